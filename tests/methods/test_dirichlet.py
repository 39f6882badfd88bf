"""The Dirichlet of a student: its likelihood against torch's, its entropies against draws, its fit against the draws' law."""

import pytest
import stats
import torch
from points import Table

from bkd_fast.methods.dirichlet import Dirichlet, dirichlet_nll, dirichlet_uncertainty
from bkd_fast.methods.posterior_expectation import PosteriorExpectation

ALPHA = torch.tensor([[0.4, 1.0, 2.5], [30.0, 3.0, 1.0], [1e-2, 5.0, 5.0], [2e4, 1e4, 3e4]], dtype=torch.float64)


def draws(alpha: torch.Tensor, number: int) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.distributions.Dirichlet(alpha).sample((number,))


def test_the_loss_is_minus_torchs_log_density_and_so_is_its_gradient():
    p = draws(ALPHA, 7).clamp_min(1e-12)
    p = p / p.sum(-1, keepdim=True)
    log_alpha = ALPHA.log().requires_grad_()
    expected = -torch.distributions.Dirichlet(log_alpha.exp()).log_prob(p).mean(0)
    found = dirichlet_nll(log_alpha, p.log().mean(0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(loss.sum(), log_alpha)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_float32_outputs_of_large_concentrations_keep_their_loss():
    """-lnGamma(alpha_0) + sum lnGamma(alpha_k) is 6e5 here, the loss 16."""
    p = draws(ALPHA[3:], 5).float()
    double = dirichlet_nll(ALPHA[3:].log().float().double(), p.double().log().mean(0))
    single = dirichlet_nll(ALPHA[3:].log().float(), p.double().log().mean(0))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=0)


def test_uncertainties_are_those_of_draws():
    found = dirichlet_uncertainty(ALPHA)
    p = draws(ALPHA, 40_000)
    entropies = torch.special.entr(p).sum(2)
    for row in range(len(ALPHA)):
        stats.assert_close_in_standard_errors(
            float(entropies[:, row].mean()),
            float(found.data[row]),
            float(entropies[:, row].std()) / 200,
            f"E H of row {row}",
        )
    torch.testing.assert_close(found.total, torch.distributions.Categorical(ALPHA).entropy())
    torch.testing.assert_close(found.knowledge + found.data, found.total)
    assert (found.knowledge > 0).all()


def test_a_student_finds_the_concentrations_that_made_the_draws():
    """4000 draws, outputs of each point's own: within 5 standard errors of maximum likelihood, and 2 % for Adam's unrest."""
    alpha = ALPHA[:2]
    student = Table(torch.zeros(2, 3))
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    inputs = torch.arange(2.0)[:, None]
    distillation = PosteriorExpectation(
        student, optimizer, inputs, [Dirichlet(smoothing=0.0)], num_classes=3, batch_size=2
    )
    number = 4000
    for p in draws(alpha, number).clamp_min(1e-30):
        distillation.update(Table(p.log().float()))
    (found,) = distillation.predict(inputs)
    # the information of one draw about alpha: diag(psi'(alpha_k)) - psi'(alpha_0)
    information = torch.diag_embed(torch.polygamma(1, alpha)) - torch.polygamma(1, alpha.sum(1))[:, None, None]
    errors = (torch.linalg.inv(information).diagonal(dim1=1, dim2=2) / number).sqrt()
    assert ((found - alpha).abs() < 5 * errors + 0.02 * alpha).all(), (found, errors)


def test_a_class_of_probability_zero_has_a_finite_statistic():
    g = Dirichlet().statistic(torch.tensor([[0.0, -torch.inf]]))
    torch.testing.assert_close(g.exp(), torch.tensor([[1 - 5e-5, 5e-5]]))
    with pytest.raises(ValueError, match="smoothing = 1"):
        Dirichlet(1.0)
