"""Batches: the order, its parts, views, cached teachers, and going on in the middle."""

from itertools import chain

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from bkd_fast import Batches, StateFileError, TeacherCache
from bkd_fast.noise import normal_

ROWS, BATCH = 23, 6


def rows_of(batches, count: int) -> list[list[int]]:
    """The rows of that many batches, over as many epochs as it takes."""
    found: list[list[int]] = []
    while len(found) < count:
        for batch in batches:
            found.append(batch[0].tolist())
            if len(found) == count:
                break
    return found


def of(**settings) -> Batches:
    return Batches(TensorDataset(torch.arange(ROWS), torch.zeros(ROWS)), BATCH, **{"seed": 5, **settings})


def test_an_epoch_is_a_permutation_that_seed_and_epoch_determine() -> None:
    batches = of()
    assert len(batches) == 3
    found = rows_of(batches, 9)
    for epoch in range(3):
        rows = [*chain.from_iterable(found[3 * epoch : 3 * epoch + 3])]
        assert len(set(rows)) == 18 and set(rows) < set(range(ROWS))
        order = normal_(torch.empty(ROWS), seed=5, step=epoch, tag=4).argsort(stable=True)
        assert rows == order[:18].tolist()
    assert found[:3] != found[3:6] and found[:3] != rows_of(of(seed=6), 3)
    assert found == rows_of(of(num_workers=1), 9)


def test_over_many_epochs_every_row_comes_as_often() -> None:
    """180 epochs, 18 of 23 rows each: counts are binomial; the largest deviation of 23 exceeds 4.2 sd with probability 6e-4."""
    counts = torch.zeros(ROWS)
    for rows in rows_of(of(), 3 * 180):
        counts[rows] += 1
    p = 18 / 23
    assert ((counts - 180 * p).abs() / (180 * p * (1 - p)) ** 0.5).max() < 4.2


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_share_each_batch(count) -> None:
    whole = rows_of(of(), 5)
    parts = [rows_of(of(shard=(rank, count)), 5) for rank in range(count)]
    for step, rows in enumerate(whole):
        assert [*chain.from_iterable(part[step] for part in parts)] == rows
        assert {len(part[step]) for part in parts} == {BATCH // count}


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
@pytest.mark.parametrize("workers", [0, 1])
def test_it_goes_on_in_the_middle(stop, workers) -> None:
    whole = rows_of(of(), 10)
    before = of(num_workers=workers)
    assert rows_of(before, stop) == whole[:stop]
    after = of(num_workers=workers)
    after.load_state_dict(before.state_dict())
    assert rows_of(after, 10 - stop) == whole[stop:]


class Views(Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


def test_each_epoch_shows_another_view_and_its_teacher(tmp_path) -> None:
    writer = TeacherCache.create(tmp_path / "teacher", num_samples=ROWS, classes=2, views=2, fingerprint={})
    for view in range(2):
        every = torch.arange(ROWS)
        writer.write(every, torch.stack([every.float(), torch.full((ROWS,), float(view))], 1), view)
    cache = writer.finish()
    batches = Batches(Views(), BATCH, views=2, teacher=cache)
    for epoch in range(4):
        for ids, view, logits in batches:
            assert set(view.tolist()) == {epoch % 2}
            assert torch.equal(logits, torch.stack([ids, view], 1).half())
    with pytest.raises(ValueError, match="teacher has views = 2: must be 1"):
        of(teacher=cache)
    with pytest.raises(ValueError, match="teacher has num_samples = 23: must be 4"):
        Batches(TensorDataset(torch.arange(4)), 2, views=2, teacher=cache)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"batch_size": 24}, "batch_size = 24: must be at least 1 and at most 23"),
        ({"shard": (0, 4)}, r"shard = \(0, 4\) with batch_size = 6"),
        ({"shard": (2, 2)}, r"shard = \(2, 2\)"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_settings_out_of_range(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(TensorDataset(torch.arange(ROWS)), **{"batch_size": BATCH, **settings})


@pytest.mark.parametrize(("name", "value"), [("seed", 6), ("batch_size", 3), ("rows", 24)])
def test_a_state_of_another_order_is_refused(name, value) -> None:
    batches = of()
    with pytest.raises(StateFileError, match=f"the saved batches have {name} = {value}"):
        batches.load_state_dict({**batches.state_dict(), "position": 4, name: value})
    assert batches.position == 0
