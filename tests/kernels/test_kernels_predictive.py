"""The posterior predictive's GPU kernels without a GPU: Triton's in its interpreter against the CPU, and the lanes of the CUDA
kernel (csrc/tile.h) compiled for the host, which must give the CPU's bits. See test_gpu_predictive.py for a GPU."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from predictive_states import (
    assert_close,
    assert_moments_close,
    assert_padding_is_empty,
    assert_same_bits,
    assert_same_tiles,
    copied,
    filled_unequally,
    logits_of,
)
from torch import Tensor

from bkd_fast.ops import use_backend
from bkd_fast.ops.predictive import (
    PickedCodes,
    PredictiveState,
    Rows,
    empty_state,
    predictive_update_,
    recorded_rows,
    sorted_rows,
)
from bkd_fast.ops.sketch import (
    Tiles,
    empty_tiles,
    sketch_deviance_quantile,
    sketch_histogram,
    sketch_merge_,
    sketch_quantile,
    sketch_sort_,
    sketch_update_,
)

pytest.importorskip("bkd_fast._native")

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


# ---- Triton, interpreted ----


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton is not interpreted where there is a GPU: test_gpu_predictive.py"
)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter's NaN and infinities


@interpreted
@pytest.mark.parametrize(
    ("classes", "bins", "counts", "present"),
    [
        # a new row, kept codes, codes that just fit, the change-over inside the window, counters; the last row is absent
        (10, 64, [0, 3, 60, 62, 64, 65, 200, 70], [6, 0, 1, 4, 3, 2, 5]),
        (37, 128, [127, 300, 0, 128], [3, 2, 0, 1]),  # rows that straddle tiles in the middle of a lane
        (2, 64, [1, 70, 0, 64], [1, 2, 3, 0]),
    ],
)
def test_triton_agrees_with_the_cpu(classes: int, bins: int, counts: list[int], present: list[int]) -> None:
    pytest.importorskip("triton")
    theirs = filled_unequally(len(counts), classes, bins, counts)
    ours = copied(theirs)
    logits = logits_of(4, len(present), classes, seed=7)
    predictive_update_(theirs, logits, torch.tensor(present))
    with use_backend("triton"):
        predictive_update_(ours, logits, torch.tensor(present))
    assert int(theirs.invalid.sum()) >= 3
    assert_close(ours, theirs)


@interpreted
@pytest.mark.parametrize(("classes", "picks"), [(10, 3), (37, 1), (2, 2)])
def test_triton_picks_codes_and_leaves_the_histogram_out(classes: int, picks: int) -> None:
    pytest.importorskip("triton")
    rows, present = 5, torch.tensor([4, 0, 2, 3])
    picked = torch.stack(
        [torch.randperm(classes, generator=torch.Generator().manual_seed(r))[:picks] for r in range(rows)]
    ).int()
    theirs, ours = (empty_state(rows, classes, 64, histogram=False) for _ in range(2))
    for seed in (1, 2):  # new rows, and old ones
        logits = logits_of(5, len(present), classes, seed=seed)
        expected = predictive_update_(theirs, logits, present, picked=picked)
        with use_backend("triton"):
            found = predictive_update_(ours, logits, present, picked=picked)
        assert torch.equal(found.order, expected.order) and torch.equal(found.valid, expected.valid)
        assert not expected.valid.all()
        assert (found.codes.int() - expected.codes.int())[expected.valid].abs().max() <= 1
        assert_moments_close(ours, theirs)


@interpreted
@pytest.mark.parametrize(
    ("row_cells", "bins", "counts", "present"),
    [
        (10, 64, [0, 3, 60, 62, 64, 65, 200, 70], [0, 1, 2, 3, 4, 5, 6]),
        (37, 128, [127, 300, 0, 128], [0, 2, 3]),
        (1, 64, [*range(55, 70), 0, 100], [0, *range(3, 17)]),
        (150, 64, [63, 200], [0, 1]),
    ],
)
def test_triton_adds_codes_to_the_cpus_bits(row_cells: int, bins: int, counts: list[int], present: list[int]) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(row_cells)

    def codes_of(draws: int, rows: int, spread: int) -> Tensor:
        return (
            (spread * torch.randn(draws, rows, row_cells, generator=generator))
            .round()
            .clamp(-32768, 32767)
            .to(torch.int16)
        )

    theirs = empty_tiles(len(counts), row_cells, bins)
    for r, count in enumerate(counts):
        sketch_update_(theirs, codes_of(count, 1, 900), None, torch.tensor([r]))
    ours = Tiles(*(t.clone() for t in theirs[:4]), row_cells)
    rows = torch.tensor([*present, len(counts)])  # the last one is left out
    some = torch.rand(6, len(rows), generator=generator) > 0.3
    for valid in (some, None):
        codes = codes_of(6, len(rows), 2500)
        sketch_update_(theirs, codes[:, :-1], None if valid is None else valid[:, :-1], rows[:-1])
        with use_backend("triton"):
            sketch_update_(ours, codes, valid, rows)
        assert_same_tiles(ours, theirs)
        assert_padding_is_empty(ours)


@interpreted
def test_triton_measures_rows_longer_than_a_block() -> None:
    pytest.importorskip("triton")
    theirs, ours = empty_state(1, 1100, 64), empty_state(1, 1100, 64)
    logits = torch.randn(1, 1, 1100, generator=torch.Generator().manual_seed(3))
    logits[0, 0, 1050] = 9.0
    predictive_update_(theirs, logits)
    with use_backend("triton"):
        predictive_update_(ours, logits)
    assert_close(ours, theirs)


@interpreted
def test_triton_leaves_recorded_rows_out() -> None:
    pytest.importorskip("triton")
    logits = logits_of(2, 5, 10, seed=4)
    faults = torch.zeros(2, dtype=torch.int64)
    ours, theirs = empty_state(4, 10, 64), empty_state(4, 10, 64)
    with use_backend("triton"):
        predictive_update_(ours, logits, recorded_rows(torch.tensor([2, 9, 1, 3, 1]), 4, faults), most=0)
    predictive_update_(theirs, logits[:, [0, 3]], torch.tensor([2, 3]))
    assert_close(ours, theirs)
    assert_padding_is_empty(ours.tiles, *ours[1:4])
    assert faults.tolist() == [3, 1]


def test_recorded_rows() -> None:
    """What `sorted_rows` refuses is left out and counted; the first of the ids in ascending order is named."""
    for ids, left_out, named in (([3, 0, 2], 0, 0), ([3, -1, 0], 1, -1), ([5, 2, 2, 2], 4, 2), ([7], 1, 7)):
        faults = torch.zeros(2, dtype=torch.int64)
        rows = recorded_rows(torch.tensor(ids), 5, faults)
        assert faults.tolist() == [left_out, named]
        good = sorted(i for i in ids if 0 <= i < 5 and ids.count(i) == 1)
        assert rows.order.tolist() == good + [5] * left_out
        assert sorted(rows.batch.tolist()) == list(range(len(ids)))
        assert [ids[b] for b in rows.batch.tolist()][: len(good)] == good
        if not left_out:
            assert all(map(torch.equal, rows, sorted_rows(torch.tensor(ids), len(ids), 5, torch.device("cpu"))))


@interpreted
def test_the_sketch_without_cupy_is_the_cpus() -> None:
    pytest.importorskip("triton")
    tiles, other = (filled_unequally(5, 7, 64, counts).tiles for counts in ([0, 5, 64, 65, 99], [3, 0, 9, 70, 80]))
    expected, levels = Tiles(*(t.clone() for t in tiles[:4]), 7), torch.linspace(0.1, 1, 5, dtype=torch.float64)
    sketch_merge_(expected, other)
    sketch_sort_(expected)
    with use_backend("triton"):
        sketch_merge_(tiles, other)
        sketch_sort_(tiles)
        found = [*sketch_quantile(tiles, 0.3), sketch_deviance_quantile(tiles, levels), *sketch_histogram(tiles, 1, 4)]
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(tiles[:4], expected[:4], strict=True)
    )
    theirs = [
        *sketch_quantile(expected, 0.3),
        sketch_deviance_quantile(expected, levels),
        *sketch_histogram(expected, 1, 4),
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))


# ---- CUDA's lanes, on the host ----


@pytest.fixture(scope="session")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("lanes") / "tiles.so"
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    subprocess.run([compiler, *options, f"-I{CSRC}", str(HERE / "tiles.cpp"), "-o", str(library)], check=True)
    yield ctypes.CDLL(str(library))


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def update_by_lanes(
    lanes: ctypes.CDLL,
    state: PredictiveState,
    logits: Tensor,
    rows: Rows | None = None,
    chunk: int = 1000,
    picked: Tensor | None = None,
) -> PickedCodes:
    """`predictive_update_` of up to 64 draws as csrc/cuda/predictive.cu does it, `chunk` rows at a time."""
    if rows is None:
        rows = Rows(torch.arange(logits.shape[1]), torch.arange(logits.shape[1]))
    tiles, *others = state
    picked = torch.empty(tiles.counts.numel(), 0, dtype=torch.int32) if picked is None else picked
    draws, size = logits.shape[0], rows.order.numel()
    codes = torch.zeros(draws, size, picked.shape[1], dtype=torch.int16)
    valid = torch.zeros(draws, size, dtype=torch.bool)
    long = ctypes.c_int64
    lanes.update_tiles(
        address(logits), long(logits.stride(0)), logits.shape[0], address(rows.order), address(rows.batch),
        long(rows.order.numel()), long(chunk), *map(address, (tiles.counters, tiles.minimum, tiles.maximum)),
        *map(address, others[:3]), address(tiles.counts), *map(address, others[3:]), long(tiles.counts.numel()),
        tiles.row_cells, tiles.counters.shape[1], address(picked), picked.shape[1], address(codes), address(valid),
    )  # fmt: skip
    return PickedCodes(rows.order, codes, valid)


WINDOWS = (1, 7, 32, 20, 5, 64, 40, 3)
SHAPES = [(70, 2), (70, 10), (70, 17), (9, 33), (9, 37), (8, 64), (8, 100), (7, 129), (5, 1000)]


@pytest.mark.parametrize("bins", [64, 128])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_lanes_give_the_cpus_bits(lanes: ctypes.CDLL, rows: int, classes: int, bins: int) -> None:
    logits = logits_of(sum(WINDOWS), rows, classes, seed=classes)
    ours, theirs = empty_state(rows, classes, bins), empty_state(rows, classes, bins)
    begin = 0
    for size in WINDOWS:
        predictive_update_(theirs, logits[begin : begin + size])
        update_by_lanes(lanes, ours, logits[begin : begin + size])
        assert_same_bits(ours, theirs)
        begin += size


@pytest.mark.parametrize("bins", [64, 128])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_lanes_of_subsets_in_chunks_give_the_cpus_bits(lanes: ctypes.CDLL, rows: int, classes: int, bins: int) -> None:
    """Rows of unequal counts: tiles where some cells are absent, new, kept, changing over and counting."""
    logits = logits_of(64, rows, classes, seed=classes + 1)
    ours, theirs = empty_state(rows, classes, bins), empty_state(rows, classes, bins)
    generator = torch.Generator().manual_seed(bins)
    for k in range(15):
        ids = torch.randperm(rows, generator=generator)[: max(1, rows * (1 + k % 3) // 4)]
        draws = (1, 7, 32, 20, 64, 3)[k % 6]
        batch = logits[:draws, ids]
        predictive_update_(theirs, batch, ids)
        update_by_lanes(lanes, ours, batch, sorted_rows(ids, len(ids), rows, ids.device), chunk=1 + k)
        assert_same_bits(ours, theirs)
    assert len(theirs.tiles.counts.unique()) > 2


@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_lanes_pick_codes_and_leave_the_histogram_out_to_the_cpus_bits(
    lanes: ctypes.CDLL, rows: int, classes: int
) -> None:
    logits = logits_of(40, rows, classes, seed=classes + 2)
    ours, theirs = (empty_state(rows, classes, 64, histogram=False) for _ in range(2))
    generator = torch.Generator().manual_seed(rows)
    picked = torch.randint(classes, (rows, 3), generator=generator).int()
    for draws in (40, 5):
        ids = torch.randperm(rows, generator=generator)[: rows - 1]
        expected = predictive_update_(theirs, logits[:draws, ids], ids, picked=picked)
        found = update_by_lanes(
            lanes, ours, logits[:draws, ids], sorted_rows(ids, len(ids), rows, ids.device), 4, picked
        )
        assert_same_bits(ours, theirs)
        assert torch.equal(found.valid, expected.valid)
        assert torch.equal(found.codes[found.valid], expected.codes[expected.valid])


@pytest.mark.parametrize("bins", [64, 128])
@pytest.mark.parametrize("row_cells", [1, 2, 17, 64, 150])
def test_cells_take_codes_to_the_cpus_bits(lanes: ctypes.CDLL, row_cells: int, bins: int) -> None:
    rows = 9
    generator = torch.Generator().manual_seed(row_cells)
    ours, theirs = empty_tiles(rows, row_cells, bins), empty_tiles(rows, row_cells, bins)
    for draws in (1, 60, 7, 64, 30, 64):
        ids = torch.randperm(rows, generator=generator)[:7].sort().values
        spread = 10 ** torch.randint(1, 5, (row_cells,), generator=generator)
        codes = (spread * torch.randn(draws, 8, row_cells, generator=generator)).round().clamp(-32768, 32767)
        codes = codes.to(torch.int16)
        valid = None if draws == 7 else torch.rand(draws, 8, generator=generator) > 0.2
        sketch_update_(theirs, codes[:, :7], None if valid is None else valid[:, :7], ids)
        order = torch.cat([ids, torch.tensor([rows])])  # which is left out
        lanes.update_cells(
            *map(address, ours[:4]), ctypes.c_int64(rows), ctypes.c_int64(row_cells), bins, address(codes),
            None if valid is None else address(valid), draws, address(order), ctypes.c_int64(8),
        )  # fmt: skip
        assert_same_tiles(ours, theirs)


@pytest.mark.parametrize("chunk", [2, 6])
def test_lanes_leave_recorded_rows_out(lanes: ctypes.CDLL, chunk: int) -> None:
    logits = logits_of(9, 6, 10, seed=4)
    ours, theirs = empty_state(5, 10, 64), empty_state(5, 10, 64)
    rows = recorded_rows(torch.tensor([2, 9, 1, 4, 1, -4]), 5, torch.zeros(2, dtype=torch.int64))
    update_by_lanes(lanes, ours, logits, rows, chunk)
    predictive_update_(theirs, logits[:, [0, 3]], torch.tensor([2, 4]))
    assert_same_bits(ours, theirs)
    assert_padding_is_empty(ours.tiles, *ours[1:4])
