"""How the processes of a run share the work: chains side by side, and for each chain replicas and shards of its network."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from bkd_fast.collectives import processes

CHAIN, REPLICATE, SHARD = AXES = ("chain", "replicate", "shard")


def chain_mesh(
    chains: int = 1, replicas: int | None = None, shards: int = 1, *, device_type: str = "cpu"
) -> DeviceMesh:
    """The processes of a `torchrun` as a grid with the axes "chain", "replicate" and "shard".

    Processes that differ in the chain alone sample independent chains: give the sampler
    `chain=first + mesh.get_local_rank("chain")`. Those of one chain take its steps together, each on its part of every batch:
    replicas hold the whole network, shards split it.

    Args:
        chains: how many at once.
        replicas: copies of each chain's network; None: as many as there are processes for.
        shards: processes that share one copy.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: a count below 1, or counts whose product is not the number of processes.
        RuntimeError: torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised: start with torchrun and call init_process_group() first"
        )
    world = processes()
    for name, count in (("chains", chains), ("replicas", 1 if replicas is None else replicas), ("shards", shards)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} = {count!r}: must be an int of at least 1")
    others = chains * shards
    if replicas is None and world % others == 0:
        replicas = world // others
    if replicas is None or replicas * others != world:
        copies = "" if replicas is None else f" x replicas = {replicas}"
        raise ValueError(
            f"chains = {chains} x shards = {shards}{copies}: must make the number of processes, {world}, which torchrun's "
            "--nproc-per-node and --nnodes set"
        )
    return init_device_mesh(device_type, (chains, replicas, shards), mesh_dim_names=AXES)


def data_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model as the processes of its chain train it: each backward pass ends with the mean of all parts' gradients.

    With shards the model is sharded in place (FSDP2: each child that has parameters, then the rest), and replicas of the shards
    kept equal; without, replicas are wrapped in DistributedDataParallel; a process by itself gets the model as it is. Make the
    sampler of what comes back, or of the model: its parameters are the same. All processes of a chain must start from the same
    parameters; DistributedDataParallel sees to it, FSDP2 does not.

    Raises:
        ValueError: a mesh without the three axes of `chain_mesh`.
    """
    _check_axes(mesh)
    if mesh[SHARD].size() > 1:
        from torch.distributed.fsdp import fully_shard

        data_axes = mesh[REPLICATE, SHARD] if mesh[REPLICATE].size() > 1 else mesh[SHARD]
        for child in model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=data_axes)
        fully_shard(model, mesh=data_axes)
        return model
    if mesh[REPLICATE].size() > 1:
        return DistributedDataParallel(model, process_group=mesh.get_group(REPLICATE))
    return model


def data_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """This process's number among those that share its chain's batches, and how many these are."""
    _check_axes(mesh)
    shards = mesh[SHARD].size()
    return mesh.get_local_rank(REPLICATE) * shards + mesh.get_local_rank(SHARD), mesh[REPLICATE].size() * shards


def rows_here(num_rows: int, mesh: DeviceMesh) -> torch.Tensor:
    """The rows, of 0 .. num_rows - 1, whose posterior this process keeps: a stretch, int64; the last may be shorter or empty.

    Every chain has the same split, so that `merge_across_(mesh.get_group("chain"))` pools the chains of these rows.
    """
    rank, count = data_rank(mesh)
    size = -(-num_rows // count)
    return torch.arange(min(rank * size, num_rows), min((rank + 1) * size, num_rows))


def _check_axes(mesh: DeviceMesh) -> None:
    if mesh.mesh_dim_names != AXES:
        raise ValueError(f"mesh has the axes {mesh.mesh_dim_names}: must have {AXES}, as chain_mesh makes it")
