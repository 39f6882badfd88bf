"""Checkpoints of two processes, gone on with by one, two and three."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from interrupted_run import CLASSES, FEATURES, PHASES, ROWS, TEST_ROWS, Stop, data
from processes import in_processes
from torch import nn
from torch.utils.data import TensorDataset

from bkd_fast import (
    SGHMC,
    Batches,
    Checkpoints,
    KDLoss,
    PosteriorPredictive,
    StateFileError,
    chain_mesh,
    data_parallel,
    data_rank,
    rows_here,
    sample,
)
from bkd_fast.sampling import Callback
from bkd_fast.sharding import whole

STEP = 25  # at which the first run is stopped


class Start(Callback):
    """The network as the run finds it, before its first step."""

    def on_start(self, run) -> None:
        with whole(run.student) as student:
            self.state = {name: value.detach().clone() for name, value in student.named_parameters()}


def run(folder: Path | None, mesh=None, stop: int | None = None, follow_also: tuple[Callback, ...] = ()):
    """(start, end, posterior of the rows here) of a run on the mesh's processes, or on one."""
    x, y, test = data()
    torch.manual_seed(2)
    student = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    chain, shard, rows = 0, (0, 1), torch.arange(TEST_ROWS)
    if mesh is not None:
        chain, shard, rows = mesh.get_local_rank("chain"), data_rank(mesh), rows_here(TEST_ROWS, mesh)
        student = data_parallel(student, mesh)
    batches = Batches(TensorDataset(x, y), 12, seed=3, shard=shard)
    sampler = SGHMC(student.named_parameters(), 0.05, num_data=ROWS, prior_precision=1.0, seed=4, chain=chain)
    posterior = PosteriorPredictive(len(rows), CLASSES, diagnostics=True)
    begin = Start()
    follow: list[Callback] = [begin, *follow_also]
    if folder is not None:
        first = int(rows[0]) if len(rows) else 0
        saved = Checkpoints(folder, every=5, chain=chain, posterior=posterior, rows=(first, TEST_ROWS), loader=batches)
        follow.insert(0, saved)
    if stop is not None:
        follow.append(Stop(stop))
    try:
        for draw in sample(student, sampler, KDLoss(0.0), batches, progress=False, callbacks=follow, **PHASES):
            posterior.update(draw, [test[rows]])
    except KeyboardInterrupt:
        pass
    with whole(student) as end:
        return begin.state, {name: value.detach().clone() for name, value in end.named_parameters()}, posterior


def interrupted(folder: Path, mesh_of: dict) -> None:
    mesh = chain_mesh(**mesh_of)
    _, end, posterior = run(folder, mesh, STEP)
    torch.save((end, posterior.mean), folder / f"stopped-{dist.get_rank()}.pt")


def finished(folder: Path, mesh_of: dict) -> None:
    begin, end, posterior = run(folder, chain_mesh(**mesh_of))
    torch.save((begin, end, posterior.mean, posterior.counts), folder / f"finished-{dist.get_rank()}.pt")


def refused(folder: Path, mesh_of: dict) -> None:
    with pytest.raises(StateFileError, match="has 1 chains: must have 2"):
        run(folder, chain_mesh(**mesh_of))


@pytest.mark.parametrize("before", [{"shards": 2}, {"replicas": 2}])
@pytest.mark.parametrize("after", [1, 3])
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path, before, after) -> None:
    in_processes(2, interrupted, tmp_path, tmp_path, before)
    if after == 1:
        results = [(*(r := run(tmp_path))[:2], r[2].mean, r[2].counts)]
    else:
        in_processes(after, finished, tmp_path, tmp_path, dict.fromkeys(before, after))
        results = [torch.load(tmp_path / f"finished-{rank}.pt") for rank in range(after)]
    stopped, _ = torch.load(tmp_path / "stopped-0.pt")
    _, end, posterior = run(None)
    for found, found_end, _, _ in results:
        for name, value in stopped.items():
            assert torch.equal(found[name], value), name
            torch.testing.assert_close(found_end[name], end[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([counts for *_, counts in results]), posterior.counts)
    torch.testing.assert_close(torch.cat([mean for *_, mean, _ in results]), posterior.mean, rtol=1e-4, atol=1e-5)


def test_chains_side_by_side_go_on_and_keep_their_number(tmp_path) -> None:
    folder, one = tmp_path / "two", tmp_path / "one"
    for place in (folder, one):
        place.mkdir()
    in_processes(2, interrupted, tmp_path, folder, {"chains": 2})
    in_processes(2, finished, tmp_path, folder, {"chains": 2})
    stopped = [torch.load(folder / f"stopped-{rank}.pt") for rank in range(2)]
    results = [torch.load(folder / f"finished-{rank}.pt") for rank in range(2)]
    for (at_stop, _), (begin, _, _, counts) in zip(stopped, results, strict=True):
        assert all(torch.equal(begin[name], value) for name, value in at_stop.items())
        assert set(counts.tolist()) == {PHASES["num_draws"]}
    assert any(not torch.equal(results[0][1][name], value) for name, value in results[1][1].items())
    run(one, stop=STEP)
    in_processes(2, refused, tmp_path, one, {"chains": 2})
