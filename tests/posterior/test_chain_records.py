"""What is kept of every chain: against the draws themselves, in any batches, and joined and moved."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bkd_fast.ops.sketch import Tiles, sketch_histogram, sketch_sort_
from bkd_fast.posterior.chains import BATCHES, ChainRecord, Piece, chains_from_dict, chains_to_dict
from bkd_fast.posterior.pooling import join_records

ROWS, CELLS = 5, 2
CPU = torch.device("cpu")


def draws_of(number: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = (800 * torch.randn(number, ROWS, CELLS, generator=generator)).round().to(torch.int16)
    valid = torch.rand(number, ROWS, generator=generator) > 0.2
    valid[:, 0] = True
    return codes, valid


def filled(codes: Tensor, valid: Tensor, windows: int, num_draws: int | None = None) -> ChainRecord:
    record = ChainRecord.empty(ROWS, CELLS, num_draws, True, CPU)
    for begin in range(0, len(codes), windows):
        window = slice(begin, begin + windows)
        for rows in (torch.tensor([0, 3]), torch.tensor([1, 2, 4, ROWS])):  # the last one is left out
            batch = rows.clamp(max=ROWS - 1)
            record.add(codes[window, batch], valid[window, batch], rows)
    return record


def tiles_hold(tiles: Tiles, row: int, codes: np.ndarray) -> bool:
    """Whether a row's cells hold just these codes (draws, cells)."""
    if int(tiles.counts[row]) != len(codes):
        return False
    counts, first, last = (array[0].numpy() for array in sketch_histogram(tiles, row, row + 1))
    return all(
        counts[c, b] == ((codes[:, c] >= first[c, b]) & (codes[:, c] <= last[c, b])).sum()
        for c, b in np.ndindex(CELLS, 128)
    )


@pytest.mark.parametrize("num_draws", [None, 300])
@pytest.mark.parametrize("windows", [1, 32, 77])
def test_records_hold_the_draws_of_every_row(windows: int, num_draws: int | None) -> None:
    codes, valid = draws_of(300, seed=windows)
    record = filled(codes, valid, windows, num_draws)
    assert len(record.segments) * record.length >= 300 and record.batch * BATCHES >= 300 > record.batch * BATCHES / 2
    if num_draws:
        assert (len(record.segments), record.length) == (2, 150)
    for row in range(ROWS):
        mine = codes[valid[:, row], row].numpy().astype(np.int64)
        assert int(record.counts[row]) == len(mine)
        assert record.trace[row, : len(mine)].tolist() == mine[:, 0].tolist()
        assert record.total[row].tolist() == mine.sum(0).tolist()
        assert record.squares[row].tolist() == (mine**2).sum(0).tolist()
        for b in range(BATCHES):
            of_batch = mine[b * record.batch : (b + 1) * record.batch]
            assert record.batches[row, :, b].tolist() == of_batch.sum(0).tolist()
        for s, tiles in enumerate(record.segments):
            assert tiles_hold(tiles, row, mine[s * record.length : (s + 1) * record.length])
        first, second = record.halves()
        cut = int(first.counts[0])
        assert abs(2 * cut - 300) <= record.length
        assert tiles_hold(first, row, mine[:cut]) and tiles_hold(second, row, mine[cut:])


def tensors(record: ChainRecord) -> dict[str, Tensor]:
    for tiles in record.segments:
        sketch_sort_(tiles)
    return record.tensors()


def assert_same(a: ChainRecord, b: ChainRecord) -> None:
    assert (a.length, a.batch) == (b.length, b.batch)
    for (name, x), y in zip(tensors(a).items(), tensors(b).values(), strict=True):
        width = min(x.shape[-1], y.shape[-1]) if name == "trace" else x.shape[-1]
        assert torch.equal(x[..., :width], y[..., :width]), name


def test_batches_of_draws_do_not_change_a_bit() -> None:
    codes, valid = draws_of(200, seed=1)
    for windows in (7, 64, 200):
        assert_same(filled(codes, valid, windows), filled(codes, valid, 1))


def test_saved_and_loaded() -> None:
    codes, valid = draws_of(120, seed=2)
    chains = {
        Piece(2**63 + 5, 1, 0, 10): filled(codes, valid, 32),
        Piece(3, 0, 2, 0): filled(codes[:50], valid[:50], 32),
    }
    state = {**chains_to_dict(chains), "watched": torch.zeros(ROWS, CELLS, dtype=torch.int32)}
    loaded = chains_from_dict(state, ROWS, CPU)
    assert loaded.keys() == chains.keys()
    for piece, record in chains.items():
        assert_same(loaded[piece], record)
    loaded[Piece(3, 0, 2, 0)].add(codes[50:], valid[50:], torch.arange(ROWS))
    assert_same(loaded[Piece(3, 0, 2, 0)], loaded[Piece(2**63 + 5, 1, 0, 10)])
    for change, message in (
        ({"chain1.total": torch.zeros(ROWS, 3, dtype=torch.int64)}, r"chain1\.total: torch.int64 \(5, 3\): must be"),
        ({"chains": torch.zeros(1, 7)}, r"chains: torch.float32 \(1, 7\): must be torch.int64 \(\*, 8\)"),
        ({"chain0.trace": 3}, "chain0.trace: int: must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            chains_from_dict({**state, **change}, ROWS, CPU)
    with pytest.raises(ValueError, match=r"state lacks chain0\.batches"):
        chains_from_dict({k: v for k, v in state.items() if k != "chain0.batches"}, ROWS, CPU)


def test_shards_of_rows_join_whatever_their_lengths() -> None:
    codes, valid = draws_of(150, seed=3)
    whole, few = filled(codes, valid, 32), filled(codes[:20], valid[:20], 32)
    joined = join_records([few.on(CPU), whole.on(CPU)], [slice(0, ROWS)] * 2)
    assert torch.equal(joined.total, torch.cat([few.total, whole.total]))
    for row in range(2 * ROWS):
        part, end = (few, 20) if row < ROWS else (whole, 150)
        mine = codes[:end][valid[:end, row % ROWS], row % ROWS].numpy().astype(np.int64)
        first, second = joined.halves()
        cut = min(len(mine), int(first.counts.max()))
        assert tiles_hold(first, row, mine[:cut]) and tiles_hold(second, row, mine[cut:])
        assert joined.trace[row, : len(mine)].tolist() == mine[:, 0].tolist()
        assert int(part.counts[row % ROWS]) == len(mine)
