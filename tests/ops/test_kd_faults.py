"""Bad input to the KD energy: each an error of its own type that names the argument, the row and the value."""

import math

import pytest
import torch

from bkd_fast.errors import NonFiniteError
from bkd_fast.ops import use_backend
from bkd_fast.ops.faults import Register
from bkd_fast.ops.kd import PRIORS, kd_energy
from bkd_fast.ops.topk import TopKLogits

try:
    from bkd_fast import _native as native
except ImportError:
    native = None

NAN, INF = math.nan, math.inf


@pytest.fixture(params=["reference"] if native is None else ["reference", *native.isas()])
def backend(request):
    """The reference, then the compiled backend on every instruction set."""
    if request.param == "reference":
        with use_backend("reference"):
            yield
        return
    before = native.isa()
    native.use_isa(request.param)
    yield
    native.use_isa(before)


def _batch(classes, rows=21):
    generator = torch.Generator().manual_seed(classes)
    logits, teacher = torch.randn(2, rows, classes, generator=generator)
    return logits, teacher, torch.randint(1, classes, (rows,), generator=generator)


def _raises(error, message, logits, target, teacher, **settings):
    with pytest.raises(error, match=message):
        kd_energy(logits, target, teacher, **{"prior_strength": 2.0, "temperature": 2.0, **settings})


# one path each: across rows narrow and wide, along the row, streaming
CLASSES = [2, 10, 129, 8200]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits(backend, classes, dtype):
    for value in (NAN, INF):
        for labelled, taught in ((True, True), (True, False), (False, True), (False, False)):
            logits, teacher, target = _batch(classes)
            logits[17, classes - 1] = value
            logits[19] = NAN
            _raises(
                NonFiniteError,
                rf"logits\[17\] = \[.*{value}\]: must be finite, or -inf",
                logits.to(dtype),
                target if labelled else None,
                teacher if taught else None,
                prior_strength=2.0 if taught else 0.0,
            )
    logits, teacher, target = _batch(classes)
    logits[3] = -INF
    _raises(NonFiniteError, r"logits\[3\] = .*not masked by -inf", logits.to(dtype), target, teacher)


def test_the_place_among_chains_is_named(backend):
    logits, teacher, target = _batch(10)
    chains = logits.expand(2, 3, 21, 10).clone()
    chains[1, 0, 5, 2] = chains[1, 2, 1, 2] = NAN
    _raises(NonFiniteError, r"logits\[1, 0, 5\] = ", chains, target, teacher)


@pytest.mark.parametrize("classes", CLASSES)
def test_teacher_logits(backend, classes):
    for value in (NAN, INF):
        logits, teacher, target = _batch(classes)
        teacher[16, 0] = value
        _raises(NonFiniteError, rf"teacher_logits\[16\] = \[{value}, .*must be finite", logits, target, teacher)
    logits, teacher, target = _batch(classes)
    teacher[20] = -INF
    _raises(NonFiniteError, r"teacher_logits\[20\] = .*not masked", logits, target, teacher)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("classes", [2, 10, 129])
def test_teacher_probs(backend, classes, prior):
    for row in ([-0.25, 1.25], [0.5, 0.4], [0.75, 0.75], [NAN, 1.0]):
        logits, teacher, target = _batch(classes)
        probs = torch.softmax(teacher, -1)
        probs[8] = 0
        probs[8, :2] = torch.tensor(row)
        given = torch.stack([probs, probs]) if prior == "mixture" else probs
        place = r"\[:, 8\]" if prior == "mixture" else r"\[8\]"
        message = rf"teacher_probs{place} = \[.*must be probabilities"
        _raises(ValueError, message, logits, target, given, prior=prior, teacher_is_probs=True)


@pytest.mark.parametrize("prior", ["dirichlet", "mixture"])
@pytest.mark.parametrize("classes", CLASSES)
def test_teacher_on_a_masked_class(backend, classes, prior):
    logits, teacher, target = _batch(classes)
    logits[4, 0] = -INF
    given = teacher[None] if prior == "mixture" else teacher
    _raises(
        ValueError,
        r"teacher_logits\[4\] = .*no probability to a class whose logit is -inf",
        logits,
        target,
        given,
        prior=prior,
    )


@pytest.mark.parametrize("prior", ["continuous_categorical", "reverse_kl"])
def test_a_class_that_the_teacher_excludes(backend, prior):
    logits, teacher, target = _batch(10)
    teacher[6, 2] = -INF
    _raises(ValueError, r"teacher_logits\[6\] = .*some probability", logits, target, teacher, prior=prior)
    logits[6, 2] = -INF  # now neither expects it
    target[6] = 3
    assert kd_energy(logits, target, teacher, prior=prior, prior_strength=2.0).isfinite()


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("bad", ["classes", -1, 2**32, 2**40 + 1, -(2**63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_target_out_of_range(backend, classes, bad, dtype):
    logits, teacher, target = _batch(classes)
    target[2], target[18], target[20] = -100, classes if bad == "classes" else bad, classes
    message = rf"target\[18\] = {target[18].item()}: must be a class in \[0, {classes}\) or ignore_index = -100"
    _raises(ValueError, message, logits.to(dtype), target, teacher)
    _raises(ValueError, message, logits.to(dtype), target, teacher, label_weight=0.0)


def test_target_on_a_masked_class(backend):
    for classes in CLASSES:
        logits, teacher, target = _batch(classes)
        logits[9, 1] = teacher[9, 1] = -INF
        target[9] = 1
        _raises(ValueError, r"target\[9\] = 1: must not be on a class whose logit is -inf", logits, target, teacher)
        _raises(ValueError, r"target\[9\] = 1: must not", logits, target, None, prior_strength=0.0)
        soft = torch.full((21, classes), 1 / classes)
        _raises(ValueError, r"target\[9\] = \[.*must not be on a class", logits, soft, teacher)


def test_soft_targets(backend):
    for row in ([-0.25, 1.25], [0.5, 0.4], [0.75, 0.75], [NAN, 1.0]):
        logits, teacher, _ = _batch(10)
        soft = torch.full((21, 10), 0.1)
        soft[11] = 0
        soft[11, :2] = torch.tensor(row)
        _raises(ValueError, r"target\[11\] = \[.*must be probabilities", logits, soft, teacher)


def test_mixture_weights(backend):
    logits, teacher, target = _batch(10)
    teachers = torch.stack([teacher, teacher])
    given = {"prior": "mixture", "mixture_weights": torch.tensor([0.7, 0.7])}
    _raises(ValueError, r"mixture_weights = \[0.7, 0.7\]: must be probabilities", logits, target, teachers, **given)
    rows = torch.full((21, 2), 0.5)
    rows[13, 0] = -0.5
    given["mixture_weights"] = rows
    _raises(ValueError, r"mixture_weights\[13\] = \[-0.5, 0.5\]: must be prob", logits, target, teachers, **given)


def test_the_first_bad_row_is_named_whatever_the_threads(two_threads):
    logits, teacher, target = _batch(10, rows=50_000)
    logits[40_000, 3], target[30_001], teacher[45_000, 2] = NAN, 77, INF
    for _ in range(20):
        _raises(ValueError, r"target\[30001\] = 77", logits, target, teacher)


SHAPES = [
    ({"logits": torch.zeros(5)}, ValueError, r"logits has shape \(5,\): must be \(..., rows, classes\)"),
    ({"logits": torch.zeros(0, 4)}, ValueError, r"logits has shape \(0, 4\)"),
    ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "logits has dtype torch.int64: must be one of"),
    ({"logits": torch.zeros(3, 4, dtype=torch.complex64)}, TypeError, "logits has dtype torch.complex64"),
    ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target has shape \(4,\): must be \(3,\)"),
    ({"target": torch.zeros(3, dtype=torch.int32)}, TypeError, "target has dtype torch.int32: must be int64"),
    ({"target": torch.zeros(3, 4, dtype=torch.bool)}, TypeError, "target has dtype torch.bool"),
    ({"target": torch.zeros(3, 5)}, ValueError, r"target has shape \(3, 5\): must be \(3, 4\)"),
    ({"teacher": None}, ValueError, "teacher_logits = None: prior_strength = 2.0 needs"),
    ({"teacher": torch.zeros(3, 5)}, ValueError, r"teacher_logits has shape \(3, 5\): must be \(3, 4\)"),
    ({"teacher": torch.zeros(2, 4)}, ValueError, r"teacher_logits has shape \(2, 4\)"),
    ({"teacher": torch.zeros(2, 3, 4)}, ValueError, r"teacher_logits has shape \(2, 3, 4\): must be \(3, 4\)"),
    ({"teacher": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "teacher_logits has dtype torch.int64"),
    ({"prior": "mixture"}, ValueError, r"teacher_logits has shape \(3, 4\): must be \(teachers, 3, 4\)"),
    (
        {"prior": "mixture", "teacher": torch.zeros(2, 3, 4), "mixture_weights": torch.ones(3)},
        ValueError,
        r"mixture_weights has shape \(3,\): must be \(2,\) or \(3, 2\)",
    ),
    (
        {"prior": "mixture", "teacher": torch.zeros(2, 3, 4), "mixture_weights": torch.ones(2, dtype=torch.int64)},
        TypeError,
        "mixture_weights has dtype torch.int64",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), SHAPES)
def test_shapes_and_dtypes(changed, error, message):
    good = {"logits": torch.zeros(3, 4), "target": torch.zeros(3, dtype=torch.int64), "teacher": torch.zeros(3, 4)}
    arguments = {**good, **changed}
    _raises(error, message, arguments.pop("logits"), arguments.pop("target"), arguments.pop("teacher"), **arguments)


@pytest.mark.parametrize("classes", [2, 10, 129, 8200])
def test_signed_targets_must_sum_to_one(backend, classes):
    logits, _, _ = _batch(classes)
    good = torch.zeros(21, classes)
    good[:, 0], good[:, 1] = 100.5, -99.5
    settings = {"prior_strength": 0.0, "signed_target": True}
    assert kd_energy(logits, good, None, **settings).isfinite()
    for value in (NAN, INF, -INF, 1.0, -99.0):
        target = good.clone()
        target[13, 1] = value
        _raises(ValueError, r"target\[13\] = \[.*\]: must be finite, with sum 1", logits, target, None, **settings)
    _raises(ValueError, r"target\[0\] = .*not negative", logits, good, None, prior_strength=0.0)
    logits[5, 1] = -INF
    _raises(ValueError, r"target\[5\] = .*must not be on a class whose logit is -inf", logits, good, None, **settings)


def test_teachers_by_label(backend):
    logits, _, target = _batch(10)
    table = torch.full((10, 10), 0.1)
    settings = {"prior": "reverse_kl", "teacher_is_probs": True, "teacher_by_label": True, "temperature": 1.0}
    for label in (-1, 10, 2**40, -(2**63)):
        bad = target.clone()
        bad[7] = label
        message = rf"target\[7\] = {label}: must be a class in \[0, 10\) or ignore_index = -100$"
        _raises(ValueError, message, logits, bad, table, **settings)
    broken = table.clone()
    broken[int(target[3]), 0] = 0.3
    first = int((target == target[3]).int().argmax())
    message = rf"teacher_probs\[{first}\] = \[0.3, .*must be probabilities"
    _raises(ValueError, message, logits, target, broken, **settings)
    zero = torch.eye(10)
    _raises(ValueError, r"teacher_probs\[0\] = .*some probability", logits, target, zero, **settings)
    for given in (None, torch.full((21, 10), 0.1)):
        _raises(TypeError, "target must be classes", logits, given, table, **settings)
    _raises(
        ValueError,
        r"teacher_probs has shape \(21, 10\): must be \(10, 10\)",
        logits,
        target,
        table.new_full((21, 10), 0.1),
        **settings,
    )
    for prior in ("dirichlet", "continuous_categorical", "mixture"):
        _raises(
            ValueError,
            f"prior = '{prior}': must be 'reverse_kl'",
            logits,
            target,
            table,
            **(settings | {"prior": prior}),
        )
    top = TopKLogits.of(logits, 3)
    _raises(
        TypeError, "is TopKLogits: must be a table", logits, target, top, **(settings | {"teacher_is_probs": False})
    )


@pytest.mark.parametrize("prior", ["dirichlet", "continuous_categorical", "mixture"])
def test_a_negative_strength_is_for_the_reverse_kl_alone(backend, prior):
    logits, teacher, target = _batch(10)
    given = teacher[None] if prior == "mixture" else teacher
    _raises(
        ValueError,
        f"prior_strength = -1.0: must be at least 0 for the prior '{prior}'",
        logits,
        target,
        given,
        prior=prior,
        prior_strength=-1.0,
    )


def test_a_register_outlives_the_inference_that_it_was_made_in():
    """A device's first KD energy may be an evaluation; what a later one finds is told, and forgotten, outside."""
    with torch.inference_mode():
        register = Register(torch.device("cpu"))
    register.word.fill_(1)  # the first kind of fault, of some call
    assert isinstance(register.take(), NonFiniteError)
    assert register.take() is None
