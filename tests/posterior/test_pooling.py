"""One posterior out of many: shards of rows, and processes that hold other draws, against one that took everything."""

import pytest
import torch
import torch.distributed as dist
from predictive_data import stream
from processes import in_processes
from torch import Tensor

from bkd_fast.posterior.predictive import PosteriorPredictive

ROWS, CLASSES, PROCESSES = 11, 7, 3
LOGITS = stream("ar.9", 200, ROWS, CLASSES, seed=1)
LABELS = torch.arange(ROWS) % CLASSES
SETTINGS = {
    "all": {},
    "tracked and diagnosed": {"track": "topk:2", "labels": LABELS, "diagnostics": True, "traces": True},
}
HISTOGRAM = ("counters", "minimum", "maximum", "counts", "invalid", "tracked", "watched")


def filled(pieces: list[tuple[int, Tensor, Tensor]], settings: dict, run: int = 1) -> PosteriorPredictive:
    """pieces: (chain, rows, logits)."""
    posterior = PosteriorPredictive(ROWS, CLASSES, stream=(run, 0), **settings)
    if settings:
        posterior.choose_classes_by(LOGITS[0])
    for chain, rows, logits in pieces:
        part = PosteriorPredictive(ROWS, CLASSES, stream=(run, chain), **settings)
        if settings:
            part.choose_classes_by(LOGITS[0])
        part.update_logits(logits[:, rows], rows)
        posterior.merge_(part)
    return posterior


def assert_same(ours: PosteriorPredictive, theirs: PosteriorPredictive) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    cells = ours.tracked_classes.numel()
    for name, x in a.items():
        if name.startswith("chain") and isinstance(x, Tensor) and not name.endswith("counters"):
            assert torch.equal(x, b[name]), name
        elif name in HISTOGRAM:
            y = b[name]
            if name == "counters":
                x, y = (t.view(torch.int16).transpose(1, 2).reshape(-1, 64)[:cells] for t in (x, y))
            elif name in ("minimum", "maximum"):
                x, y = x[:cells], y[:cells]
            assert torch.equal(x, y), name
    for name in ("mean", "expected_entropy", "mutual_information", "variance"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-7, equal_nan=True, msg=name
        )
    assert ours.streams == theirs.streams


# ---- shards of rows ----


@pytest.mark.parametrize("name", SETTINGS)
def test_shards_of_rows_make_the_whole(name: str) -> None:
    settings = SETTINGS[name]
    whole = PosteriorPredictive(ROWS, CLASSES, stream=(1, 0), **settings)
    shards = []
    for rows in torch.arange(ROWS).split(4):
        labels = {"labels": LABELS[rows]} if "labels" in settings else {}
        shard = PosteriorPredictive(len(rows), CLASSES, stream=(1, 0), **{**settings, **labels})
        if settings:
            shard.choose_classes_by(LOGITS[0, rows])
        shard.update_logits(LOGITS[:150, rows])
        shards.append(shard)
    if settings:
        whole.choose_classes_by(LOGITS[0])
    whole.update_logits(LOGITS[:150])
    joined = PosteriorPredictive.join_rows(shards)
    assert_same(joined, whole)
    assert shards[0].num_rows == 4
    # cut anew, with an empty stretch among them
    cuts = [slice(0, 3), slice(3, 3), slice(3, 10), slice(10, ROWS)]
    again = [PosteriorPredictive.join_rows([joined], [cut]) for cut in cuts]
    assert [part.num_rows for part in again] == [3, 0, 7, 1]
    assert_same(PosteriorPredictive.join_rows(again), whole)
    middle = PosteriorPredictive.join_rows(shards[:2], [slice(1, 4), slice(0, 2)])
    assert_same(middle, PosteriorPredictive.join_rows([whole], [slice(1, 6)]))
    with pytest.raises(ValueError, match=r"rows holds slice\(2, 12, None\): must be slice\(begin, end\) with .* <= 11"):
        PosteriorPredictive.join_rows([whole], [slice(2, 12)])
    for posterior in (joined, whole):  # which go on alike
        posterior.update_logits(LOGITS[150:])
    assert_same(joined, whole)


def test_shards_that_are_not_alike_are_refused() -> None:
    def shard(classes: int = 5, run: int = 1, **settings) -> PosteriorPredictive:
        posterior = PosteriorPredictive(3, classes, stream=(run, 0), **settings)
        posterior.update_logits(torch.zeros(3, classes))
        return posterior

    for other, message in (
        (shard(classes=6), "part 1 has another num_classes"),
        (shard(bins=128), "part 1 has another bins"),
        (shard(run=2), "part 1 has another streams"),
        (shard(track=torch.zeros(3, 1, dtype=torch.int64)), "part 1 has another tracked"),
        (shard(labels=torch.zeros(3, dtype=torch.int64), track="label"), "part 1 has another tracked"),
    ):
        with pytest.raises(ValueError, match=message):
            PosteriorPredictive.join_rows([shard(), other])
    with pytest.raises(ValueError, match="parts is empty"):
        PosteriorPredictive.join_rows([])


# ---- processes ----

# (chain, rows, draws) of every process: rows with few draws, with many, of one process alone, and of none
EVERY = torch.arange(ROWS)
SHARES = [
    [(0, EVERY[:8], LOGITS[:20]), (1, EVERY[5:8], LOGITS[20:110])],
    [(2, EVERY[:6], LOGITS[110:130])],
    [(3, EVERY[2:10], LOGITS[130:165]), (4, EVERY[:1], LOGITS[165:170])],
]


REFUSALS = ("repeated", "classes", "many")


def pool_and_refuse() -> None:
    rank = dist.get_rank()
    everything = [piece for share in SHARES for piece in share]
    for settings in SETTINGS.values():
        ours = filled(SHARES[rank], settings)
        ours.merge_across_()
        assert_same(ours, filled(everything, settings))
    for case in REFUSALS:
        refused(rank, case)


def refused(rank: int, case: str) -> None:
    if case == "repeated":
        posterior, message = (
            filled([(7, EVERY, LOGITS[:5])], {}),
            r"draws 0 .. 4 of stream \(run 1, chain 7\) are already",
        )
    elif case == "classes":
        posterior = PosteriorPredictive(ROWS, CLASSES, track=(EVERY[:, None] + rank) % CLASSES, stream=(1, rank))
        message = "the posterior of process 1 has tracked ="
    else:
        posterior = PosteriorPredictive(ROWS, CLASSES, stream=(1, rank))
        posterior.update_logits(torch.zeros(30_000, 1, CLASSES), torch.tensor([4]))
        message = "90000 draws in one row"
    before = posterior.state_dict()
    with pytest.raises(ValueError, match=message):
        posterior.merge_across_()
    after = posterior.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items() if isinstance(x, Tensor))


def test_processes_pool_their_draws_and_refuse_alike(tmp_path) -> None:
    in_processes(PROCESSES, pool_and_refuse, tmp_path)


def test_one_process_alone_has_nothing_to_pool() -> None:
    ours = filled(SHARES[0], {})
    before = ours.state_dict()
    ours.merge_across_()
    after = ours.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items() if isinstance(x, Tensor))
