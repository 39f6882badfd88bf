"""Chains on several processes against one process: replicas, shards, and chains side by side."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import bkd_fast
from bkd_fast import (
    KDLoss,
    NonFiniteError,
    PosteriorPredictive,
    chain_mesh,
    data_parallel,
    data_rank,
    rows_here,
    sample,
)

PROCESSES = 4
ROWS, FEATURES, CLASSES = 24, 5, 3
SHAPES = [(9, 3), (2, 7), (4,), (5, 1, 2)]  # rows that four processes cannot share evenly, or that are fewer than they

SAMPLERS: dict[str, dict[str, Any]] = {
    "SGLD": {},
    "SGHMC": {"momentum": 0.7},
    "BAOAB": {"friction": 5.0},
    "PSGLD": {},
    "AdamSGHMC": {},
    "SGNHT": {},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Linear(FEATURES, 6),
        nn.Tanh(),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Linear(6, CLASSES),
    ]
    return nn.Sequential(*layers)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(ROWS, FEATURES, generator=generator), torch.randn(ROWS, CLASSES, generator=generator)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator), t


def chain_of(
    student: nn.Module, rows: Tensor, chain: int = 0, callbacks: list = ()
) -> tuple[list[dict], PosteriorPredictive]:
    """Draws of a chain whose every batch is these rows, and their posterior on some of x; the health's figures go to it too."""
    x, y, t = problem()
    sampler = bkd_fast.SGLD(student.named_parameters(), 0.05, num_data=ROWS, prior_precision=1.0, seed=3, chain=chain)
    seen: list[dict] = []
    posterior = PosteriorPredictive(ROWS, CLASSES, stream=(1, chain))
    batches = [(x[rows], y[rows], t[rows])]
    settings = {"warm_start": 2, "burn_in": 3, "thin": 2, "num_draws": 3, "progress": False, "callbacks": callbacks}
    for draw in sample(student, sampler, KDLoss(2.0), batches, **settings):
        seen.append(draw.snapshot())
        # some processes have more test images than others, or none
        for _ in range(dist.get_rank() if dist.is_initialized() else 0):
            with torch.no_grad():
                draw.model(x[:2])
        posterior.update(draw, [x[:20], x[20:]])
    return seen, posterior


class KeepHealth(bkd_fast.Callback):
    def on_end(self, health: bkd_fast.Health) -> None:
        self.health = health


# ---- what a run of four processes checks ----


def meshes() -> None:
    for counts, message in (
        ({"chains": 3}, "chains = 3 x shards = 1: must make the number of processes, 4"),
        ({"chains": 2, "replicas": 1}, "x replicas = 1: must make"),
        ({"shards": 0}, "shards = 0: must be an int of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            chain_mesh(**counts)
    mesh = chain_mesh(2)
    rank, count = data_rank(mesh)
    assert mesh.shape == (2, 2, 1) and (rank, count) == (dist.get_rank() % 2, 2)
    assert rows_here(7, mesh).tolist() == [[0, 1, 2, 3], [4, 5, 6]][rank]
    assert rows_here(1, mesh).tolist() == [[0], []][rank]
    with pytest.raises(ValueError, match="mesh has the axes"):
        data_rank(torch.distributed.device_mesh.init_device_mesh("cpu", (4,), mesh_dim_names=("x",)))


def two_chains_of_two_replicas() -> None:
    mesh = chain_mesh(2)
    chain = mesh.get_local_rank("chain")
    rank, count = data_rank(mesh)
    own = torch.arange(ROWS)[rank::count]
    health = KeepHealth()
    draws, posterior = chain_of(data_parallel(network(), mesh), own, chain, [health])
    alone_health = KeepHealth()
    alone, alone_posterior = chain_of(network(), torch.arange(ROWS), chain, [alone_health])
    for ours, theirs in zip(draws, alone, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:  # the mean gradient is summed in another order, the noise is the same
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    for name, value in draws[-1].items():
        everybody = [torch.empty_like(value) for _ in range(PROCESSES)]
        dist.all_gather(everybody, value)
        assert torch.equal(everybody[2 * chain], everybody[2 * chain + 1]), name
        assert (everybody[0] - everybody[2]).abs().max() > 1e-3
    assert health.health.noise_share == pytest.approx(alone_health.health.noise_share, abs=1e-9)
    assert health.health.stationarity == pytest.approx(alone_health.health.stationarity, rel=1e-3)
    posterior.merge_across_(mesh.get_group("chain"))
    assert sorted((chain, draws) for (_, chain), draws in posterior.streams) == [(0, (0, 3)), (1, (0, 3))]
    assert set(posterior.counts.tolist()) == {6}
    runs = [None] * PROCESSES
    dist.all_gather_object(runs, [run for (run, _), _ in posterior.streams])
    assert all(run == runs[0] for run in runs), "replicas hold the same draws, and call them the same"
    alone_posterior.merge_across_(mesh.get_group("chain"))
    torch.testing.assert_close(posterior.mean, alone_posterior.mean, rtol=1e-5, atol=1e-6)


def shards(replicas: int) -> None:
    mesh = chain_mesh(1, replicas, PROCESSES // replicas)
    rank, count = data_rank(mesh)
    student = data_parallel(network(), mesh)
    assert all(isinstance(p, DTensor) for p in student.parameters())
    health, alone_health = KeepHealth(), KeepHealth()
    draws, posterior = chain_of(student, torch.arange(ROWS)[rank::count], 0, [health])
    alone, alone_posterior = chain_of(network(), torch.arange(ROWS), 0, [alone_health])
    for ours, theirs in zip(draws, alone, strict=True):
        for name in theirs:
            assert not isinstance(ours[name], DTensor), "a draw is whole"
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.mean, alone_posterior.mean, rtol=1e-5, atol=1e-6)
    assert health.health.stationarity == pytest.approx(alone_health.health.stationarity, rel=1e-3)
    assert all(isinstance(p, DTensor) for p in student.parameters()), "and the chain's network is split again"


def split(value: Tensor, mesh: Any) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))


def whole_of(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def steps_of_shards_are_the_whole_ones(name: str, dtype: torch.dtype, **settings: Any) -> None:
    """Given equal gradients a sampler's arithmetic is elementwise: every bit of parameters and state."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    means = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    make = getattr(bkd_fast, name)
    arguments = {"num_data": 50, "prior_precision": 2.0, "prior_mean": means, "seed": 9, **SAMPLERS[name], **settings}
    whole = [nn.Parameter(value.clone()) for value in start]
    parted = [split(value, mesh) for value in start]
    alone, ours = make(whole, 0.02, **arguments), make(parted, 0.02, **arguments)
    for sampler in (alone, ours):
        sampler.track_moments(1)
    for step in range(4):
        for p, q in zip(whole, parted, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        for sampler in (alone, ours):
            sampler.step()
            if step == 1:
                sampler.draw_momentum()
    for p, q in zip(whole, parted, strict=True):
        assert torch.equal(p, q.full_tensor()), name
        assert alone.state[p].keys() == ours.state[q].keys()
        for key, value in alone.state[p].items():
            assert torch.equal(value, whole_of(ours.state[q][key])), (name, key)
        for mine, theirs in zip(alone.moments(p), ours.moments(q), strict=True):
            assert torch.equal(torch.as_tensor(mine), whole_of(torch.as_tensor(theirs)))


def a_nan_on_one_shard_stops_all() -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    for rule in ("raise", "skip", "record"):
        parameter = split(torch.ones(8, 2), mesh)
        sampler = bkd_fast.SGLD([("w", parameter)], 0.1, num_data=10, nonfinite=rule)
        gradient = torch.zeros(8, 2)
        gradient[5, 1] = torch.nan
        parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        if rule == "raise":
            with pytest.raises(NonFiniteError, match="parameter 'w'"):
                sampler.step()
            assert torch.equal(parameter.full_tensor(), torch.ones(8, 2))
        elif rule == "skip":
            sampler.step()
            assert sampler.skipped_steps == 1 and torch.equal(parameter.full_tensor(), torch.ones(8, 2))
        else:
            sampler.step()
            with pytest.raises(NonFiniteError, match="parameter 'w'"):
                sampler.check()
            assert (parameter.full_tensor() == 1).sum() == 1


def what_has_no_noise_is_refused() -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    columns = nn.Parameter(distribute_tensor(torch.ones(4, 8), mesh, [Shard(1)]))
    columns.grad = distribute_tensor(torch.ones(4, 8), mesh, [Shard(1)])
    sampler = bkd_fast.SGLD([("w", columns)], 0.1, num_data=10)
    with pytest.raises(ValueError, match=r"parameter 'w': .*must be split along its first dimension"):
        sampler.step()
    rows = split(torch.ones(8, 2), mesh)
    rows.grad = distribute_tensor(torch.ones(8, 2), mesh, [Shard(0)])
    stacked = bkd_fast.SGLD([("w", rows)], 0.1, num_data=10, chains=8)
    with pytest.raises(ValueError, match="parameter 'w' is a DTensor in a group of 8 chains"):
        stacked.step()
    with pytest.raises(ValueError, match="parameter w is a DTensor"):
        bkd_fast.SGLD([("w", rows)], 0.1, num_data=10).track_quantiles(["w"])


def one_thermostat_for_all_shards() -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    value = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
    thermostats = []
    for parameter in (nn.Parameter(value.clone()), split(value, mesh)):
        sampler = bkd_fast.SGNHT([parameter], 0.02, num_data=50, per_element=False, rate=0.1)
        for _ in range(3):
            gradient = torch.ones(9, 3)
            parameter.grad = (
                distribute_tensor(gradient, mesh, [Shard(0)]) if isinstance(parameter, DTensor) else gradient
            )
            sampler.step()
        thermostats.append(sampler.param_groups[0]["thermostat"])
    torch.testing.assert_close(*thermostats, rtol=1e-12, atol=0)


def a_network_sharded_after_the_sampler_was_made() -> None:
    """As accelerate does it: the parameters are replaced in `param_groups`; prior means are whole then, and become parts."""
    model, alone = network(), network()
    means = [torch.full_like(p, 0.5) for p in model.parameters()]
    settings = {"num_data": 10, "prior_precision": 5.0, "prior_mean": means}
    ours = bkd_fast.SGLD(model.parameters(), 0.1, **settings)
    theirs = bkd_fast.SGLD(alone.parameters(), 0.1, **settings)
    fully_shard(model)
    ours.param_groups[0]["params"] = list(model.parameters())
    for network_, sampler in ((model, ours), (alone, theirs)):
        (0 * network_(torch.ones(2, FEATURES))).sum().backward()
        sampler.step()
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q.full_tensor())


def everything() -> None:
    meshes()
    two_chains_of_two_replicas()
    shards(replicas=1)
    shards(replicas=2)
    for name in SAMPLERS:
        steps_of_shards_are_the_whole_ones(name, torch.float32)
        steps_of_shards_are_the_whole_ones(name, torch.bfloat16, rounding="master")
    steps_of_shards_are_the_whole_ones("SGLD", torch.bfloat16, rounding="stochastic")
    steps_of_shards_are_the_whole_ones("SGLD", torch.float64)
    a_nan_on_one_shard_stops_all()
    what_has_no_noise_is_refused()
    one_thermostat_for_all_shards()
    a_network_sharded_after_the_sampler_was_made()


def test_four_processes(tmp_path) -> None:
    in_processes(PROCESSES, everything, tmp_path)


def test_a_mesh_needs_processes() -> None:
    with pytest.raises(RuntimeError, match="start with torchrun"):
        chain_mesh()
