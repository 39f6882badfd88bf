"""Posteriors with known answers, sampled through the public API: the golden values of docs/methods.md.

Thousands of chains run at once as rows of one parameter, so that draws are independent and standard errors exact. The loss is
then the *sum* over chains of per-chain means (a mean over K chains would multiply the temperature by K).
"""

import math

import numpy as np
import pytest
import stats
import torch

import bkd_fast as bkd


def _relative(sample_size):
    """Relative standard error of a variance."""
    return math.sqrt(2 / sample_size)


def _run(parameter, sampler, energy, steps):
    for _ in range(steps):
        sampler.zero_grad()
        energy(parameter).backward()
        sampler.step()


def test_conjugate_bkd():
    """Constant input: the posterior of q is Dir(n + N lambda p). K = 3, N = 20, lambda = 2 (methods.md §7)."""
    chains, num_data, prior_strength = 15_000, 20, 2.0
    counts, teacher = torch.tensor([9.0, 8.0, 3.0]), torch.tensor([[0.6, 0.3, 0.1]])
    loss = bkd.KDLoss(prior_strength)

    def energy(z):
        return chains * loss(z[:, None, :], (counts / num_data)[None], teacher_probs=teacher)

    z = torch.zeros(chains, 3, requires_grad=True)
    sampler = bkd.SGLD([z], lr=0.04, num_data=num_data, seed=1)
    posterior = bkd.PosteriorPredictive(num_rows=1, num_classes=3)
    _run(z, sampler, energy, 900)  # slowest curvature about 0.2 of the mean loss: relaxes in 130 steps
    draws = []
    for _ in range(3):
        _run(z, sampler, energy, 400)
        draws.append(torch.softmax(z.detach().double(), -1))
        posterior.update_logits(z.detach()[:, None, :])
    q = torch.cat(draws)
    n = len(q)
    alpha = counts + num_data * prior_strength * teacher[0]
    torch.testing.assert_close(alpha / alpha.sum(), torch.tensor([0.55, 1 / 3, 7 / 60]))
    golden = {"mean": [0.55, 0.333333, 0.116667], "variance": [0.00405738, 0.00364299, 0.00168944]}
    bias = 0.04 * 0.75 / 2  # lr l / 2 with l <= (1 + lambda) / 4: what a finite step adds to a variance at most
    for k in range(3):
        # exact at any step size: E grad = 0
        error = math.sqrt(golden["variance"][k] / n)
        stats.assert_close_in_standard_errors(float(q[:, k].mean()), golden["mean"][k], error, f"E q_{k}")
        allowed = golden["variance"][k] * (stats.SIGMAS * _relative(n) + bias)
        assert abs(float(q[:, k].var()) - golden["variance"][k]) < allowed
    # the streamed posterior of the same draws
    torch.testing.assert_close(posterior.mean[0].double(), q.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(posterior.variance[0].double(), q.var(0), rtol=1e-4, atol=0)
    entropy = -(q * q.log()).sum(-1)
    assert float(posterior.expected_entropy[0]) == pytest.approx(float(entropy.mean()), abs=1e-5)
    error = float(entropy.std()) / math.sqrt(n)
    assert abs(float(posterior.expected_entropy[0]) - 0.9292848) < stats.SIGMAS * error + 0.003 * bias
    assert float(posterior.mean_deviance[0]) == pytest.approx(2 * float(posterior.expected_entropy[0]), rel=1e-6)
    # credible intervals: the quantiles of Beta marginals
    from scipy.stats import beta

    lower, upper = posterior.interval(0.95)
    for k in range(3):
        a, b = float(alpha[k]), float(alpha.sum() - alpha[k])
        for got, level in ((lower[0, k], 0.025), (upper[0, k], 0.975)):
            exact = beta.ppf(level, a, b)
            error = math.sqrt(0.025 * 0.975 / n) / beta.pdf(exact, a, b)
            width = beta.std(a, b)
            assert abs(float(got) - exact) < stats.SIGMAS * error + 0.01 * width  # the finite step, the bins


Y = [0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1]


def test_two_parameter_logistic_bkd():
    """Against grid quadrature (methods.md §7): lambda = 2, tau = 1, teacher sigmoid(1.5 x - 0.3)."""
    chains, lr = 4_000, 0.04  # epsilon = 2 lr / N = 0.004: variances 1 % high
    x = torch.linspace(-2, 2, 20)
    teacher, target = torch.stack([torch.zeros(20), 1.5 * x - 0.3], -1), torch.tensor(Y)
    loss = bkd.KDLoss(2.0)

    def logits(theta, at):
        return torch.stack([torch.zeros(len(theta), len(at)), theta[:, :1] + theta[:, 1:] * at], -1)

    theta = torch.zeros(chains, 2, requires_grad=True)
    sampler = bkd.SGLD([theta], lr=lr, num_data=20, prior_precision=1.0, seed=2)
    posterior = bkd.PosteriorPredictive(num_rows=1, num_classes=2)

    def energy(theta):
        return chains * loss(logits(theta, x), target, teacher)

    _run(theta, sampler, energy, 300)  # curvature of the mean loss 0.5 - 0.8: relaxes in 50 steps
    draws = []
    for _ in range(4):
        _run(theta, sampler, energy, 150)
        draws.append(theta.detach().double().clone())
        posterior.update_logits(logits(theta.detach(), torch.tensor([0.5])))
    sample = torch.cat(draws).numpy()
    n = len(sample)
    mean, covariance = (
        np.array([-0.16035164, 1.21664104]),
        np.array([[0.09250343, -0.00627967], [-0.00627967, 0.09034300]]),
    )
    deviation = np.sqrt(np.diag(covariance))
    assert (np.abs(sample.mean(0) - mean) < deviation * (stats.SIGMAS / math.sqrt(n) + 0.005)).all()
    scale = np.outer(deviation, deviation)
    assert (np.abs(np.cov(sample.T) - covariance) < scale * (stats.SIGMAS * _relative(n) + 0.015)).all()
    qbar, sd = float(posterior.mean[0, 1]), float(posterior.variance[0, 1]) ** 0.5
    assert abs(qbar - 0.607366) < 0.076454 * (stats.SIGMAS / math.sqrt(n) + 0.005)
    assert abs(sd - 0.076454) < 0.076454 * (stats.SIGMAS * _relative(n) / 2 + 0.01)
    assert float(posterior.expected_entropy[0]) == pytest.approx(0.657500, abs=0.003)
    assert float(posterior.mean_deviance[0]) == pytest.approx(1.314999, abs=0.006)
    assert float(posterior.mutual_information[0]) == pytest.approx(0.012412, rel=stats.SIGMAS * _relative(n) + 0.02)
    assert float(posterior.deviance_upper(0.95)[0]) == pytest.approx(2.2737, abs=0.03)


def test_gaussian_linear_bkd():
    """A = (1 + lambda) X'X / s^2 + tau I, mean A^-1 X'(y + lambda m) / s^2; SGLD's stationary covariance is exact at any step."""
    generator = torch.Generator().manual_seed(5)
    chains, num_data, d, prior_strength, s, tau = 20_000, 30, 3, 2.0, 0.7, 4.0
    design = torch.randn(num_data, d, generator=generator, dtype=torch.float64)
    y, m = (torch.randn(num_data, generator=generator, dtype=torch.float64) for _ in range(2))
    a = (1 + prior_strength) * design.T @ design / s**2 + tau * torch.eye(d, dtype=torch.float64)
    mean = torch.linalg.solve(a, design.T @ (y + prior_strength * m) / s**2)
    curvatures, axes = torch.linalg.eigh(a / num_data)
    lr = 0.5 / float(curvatures.max())

    def energy(theta):
        f = theta @ design.T
        return ((y - f) ** 2 + prior_strength * (m - f) ** 2).mean(-1).sum() / (2 * s**2)

    theta = torch.zeros(chains, d, dtype=torch.float64, requires_grad=True)
    sampler = bkd.SGLD([theta], lr=lr, num_data=num_data, prior_precision=tau, seed=3)
    _run(theta, sampler, energy, int(25 / (lr * float(curvatures.min()))))
    rotated = (theta.detach() - mean) @ axes
    for k, curvature in enumerate(curvatures.tolist()):
        variance = 1 / (num_data * curvature * (1 - lr * curvature / 2))
        stats.assert_mean(rotated[:, k], 0.0, math.sqrt(variance), f"axis {k}")
        stats.assert_variance(rotated[:, k], variance, f"axis {k}")


def test_cold_posterior_is_colder():
    """Temperature T divides every precision by T: the conjugate problem at T = 0.1 has a tenth of the variance in the logits."""
    variances = []
    loss, target = bkd.KDLoss(2.0), torch.tensor([[0.45, 0.4, 0.15]])
    for temperature in (1.0, 0.1):
        z = torch.zeros(5000, 3, requires_grad=True)
        sampler = bkd.SGLD([z], lr=0.05, num_data=2000, temperature=temperature, seed=4)
        _run(z, sampler, lambda z: 5000 * loss(z[:, None], target, teacher_probs=target), 600)
        centred = z.detach() - z.detach().mean(-1, keepdim=True)
        variances.append(centred.var(0))
    ratio = (variances[0] / variances[1]).mean()
    assert abs(float(ratio) - 10) < 10 * stats.SIGMAS * _relative(5000) * math.sqrt(2)
