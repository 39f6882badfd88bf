"""The KD energy on a GPU: against the float64 reference, without a synchronisation, in CUDA graphs and compiled.

A kernel is compiled for the number of classes, the dtypes and the terms, a second each: tests/kernels has every combination, in
Triton's interpreter, and this file a few of each kind.
"""

import math
import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bkd_fast.distill import KDLoss, TopKLogits
from bkd_fast.errors import NonFiniteError
from bkd_fast.kernels.kd import shape_of
from bkd_fast.ops.kd import PRIORS, Problem, kd_energy
from bkd_fast.ops.reference.kd import kd_energy as reference

DEVICE = torch.device("cuda", torch.cuda.current_device())
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STRENGTH, WEIGHT, SMOOTHING = 3.0, 0.7, 0.15
GRADIENT_TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN: an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    KDLoss(1.0).check()  # no test leaves a fault behind


@pytest.fixture
def no_synchronisation():
    """Anything that waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def _batch(classes, rows, chains=(), teachers=None, dtype=torch.float32):
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*chains, rows, classes, generator=generator) * 4
    teacher = torch.randn(*(() if teachers is None else (teachers,)), rows, classes, generator=generator) * 4
    if dtype != torch.float16:
        logits[..., 0, :] += 300
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[1::3] = -100
    return logits.to(DEVICE, dtype), labels.to(DEVICE), teacher.to(DEVICE, dtype)


def _expected(logits, target, teacher, prior, temperature, smoothing, probs=False):
    """The reference's energies and gradient, on the CPU in float64."""
    rows, classes = logits.shape[-2:]
    target = None if target is None else target.cpu()
    p = Problem(
        logits=logits.reshape(-1, rows, classes).cpu().double(),
        labels=target if target is not None and not target.is_floating_point() else None,
        soft=target if target is not None and target.is_floating_point() else None,
        teacher=teacher.reshape(-1, rows, classes).cpu(), weights=None, prior=prior, teacher_is_probs=probs,
        prior_strength=STRENGTH, temperature=temperature, label_weight=WEIGHT, label_smoothing=smoothing,
        ignore_index=-100, scale=1.0, summed=False,
    )  # fmt: skip
    energy, gradient, bad_row, fault = reference(p)
    assert (bad_row, fault) == (-1, "")
    return energy.reshape(logits.shape[:-1]), gradient.reshape(logits.shape)


def _assert_right(logits, target, teacher, prior="dirichlet", temperature=2.0, smoothing=0.0, probs=False):
    settings = {
        "prior": prior, "prior_strength": STRENGTH, "temperature": temperature, "label_weight": WEIGHT,
        "label_smoothing": smoothing, "teacher_is_probs": probs,
    }  # fmt: skip
    leaf = logits.clone().requires_grad_()
    energy = kd_energy(leaf, target, teacher, reduction="none", **settings)
    energy.sum().backward()
    wanted, gradient = _expected(logits, target, teacher, prior, temperature, smoothing, probs)
    unit = 1.0 if prior == "dirichlet" else 10.0
    tolerance = unit * (1e-13 if logits.dtype == torch.float64 else 4e-6)
    assert ((energy.cpu().double() - wanted).abs() <= tolerance * wanted.abs().clamp(min=1)).all()
    bound = GRADIENT_TOLERANCE[logits.dtype] * unit * (STRENGTH + WEIGHT)
    assert ((leaf.grad.cpu().double() - gradient).abs() <= bound).all()


COUNTS = {
    torch.float32: [2, 3, 5, 10, 33, 100, 129, 257, 512, 513, 1000, 1025, 4097, 16384, 16385, 50257, 262144],
    **dict.fromkeys((torch.float64, torch.bfloat16, torch.float16), (7, 100, 1025, 16385)),
}


@pytest.mark.parametrize(("dtype", "classes"), [(dtype, classes) for dtype in DTYPES for classes in COUNTS[dtype]])
def test_class_counts(classes, dtype):
    rows = 3 if classes > 2000 else 200
    _assert_right(*_batch(classes, rows, dtype=dtype), temperature=(1.0, 2.0, 2.5)[classes % 3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "rows"), [(10, 9000), (1000, 3)])
def test_means(classes, rows, dtype):
    """In one chunk of energies, and summed from several."""
    logits, target, teacher = _batch(classes, rows, dtype=dtype)
    energies, mean = (kd_energy(logits, target, teacher, prior_strength=2.0, reduction=r) for r in ("none", "mean"))
    assert mean.dtype == energies.dtype
    torch.testing.assert_close(mean.double(), energies.double().mean(), rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_priors_and_labels(prior, dtype):
    """On chip in many rows, on chip in one, and in tiles; each with a label and a temperature of its own."""
    shift = PRIORS.index(prior) + 2 * DTYPES.index(dtype)
    for number, classes in enumerate((10, 1000, 20_000), start=shift):
        logits, target, teacher = _batch(
            classes, 5, chains=(2,), teachers=3 if prior == "mixture" else None, dtype=dtype
        )
        soft = torch.softmax(torch.randn(5, classes, device=DEVICE, dtype=torch.float64), -1)
        label, smoothing = ((target, 0.0), (target, SMOOTHING), (soft, SMOOTHING), (None, 0.0))[number % 4]
        probs = number % 5 == 0 and dtype in (torch.float32, torch.float64)
        given = torch.softmax(teacher, -1) if probs else teacher
        _assert_right(logits, label, given, prior, (1.0, 2.0, 4.0, 2.5)[number // 2 % 4], smoothing, probs)


def test_masks():
    for classes in (3, 10, 129, 20000):
        logits, target, teacher = _batch(classes, 5)
        logits[0, 1] = teacher[0, 1] = -math.inf
        target[target == 1] = 0
        _assert_right(logits, target, teacher, smoothing=SMOOTHING)
        _assert_right(logits, target, teacher, "reverse_kl", smoothing=SMOOTHING)


def test_strides_and_offsets():
    logits, target, teacher = _batch(10, 33)
    wide = torch.zeros(33, 20, device=DEVICE)
    wide[:, ::2] = logits
    shifted = torch.zeros(331, device=DEVICE)[1:].view(33, 10).copy_(logits)
    for given in (wide[:, ::2], shifted):
        _assert_right(given, target, teacher.t().contiguous().t())


def test_equal_calls_give_equal_bits():
    for classes, rows in ((10, 100_000), (1000, 3000), (32000, 64)):
        logits, target, teacher = _batch(classes, rows)
        first = kd_energy(logits, target, teacher, prior_strength=2.0)
        for _ in range(5):
            assert torch.equal(kd_energy(logits, target, teacher, prior_strength=2.0), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_multiplies_on_the_device(dtype):
    logits, target, teacher = _batch(10, 50, dtype=dtype)
    leaf = logits.clone().requires_grad_()
    (one,) = torch.autograd.grad(kd_energy(leaf, target, teacher, prior_strength=2.0), leaf)
    loss = kd_energy(leaf, target, teacher, prior_strength=2.0) * 3
    for times in (1, 2):
        (three,) = torch.autograd.grad(loss, leaf, retain_graph=times == 1)
        # float16's smallest numbers are 6e-8 apart: half of that lost by one number, and three times that by the other
        torch.testing.assert_close(three.double(), one.double() * 3, rtol=2 * GRADIENT_TOLERANCE[dtype], atol=1.3e-7)
    loss = kd_energy(leaf, target, teacher, prior_strength=2.0)
    loss.backward(retain_graph=True)
    leaf.grad.zero_()  # writing to a gradient must not reach into the graph
    loss.backward()
    torch.testing.assert_close(leaf.grad, one)


def test_nothing_waits_for_the_device(request):
    cases = []
    for prior in PRIORS:
        logits, target, teacher = _batch(10, 50, teachers=2 if prior == "mixture" else None)
        loss = KDLoss(2.0, 2.0, prior=prior, mixture_weights="uniform")
        loss(logits.clone().requires_grad_(), target, teacher).backward()  # compiles
        cases.append((loss, logits.requires_grad_(), target, teacher))
    request.getfixturevalue("no_synchronisation")
    for loss, logits, target, teacher in cases:
        (loss(logits, target, teacher) * 2).backward()
        loss(logits, None, teacher).backward()


def test_a_captured_graph_replays():
    logits, target, teacher = _batch(1000, 64)
    loss = KDLoss(2.0, 2.0)
    leaf = logits.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            leaf.grad = None
            loss(leaf, target, teacher).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    leaf.grad = None
    with torch.cuda.graph(graph):
        energy = loss(leaf, target, teacher)
        energy.backward()
    for _ in range(3):
        fresh, fresh_target, fresh_teacher = _batch(1000, 64)
        with torch.no_grad():
            leaf.copy_(fresh)
            target.copy_(fresh_target)
            teacher.copy_(fresh_teacher)
        graph.replay()
        plain = fresh.clone().requires_grad_()
        wanted = loss(plain, fresh_target, fresh_teacher)
        wanted.backward()
        assert torch.equal(energy, wanted) and torch.equal(leaf.grad, plain.grad)
    loss.check()
    teacher[7, 3] = math.nan
    graph.replay()
    assert energy.isnan() and (leaf.grad[7] == 0).all() and leaf.grad.isfinite().all()
    with pytest.raises(NonFiniteError, match=r"^teacher_logits\[7\]: must be finite"):
        loss.check()


def test_compiles_on_the_device():
    def loss(logits, target, teacher):
        return kd_energy(logits * 2, target, teacher, prior_strength=2.0, temperature=2.0) * 3

    compiled = torch.compile(loss, fullgraph=True)
    for _ in range(2):
        logits, target, teacher = _batch(10, 50)
        results = []
        for function in (loss, compiled):
            leaf = logits.clone().requires_grad_()
            value = function(leaf, target, teacher)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("prior", ["dirichlet", "continuous_categorical", "reverse_kl"])
@pytest.mark.parametrize("classes", [10, 1000, 32_000])
def test_top_k_teachers(classes, prior):
    logits, target, teacher = _batch(classes, 64)
    for k in (1, 7, 10) if classes == 1000 else (7,):
        top = TopKLogits.of(teacher, k)
        results = []
        for given in (top, top.dense(classes)):
            leaf = logits.clone().requires_grad_()
            energy = kd_energy(
                leaf, target, given, prior=prior, prior_strength=STRENGTH, temperature=2.0, reduction="none"
            )
            energy.sum().backward()
            results.append((energy.detach(), leaf.grad))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=4e-5)
    top.indices[3, 2] = classes
    loss = KDLoss(STRENGTH, prior=prior)
    assert loss(logits, target, top).isnan()
    with pytest.raises(ValueError, match=rf"teacher_logits.indices\[3, 2\] = {classes}: must be a class"):
        loss.check()


@pytest.mark.parametrize(
    ("dtype", "classes"), [(dtype, classes) for dtype in DTYPES for classes in (10, 20_000)] + [(torch.float32, 1000)]
)
def test_signed_targets(classes, dtype):
    """Linear in the target: that of y + a (y - y') has (1 + a) times the energy of y less a times that of y'."""
    logits, _, _ = _batch(classes, 9, dtype=dtype)
    one, other = torch.randn(2, 9, classes, device=DEVICE, dtype=torch.float64).softmax(-1)
    signed = 3 * one - 2 * other
    if dtype != torch.float64:
        one, other, signed = one.float(), other.float(), signed.float()
    loss = KDLoss(0.0, reduction="none", signed_targets=True)
    results = []
    for target in (signed, one, other):
        leaf = logits.clone().requires_grad_()
        energy = loss(leaf, target)
        energy.sum().backward()
        results.append((energy.detach().double(), leaf.grad.double()))
    (energy, gradient), (of_one, slope), (of_other, its_slope) = results
    torch.testing.assert_close(energy, 3 * of_one - 2 * of_other, rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(gradient, 3 * slope - 2 * its_slope, rtol=0, atol=10 * GRADIENT_TOLERANCE[dtype])
    signed[5, 1] += 100
    assert loss(logits, signed).isnan().nonzero().flatten().tolist() == [5]
    with pytest.raises(ValueError, match=r"target\[5\] = .*must be finite, with sum 1"):
        loss.check()


@pytest.mark.parametrize(
    ("dtype", "classes"), [(dtype, classes) for dtype in DTYPES for classes in (10, 20_000)] + [(torch.float32, 4099)]
)
def test_teachers_by_label(classes, dtype):
    logits, target, _ = _batch(classes, 9, dtype=dtype)
    table = torch.randn(classes, classes, device=DEVICE).to(dtype)
    settings = {"prior": "reverse_kl", "prior_strength": -STRENGTH, "temperature": 2.5, "reduction": "none"}
    results = []
    for given, by_label in ((table, True), (table[target.clamp_min(0)], False)):
        leaf = logits.clone().requires_grad_()
        energy = kd_energy(leaf, target, given, teacher_by_label=by_label, **settings)
        energy.sum().backward()
        results.append((energy.detach(), leaf.grad))
    labelled = target != -100
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours[labelled], theirs[labelled], rtol=1e-5, atol=10 * GRADIENT_TOLERANCE[dtype])
        assert (ours[~labelled] == 0).all()
    target[3] = 2**40  # far outside the table
    assert kd_energy(logits, target, table, teacher_by_label=True, **settings)[3].isnan()
    with pytest.raises(ValueError, match=rf"target\[3\] = {2**40}: must be a class"):
        KDLoss(1.0).check()


def test_inside_torch():
    logits, target, teacher = _batch(5, 9)
    settings = ("dirichlet", False, False, 2.0, 1.5, 0.8, 0.1, False, -100, "mean")
    arguments = (logits, target, teacher, None, None, None, *settings)
    torch.library.opcheck(torch.ops.bkd_fast.kd_energy, arguments)
    chains = torch.stack([logits, logits * 2, logits + 1])

    def loss(z):
        return kd_energy(z, target, teacher, prior_strength=2.0)

    torch.testing.assert_close(torch.vmap(loss)(chains), torch.stack([loss(z) for z in chains]))


@pytest.mark.parametrize("classes", [10, 1000, 20000])
def test_faults_are_recorded_and_raised_once(classes):
    loss = KDLoss(2.0, 2.0)
    logits, target, teacher = _batch(classes, 20)
    clean = logits.clone().requires_grad_()
    loss(clean, target, teacher).backward()
    bad = logits.clone()
    bad[11, 3] = math.nan
    leaf = bad.requires_grad_()
    energy = loss(leaf, target, teacher)
    energy.backward()
    assert energy.isnan() and (leaf.grad[11] == 0).all()
    kept = [row for row in range(20) if row != 11]
    assert torch.equal(leaf.grad[kept], clean.grad[kept])
    with pytest.raises(NonFiniteError, match=r"^logits\[11\] = \[.*nan.*\]: must be finite"):
        loss.check()
    loss.check()
    target[4] = classes
    loss(logits, target, teacher)
    with pytest.raises(ValueError, match=rf"^target\[4\] = {classes}: must be a class in \[0, {classes}\)"):
        loss.check()


def test_a_check_inside_a_capture_is_an_error():
    logits, target, teacher = _batch(10, 4)
    loss = KDLoss(2.0)
    loss(logits, target, teacher)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="must not be called while a CUDA graph"):
        loss.check()


def test_every_launch_of_short_float32_rows():
    """The largest class count of every launch that rows of up to 600 classes can have, but for the number of tiles."""
    shapes = {shape_of(classes, 32, plain=True)._replace(chunks=0): classes for classes in range(2, 600)}
    assert len(shapes) > 10
    for classes in shapes.values():
        logits, target, teacher = _batch(classes, 3)
        energy = kd_energy(logits, target, teacher, prior_strength=STRENGTH, label_weight=WEIGHT, reduction="none")
        wanted, _ = _expected(logits, target, teacher, "dirichlet", 1.0, 0.0)
        torch.testing.assert_close(energy.cpu().double(), wanted, rtol=4e-6, atol=4e-6)
