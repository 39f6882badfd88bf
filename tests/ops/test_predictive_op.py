"""The posterior predictive's update: every instruction set against the reference, itself in other pieces, and bad input."""

import pytest
import torch
from torch import Tensor

from bkd_fast.ops import use_backend
from bkd_fast.ops.predictive import PredictiveState, empty_state, predictive_update_
from bkd_fast.ops.sketch import empty_tiles, sketch_sort_, sketch_update_

native = pytest.importorskip("bkd_fast._native")

WINDOWS = (1, 7, 32, 20, 5, 64, 40, 3)  # crosses from kept codes to counters inside a window, for 64 and for 128 bins


def draws_with_everything(rows: int, classes: int, seed: int, draws: int = sum(WINDOWS)) -> Tensor:
    """Logits with masked classes, ties, invalid rows of every kind, and outliers that raise levels late."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(draws, rows, classes, generator=generator) + 3 * torch.randn(rows, classes, generator=generator)
    z[:, 1, 0] = -torch.inf
    z[3::5, 2, 1] = -torch.inf
    z[4, 0, classes - 1] = torch.nan
    z[40, rows // 2, 0] = torch.inf
    z[41:44, rows - 1] = -torch.inf
    z[5, 3, :2] = 20.0
    z[150, :, 0] += 30
    z[7, 4, 1].view(torch.int32).fill_(0x7FC00001)  # a NaN with a payload
    return z


def updated(state: PredictiveState, logits: Tensor, rows: Tensor | None = None) -> PredictiveState:
    begin = 0
    for size in WINDOWS:
        predictive_update_(state, logits[begin : begin + size], rows)
        begin += size
    sketch_sort_(state.tiles)
    return state


def tensors(state: PredictiveState) -> dict[str, Tensor]:
    """Every array of the state; padding cells belong to no one and are left out."""
    cells = state.tiles.counts.numel() * state.tiles.row_cells
    named = {**state.tiles._asdict(), **state._asdict()}
    flat = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    counters = flat.pop("counters").to(torch.int32).transpose(1, 2).reshape(-1, state.tiles.counters.shape[1])[:cells]
    padded = state.mean.numel()
    return {"counters": counters, **{k: v[:cells] if v.numel() == padded else v for k, v in flat.items()}}


def assert_same_bits(a: PredictiveState, b: PredictiveState) -> None:
    for (name, x), y in zip(tensors(a).items(), tensors(b).values(), strict=True):
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), name


SHAPES = [(70, 10), (70, 2), (70, 17), (9, 37), (8, 100), (7, 129)]


@pytest.mark.parametrize("bins", [64, 128])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_agrees_with_the_reference(isa: str, rows: int, classes: int, bins: int) -> None:
    logits = draws_with_everything(rows, classes, seed=classes)
    ours = tensors(updated(empty_state(rows, classes, bins), logits))
    with use_backend("reference"):
        oracle = tensors(updated(empty_state(rows, classes, bins), logits))
    for name in ("counts", "invalid"):
        assert torch.equal(ours[name], oracle[name])
    # a code may round the other way where float32 and float64 differ: then one draw moves to a neighbouring slot
    assert (ours["minimum"].int() - oracle["minimum"].int()).abs().max() <= 1
    assert (ours["maximum"].int() - oracle["maximum"].int()).abs().max() <= 1
    same_range = (ours["minimum"] == oracle["minimum"]) & (ours["maximum"] == oracle["maximum"])
    assert same_range.double().mean() > 0.99
    moved = (ours["counters"] - oracle["counters"])[same_range].abs().sum() / 2
    assert moved <= 1e-4 * logits.numel()
    for name, tolerance in (("mean", 2e-6), ("m2", 1e-5), ("entropy", 1e-6), ("divergence", 1e-5), ("reference", 2e-6)):
        torch.testing.assert_close(ours[name], oracle[name], rtol=tolerance, atol=1e-9, msg=name)


@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_every_instruction_set_gives_the_same_bits(rows: int, classes: int) -> None:
    logits = draws_with_everything(rows, classes, seed=1)
    states = []
    before = native.isa()
    for name in native.isas():
        native.use_isa(name)
        states.append(updated(empty_state(rows, classes, 64), logits))
    native.use_isa(before)
    for state in states[:-1]:
        assert_same_bits(state, states[-1])


@pytest.mark.parametrize(("rows", "classes"), [(400, 10), (40, 1000), (90, 37)])
def test_threads_do_not_change_a_bit(rows: int, classes: int) -> None:
    logits = draws_with_everything(rows, classes, seed=2, draws=sum(WINDOWS))
    before = torch.get_num_threads()
    states = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        states.append(updated(empty_state(rows, classes, 64), logits))
    torch.set_num_threads(before)
    assert_same_bits(states[0], states[1])
    assert_same_bits(states[0], states[2])


@pytest.mark.parametrize(("rows", "classes"), [(70, 10), (70, 2), (9, 100), (9, 37)])
def test_batches_of_rows_in_any_order_equal_the_whole(isa: str, rows: int, classes: int) -> None:
    logits = draws_with_everything(rows, classes, seed=3)
    whole = updated(empty_state(rows, classes, 64), logits)
    pieces = empty_state(rows, classes, 64)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(4))
    for ids in order.split(max(1, rows // 5)):
        updated(pieces, logits[:, ids], ids)
    assert_same_bits(pieces, whole)


def test_rows_with_unequal_numbers_of_draws_equal_separate_states(isa: str) -> None:
    """Tiles that mix rows without draws, with kept codes, converting ones and counted ones."""
    rows, classes = 23, 10
    logits = draws_with_everything(rows, classes, seed=5, draws=160)
    generator = torch.Generator().manual_seed(6)
    first = torch.randint(0, 120, (rows,), generator=generator)
    mixed = empty_state(rows, classes, 64)
    for r in range(rows):
        predictive_update_(mixed, logits[: int(first[r]), r : r + 1], torch.tensor([r]))
    present = torch.arange(0, rows, 2)
    predictive_update_(mixed, logits[120:, present], present)
    sketch_sort_(mixed.tiles)
    for r in range(rows):
        alone = empty_state(1, classes, 64)
        predictive_update_(alone, logits[: int(first[r]), r : r + 1])
        if r % 2 == 0:
            predictive_update_(alone, logits[120:, r : r + 1])
        sketch_sort_(alone.tiles)
        cells = slice(r * classes, (r + 1) * classes)
        for (name, x), y in zip(tensors(mixed).items(), tensors(alone).values(), strict=True):
            assert torch.equal(x[cells if len(y) == classes else slice(r, r + 1)], y), (r, name)


def test_opcheck() -> None:
    state = empty_state(3, 5, 64)
    arguments = (
        torch.randn(4, 3, 5), torch.arange(3), torch.arange(3), torch.tensor([[0, 4]] * 3, dtype=torch.int32),
        *state.tiles[:4], state.mean, state.m2, state.reference, state.invalid, state.entropy, state.divergence,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.bkd_fast.predictive_update_.default, arguments)


BAD = [
    (torch.zeros(1, 3, 4), None, ValueError, r"logits have shape \(1, 3, 4\): must be \(draws, rows, 5\)"),
    (torch.zeros(3, 5), None, ValueError, "logits have shape"),
    (torch.zeros(1, 3, 5, dtype=torch.float64), None, TypeError, "logits have dtype torch.float64"),
    (torch.zeros(1, 2, 5), None, ValueError, "2 rows and rows = None: must be all 3 rows"),
    (torch.zeros(1, 2, 5), torch.tensor([0, 3]), ValueError, r"rows holds 3: must be in 0 .. 2"),
    (torch.zeros(1, 2, 5), torch.tensor([-1, 1]), ValueError, "rows holds -1"),
    (torch.zeros(1, 2, 5), torch.tensor([1, 1]), ValueError, "rows holds 1 twice"),
    (torch.zeros(1, 2, 5), torch.tensor([1]), ValueError, r"rows has shape \(1,\): must be \(2,\)"),
    (torch.zeros(1, 2, 5), torch.tensor([0, 1], dtype=torch.int32), TypeError, "rows has dtype torch.int32"),
]


@pytest.mark.parametrize(("logits", "rows", "error", "message"), BAD)
def test_bad_input_changes_nothing(logits: Tensor, rows: Tensor | None, error: type[Exception], message: str) -> None:
    state, untouched = empty_state(3, 5, 64), empty_state(3, 5, 64)
    for s in (state, untouched):
        predictive_update_(s, torch.arange(30.0).reshape(2, 3, 5))
    with pytest.raises(error, match=message):
        predictive_update_(state, logits, rows)
    assert_same_bits(state, untouched)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 1, 64), "num_classes = 1"), ((-1, 5, 64), "num_rows = -1"), ((3, 5, 32), "bins = 32: must be one of")],
)
def test_bad_sizes(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        empty_state(*arguments)


@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_picked_codes_are_those_of_the_histogram(isa: str, rows: int, classes: int) -> None:
    """Cells that pick every class sketch what the histogram holds, whatever the batches; the reference agrees to a rounding."""
    logits = draws_with_everything(rows, classes, seed=7)
    picked = torch.stack(
        [torch.randperm(classes, generator=torch.Generator().manual_seed(r)) for r in range(rows)]
    ).int()
    state, tiles = empty_state(rows, classes, 64), empty_tiles(rows, classes, 64)
    for ids in torch.randperm(rows, generator=torch.Generator().manual_seed(8)).split(5):
        found = predictive_update_(state, logits[:, ids], ids, picked=picked)
        assert torch.equal(found.order, ids.sort().values)
        with use_backend("reference"):
            oracle = predictive_update_(empty_state(rows, classes, 64), logits[:, ids], ids, picked=picked)
        assert torch.equal(found.valid, oracle.valid)
        assert (found.codes.int() - oracle.codes.int())[found.valid].abs().max() <= 1
        unpicked = torch.empty_like(found.codes).scatter_(
            2, picked[found.order].long().expand(len(logits), -1, -1), found.codes
        )
        sketch_update_(tiles, unpicked, found.valid, found.order)
    for t in (state.tiles, tiles):
        sketch_sort_(t)
    assert_same_bits(state, state._replace(tiles=tiles))


@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_without_a_histogram_the_rest_is_the_same(isa: str, rows: int, classes: int) -> None:
    logits = draws_with_everything(rows, classes, seed=9)
    whole = updated(empty_state(rows, classes, 64), logits)
    states = {}
    for backend in ("cpp", "reference"):
        with use_backend(backend):
            states[backend] = empty_state(rows, classes, 64, histogram=False)
            begin = 0
            for size in WINDOWS:
                predictive_update_(states[backend], logits[begin : begin + size])
                begin += size
    ours, oracle = tensors(states["cpp"]), tensors(states["reference"])
    assert not ours["minimum"].numel()
    for name, expected in tensors(whole).items():
        if name not in ("counters", "minimum", "maximum"):
            assert torch.equal(ours[name], expected), name
            torch.testing.assert_close(oracle[name], expected, rtol=1e-5, atol=1e-9, msg=name)


def test_classes_that_are_picked_wrongly_change_nothing() -> None:
    state = empty_state(3, 5, 64)
    for picked in (torch.zeros(3, 2), torch.zeros(2, 2).int(), torch.zeros(3).int()):
        with pytest.raises(ValueError, match=r"picked is .*: must be torch.int32 \(3, picks\)"):
            predictive_update_(state, torch.zeros(1, 3, 5), picked=picked)
    assert_same_bits(state, empty_state(3, 5, 64))
