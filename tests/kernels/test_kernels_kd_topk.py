"""The KD energy's Triton kernels on top-k teachers, interpreted, against the float64 reference, which writes them out."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install 'bkd_fast[gpu]')")

from bkd_fast.distill import TopKLogits
from bkd_fast.ops import faults, use_backend
from bkd_fast.ops.kd import Problem, kd_energy
from bkd_fast.ops.reference.kd import kd_energy as reference

if torch.cuda.is_available():
    pytest.skip("Triton compiles here: tests/gpu runs the kernels", allow_module_level=True)

from bkd_fast.ops.triton.kd import kd_energy as interpreted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's: rows that are only padding divide by 0

PRIORS = ["dirichlet", "continuous_categorical", "reverse_kl"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STRENGTH, WEIGHT, SMOOTHING, SCALE = 3.0, 0.7, 0.15, 0.25
IGNORED = -7
NAN, INF = math.nan, math.inf
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN: an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _problem(classes, k, rows=3, prior="dirichlet", label="hard", temperature=2.0, dtype=torch.float32,
             stored=torch.float16, index=torch.int32, chains=1):  # fmt: skip
    """A problem of fresh numbers; labels are ignored, on named classes and on others. A failing test prints the seed."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(chains, rows, classes, generator=generator) * 4
    if dtype != torch.float16:  # which keeps too few digits of a shift
        logits[:, 0] += 300
    top = TopKLogits.of(torch.randn(rows, classes, generator=generator) * 4, k)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[::3], labels[1::3] = top.indices[::3, 0].long(), IGNORED
    soft = torch.softmax(torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2, -1)
    return Problem(
        logits=logits.to(dtype),
        labels=labels if label in ("hard", "smoothed") else None,
        soft=soft.to(dtype if dtype == torch.float64 else torch.float32) if label == "soft" else None,
        teacher=top.values.to(stored)[None],
        indices=top.indices.to(index),
        rest=top.rest if k < classes else torch.full((rows,), NAN),
        weights=None,
        prior=prior,
        teacher_is_probs=False,
        prior_strength=STRENGTH,
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
    unit *= 1.0 if p.prior == "dirichlet" else 10.0  # as for dense teachers: float32 logarithms of 60 nats
    tolerance = unit * (1e-13 if p.logits.dtype == torch.float64 else 2e-6)
    assert ((energy.double() - wanted_energy).abs() <= tolerance * wanted_energy.abs().clamp(min=1)).all()
    bound = SCALE * (STRENGTH + WEIGHT) * unit * GRADIENT_TOLERANCE[p.logits.dtype]
    assert ((gradient.double() - wanted).abs() <= bound).all()
    return energy, gradient


@pytest.mark.parametrize("label", ["hard", "smoothed", "soft", "none"])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_label_temperature_and_dtype(prior, label):
    for i, temperature in enumerate((1.0, 2.0, 4.0, 2.5)):
        stored, index = DTYPES[(0, 2, 3)[i % 3]], (torch.int32, torch.int64)[i % 2]
        for dtype in (torch.float32, DTYPES[i]):
            _assert_right(_problem(10, 3, 4, prior, label, temperature, dtype, stored, index))


@pytest.mark.parametrize("classes", [2, 3, 10, 33, 257, 1000, 1025])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_k(prior, classes):
    for k in sorted({1, 2, min(5, classes), classes // 2, classes - 1, classes} - {0}):
        _assert_right(_problem(classes, k, 4 if classes > 200 else 70, prior))


@pytest.mark.parametrize("prior", PRIORS)
def test_rows_that_are_read_in_tiles(prior):
    for k, label, dtype in (
        (1, "hard", torch.float32),
        (32, "soft", torch.bfloat16),
        (1500, "smoothed", torch.float32),
    ):
        p = _problem(17_001, k, 2, prior, label, dtype=dtype, temperature=2.5 if label == "soft" else 1.0)
        p.logits[:, 1] += torch.linspace(-40, 40, 17_001).to(dtype)  # maxima rise
        _assert_right(p, 2.0)


@pytest.mark.parametrize("classes", [10, 17_001])
def test_masked_classes(classes):
    """The others may have no probability (rest = -inf), or be all of what is not masked."""
    for prior, label in itertools.product(PRIORS, ("hard", "smoothed")):
        p = _problem(classes, 4, 3, prior, label)
        others = torch.ones(classes, dtype=torch.bool)
        others[p.indices[0].long()] = False
        p.logits[0, 0, others] = -INF
        p.rest[0] = -INF
        p.labels[0] = p.indices[0, 1]
        if prior != "dirichlet":  # whose teacher may expect what is masked
            p.logits[0, 2, p.indices[2, 1]] = p.logits[0, 2, others.nonzero()[0]] = -INF
            p.labels[2] = IGNORED
        _assert_right(p)
        if prior == "dirichlet":  # and exclude what is not
            p.rest[1] = -INF
            _assert_right(p)


def test_chains_share_the_teacher():
    p = _problem(7, 3, 5, chains=3)
    energy, gradient = _assert_right(p)
    for chain in range(3):
        alone = interpreted(replace(p, logits=p.logits[chain : chain + 1].clone()))
        assert torch.equal(alone[0][0], energy[chain]) and torch.equal(alone[1][0], gradient[chain])


def test_the_public_path():
    p = _problem(10, 3)
    top = TopKLogits(p.teacher[0], p.indices, p.rest)
    settings = {"prior_strength": STRENGTH, "ignore_index": IGNORED}
    wanted = kd_energy(p.logits[0], p.labels, top, **settings)
    with use_backend("triton"):
        torch.testing.assert_close(kd_energy(p.logits[0], p.labels, top, **settings), wanted, rtol=2e-6, atol=0)
        top.indices[2, 1] = 10
        with pytest.raises(ValueError, match=r"teacher_logits.indices\[2, 1\] = 10: must be a class in \[0, 10\)"):
            kd_energy(p.logits[0], p.labels, top, **settings)


def _bad_problems(classes):
    """Problems whose row 2 cannot be used."""

    def changed(name, value, *where, prior="dirichlet"):
        p = _problem(classes, 3, 4, prior, label="none")
        (p.teacher[0] if name == "teacher" else p.logits[0] if name == "logits" else getattr(p, name))[(2, *where)] = (
            value
        )
        return p

    for value in (classes, -1, 2**31 - 1, -(2**31)):
        yield "teacher_index_out_of_range", changed("indices", value, 1)
    p = changed("indices", classes, 2)
    p.logits[0, 2, 0] = p.teacher[0, 2, 0] = NAN
    yield "teacher_index_out_of_range", p
    for prior in PRIORS:
        yield "logits_not_finite", changed("logits", NAN, 0, prior=prior)
        yield "logits_all_masked", changed("logits", -INF, prior=prior)
        for value in (NAN, INF):
            yield "teacher_not_finite", changed("teacher", value, 1, prior=prior)
            yield "teacher_not_finite", changed("rest", value, prior=prior)
        p = changed("teacher", -INF, prior=prior)
        p.rest[2] = -INF
        yield "teacher_all_masked", p
    for named in (True, False):
        p = _problem(classes, 3, 4, label="none")
        named_classes = p.indices[2].tolist()
        column = named_classes[1] if named else next(c for c in range(classes) if c not in named_classes)
        p.logits[0, 2, column] = -INF
        yield "teacher_on_masked_class", p
    for prior in PRIORS[1:]:
        yield "teacher_excludes_class", changed("rest", -INF, prior=prior)
        p = changed("teacher", -INF, 2, prior=prior)
        p.logits[0, 2, p.indices[2, 2]] = -2000.0  # q is 0 in float32: the fault is there all the same
        yield "teacher_excludes_class", p


@pytest.mark.parametrize("classes", [10, 17_001])
def test_every_fault_is_found_named_and_contained(classes):
    for name, p in _bad_problems(classes):
        p = replace(p, register=torch.zeros(1, dtype=torch.int64))
        energy, gradient, _, _ = interpreted(p)
        found = faults.decode(int(p.register))
        assert (found.name, found.row) == (name, 2)
        assert reference(p)[2:] == (2, name)
        assert energy[0, 2].isnan() and (gradient[0, 2] == 0).all(), name
        good = [0, 1, 3]
        assert energy[0, good].isfinite().all() and gradient[0, good].isfinite().all(), name
