"""Adding codes to tiles, and reading them as plain histograms: against the reference, NumPy, and themselves in other pieces."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bkd_fast.ops import use_backend
from bkd_fast.ops.sketch import Tiles, empty_tiles, sketch_histogram, sketch_sort_, sketch_update_

native = pytest.importorskip("bkd_fast._native")

WINDOWS = (1, 7, 32, 20, 5, 64, 40, 3)  # crosses from kept codes to counters inside a window, for 64 and for 128 bins
SHAPES = [(1, 200), (300, 1), (70, 2), (23, 10), (9, 64), (5, 129)]


def codes_with_everything(rows: int, row_cells: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes whose range grows late, constants, both ends of the scale; and draws that do not count."""
    generator = torch.Generator().manual_seed(seed)
    codes = 300 * torch.randn(sum(WINDOWS), rows, row_cells, generator=generator)
    codes += 9000 * torch.randn(rows, row_cells, generator=generator)
    codes[120:, :, 0] *= 5
    codes[:, 0, -1] = 77
    codes[60, -1], codes[90, -1] = 40000, -40000
    valid = torch.rand(len(codes), rows, generator=generator) > 0.1
    valid[:, rows // 2] = True
    return codes.round().clamp(-32768, 32767).to(torch.int16), valid


def filled(codes: Tensor, valid: Tensor | None, bins: int = 64, rows: Tensor | None = None) -> Tiles:
    tiles = empty_tiles(codes.shape[1], codes.shape[2], bins)
    begin = 0
    for size in WINDOWS:
        window = slice(begin, begin + size)
        sketch_update_(tiles, codes[window], None if valid is None else valid[window], rows)
        begin += size
    sketch_sort_(tiles)
    return tiles


def assert_same_bits(a: Tiles, b: Tiles) -> None:
    cells = a.counts.numel() * a.row_cells
    assert torch.equal(a.counts, b.counts)
    for x, y in zip(a[1:3], b[1:3], strict=True):
        assert torch.equal(x[:cells], y[:cells])
    columns = [t.counters.to(torch.int32).transpose(1, 2).reshape(-1, t.counters.shape[1])[:cells] for t in (a, b)]
    assert torch.equal(*columns)


@pytest.mark.parametrize("bins", [64, 128])
@pytest.mark.parametrize(("rows", "row_cells"), SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_update_is_the_reference_bit_for_bit(isa: str, rows: int, row_cells: int, bins: int, masked: bool) -> None:
    codes, valid = codes_with_everything(rows, row_cells, seed=row_cells)
    ours = filled(codes, valid if masked else None, bins)
    with use_backend("reference"):
        assert_same_bits(ours, filled(codes, valid if masked else None, bins))
    assert torch.equal(ours.counts, valid.sum(0).int() if masked else torch.full((rows,), len(codes)).int())


@pytest.mark.parametrize(("rows", "row_cells"), SHAPES)
def test_rows_in_pieces_on_any_number_of_threads_equal_the_whole(rows: int, row_cells: int) -> None:
    codes, valid = codes_with_everything(rows, row_cells, seed=3)
    whole = filled(codes, valid)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        pieces = empty_tiles(rows, row_cells, 64)
        for ids in torch.randperm(rows, generator=torch.Generator().manual_seed(4)).split(max(1, rows // 3)):
            ids = ids.sort().values
            sketch_update_(pieces, codes[:, ids], valid[:, ids], ids)
        sketch_sort_(pieces)
        assert_same_bits(pieces, whole)
    torch.set_num_threads(before)


@pytest.mark.parametrize("bins", [64, 128])
@pytest.mark.parametrize("draws", [1, 60, 64, 172])
def test_histograms_count_every_code_in_its_bin(draws: int, bins: int) -> None:
    rows, row_cells = 7, 11
    codes, _ = codes_with_everything(rows, row_cells, seed=5)
    codes = codes[:draws]
    tiles = empty_tiles(rows, row_cells, bins)
    sketch_update_(tiles, codes)
    low, high = codes.min(0).values, codes.max(0).values
    for least, most in ((None, None), (low // 2 - 2000, high // 2 + 20000)):
        least = None if least is None else torch.minimum(least, low)
        most = None if most is None else torch.maximum(most, high)
        found = sketch_histogram(tiles, 2, 6, *(None if x is None else x[2:6] for x in (least, most)))
        with use_backend("reference"):
            oracle = sketch_histogram(tiles, 2, 6, *(None if x is None else x[2:6] for x in (least, most)))
        assert all(torch.equal(a, b) for a, b in zip(found, oracle, strict=True))
        assert torch.equal(found.counts.sum(-1), torch.full((4, row_cells), draws, dtype=torch.int32))
        for r, c in np.ndindex(4, row_cells):
            of_cell = codes[:, r + 2, c].numpy()
            for count, first, last in zip(*(x[r, c].tolist() for x in found), strict=True):
                assert count == ((of_cell >= first) & (of_cell <= last)).sum()


def test_rows_that_are_left_out_change_nothing() -> None:
    """As on GPUs, whose row ids nobody looks at on the host."""
    codes, _ = codes_with_everything(4, 5, seed=6)
    with use_backend("reference"):
        tiles, alone = empty_tiles(3, 5, 64), empty_tiles(3, 5, 64)
        sketch_update_(tiles, codes[:, :3], None, torch.tensor([0, 2, 3]))
        sketch_update_(alone, codes[:, :2], None, torch.tensor([0, 2]))
    assert_same_bits(tiles, alone)


CODES = torch.zeros(2, 3, 5, dtype=torch.int16)
BAD = [
    ((CODES[:, :2],), r"codes are torch.int16 \(2, 2, 5\): must be torch.int16 \(draws, 3, 5\)"),
    ((CODES.int(),), "codes are torch.int32"),
    ((CODES, torch.ones(2, 2, dtype=torch.bool)), r"valid is torch.bool \(2, 2\): must be torch.bool \(2, 3\)"),
    ((CODES, None, torch.tensor([0])), r"must be torch.int16 \(draws, 1, 5\)"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_codes_change_nothing(arguments: tuple[Tensor | None, ...], message: str) -> None:
    tiles = empty_tiles(3, 5, 64)
    with pytest.raises(ValueError, match=message):
        sketch_update_(tiles, *arguments)
    assert_same_bits(tiles, empty_tiles(3, 5, 64))


def test_bad_ranges_of_histograms() -> None:
    tiles = empty_tiles(3, 5, 64)
    with pytest.raises(ValueError, match=r"rows 1 \.\. 4: must be in 0 \.\. 3"):
        sketch_histogram(tiles, 1, 4)
    with pytest.raises(ValueError, match=r"most is torch.int16 \(1, 5\): must be torch.int16 \(2, 5\)"):
        sketch_histogram(tiles, 1, 3, None, torch.zeros(1, 5, dtype=torch.int16))


def test_opcheck() -> None:
    tiles = empty_tiles(3, 5, 64)
    arguments = (CODES, torch.ones(2, 3, dtype=torch.bool), torch.arange(3))
    torch.library.opcheck(torch.ops.bkd_fast.sketch_update_.default, (*tiles, *arguments))
    extremes = torch.zeros(2, 5, dtype=torch.int16)
    torch.library.opcheck(torch.ops.bkd_fast.sketch_histogram.default, (*tiles, 1, 3, extremes, extremes))
