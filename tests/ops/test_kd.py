"""The KD energy against torch's own float64 losses under autograd: every prior, label, dtype and size."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from bkd_fast.ops import use_backend
from bkd_fast.ops.kd import PRIORS, kd_energy

try:
    from bkd_fast import _native as native
except ImportError:
    native = None

# below and above a quad, a register, the last class count that goes across the lanes, the fold, the streaming threshold
CLASSES = [2, 3, 4, 5, 7, 10, 16, 17, 33, 100, 128, 129, 1000, 4097, 8192, 32000]
TEMPERATURES = [1.0, 2.0, 4.0, 2.5]
LABELS = ["hard", "smoothed", "soft", "none"]
# each temperature and each label with two of the others: for the slow cases, in place of all pairs
SOME = [
    (1.0, "hard"),
    (1.0, "soft"),
    (2.0, "soft"),
    (2.0, "none"),
    (4.0, "none"),
    (4.0, "smoothed"),
    (2.5, "smoothed"),
    (2.5, "hard"),
]
STRENGTH, WEIGHT, SMOOTHING = 3.0, 0.7, 0.15
# what a unit of gradient or of energy may lose; for the half types mostly the rounding of the gradient itself
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-10}
ENERGY_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-6, torch.float16: 2e-6}


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN: an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def backend(isa):
    """The compiled backend on every instruction set, and the reference."""
    if native is None:
        with use_backend("reference"):
            yield
    else:
        yield


def _rows_of(classes):
    return 3 if classes > 4000 else 19 if classes > 64 else 37


def _inputs(classes, dtype=torch.float32, teachers=1, rows=None, seed=0):
    rows = rows or _rows_of(classes)
    generator = torch.Generator().manual_seed(1000 * classes + seed)
    logits = torch.randn(rows, classes, generator=generator) * 4
    teacher = torch.randn(teachers, rows, classes, generator=generator) * 4
    if dtype != torch.float16:  # softmax does not see a shift; float16 keeps too few digits of it
        logits[1] += 300
        teacher[:, -1] -= 300
    target = torch.randint(classes, (rows,), generator=generator)
    target[::5] = -100
    soft = torch.softmax(torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2, -1)
    return logits.to(dtype), teacher.to(dtype), target, soft


def _settings(label, target, soft):
    smoothing = SMOOTHING if label in ("smoothed", "soft") else 0.0
    chosen = {"hard": target, "smoothed": target, "soft": soft.float(), "none": None}[label]
    return chosen, smoothing


def _definition(logits, target, smoothing, prior, teacher, temperature, weights=None):
    """Energies (rows,) by torch's losses and distributions; teacher is p (teachers, rows, classes) at T = 1."""
    rows, _classes = logits.shape
    energy = torch.zeros(rows, dtype=torch.float64)
    if target is not None:
        goal = target.double() if target.is_floating_point() else target
        energy = WEIGHT * F.cross_entropy(logits, goal, reduction="none", label_smoothing=smoothing)
    if prior == "none":
        return energy
    q = torch.softmax(logits / temperature, -1)
    p = teacher ** (1 / temperature)
    p = p / p.sum(-1, keepdim=True)
    if prior == "dirichlet":
        return energy + STRENGTH * F.cross_entropy(logits / temperature, p[0], reduction="none")
    if prior == "continuous_categorical":
        return energy - STRENGTH * (q * p[0].log()).sum(-1)
    log_q = torch.log_softmax(logits / temperature, -1)
    if prior == "reverse_kl":
        return energy + STRENGTH * F.kl_div(p[0].log(), log_q, reduction="none", log_target=True).sum(-1)
    entropies = torch.distributions.Categorical(p).entropy()
    if weights is None:
        weights = 1 - entropies / entropies.sum(0) if len(p) > 1 else torch.ones_like(entropies)
    weights = weights / weights.sum(0)
    densities = torch.stack([torch.distributions.Dirichlet(1 + STRENGTH * one).log_prob(q) for one in p])
    return energy - torch.logsumexp(weights.log() + densities, 0)


def _expected(logits, *arguments, **keywords):
    """The definition's energies and their gradient by autograd."""
    leaf = logits.detach().to(torch.float64, copy=True).requires_grad_()
    energy = _definition(leaf, *arguments, **keywords)
    gradient = torch.zeros_like(leaf)
    if energy.requires_grad:
        (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    return energy.detach(), gradient


def _run(logits, target, teacher, reduction="none", **settings):
    """Energies and gradient of the operation."""
    leaf = logits.clone().requires_grad_()
    arguments = {"prior_strength": STRENGTH, "label_weight": WEIGHT, **settings}
    energy = kd_energy(leaf, target, teacher, reduction=reduction, **arguments)
    energy.sum().backward()
    assert leaf.grad.dtype == logits.dtype
    return energy.detach(), leaf.grad


def _assert_close(got, wanted, dtype, unit=1.0):
    energy, gradient = got
    energy_wanted, gradient_wanted = wanted
    assert energy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    size = energy_wanted.abs().clamp(min=1) * ENERGY_TOLERANCE[dtype]
    assert ((energy.double() - energy_wanted).abs() <= size * unit).all()
    bound = GRADIENT_TOLERANCE[dtype] * unit * (STRENGTH + WEIGHT)
    assert ((gradient.double() - gradient_wanted).abs() <= bound).all()


@pytest.mark.parametrize("classes", CLASSES)
def test_dirichlet_with_teacher_logits(backend, classes):
    logits, teacher, target, soft = _inputs(classes)
    p = torch.softmax(teacher.double(), -1)
    for temperature, label in SOME if classes > 64 else itertools.product(TEMPERATURES, LABELS):
        chosen, smoothing = _settings(label, target, soft)
        got = _run(logits, chosen, teacher[0], temperature=temperature, label_smoothing=smoothing)
        _assert_close(got, _expected(logits, chosen, smoothing, "dirichlet", p, temperature), torch.float32)
        # the gradient of a function of softmax is orthogonal to a shift of the logits
        assert got[1].double().sum(-1).abs().max() <= 1e-5


@pytest.mark.parametrize("classes", CLASSES)
def test_plain_cross_entropy(backend, classes):
    logits, _, target, soft = _inputs(classes)
    for label in LABELS:
        chosen, smoothing = _settings(label, target, soft)
        got = _run(logits, chosen, None, prior_strength=0.0, label_smoothing=smoothing)
        _assert_close(got, _expected(logits, chosen, smoothing, "none", None, 1.0), torch.float32)


@pytest.mark.parametrize("classes", [2, 5, 10, 33, 200])
@pytest.mark.parametrize("probs", [False, True], ids=["teacher_logits", "teacher_probs"])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior(backend, prior, probs, classes):
    teachers = 3 if prior == "mixture" else 1
    logits, teacher, target, soft = _inputs(classes, teachers=teachers)
    p = torch.softmax(teacher.double(), -1)
    given = p.float() if probs else teacher
    judged = given.double() / given.double().sum(-1, keepdim=True) if probs else p
    for temperature, label in SOME:
        chosen, smoothing = _settings(label, target, soft)
        got = _run(
            logits,
            chosen,
            given if prior == "mixture" else given[0],
            prior=prior,
            teacher_is_probs=probs,
            temperature=temperature,
            label_smoothing=smoothing,
        )
        wanted = _expected(logits, chosen, smoothing, prior, judged, temperature)
        # energies of up to 60 nats meet probabilities that small: fp32 logarithms lose what the others do not have
        _assert_close(got, wanted, torch.float32, unit=1.0 if prior == "dirichlet" else 10.0)
        assert got[1].double().sum(-1).abs().max() <= 5e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 3, 10, 17, 128, 129, 8192])
def test_every_dtype(backend, dtype, classes):
    logits, teacher, target, soft = _inputs(classes, dtype)
    p = torch.softmax(teacher.double(), -1)
    for prior, temperature, label in itertools.product(["dirichlet", "reverse_kl"], [1.0, 2.5], ["smoothed", "soft"]):
        chosen, smoothing = _settings(label, target, soft)
        chosen = chosen.double() if label == "soft" else chosen
        got = _run(logits, chosen, teacher[0], prior=prior, temperature=temperature, label_smoothing=smoothing)
        wanted = _expected(logits, chosen, smoothing, prior, p, temperature)
        _assert_close(got, wanted, dtype, unit=1.0 if prior == "dirichlet" else 20.0)


def test_teacher_and_soft_target_of_other_dtypes(backend):
    logits, teacher, _, soft = _inputs(10, torch.bfloat16)
    for other in (torch.float32, torch.float64, torch.float16):
        given, label = teacher[0].clamp(-80, 80).to(other), soft.to(other)
        got = _run(logits, label, given, temperature=2.0)
        p = torch.softmax(given.double(), -1)[None]
        _assert_close(got, _expected(logits, label, 0.0, "dirichlet", p, 2.0), torch.bfloat16)


@pytest.mark.parametrize("weights", ["teachers", "rows", "one_teacher"])
def test_mixture_weights(backend, weights):
    logits, teacher, target, _ = _inputs(10, teachers=1 if weights == "one_teacher" else 3)
    p = torch.softmax(teacher.double(), -1)
    given, judged = None, None
    if weights == "teachers":
        given = torch.tensor([0.2, 0.5, 0.3])
        judged = given.double()[:, None]
    if weights == "rows":
        given = torch.softmax(torch.randn(len(logits), 3, generator=torch.Generator().manual_seed(0)), -1)
        given[2] = torch.tensor([0.0, 1.0, 0.0])
        judged = given.double().T
    got = _run(logits, target, teacher, prior="mixture", temperature=2.0, mixture_weights=given)
    _assert_close(got, _expected(logits, target, 0.0, "mixture", p, 2.0, weights=judged), torch.float32, unit=10.0)


def test_entropy_weights_of_certain_teachers_are_even(backend):
    logits, _, target, _ = _inputs(4)
    certain = torch.zeros(2, len(logits), 4)
    certain[0, :, 1] = certain[1, :, 2] = 1
    even = torch.full((2,), 0.5)
    settings = {"prior": "mixture", "teacher_is_probs": True}
    by_entropy = _run(logits, target, certain, **settings)
    uniform = _run(logits, target, certain, mixture_weights=even, **settings)
    assert torch.equal(by_entropy[0], uniform[0]) and torch.equal(by_entropy[1], uniform[1])


@pytest.mark.parametrize("prior", PRIORS)
def test_probability_zero_is_legal_where_its_energy_is_finite(backend, prior):
    logits, teacher, target, _ = _inputs(10)
    probs = torch.softmax(teacher[0], -1)
    probs[:, 3] = 0
    probs /= probs.sum(-1, keepdim=True)
    masked = logits.clone()
    masked[:, 3] = -math.inf
    target[target == 3] = 4
    kept = [k for k in range(10) if k != 3]
    for temperature in (1.0, 2.0, 2.5):
        settings = {"prior": prior, "teacher_is_probs": True, "temperature": temperature, "label_smoothing": SMOOTHING}
        given = probs[None] if prior == "mixture" else probs
        energy, gradient = _run(masked, target, given, **settings)
        # a class that is masked and unexpected is a class that is not there, but for the mixture's normaliser
        narrow_target = torch.where(target > 3, target - 1, target)
        narrow = _run(logits[:, kept], narrow_target, given[..., kept], **settings)
        assert (gradient[:, 3] == 0).all()
        torch.testing.assert_close(gradient[:, kept], narrow[1], atol=4e-6, rtol=0)
        if prior != "mixture":
            torch.testing.assert_close(energy, narrow[0], atol=1e-5, rtol=1e-5)
        if prior in ("dirichlet", "mixture"):  # and the student may expect what the teacher excludes
            assert _run(logits, target, given, **settings)[1].isfinite().all()


@pytest.mark.parametrize("classes", [2, 3, 10, 33, 129, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_masked_classes(backend, classes, dtype):
    logits, teacher, target, _ = _inputs(classes, dtype)
    rows = torch.arange(0, len(logits), 2)
    logits[rows, 1] = teacher[0, rows, 1] = -math.inf
    target[target == 1] = 0
    kept = [k for k in range(classes) if k != 1]
    for temperature in (1.0, 2.0, 2.5):
        settings = {"temperature": temperature, "label_smoothing": SMOOTHING}
        energy, gradient = _run(logits, target, teacher[0], **settings)
        narrow_target = torch.where(target > 1, target - 1, target)
        narrow = _run(logits[:, kept], narrow_target, teacher[0][:, kept], **settings)
        assert (gradient[rows, 1] == 0).all()
        bound = GRADIENT_TOLERANCE[dtype] * (STRENGTH + WEIGHT)
        torch.testing.assert_close(gradient[rows][:, kept], narrow[1][rows], atol=bound, rtol=0)
        torch.testing.assert_close(energy[rows], narrow[0][rows], atol=1e-5, rtol=1e-5)


def test_extreme_but_finite_logits(backend):
    logits, teacher, target, _ = _inputs(10)
    logits[2, 4], logits[3, 5], teacher[0, 4, 2] = 1e30, -1e30, -1e30
    target[2], target[3] = 4, 0
    p = torch.softmax(teacher.double(), -1)
    got = _run(logits, target, teacher[0], temperature=2.0)
    wanted = _expected(logits, target, 0.0, "dirichlet", p, 2.0)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", [3, 10, 100, 200, 1000])
@pytest.mark.parametrize("prior", ["dirichlet", "continuous_categorical"])
def test_a_row_does_not_depend_on_the_others(backend, classes, prior):
    logits, teacher, target, _ = _inputs(classes, rows=53)
    settings = {"prior": prior, "temperature": 2.0, "label_smoothing": SMOOTHING}
    energy, gradient = _run(logits, target, teacher[0], **settings)
    order = torch.randperm(53, generator=torch.Generator().manual_seed(1))
    shuffled = _run(logits[order], target[order], teacher[0][order], **settings)
    assert torch.equal(shuffled[0], energy[order]) and torch.equal(shuffled[1], gradient[order])
    alone = _run(logits[7:8], target[7:8], teacher[0][7:8], **settings)
    assert torch.equal(alone[0], energy[7:8]) and torch.equal(alone[1], gradient[7:8])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_threads_do_not_change_a_bit(backend, reduction):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for classes, rows in ((10, 9001), (300, 700), (20_000, 5)):
                logits, teacher, target, _ = _inputs(classes, rows=rows)
                results.append(_run(logits, target, teacher[0], temperature=2.0, reduction=reduction))
    finally:
        torch.set_num_threads(before)
    for first, second, third in zip(results[:3], results[3:6], results[6:], strict=True):
        for a, b, c in zip(first, second, third, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prior", PRIORS)
def test_chains_share_teacher_and_target(backend, prior, dtype):
    logits, teacher, target, _ = _inputs(10, dtype, teachers=2 if prior == "mixture" else 1, rows=21)
    teacher = teacher if prior == "mixture" else teacher[0]
    generator = torch.Generator().manual_seed(5)
    chains = (logits + torch.randn(2, 3, 21, 10, generator=generator)).to(dtype)
    energy, gradient = _run(chains, target, teacher, prior=prior, temperature=2.0)
    assert energy.shape == (2, 3, 21)
    for i, j in itertools.product(range(2), range(3)):
        one = _run(chains[i, j], target, teacher, prior=prior, temperature=2.0)
        assert torch.equal(energy[i, j], one[0]) and torch.equal(gradient[i, j], one[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10, 300])
def test_reductions(backend, classes, dtype):
    logits, teacher, target, _ = _inputs(classes, dtype, rows=40)
    logits = torch.stack([logits, logits * 0.5])
    energy, gradient = _run(logits, target, teacher[0])
    summed = _run(logits, target, teacher[0], reduction="sum")
    mean = _run(logits, target, teacher[0], reduction="mean")
    torch.testing.assert_close(summed[0], energy.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean[0], energy.mean(), rtol=1e-6, atol=0)
    assert torch.equal(summed[1], gradient)
    unit = GRADIENT_TOLERANCE[dtype] * (STRENGTH + WEIGHT) / 80
    torch.testing.assert_close(mean[1], gradient / 80, atol=unit, rtol=2 * GRADIENT_TOLERANCE[dtype])


def test_float16_gradients_of_a_large_batch_keep_their_digits(backend):
    logits, teacher, target, _ = _inputs(10, torch.float16, rows=50_000)
    leaf = logits.clone().requires_grad_()
    loss = kd_energy(leaf, target, teacher[0], prior_strength=STRENGTH, label_weight=WEIGHT)
    (loss * 50_000).backward()  # a gradient scaler's factor: 1 / rows alone would be subnormal
    _, gradient = _run(logits, target, teacher[0])
    torch.testing.assert_close(leaf.grad, gradient, rtol=2**-10, atol=2**-20)


def test_inputs_need_not_be_contiguous(backend):
    logits, teacher, target, soft = _inputs(10)
    wide = torch.zeros(37, 20)
    wide[:, ::2] = logits
    transposed = teacher[0].t().contiguous().t()
    plain = _run(logits, target, teacher[0])
    got = _run(wide[:, ::2], torch.stack([target, target], 1)[:, 0], transposed)
    assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])
    expanded = soft[:1].float().expand(37, 10)
    assert torch.equal(_run(logits, expanded, teacher[0])[1], _run(logits, expanded.contiguous(), teacher[0])[1])


def _signed(classes, rows, seed=0):
    """Targets that sum to 1, with entries of either sign, some larger than 1 and some 0."""
    generator = torch.Generator().manual_seed(classes + seed)
    target = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3
    target[:, 1:] *= torch.rand(rows, classes - 1, generator=generator) < 0.7
    target[:, 0] += 1 - target.sum(1)
    return target


@pytest.mark.parametrize("classes", [2, 3, 10, 33, 129, 1000, 8200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signed_targets(backend, classes, dtype):
    """Their energy is linear in the target, which torch's cross entropy takes as it is."""
    logits, teacher, _, _ = _inputs(classes, dtype)
    target = _signed(classes, len(logits)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    for prior, temperature, smoothing in (("none", 1.0, 0.0), ("none", 1.0, SMOOTHING), ("dirichlet", 2.0, 0.0)):
        p = torch.softmax(teacher.double(), -1)
        wanted = _expected(logits, target, smoothing, prior, p, temperature)
        settings = {"prior_strength": 0.0} if prior == "none" else {"temperature": temperature}
        got = _run(
            logits,
            target,
            None if prior == "none" else teacher[0],
            label_smoothing=smoothing,
            signed_target=True,
            **settings,
        )
        # an energy is a difference of terms as large as the target's entries times log q
        unit = float(target.abs().sum(1).max()) * 20
        _assert_close(got, wanted, dtype, unit)


def test_signed_targets_leave_masked_classes_alone(backend):
    logits, _, _, _ = _inputs(10)
    target = _signed(10, len(logits)).float()
    target[:, 4] = 0
    target[:, 0] += 1 - target.sum(1)
    whole = _run(
        logits[:, [0, 1, 2, 3, 5, 6, 7, 8, 9]],
        target[:, [0, 1, 2, 3, 5, 6, 7, 8, 9]],
        None,
        prior_strength=0.0,
        signed_target=True,
    )
    logits[:, 4] = -math.inf
    masked = _run(logits, target, None, prior_strength=0.0, signed_target=True)
    torch.testing.assert_close(masked[0], whole[0], rtol=1e-6, atol=1e-4)
    assert (masked[1][:, 4] == 0).all()


@pytest.mark.parametrize("classes", [2, 10, 129])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_orthogonal_cross_entropy_is_cross_entropy_on_a_signed_target(backend, classes, temperature):
    """CE(w(p), q) and its slope from the teacher's p towards the label y, w(p) ~ p^(1/T) (Dao et al., ICLR 2021), is CE on the
    target w + (1/T) w (r - sum w r), r = y / p - 1."""
    logits, teacher, target, _ = _inputs(classes, torch.float64)
    p, y = (teacher[0] / 4).softmax(-1), F.one_hot(target.clamp_min(0), classes).double()
    leaf, given = logits.clone().requires_grad_(), p.clone().requires_grad_()
    value = -((given.log() / temperature).softmax(-1) * leaf.log_softmax(-1)).sum(-1)
    (slope,) = torch.autograd.grad(value.sum(), given, create_graph=True)
    wanted = value + (slope * (y - p)).sum(-1)
    (gradient,) = torch.autograd.grad(wanted.sum(), leaf)
    w, r = (p.log() / temperature).softmax(-1), y / p - 1
    signed = w + w * (r - (w * r).sum(-1, keepdim=True)) / temperature
    assert (signed < 0).any()
    got = _run(logits, signed, None, prior_strength=0.0, label_weight=1.0, signed_target=True)
    unit = float(signed.abs().sum(-1).max()) * 20
    torch.testing.assert_close(got[0], wanted.detach(), rtol=0, atol=1e-13 * unit)
    torch.testing.assert_close(got[1], gradient, rtol=0, atol=1e-13 * unit)


@pytest.mark.parametrize("classes", [2, 3, 10, 129, 1000])
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("label", ["hard", "smoothed"])
def test_a_teacher_by_label_is_the_table_s_row_of_each_label(backend, classes, probs, dtype, label):
    """Bit for bit the energy of the table's rows written out; a row without a label has neither term."""
    logits, _, target, _ = _inputs(classes, dtype)
    table = torch.randn(classes, classes, generator=torch.Generator().manual_seed(classes)) * 2
    table = table.softmax(-1) if probs else table
    settings = {"prior": "reverse_kl", "prior_strength": -STRENGTH, "teacher_is_probs": probs, "temperature": 2.5,
                "label_smoothing": SMOOTHING if label == "smoothed" else 0.0}  # fmt: skip
    energy, gradient = _run(logits, target, table, teacher_by_label=True, **settings)
    wanted, slope = _run(logits, target, table[target.clamp_min(0)], **settings)
    labelled = target != -100
    assert torch.equal(energy[labelled], wanted[labelled]) and torch.equal(gradient[labelled], slope[labelled])
    assert (energy[~labelled] == 0).all() and (gradient[~labelled] == 0).all()


def test_rows_without_a_label_do_not_care_what_the_table_of_teachers_holds(backend):
    logits, _, target, _ = _inputs(10)
    table = torch.zeros(10, 10)
    settings = {"prior": "reverse_kl", "prior_strength": -STRENGTH, "teacher_by_label": True}
    wanted = _run(logits, target, table, **settings)
    table[0] = math.nan
    target[target == 0] = -100
    for ignored in (-100, 0):
        there = target.clone()
        there[target == -100] = ignored
        got = _run(logits, there, table, ignore_index=ignored, **settings)
        assert torch.equal(got[0][target != -100], wanted[0][target != -100])
        assert (got[0][target == -100] == 0).all() and (got[1][target == -100] == 0).all()


def test_a_negative_reverse_kl_is_the_negative_of_the_positive_one(backend):
    logits, teacher, target, _ = _inputs(10, torch.float64)
    plus, minus, none = (
        _run(logits, target, teacher[0], prior="reverse_kl", prior_strength=strength) for strength in (2.0, -2.0, 0.0)
    )
    for a, b, c in zip(plus, minus, none, strict=True):
        torch.testing.assert_close(a - c, c - b, rtol=1e-9, atol=1e-9)
        assert float((a - c).abs().max()) > 0.01


@pytest.mark.skipif(native is None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10, 17, 127, 128, 129, 1000, 8200])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float64"])
def test_nothing_is_written_outside_the_outputs(isa, classes, storage):
    dtype = getattr(torch, storage)
    rows, sentinel = 19 if classes < 5000 else 3, 12345.0
    logits, teacher, target, _ = _inputs(classes, dtype, rows=rows)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for offset in (0, 1, 3):  # streaming stores need aligned lines: every start must do
        gradient = torch.full((rows * classes + 64,), sentinel, dtype=dtype)
        energy = torch.full((rows + 8,), sentinel, dtype=accumulator)
        native.kd_energy(
            logits.data_ptr(), storage, teacher.data_ptr(), storage, False, 0, False, 0, 0, target.data_ptr(), 0, "", False,
            0, False, gradient[offset:].data_ptr(), energy[4:].data_ptr(), 1, rows, classes, 1, "dirichlet", False, STRENGTH, 2.0,
            WEIGHT, 0.0, 1e-3, 1e-3, 1.0, -100, 2,
        )  # fmt: skip
        end = offset + rows * classes
        assert (gradient[:offset] == sentinel).all() and (gradient[end:] == sentinel).all()
        assert (energy[:4] == sentinel).all() and (energy[4 + rows :] == sentinel).all()
        plain = _run(logits, target, teacher[0], temperature=2.0)
        assert torch.equal(gradient[offset:end].view(rows, classes), plain[1])
        assert torch.equal(energy[4 : 4 + rows], plain[0])


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_reference_against_the_definition(prior, temperature):
    logits, teacher, target, soft = _inputs(7, torch.float64, teachers=3 if prior == "mixture" else 1)
    p = torch.softmax(teacher, -1)
    with use_backend("reference"):
        for label in LABELS:
            chosen, smoothing = _settings(label, target, soft)
            chosen = chosen.double() if label == "soft" else chosen
            given = teacher if prior == "mixture" else teacher[0]
            got = _run(logits, chosen, given, prior=prior, temperature=temperature, label_smoothing=smoothing)
            _assert_close(got, _expected(logits, chosen, smoothing, prior, p, temperature), torch.float64, unit=100.0)
