"""Corrected distillation: the exact error of a target, orthogonality, and signed targets through the fused energy."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from torch import nn

import bkd_fast as bkd
from bkd_fast.distill import KDLoss
from bkd_fast.methods.cross_fitting import cross_fit_estimator
from bkd_fast.methods.semiparametric import (
    C_VALUES,
    TREE_CLIP,
    corrected_targets,
    orthogonal_labels,
    orthogonal_targets,
    squared_error,
)

PSI = {"probs": (lambda p: p, torch.ones_like), "log_probs": (torch.log, lambda p: 1 / p)}
CLASSES = 4


def _distributions(count, rows=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(count, rows, CLASSES, generator=generator, dtype=torch.float64), -1)


def _batch(rows=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (rows,), generator=generator), _distributions(1, rows, seed + 1)[0]


def _of_every_label(transform, p):
    """(C, N, C): what a transform of (p, labels) gives for each class in turn as everybody's label."""
    return torch.stack([transform(p, torch.full((len(p),), y)) for y in range(CLASSES)])


def _expected(values, p0):
    """E over y ~ p0 of values (C, N, ...), one for each y."""
    return (p0.T.reshape(CLASSES, -1, *[1] * (values.ndim - 2)) * values).sum(0)


def _gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


# ---- the error of a target ----


@pytest.mark.parametrize("scale", PSI)
@pytest.mark.parametrize("c", [0.0, math.inf])
def test_the_pointwise_error_is_bias_squared_plus_variance(scale, c):
    p, p0 = _distributions(2)
    psi, slope = PSI[scale]
    targets = _of_every_label(lambda p, y: corrected_targets(p, y, scale=scale, c=c), p)
    gamma = slope(p) if c else torch.zeros_like(p)
    bias = gamma * (p0 - p) - (psi(p0) - psi(p))
    variance = gamma**2 * p0 * (1 - p0)
    error = _expected((targets - psi(p0)).square(), p0)
    torch.testing.assert_close(error, bias**2 + variance, rtol=1e-12, atol=1e-14)
    mean = _expected(targets, p0)
    torch.testing.assert_close(mean - psi(p0), bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_expected((targets - mean).square(), p0), variance, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", PSI)
@pytest.mark.parametrize("c", [1e-2, 1.0, 100.0])
def test_the_enhanced_gamma_is_the_papers(scale, c):
    p, p0 = _distributions(2)
    psi, slope = PSI[scale]
    error = _expected(
        (_of_every_label(lambda p, y: corrected_targets(p, y, scale=scale, c=c), p) - psi(p0)).square(), p0
    )
    written_out = torch.zeros_like(p)
    for y in range(CLASSES):  # every class is or is not the label: a sum of two terms for each
        for k in range(CLASSES):
            residual = float(k == y) - p[:, k]
            gamma = slope(p)[:, k] * c / (c + residual**2)
            written_out[:, k] += p0[:, y] * (psi(p)[:, k] + gamma * residual - psi(p0)[:, k]) ** 2
    torch.testing.assert_close(error, written_out, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", PSI)
def test_c_goes_from_the_plug_in_to_the_orthogonal_target(scale):
    p = _distributions(1)[0]
    y = torch.arange(50) % CLASSES

    def targets(c):
        return corrected_targets(p, y, scale=scale, c=c)

    torch.testing.assert_close(targets(1e-30), targets(0.0), atol=1e-9, rtol=0)
    torch.testing.assert_close(targets(1e30), targets(math.inf), atol=1e-9, rtol=0)
    distance = [float((targets(c) - targets(0.0)).abs().sum()) for c in (0.0, *C_VALUES, math.inf)]
    assert distance == sorted(distance) and distance[0] == 0 < distance[-1]


@pytest.mark.parametrize("scale", PSI)
def test_the_orthogonal_target_errs_to_second_order_in_the_teacher(scale):
    p0, other = _distributions(2)
    psi, _ = PSI[scale]
    step = 1e-6  # far below the least p0

    def bias(size, c):
        p = p0 + size * (other - p0)
        mean = _expected(_of_every_label(lambda p, y: corrected_targets(p, y, scale=scale, c=c), p), p0)
        return (mean - psi(p0)).abs().amax()

    assert bias(step, 0.0) / bias(step / 2, 0.0) == pytest.approx(2, rel=0.02)
    if scale == "log_probs":
        assert bias(step, math.inf) / bias(step / 2, math.inf) == pytest.approx(4, rel=0.02)
    else:
        assert bias(step, math.inf) < 1e-15  # linear: nothing is left


def test_soft_labels_and_classes_agree():
    p = _distributions(1)[0]
    y = torch.arange(50) % CLASSES
    for scale in PSI:
        hard, soft = (corrected_targets(p, label, scale=scale, c=0.3) for label in (y, F.one_hot(y, CLASSES).double()))
        assert torch.equal(hard, soft)


def test_a_clip_bounds_the_correction():
    p = torch.tensor([[1.0, 0.0], [0.999, 0.001]], dtype=torch.float64)
    y = torch.tensor([1, 1])
    targets = corrected_targets(p, y, clip=TREE_CLIP)
    expected = torch.tensor([[0.0 - 1, math.log(1 / 500) + 499], [math.log(0.999) - 1, math.log(1 / 500) + 499]])
    torch.testing.assert_close(targets, expected.double(), rtol=1e-6, atol=0)


def test_squared_error_is_the_papers_and_centred_it_sees_no_shift():
    logits, y, p = _batch()
    targets = corrected_targets(p, y)
    by_hand = sum(0.5 * (logits[:, k] - targets[:, k]) ** 2 for k in range(CLASSES)).mean()
    torch.testing.assert_close(squared_error(logits, targets), by_hand)
    shift = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None]
    centred = squared_error(logits, targets, centred=True)
    torch.testing.assert_close(squared_error(logits + shift, targets, centred=True), centred)
    best = (targets - logits).mean(1, keepdim=True)
    torch.testing.assert_close(squared_error(logits + best, targets), centred)
    assert centred < squared_error(logits, targets)


# ---- orthogonal cross entropy ----


def _distillation(p, logits, temperature):
    """CE(p_T, q_T) per row as a function of an unnormalised teacher."""
    w = (p.log() / temperature).softmax(1)
    return -(w * (logits / temperature).log_softmax(1)).sum(1)


def _by_autograd(p, y, logits, temperature):
    """The loss and its directional derivative in p towards the label, per row."""
    residual = F.one_hot(y, CLASSES) - p
    loss, change = torch.autograd.functional.jvp(
        lambda p: _distillation(p, logits, temperature), p, residual, create_graph=True
    )
    return loss + change


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0, 8.0])
def test_orthogonal_cross_entropy_is_cross_entropy_on_the_signed_target(temperature):
    logits, y, p = _batch()
    logits.requires_grad_()
    wanted = _by_autograd(p, y, logits, temperature)
    targets = orthogonal_targets(p, y, temperature=temperature)
    torch.testing.assert_close(targets.sum(1), torch.ones(50, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (targets < 0).any() or temperature == 1
    found = -(targets * (logits / temperature).log_softmax(1)).sum(1)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    expected = _gradient(wanted.mean(), logits)
    torch.testing.assert_close(_gradient(found.mean(), logits), expected, rtol=1e-11, atol=1e-13)
    fused = KDLoss(0.0, signed_targets=True)(logits / temperature, targets)
    torch.testing.assert_close(fused, wanted.mean(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(_gradient(fused, logits), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_in_the_label_slot_the_whole_energy_is_the_corrected_one(temperature, clip):
    logits, y, p = _batch()
    logits.requires_grad_()
    strength = 5.0
    corrected = _by_autograd(p.clamp(min=clip), y, logits, temperature)
    wanted = F.cross_entropy(logits, y) + strength * corrected.mean()
    labels = orthogonal_labels(p, y, prior_strength=strength, temperature=temperature, clip=clip)
    found = KDLoss(strength, temperature, signed_targets=True)(logits, labels, teacher_probs=p)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    expected = _gradient(wanted, logits)
    torch.testing.assert_close(_gradient(found, logits), expected, rtol=1e-11, atol=1e-13)


def test_zero_votes_keep_their_teacher_and_get_a_correction_where_clipped():
    p = torch.tensor([[0.9, 0.1, 0.0, 0.0]], dtype=torch.float64)
    labels = orthogonal_labels(p, torch.tensor([3]), prior_strength=2.0, temperature=2.0, clip=0.01)
    assert labels.isfinite().all() and float(labels.sum()) == pytest.approx(1)


def test_without_correction_it_is_plain_distillation():
    _, y, p = _batch()
    torch.testing.assert_close(orthogonal_targets(p, y, c=0.0), p)
    assert torch.equal(orthogonal_labels(p, y, prior_strength=5.0, c=0.0).round(decimals=12), F.one_hot(y, 4).double())


def test_at_temperature_one_the_orthogonal_target_is_the_label():
    """CE(p, q) is linear in p, so that a full first-order correction leaves nothing of the teacher."""
    _, y, p = _batch()
    torch.testing.assert_close(orthogonal_targets(p, y), F.one_hot(y, CLASSES).double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 2.0, 8.0])
def test_the_expected_gradient_errs_to_second_order_in_the_teacher(temperature):
    """dz is (q_T - a) / T: orthogonal where the mean of a over y ~ p0 is p0_T up to second order."""
    p0, other = _distributions(2)

    def bias(size, c):
        p = p0 + size * (other - p0)
        mean = _expected(_of_every_label(lambda p, y: orthogonal_targets(p, y, temperature=temperature, c=c), p), p0)
        return (mean - (p0.log() / temperature).softmax(1)).abs().amax()

    assert bias(1e-6, 0.0) / bias(5e-7, 0.0) == pytest.approx(2, rel=0.02)
    assert bias(1e-6, math.inf) / bias(5e-7, math.inf) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_path_takes_student_logits_of_lower_precision(dtype):
    logits, y, p = _batch()
    labels = orthogonal_labels(p, y, prior_strength=5.0, temperature=2.0, clip=0.01)
    loss = KDLoss(5.0, 2.0, signed_targets=True)
    low = logits.to(dtype).requires_grad_()
    high = low.detach().double().requires_grad_()
    found = _gradient(loss(low, labels.float(), teacher_probs=p.float()), low).double()
    wanted = _gradient(loss(high, labels, teacher_probs=p), high)
    scale = float(wanted.detach().abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=scale * (2e-6 if dtype == torch.float32 else 2**-8))


# ---- end to end ----


def test_students_of_an_underfitted_teacher_gain_by_the_correction_on_digits():
    """A forest of depth 1 knows little; squared error on its corrected log probabilities, and orthogonal CE, mend that."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(x).float()[order] / 16, torch.from_numpy(y).long()[order]
    train, test = slice(0, 1200), slice(1200, None)
    forest = RandomForestClassifier(50, max_depth=1)
    p = cross_fit_estimator(forest, x[train].numpy(), y[train], folds=5).probs.float()

    def accuracy(loss):
        torch.manual_seed(0)
        student = nn.Linear(64, 10)
        optimizer = torch.optim.Adam(student.parameters(), 0.02, weight_decay=1e-4)
        for _ in range(300):
            optimizer.zero_grad()
            loss(student(x[train])).backward()
            optimizer.step()
        return float((student(x[test]).argmax(1) == y[test]).double().mean())

    teacher = float((p.argmax(1) == y[train]).double().mean())
    kd, energy = KDLoss(0.0), KDLoss(0.0, signed_targets=True)
    plain = accuracy(lambda z: kd(z / 4, orthogonal_targets(p, y[train], temperature=4.0, c=0.0)))
    signed = accuracy(lambda z: energy(z / 4, orthogonal_targets(p, y[train], temperature=4.0, c=1.0, clip=0.01)))
    squared = accuracy(lambda z: squared_error(z, corrected_targets(p, y[train], c=1.0, clip=0.05), centred=True))
    # 597 test rows: .11 is 5 standard errors of the difference of rates such as .71 and .93
    assert teacher < 0.8 and signed > plain + 0.11 and squared > plain + 0.11, (teacher, plain, signed, squared)


def test_a_sampler_samples_the_corrected_posterior():
    """With one constant input the logits are the parameters: E q = (n + lambda sum a) / (N (1 + lambda)) at any step size."""
    counts = torch.tensor([9, 8, 3])
    y = torch.repeat_interleave(torch.arange(3), counts)
    p = torch.tensor([0.6, 0.3, 0.1]).expand(20, 3)
    labels = orthogonal_labels(p, y, prior_strength=2.0, temperature=1.0, c=0.5)
    a = orthogonal_targets(p, y, c=0.5)
    expected = (counts + 2 * a.sum(0)) / 60
    logits = nn.Parameter(torch.zeros(64, 1, 3))
    sampler = bkd.SGLD([logits], 0.02, num_data=20, chains=64, seed=0)
    loss = KDLoss(2.0, signed_targets=True)
    draws = []
    for step in range(2000):
        sampler.zero_grad()
        (64 * loss(logits.expand(64, 20, 3), labels, teacher_probs=p)).backward()
        sampler.step()
        if step >= 500:
            draws.append(logits.detach().softmax(-1)[:, 0])
    means = torch.stack(draws).double().mean(0)  # one for each chain
    error = means.std(0) / 8
    assert ((means.mean(0) - expected).abs() < 5.6 * error).all(), (means.mean(0), expected, error)


# ---- bad input ----


def test_what_is_no_distribution_is_refused_by_its_row():
    _, y, p = _batch()
    for wrong in ([0.5, 0.4, 0.0, 0.0], [1.5, -0.5, 0.0, 0.0], [math.nan, 0.5, 0.5, 0.0]):
        bad = p.clone()
        bad[17] = torch.tensor(wrong, dtype=torch.float64)
        for use in (corrected_targets, orthogonal_targets, lambda p, y: orthogonal_labels(p, y, prior_strength=1.0)):
            with pytest.raises(ValueError, match="probabilities in row 17: must be >= 0 and sum to 1"):
                use(bad, y)
    soft = F.one_hot(y, CLASSES).double()
    soft[3, 0] += 0.5
    with pytest.raises(ValueError, match="probabilities in row 3"):
        corrected_targets(p, soft)


@pytest.mark.parametrize("label", [CLASSES, -1, -100])
def test_labels_out_of_range_are_refused(label):
    _, y, p = _batch()
    y[5] = label
    with pytest.raises(ValueError, match=r"labels of torch.int64 .* must be integers in \[0, 4\)"):
        corrected_targets(p, y)
    with pytest.raises(ValueError, match=r"labels has shape \(49,\)"):
        corrected_targets(p, y[1:])
    with pytest.raises(ValueError, match=r"labels have shape \(50,\): must be \(50, 4\)"):
        corrected_targets(p, y.double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"c": -1.0}, r"c = -1.0: must be in \[0, infinity\]"),
        ({"c": math.nan}, r"c = nan: must be in \[0, infinity\]"),
        ({"clip": 1.0}, r"clip = 1.0: must be in \[0, 1\)"),
        ({"clip": -0.1}, r"clip = -0.1: must be in \[0, 1\)"),
        ({"temperature": 0.0}, "temperature = 0.0: must be a finite number > 0"),
        ({"temperature": math.inf}, "temperature = inf: must be a finite number > 0"),
        ({"prior_strength": -1.0}, "prior_strength = -1.0: must be a finite number >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    _, y, p = _batch()
    with pytest.raises(ValueError, match=message):
        orthogonal_labels(p, y, **({"prior_strength": 1.0} | arguments))


def test_other_arguments_are_refused():
    _, y, p = _batch()
    with pytest.raises(ValueError, match="scale = 'logit': must be 'probs' or 'log_probs'"):
        corrected_targets(p, y, scale="logit")
    p[7] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"probs\[7, 1\] = 0 has no logarithm: clip must be > 0"):
        corrected_targets(p, y)
    corrected_targets(p, y, scale="probs")
    with pytest.raises(ValueError, match=r"outputs have shape \(2, 3\) and targets \(2, 4\): both must be \(N, C\)"):
        squared_error(torch.zeros(2, 3), torch.zeros(2, 4))
