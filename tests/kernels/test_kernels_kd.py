"""The KD energy's Triton kernels, interpreted, against the float64 reference: every prior, label, dtype and shape."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install 'bkd_fast[gpu]')")

from bkd_fast.distill import KDLoss
from bkd_fast.errors import NonFiniteError
from bkd_fast.ops import faults, use_backend
from bkd_fast.ops import kd as operation
from bkd_fast.ops.kd import PRIORS, Problem, kd_energy
from bkd_fast.ops.reference.kd import kd_energy as reference

if torch.cuda.is_available():
    pytest.skip("Triton compiles here: tests/gpu runs the kernels", allow_module_level=True)

from bkd_fast.kernels import kd, kd_settle
from bkd_fast.ops.triton.kd import kd_energy as interpreted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's: rows that are only padding divide by 0

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TEMPERATURES = [1.0, 2.0, 4.0, 2.5]
LABELS = ["hard", "smoothed", "soft", "none"]
STRENGTH, WEIGHT, SMOOTHING, SCALE = 3.0, 0.7, 0.15, 0.25
IGNORED = -7
NAN, INF = math.nan, math.inf
# what a unit may lose; for the half types the gradient's own rounding
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN: an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _problem(classes, rows=3, chains=1, prior="dirichlet", label="hard", temperature=2.0, dtype=torch.float32, probs=False,
             teachers=3, weights=None):  # fmt: skip
    """A problem of fresh numbers: shifted rows, ignored labels, a seed that a failing test prints."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(chains, rows, classes, generator=generator) * 4
    teacher = torch.randn(teachers if prior == "mixture" else 1, rows, classes, generator=generator) * 4
    if dtype != torch.float16:  # which keeps too few digits of a shift
        logits[:, 0] += 300
        teacher[:, -1] -= 300
    if probs:
        teacher = torch.softmax(teacher, -1)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[1::2] = IGNORED
    soft = torch.softmax(torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2, -1)
    return Problem(
        logits=logits.to(dtype),
        labels=labels if label in ("hard", "smoothed") else None,
        soft=soft.to(dtype if dtype == torch.float64 else torch.float32) if label == "soft" else None,
        teacher=None if prior == "none" else teacher.to(dtype),
        weights=weights,
        prior=prior,
        teacher_is_probs=probs,
        prior_strength=STRENGTH if prior != "none" else 0.0,
        temperature=temperature,
        label_weight=WEIGHT,
        label_smoothing=SMOOTHING if label in ("smoothed", "soft") else 0.0,
        ignore_index=IGNORED,
        scale=SCALE,
        summed=False,
    )


def _assert_right(p, unit=1.0):
    energy, gradient, bad_row, fault = interpreted(p)
    assert (bad_row, fault) == (-1, "")
    wanted_energy, wanted, bad_row, fault = reference(replace(p, logits=p.logits.double()))
    assert (bad_row, fault) == (-1, "")
    assert energy.dtype == p.accumulator and gradient.dtype == p.logits.dtype
    tolerance = unit * (1e-13 if p.logits.dtype == torch.float64 else 2e-6)
    assert ((energy.double() - wanted_energy).abs() <= tolerance * wanted_energy.abs().clamp(min=1)).all()
    bound = SCALE * (STRENGTH + WEIGHT) * unit * GRADIENT_TOLERANCE[p.logits.dtype]
    assert ((gradient.double() - wanted).abs() <= bound).all()
    return energy, gradient


def _unit(prior):
    # log p of up to 60 nats enters the other priors: float32 logarithms lose what the Dirichlet's do not have
    return 1.0 if prior in ("none", "dirichlet") else 10.0


@pytest.mark.parametrize("probs", [False, True])
def test_entropy_weights_of_confident_teachers_keep_their_digits(probs):
    """A teacher weighs as much as the other, who disagrees, is unsure: entropies down to 1e-6 enter by their ratio."""
    p = _problem(2, prior="mixture", temperature=1.0, rows=4, teachers=2)
    gaps = torch.tensor([[6.0, 9.0, 12.0, 16.0], [-9.0, -6.5, -14.0, -13.0]])
    teacher = torch.stack([torch.zeros_like(gaps), gaps], -1)
    if probs:
        teacher = teacher.softmax(-1)
    _assert_right(replace(p, teacher=teacher, teacher_is_probs=probs), _unit("mixture"))


def _signed(p):
    """The problem with a target that sums to 1 and has entries of either sign, larger than 1 and 0."""
    generator = torch.Generator().manual_seed(p.logits.shape[-1])
    rows, classes = p.logits.shape[1:]
    target = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3
    target[:, 1:] *= torch.rand(rows, classes - 1, generator=generator) < 0.7
    target[:, 0] += 1 - target.sum(1)
    soft = target if p.logits.dtype == torch.float64 else target.float()
    return replace(p, labels=None, soft=soft, signed_target=True)


# rows on chip: several to a program, one, in several tiles; and in tiles from memory
@pytest.mark.parametrize("classes", [2, 7, 33, 600, 3000, 17000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_signed_targets(classes, dtype):
    for prior, smoothing in (("none", 0.0), ("dirichlet", SMOOTHING)):
        p = _signed(_problem(classes, rows=2, prior=prior, temperature=1.0, dtype=dtype))
        _assert_right(replace(p, label_smoothing=smoothing), unit=20 * float(p.soft.abs().sum(1).max()))


@pytest.mark.parametrize("classes", [2, 10, 129])
def test_signed_targets_that_do_not_sum_to_one(classes):
    for value in (NAN, INF, -INF, 1000.0):
        p = _signed(_problem(classes, rows=5, prior="none", temperature=1.0))
        p.soft[3, classes - 1] = value
        assert interpreted(p)[2:] == reference(p)[2:] == (3, "target_sum_not_one")
    p = _signed(_problem(classes, rows=5, prior="none", temperature=1.0))
    p.logits[0, 2, int(p.soft[2].abs().argmax())] = -INF
    assert interpreted(p)[2:] == reference(p)[2:] == (2, "target_on_masked_class")


def _by_label(classes, rows=3, chains=1, dtype=torch.float32, probs=False, temperature=1.0, label="hard"):
    """A problem whose teachers are by label, of which every other row has none."""
    p = _problem(
        classes, rows=rows, chains=chains, prior="reverse_kl", temperature=temperature, dtype=dtype, label=label
    )
    table = torch.randn(1, classes, classes, generator=torch.Generator().manual_seed(classes), dtype=torch.float64) * 2
    table = (table.softmax(-1) if probs else table).to(dtype)
    own = {"teacher_is_probs": probs, "teacher_by_label": True, "prior_strength": -STRENGTH}
    return replace(p, teacher=table, **own)


@pytest.mark.parametrize("classes", [2, 7, 33, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_teachers_by_label(classes, dtype):
    cases = ((True, 1.0, "hard"), (False, 1.0, "smoothed"), (False, 2.5, "hard"), (False, 2.5, "smoothed"))
    for probs, temperature, label in cases:
        p = _by_label(classes, 5, 2, dtype, probs and dtype in (torch.float32, torch.float64), temperature, label)
        energy, gradient = _assert_right(p, _unit("reverse_kl"))
        assert (energy[:, 1::2] == 0).all() and (gradient[:, 1::2] == 0).all()  # no label: neither term


def test_teachers_by_label_in_tiles_from_memory(monkeypatch):
    monkeypatch.setattr(kd, "shape_of", lambda *_: None)
    energy, gradient = _assert_right(_by_label(2300), _unit("reverse_kl"))
    assert (energy[:, 1] == 0).all() and (gradient[:, 1] == 0).all()


@pytest.mark.parametrize("label_weight", [0.0, WEIGHT])
@pytest.mark.parametrize("ignored", [0, IGNORED])
def test_rows_without_a_label_do_not_care_what_the_table_holds(label_weight, ignored):
    """Not even class 0's row, which they read."""
    p = replace(_by_label(10, rows=4), ignore_index=ignored, label_weight=label_weight)
    p.labels[:] = torch.tensor([3, ignored, 5, ignored])
    p.teacher[0, 0] = NAN
    energy, gradient = _assert_right(p, _unit("reverse_kl"))
    assert energy[0, 1] == 0 and (gradient[0, 1] == 0).all() and energy[0, 0] != 0
    p.logits[0, 3, 2] = NAN
    assert interpreted(p)[2:] == reference(p)[2:] == (3, "logits_not_finite")


@pytest.mark.parametrize("label", [-100, -1, 10, 2**40, -(2**63)])
def test_labels_that_are_no_classes_read_nothing_outside_the_table_of_teachers(label):
    p = _by_label(10, rows=4)
    p.labels[2] = label
    assert interpreted(p)[2:] == reference(p)[2:] == (2, "target_out_of_range")


def test_bad_rows_of_a_table_of_teachers():
    for values, fault in (
        (torch.full((10,), 0.2), "teacher_not_probabilities"),
        (torch.eye(10)[0], "teacher_excludes_class"),
    ):
        p = _by_label(10, rows=4, probs=True)
        row = int(p.labels[2])
        p.teacher[0, row] = values
        first = int((p.labels == row).int().argmax())
        assert interpreted(p)[2:] == reference(p)[2:] == (first, fault)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("prior", ["none", *PRIORS])
def test_every_prior_label_temperature_and_dtype(prior, label):
    for i, (temperature, probs) in enumerate(itertools.product(TEMPERATURES, [False, True])):
        if prior == "none" and (temperature != 1 or probs):
            continue
        if prior == "mixture" and probs != (temperature == 2):
            continue  # slow in the interpreter
        dtype = DTYPES[(i + LABELS.index(label)) % 4] if i % 2 else torch.float32
        if probs and dtype in (torch.bfloat16, torch.float16):
            dtype = torch.float64  # rounded probabilities: test_half_probabilities
        classes = random.SystemRandom().choice([2, 3, 7, 10])
        print(prior, label, temperature, probs, dtype, classes)
        _assert_right(
            _problem(
                classes, prior=prior, label=label, temperature=temperature, dtype=dtype, probs=probs, rows=2, teachers=2
            ),
            _unit(prior),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", PRIORS)
def test_every_dtype(prior, dtype):
    for label, temperature in (("hard", 1.0), ("soft", 2.5)):
        _assert_right(
            _problem(10, rows=2, prior=prior, label=label, temperature=temperature, dtype=dtype), 2 * _unit(prior)
        )


@pytest.mark.parametrize("classes", [2, 3, 4, 7, 10, 33, 100, 257, 513, 1000, 1025, 4097])
def test_class_counts(classes):
    rows = 3 if classes > 300 else 131 if classes < 40 else 19  # more than a program's, and not a multiple
    for dtype in (torch.float32, torch.bfloat16):
        _assert_right(_problem(classes, rows=rows, dtype=dtype))
    _assert_right(_problem(classes, rows=3, prior="reverse_kl", label="soft", temperature=1.5), 10.0)


@pytest.mark.parametrize("classes", [16384, 16385, 33000])
def test_large_class_counts(classes):
    _assert_right(_problem(classes, rows=2))
    _assert_right(_problem(classes, rows=1, prior="reverse_kl", label="soft", temperature=2.5), 10.0)
    _assert_right(_problem(classes, rows=1, prior="none", dtype=torch.float64))


def test_a_vocabulary():
    _assert_right(_problem(262_144, rows=1, dtype=torch.bfloat16, temperature=1.0))


def test_float64_on_chip_and_tiled():
    for classes in (256, 300, 2000, 8200):
        _assert_right(_problem(classes, rows=2, dtype=torch.float64, temperature=2.5, label="smoothed"))


def test_rising_maxima_of_a_row_that_is_read_in_tiles():
    for prior in ("dirichlet", "continuous_categorical", "reverse_kl"):
        p = _problem(20_000, rows=1, prior=prior, label="soft", temperature=4.0)
        p.logits[0, 0] += torch.linspace(-40, 40, 20_000)
        p.teacher[0, 0] += torch.linspace(-40, 40, 20_000).roll(5000)
        _assert_right(p, 20.0)


def test_half_probabilities():
    p = _problem(10, probs=True, dtype=torch.bfloat16)
    reference_probs = p.teacher.double() / p.teacher.double().sum(-1, keepdim=True)
    energy, gradient, _, _ = interpreted(p)
    exact = reference(replace(p, logits=p.logits.double(), teacher=reference_probs))
    torch.testing.assert_close(energy.double(), exact[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), exact[1], rtol=0, atol=SCALE * 4 * 2**-8)


@pytest.mark.parametrize("teachers", [1, 2, 5])
@pytest.mark.parametrize("weights", ["entropy", "teachers", "rows"])
def test_mixtures(teachers, weights):
    given = None
    if weights != "entropy":
        given = torch.softmax(torch.randn((4, teachers) if weights == "rows" else (teachers,), dtype=torch.float64), -1)
    if weights == "rows" and teachers > 1:
        given[1] = 0
        given[1, 0] = 1  # a teacher without a share
    p = _problem(33, rows=4, prior="mixture", teachers=teachers, weights=given, chains=2, dtype=torch.float64)
    _assert_right(p, 10.0)
    _assert_right(replace(p, logits=p.logits.float(), teacher=p.teacher.float()), 10.0)


def test_a_strong_mixture_over_many_classes():
    p = replace(_problem(1500, rows=1, prior="mixture", teachers=2, dtype=torch.float64), prior_strength=500.0)
    energy, gradient, _, _ = interpreted(p)
    wanted = reference(p)
    torch.testing.assert_close(energy, wanted[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, wanted[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classes", [3, 10, 129, 17_000])
@pytest.mark.parametrize("prior", ["none", *PRIORS])
def test_masked_classes(prior, classes):
    if prior == "mixture" and classes > 1000:
        pytest.skip("the mixture has one way for every class count")
    for label in ("smoothed", "soft"):
        p = _problem(classes, rows=2, prior=prior, label=label, temperature=2.0, teachers=2)
        p.logits[:, 0, 1] = -INF
        if p.teacher is not None:
            p.teacher[:, 0, 1] = -INF
        if p.labels is not None:
            p.labels[p.labels == 1] = 0
        if p.soft is not None:
            p.soft[0, 0] += p.soft[0, 1]
            p.soft[0, 1] = 0
        _, gradient = _assert_right(p, _unit(prior))
        assert (gradient[0, 0, 1] == 0).all()


def test_a_teacher_may_exclude_a_class_where_its_energy_is_finite():
    for prior in ("dirichlet", "mixture"):
        p = _problem(10, prior=prior)
        p.teacher[:, :, 3] = -INF
        _assert_right(p, _unit(prior))


def test_extreme_but_finite_logits():
    p = _problem(10, rows=3)
    p.logits[0, 0, 4], p.logits[0, 1, 5], p.teacher[0, 2, 2] = 1e30, -1e30, -1e30
    p.labels[0] = 4
    energy, gradient, _, _ = interpreted(p)
    wanted = reference(replace(p, logits=p.logits.double()))
    torch.testing.assert_close(energy.double(), wanted[0], rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prior", PRIORS)
def test_chains_share_teacher_and_labels(prior):
    p = _problem(7, rows=5, chains=3, prior=prior, teachers=2)
    energy, gradient = _assert_right(p, _unit(prior))
    for chain in range(3):
        alone = interpreted(replace(p, logits=p.logits[chain : chain + 1].clone()))
        assert torch.equal(alone[0][0], energy[chain]) and torch.equal(alone[1][0], gradient[chain])


def test_a_row_does_not_depend_on_the_others():
    for classes in (2, 10, 100):
        p = _problem(classes, rows=70)
        energy, gradient, _, _ = interpreted(p)
        order = torch.randperm(70)
        shuffled = interpreted(
            replace(p, logits=p.logits[:, order], teacher=p.teacher[:, order], labels=p.labels[order])
        )
        assert torch.equal(shuffled[0], energy[:, order]) and torch.equal(shuffled[1], gradient[:, order])


def test_sums_and_means():
    for rows, dtype in ((70, torch.float32), (9000, torch.float32), (70, torch.float64)):  # 9000: two programs sum
        p = _problem(2, rows=rows, dtype=dtype)
        energy, gradient, _, _ = interpreted(p)
        total, same, _, _ = interpreted(replace(p, summed=True, total_factor=0.125))
        assert total.shape == () and total.dtype == p.accumulator and torch.equal(gradient, same)
        torch.testing.assert_close(total, (energy.double().sum() * 0.125).to(total.dtype), rtol=1e-7, atol=0)


def test_the_public_path_with_odd_strides_and_offsets():
    p = _problem(10, rows=6)
    logits, teacher = p.logits[0], p.teacher[0]
    wide = torch.zeros(6, 20)
    wide[:, ::2] = logits
    shifted = torch.zeros(61)[1:].view(6, 10).copy_(logits)  # four bytes past an aligned address
    soft = torch.softmax(teacher, -1)[:1].expand(6, 10)
    settings = {"prior_strength": 2.0, "temperature": 2.0, "ignore_index": IGNORED}
    with use_backend("triton"):
        for target in (p.labels, soft):
            results = []
            for given in (logits, wide[:, ::2], shifted):
                leaf = given.detach().requires_grad_()
                loss = kd_energy(leaf, target, teacher.t().contiguous().t(), **settings)
                loss.backward()
                results.append((loss.detach(), leaf.grad))
            for loss, gradient in results[1:]:
                assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
    leaf = logits.clone().requires_grad_()
    kd_energy(leaf, soft, teacher, **settings).backward()
    torch.testing.assert_close(results[0][1], leaf.grad, rtol=0, atol=2e-6)


def test_inside_torch():
    p = _problem(5, rows=4)
    settings = ("dirichlet", False, False, 2.0, 1.5, 0.8, 0.1, False, IGNORED, "mean")
    arguments = (p.logits[0], p.labels, p.teacher[0], None, None, None, *settings)
    with use_backend("triton"):
        torch.library.opcheck(torch.ops.bkd_fast.kd_energy, arguments)

        def loss(logits):
            return kd_energy(logits * 2, p.labels, p.teacher[0], prior_strength=2.0, ignore_index=IGNORED) * 3

        results = []
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaf = p.logits[0].clone().requires_grad_()
            function(leaf).backward()
            results.append(leaf.grad)
        torch.testing.assert_close(results[1], results[0])
        chains = torch.stack([p.logits[0], p.logits[0] + torch.randn(4, 5)])
        torch.testing.assert_close(torch.vmap(loss)(chains), torch.stack([loss(z) for z in chains]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0])
def test_multiplication_by_the_incoming_gradient(dtype, factor):
    gradient = torch.randn(9001).to(dtype)
    incoming = torch.tensor(factor, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for divisor in (1.0, 4.0):
        got = gradient.clone()
        kd_settle.multiply_(got, incoming, divisor)
        assert torch.equal(got, (gradient.double() * factor / divisor).to(dtype))


# ---- faults ----


def _bad_problems():
    """Problems with one unusable row, number 2, and a later one."""
    rows = torch.full((4, 2), 0.5, dtype=torch.float64)
    rows[2] = 0.7

    def changed(p, name, value, *where):
        every = (slice(None),) if name in ("logits", "teacher") else ()
        for row in (2, 3):
            getattr(p, name)[(*every, row, *where)] = value
        return p

    yield "target_out_of_range", changed(_problem(10, rows=4), "labels", 10)
    yield "target_out_of_range", replace(changed(_problem(10, rows=4), "labels", -(2**62)), label_weight=0.0)
    for value in (NAN, INF):
        yield "logits_not_finite", changed(_problem(10, rows=4), "logits", value, 4)
        yield "logits_not_finite", changed(_problem(10, rows=4, prior="none", label="none"), "logits", value, 4)
        yield "teacher_not_finite", changed(_problem(10, rows=4), "teacher", value, 4)
    yield "logits_all_masked", changed(_problem(10, rows=4), "logits", -INF)
    yield "logits_all_masked", changed(_problem(10, rows=4, prior="none", label="none"), "logits", -INF)
    yield "teacher_all_masked", changed(_problem(10, rows=4), "teacher", -INF)
    for prior in PRIORS:
        yield "teacher_not_probabilities", changed(_problem(10, rows=4, prior=prior, probs=True), "teacher", 0.5, 0)
        yield "teacher_not_probabilities", changed(_problem(10, rows=4, prior=prior, probs=True), "teacher", -0.1, 0)
    for prior in ("dirichlet", "mixture"):
        yield "teacher_on_masked_class", changed(_problem(10, rows=4, prior=prior, label="none"), "logits", -INF, 4)
    for prior in ("continuous_categorical", "reverse_kl"):
        p = changed(_problem(10, rows=4, prior=prior), "teacher", -INF, 4)
        p.logits[0, 2, 4] = -2000.0  # q is 0 in float32: the fault is there all the same
        yield "teacher_excludes_class", p
    yield "weights_not_probabilities", _problem(10, rows=4, prior="mixture", teachers=2, weights=rows)
    for value in (0.5, -0.1, NAN):
        yield "target_not_probabilities", changed(_problem(10, rows=4, label="soft"), "soft", value, 0)
    p = changed(changed(_problem(10, rows=4), "logits", -INF, 4), "teacher", -INF, 4)
    p.labels[2] = 4
    yield "target_on_masked_class", p
    p = changed(changed(_problem(10, rows=4, label="soft"), "logits", -INF, 4), "teacher", -INF, 4)
    yield "target_on_masked_class", p
    p = changed(_problem(17_000, rows=4), "logits", NAN, 16_999)
    yield "logits_not_finite", p
    # several at once: the first in the order of the checks
    p = changed(changed(changed(_problem(10, rows=4), "logits", NAN, 4), "teacher", INF, 4), "labels", 12)
    yield "target_out_of_range", p
    p = changed(changed(_problem(10, rows=4), "logits", NAN, 4), "teacher", INF, 4)
    yield "logits_not_finite", p


def test_every_fault_is_found_named_and_contained():
    for name, p in _bad_problems():
        p = replace(p, register=torch.zeros(1, dtype=torch.int64), stamp=faults.Form(True, False, True).stamp(17))
        energy, gradient, bad_row, fault = interpreted(p)
        assert (bad_row, fault) == (-1, "")  # it is in the register
        found = faults.decode(int(p.register))
        assert (found.name, found.row, found.chain, found.call) == (name, 2, 0, 17), name
        assert found.form == faults.Form(True, False, True)
        assert reference(p)[2:] == (2, name)
        assert energy[0, 2].isnan() and (gradient[0, 2] == 0).all(), name
        tensors = ("logits", "labels", "soft", "teacher", "weights")
        good = replace(p, register=None, **{t: _first_rows(getattr(p, t), t) for t in tensors})
        alone = interpreted(good)
        assert torch.equal(energy[0, :2], alone[0][0]) and torch.equal(gradient[0, :2], alone[1][0]), name


def _first_rows(tensor, name):
    if tensor is None or (name == "weights" and tensor.dim() == 1):
        return tensor
    return (tensor[:, :2] if name in ("logits", "teacher") else tensor[:2]).contiguous()


def test_the_chain_of_a_fault():
    p = replace(_problem(10, rows=150, chains=3), register=torch.zeros(1, dtype=torch.int64))
    p.logits[2, 1, 0] = p.logits[1, 149, 0] = NAN
    interpreted(p)
    found = faults.decode(int(p.register))
    assert (found.chain, found.row) == (1, 149)


def test_words():
    for name in faults.FAULTS:
        for call, chain, row in ((0, 0, 0), (4095, 4095, 2**32 - 1), (12, 3, 2**31 + 5)):
            form = faults.Form(False, True, True)
            code = list(faults.FAULTS).index(name) + 1
            stamp = form.stamp(call)
            word = (
                ((4095 - stamp // 8) << 51)
                + ((4095 - chain) << 39)
                + ((2**32 - 1 - row) << 7)
                + (stamp % 8 << 4)
                + code
            )
            assert 0 < word < 2**63
            assert faults.decode(word) == faults.Fault(name, chain, row, call, form)
    assert faults.decode(0) is None


@pytest.mark.parametrize("prior", PRIORS)
def test_on_a_cpu_the_kernels_raise_at_once(prior):
    p = _problem(10, rows=4, prior=prior)
    p.logits[0, 2, 4] = NAN
    with use_backend("triton"), pytest.raises(NonFiniteError, match=r"logits\[2\] = \[.*nan.*\]: must be finite"):
        kd_energy(p.logits[0], None, p.teacher if prior == "mixture" else p.teacher[0], prior=prior, prior_strength=1.0)


@pytest.fixture
def recording(monkeypatch):
    """CPU tensors by the rule of CUDA's."""
    monkeypatch.setattr(operation, "records", lambda device: True)
    monkeypatch.setattr(faults, "_REGISTERS", {})
    with use_backend("triton"):
        yield


def _batch():
    p = _problem(10, rows=4)
    return p.logits[0], p.labels, p.teacher[0]


def test_recorded_faults_are_raised_by_check_once(recording):
    loss = KDLoss(2.0, 2.0, ignore_index=IGNORED)
    logits, target, teacher = _batch()
    leaf = logits.clone().requires_grad_()
    loss(leaf, target, teacher).backward()
    loss.check()
    clean = leaf.grad.clone()
    leaf = logits.clone().requires_grad_()
    teacher[2, 3] = INF
    energy = loss(leaf, target, teacher)
    energy.backward()
    assert energy.isnan()
    assert (leaf.grad[2] == 0).all()
    kept = [0, 1, 3]
    assert torch.equal(leaf.grad[kept], clean[kept])
    with pytest.raises(NonFiniteError, match=r"teacher_logits\[2\] = \[.*, inf, .*\]: must be finite"):
        KDLoss(1.0).check()
    loss.check()


def test_recorded_faults_without_their_tensors(recording):
    loss = KDLoss(2.0, ignore_index=IGNORED)
    logits, target, teacher = _batch()
    chains = torch.stack([logits, logits])
    chains[1, 3, 0] = NAN
    loss(chains, target, teacher)
    del chains
    with pytest.raises(NonFiniteError, match=r"^logits\[1, 3\]: must be finite"):
        loss.check()
    target[0] = 10
    loss(logits, target, teacher)
    target[0] = 3  # no longer what was wrong
    with pytest.raises(ValueError, match=r"^target\[0\]: must be a class$"):
        loss.check()
    target[0] = 10
    loss(logits, target, teacher)
    with pytest.raises(ValueError, match=r"^target\[0\] = 10: must be a class in \[0, 10\) or ignore_index = -7$"):
        loss.check()
    probs = torch.softmax(teacher, -1)
    probs[1] *= 2
    loss(logits, None, teacher_probs=probs)
    loss(logits, None, teacher_probs=torch.softmax(teacher, -1))  # the call with the fault is not the last
    with pytest.raises(ValueError, match=r"^teacher_probs\[1\]: must be probabilities"):
        loss.check()


def test_the_first_call_with_a_fault_is_told(recording):
    loss = KDLoss(2.0, ignore_index=IGNORED)
    logits, target, teacher = _batch()
    teacher[3, 0] = NAN
    loss(logits, target, teacher)
    worse = logits.clone()
    worse[0] = NAN
    loss(worse, target, teacher)
    with pytest.raises(NonFiniteError, match=r"teacher_logits\[3\]"):
        loss.check()
    loss.check()


def test_recorded_faults_of_mixtures(recording):
    logits, target, teacher = _batch()
    weights = torch.full((4, 2), 0.5)
    weights[1] = 0.6
    loss = KDLoss(2.0, prior="mixture", mixture_weights=weights, ignore_index=IGNORED)
    loss(logits, target, torch.stack([teacher, teacher]))
    with pytest.raises(ValueError, match=r"^mixture_weights\[1\] = \[0.6, 0.6\]: must be probabilities"):
        loss.check()
    teacher[2, 0] = INF
    loss = KDLoss(2.0, prior="mixture", ignore_index=IGNORED)
    loss(logits, target, torch.stack([teacher, teacher]))
    with pytest.raises(NonFiniteError, match=r"^teacher_logits\[:, 2\]: must be finite"):
        loss.check()


def test_shapes_of_the_launch():
    for bits, plain in itertools.product((16, 32, 64), (False, True)):
        for classes in [*range(1, 700), 1000, 1024, 1025, 4096, 8192, 16384]:
            shape = kd.shape_of(classes, bits, plain)
            if shape is None:
                assert classes > 2048 if bits == 64 else classes > 8192
                continue
            each = shape.block * shape.chunks * shape.rows / (32 * shape.warps)
            assert (shape.chunks - 1) * shape.block < classes <= shape.chunks * shape.block
            assert each <= 48, (classes, bits, shape)  # logits per thread, padding included
