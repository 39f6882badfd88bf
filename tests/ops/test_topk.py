"""Top-k teachers: what they keep of dense logits, and energies that equal, bit for bit, those of the rows written out."""

import itertools
import math

import pytest
import torch

import bkd_fast as bkd
from bkd_fast.ops import use_backend
from bkd_fast.ops.kd import kd_energy

try:
    from bkd_fast import _native as native
except ImportError:
    native = None

PRIORS = ["dirichlet", "continuous_categorical", "reverse_kl"]
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN: an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _logits(rows, classes, seed=0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(1000 * classes + seed)) * 4


def _batch(classes, k, rows=19, values=torch.float16, indices=torch.int32):
    top = bkd.TopKLogits.of(_logits(rows, classes, 1), k)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(classes))
    target[::3], target[1::3] = top.indices[::3, 0].long(), -100
    top = top._replace(values=top.values.to(values), indices=top.indices.to(indices))
    return _logits(rows, classes), target, top


def _run(logits, target, teacher, **settings):
    leaf = logits.clone().requires_grad_()
    arguments = {"prior_strength": 3.0, "temperature": 2.0, "label_weight": 0.7, **settings}
    energy = kd_energy(leaf, target, teacher, reduction="none", **arguments)
    energy.sum().backward()
    return energy.detach(), leaf.grad


def _assert_same(logits, target, top, **settings):
    got = _run(logits, target, top, **settings)
    wanted = _run(logits, target, top.dense(logits.shape[-1]), **settings)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert got[0].isfinite().all()


# ---- TopKLogits ----


@pytest.mark.parametrize("k", [1, 3, 9, 10])
def test_of_keeps_the_probabilities_of_the_largest(k):
    logits = _logits(7, 10).double()
    logits[3] += 1000  # exp would overflow
    top = bkd.TopKLogits.of(logits, k)
    assert top.values.dtype == top.rest.dtype == torch.float32 and top.indices.dtype == torch.int32
    dense = top.dense(10)
    assert dense.dtype == torch.float32 and dense.shape == (7, 10)
    before, after = torch.softmax(logits, -1), torch.softmax(dense.double(), -1)
    named = torch.zeros(7, 10, dtype=torch.bool).scatter_(-1, logits.topk(k).indices, True)
    torch.testing.assert_close(after[named], before[named], rtol=1e-4, atol=0)
    share = (before * ~named).sum(-1, keepdim=True) / max(10 - k, 1)
    torch.testing.assert_close(after[~named], share.expand(7, 10)[~named], rtol=1e-4, atol=0)


def test_of_keeps_the_dtype_and_masks():
    logits = _logits(3, 10).bfloat16()
    logits[0, 2:] = -INF
    top = bkd.TopKLogits.of(logits, 2)
    assert top.values.dtype == torch.bfloat16 and top.rest.dtype == torch.float32
    assert top.rest[0] == -INF and top.rest[1:].isfinite().all()
    assert torch.equal(top.dense(10)[0], logits[0].float())


@pytest.mark.parametrize("k", [0, 11])
def test_of_needs_a_k_that_is_there(k):
    with pytest.raises(ValueError, match=rf"k = {k}: must be in \[1, 10\]"):
        bkd.TopKLogits.of(torch.zeros(3, 10), k)
    with pytest.raises(TypeError, match=r"logits has dtype torch.int64"):
        bkd.TopKLogits.of(torch.zeros(3, 10, dtype=torch.int64), 2)


def test_dense_needs_classes():
    top = bkd.TopKLogits.of(_logits(3, 10), 2)
    top.indices[1, 0] = 10
    with pytest.raises(ValueError, match=r"teacher_logits.indices holds 10: must be classes in \[0, 10\)"):
        top.dense(10)


def test_a_loader_collates_and_a_device_takes_it():
    top = bkd.TopKLogits.of(_logits(6, 10), 3)
    samples = [(torch.zeros(2), i, bkd.TopKLogits(top.values[i], top.indices[i], top.rest[i])) for i in range(6)]
    (_, _, batch) = next(iter(torch.utils.data.DataLoader(samples, batch_size=6)))
    assert isinstance(batch, bkd.TopKLogits)
    assert all(torch.equal(got, wanted) for got, wanted in zip(batch, top, strict=True))
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert isinstance(moved, bkd.TopKLogits) and all(field.is_meta for field in moved)


# ---- the energy ----


@pytest.mark.skipif(native is None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10, 17, 33, 128, 129, 1000, 5000, 8200])
def test_energies_are_those_of_the_rows_written_out(isa, classes):
    kinds = itertools.cycle(
        itertools.product((torch.float16, torch.bfloat16, torch.float32), (torch.int32, torch.int64))
    )
    for k in sorted({1, 2, min(32, classes), classes // 2, classes - 1, classes} - {0}):
        logits, target, top = _batch(classes, k, 3 if classes > 2000 else 19, *next(kinds))
        soft = torch.softmax(_logits(len(logits), classes, 2), -1)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for label in (target, soft, None):
                _assert_same(logits.to(dtype), label, top)
    for prior, temperature in itertools.product(PRIORS, (1.0, 4.0, 2.5)):
        _assert_same(logits, target, top, prior=prior, temperature=temperature, label_smoothing=0.1)


@pytest.mark.parametrize("prior", PRIORS)
def test_the_reference_writes_the_rows_out(prior):
    logits, target, top = _batch(10, 3)
    with use_backend("reference"):
        _assert_same(logits, target, top, prior=prior)


def test_rest_is_not_read_where_there_are_no_others(isa):
    logits, target, top = _batch(10, 10)
    wanted = _run(logits, target, top)
    got = _run(logits, target, top._replace(rest=torch.full((19,), NAN)))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chains_share_the_teacher(isa, dtype):
    logits, target, top = _batch(10, 3, rows=21)
    chains = torch.stack([logits, logits * 2, logits - 1]).to(dtype)
    _assert_same(chains, target, top)


def test_masks(isa):
    for classes in (10, 200):
        logits, target, top = _batch(classes, 4)
        named = top.indices[5].long()
        logits[5] = logits[5].masked_fill(~torch.zeros(classes, dtype=torch.bool).scatter(0, named, True), -INF)
        top.rest[5] = -INF
        target[5] = named[2]
        for prior in PRIORS:
            _assert_same(logits, target, top, prior=prior, label_smoothing=0.1)


def test_fields_need_not_be_contiguous(isa):
    logits, target, top = _batch(10, 4)
    wide = bkd.TopKLogits(*(torch.stack([field, field], -1)[..., 0] for field in top))
    got, wanted = _run(logits, target, wide), _run(logits, target, top)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_threads_do_not_change_a_bit(two_threads):
    logits, target, top = _batch(300, 20, rows=700)
    got = _run(logits, target, top)
    torch.set_num_threads(1)
    wanted = _run(logits, target, top)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_a_teacher_without_a_prior_is_not_read():
    logits, target, top = _batch(10, 3)
    top.indices[:] = 77
    assert torch.equal(
        _run(logits, target, top, prior_strength=0.0)[0], _run(logits, target, None, prior_strength=0.0)[0]
    )


# ---- bad input ----


def _raises(error, message, logits, top, **settings):
    with pytest.raises(error, match=message):
        kd_energy(logits, None, top, **{"prior_strength": 2.0, **settings})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("classes", [5, 10, 129, 8200])
def test_bad_classes(isa, classes, dtype):
    for prior in ("dirichlet", "reverse_kl"):
        for index, bad in (
            (torch.int64, 2**32 + 1),
            (torch.int64, -(2**63)),
            (torch.int32, classes),
            (torch.int32, -1),
        ):
            logits, _, top = _batch(classes, 4, indices=index)
            top.indices[17, 2], top.indices[18, 0] = bad, classes
            message = rf"teacher_logits.indices\[17, 2\] = {bad}: must be a class in \[0, {classes}\)"
            _raises(ValueError, message, logits.to(dtype), top, prior=prior)
        logits, _, top = _batch(classes, 4)
        top.indices[16, 3] = top.indices[16, 1]
        top.values[16, 3] = top.values[16, 1]
        message = rf"teacher_logits.indices\[16, 3\] = {top.indices[16, 1]}: must be distinct in a row"
        _raises(ValueError, message, logits.to(dtype), top, prior=prior)


@pytest.mark.parametrize("classes", [10, 129])
def test_bad_numbers(isa, classes):
    for value in (NAN, INF):
        logits, _, top = _batch(classes, 3)
        top.values[7, 1] = value
        _raises(bkd.NonFiniteError, r"teacher_logits\[7\] = \[.*must be finite, or -inf", logits, top)
        logits, _, top = _batch(classes, 3)
        top.rest[8] = value
        _raises(bkd.NonFiniteError, rf"teacher_logits\[8\] = \[.*{value}.*must be finite", logits, top)
    logits, _, top = _batch(classes, 3)
    top.values[4], top.rest[4] = -INF, -INF
    _raises(bkd.NonFiniteError, r"teacher_logits\[4\] = .*not masked", logits, top)
    top.values[4, 0] = 1.0
    _raises(ValueError, r"teacher_logits\[4\] = .*some probability", logits, top, prior="reverse_kl")
    logits[2, 0] = -INF
    _raises(ValueError, r"teacher_logits\[2\] = .*no probability to a class", logits, top)


def _fields(values=(3, 2), indices=(3, 2), rest=(3,), dtype=torch.float32, index=torch.int32, rest_dtype=torch.float32):
    top = (torch.zeros(values, dtype=dtype), torch.zeros(indices, dtype=index), torch.zeros(rest, dtype=rest_dtype))
    return bkd.TopKLogits(*top)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, "teacher_logits.values has dtype torch.float64: must be one of"),
        ({"index": torch.int16}, TypeError, "teacher_logits.indices has dtype torch.int16: must be one of"),
        ({"rest_dtype": torch.int64}, TypeError, "teacher_logits.rest has dtype torch.int64: must be one of"),
        (
            {"values": (3, 5)},
            ValueError,
            r"teacher_logits.values has shape \(3, 5\): must be \(rows, k\), k in \[1, 4\]",
        ),
        ({"values": (3, 0)}, ValueError, r"teacher_logits.values has shape \(3, 0\)"),
        ({"indices": (3, 1)}, ValueError, r"teacher_logits.indices has shape \(3, 1\): must be \(3, 2\)"),
        ({"rest": (3, 1)}, ValueError, r"teacher_logits.rest has shape \(3, 1\): must be \(3,\)"),
        (
            {"values": (2, 2), "indices": (2, 2), "rest": (2,)},
            ValueError,
            r"values has shape \(2, 2\): must be \(3, k\)",
        ),
    ],
)
def test_fields(fields, error, message):
    _raises(error, message, torch.zeros(3, 4), _fields(**fields))


def test_what_takes_no_top_k():
    with pytest.raises(TypeError, match="teacher_logits is TopKLogits: must be a tensor for a mixture"):
        bkd.KDLoss(2.0, prior="mixture")(torch.zeros(3, 4), None, _fields())
    with pytest.raises(TypeError, match="teacher_probs is TopKLogits: must be a tensor for probabilities"):
        bkd.KDLoss(2.0)(torch.zeros(3, 4), None, teacher_probs=_fields())


# ---- inside torch ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    logits, target, top = _batch(5, 2)
    settings = ("dirichlet", False, False, 2.0, 1.5, 0.8, 0.1, False, -100, reduction)
    torch.library.opcheck(torch.ops.bkd_fast.kd_energy, (logits.requires_grad_(), target, *top, None, *settings))


def test_compiles_into_one_graph():
    logits, target, top = _batch(5, 2)
    loss_fn = bkd.KDLoss(2.0, 2.0)
    results = []
    for function in (loss_fn, torch.compile(loss_fn, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(leaf, target, top).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("mapped", [(0, None, None), (None, None, 0), (0, 0, 0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_is_a_loop(mapped, reduction):
    batches = [_batch(5, 2, rows=9) for _ in range(3)]
    batches = [(z + i, y.roll(i), top._replace(values=top.values - i)) for i, (z, y, top) in enumerate(batches)]
    logits, targets, tops = zip(*batches, strict=True)
    stacked = [torch.stack(logits), torch.stack(targets), bkd.TopKLogits(*map(torch.stack, zip(*tops, strict=True)))]
    given = [many if dim == 0 else many_of[0] for many, many_of, dim in
             zip(stacked, (logits, targets, tops), mapped, strict=True)]  # fmt: skip

    def gradient(logits, target, top):
        def loss(z):
            return kd_energy(z, target, top, prior_strength=2.0, reduction=reduction).sum()

        return torch.func.grad(loss)(logits)

    def of(i):
        return [many_of[i if dim == 0 else 0] for many_of, dim in zip((logits, targets, tops), mapped, strict=True)]

    wanted = torch.stack([gradient(*of(i)) for i in range(3)])
    torch.testing.assert_close(torch.vmap(gradient, mapped)(*given), wanted)


def test_a_teacher_that_asks_for_gradients_is_data():
    logits, target, top = _batch(5, 2, values=torch.float32)
    top.values.requires_grad_()
    top.rest.requires_grad_()
    leaf = logits.clone().requires_grad_()
    bkd.KDLoss(2.0)(leaf, target, top).backward()
    assert leaf.grad is not None and top.values.grad is None and top.rest.grad is None
