"""Models that several processes train together: the parts of parameters that are here, and the model as a whole.

A parameter whose elements lie on several processes is a DTensor (FSDP2, tensor parallelism). Its noise is a function of the
element's index in the whole, so its part has to be a stretch of the whole in row-major order: split along the first dimension
alone, or not at all.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    # whoever made one has imported its module, which takes a second
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that is here; an ordinary tensor itself. Without autograd it is the memory that the DTensor holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def first_element(parameter: Tensor) -> int:
    """The index in the whole of the first element that is here.

    Raises:
        ValueError: the part is no stretch of the whole.
    """
    return _rows(parameter)[0] * _row(parameter) if is_sharded(parameter) else 0


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What is here of a tensor of the parameter's shape: an ordinary one is taken for the whole."""
    if is_sharded(tensor) or not is_sharded(parameter):
        return local(tensor)
    begin, rows = _rows(parameter)
    return tensor[begin : begin + rows]


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of the parameter's shape on the same processes, of which `part` is here; for an ordinary parameter `part`."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    stride = parameter.stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=parameter.shape, stride=stride)


def on_any(flags: Tensor, parameter: Tensor) -> Tensor:
    """Of every flag, whether it is set on any of the parameter's processes: a collective for a DTensor."""
    if not is_sharded(parameter):
        return flags
    return _reduced(flags.to(torch.int32), parameter, "MAX", range(parameter.device_mesh.ndim)) > 0  # type: ignore[attr-defined]


def sum_of_parts(sums: Tensor, parameter: Tensor) -> Tensor:
    """The sum over the parameter's parts of what is here of each: a collective for a DTensor."""
    if not is_sharded(parameter):
        return sums
    placements = parameter.placements  # type: ignore[attr-defined]
    return _reduced(
        sums.clone(), parameter, "SUM", [i for i, placement in enumerate(placements) if placement.is_shard()]
    )


def _reduced(tensor: Tensor, parameter: Any, operation: str, dimensions: Iterable[int]) -> Tensor:
    for dimension in dimensions:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), parameter.device_mesh.get_group(dimension))
    return tensor


def _row(parameter: Tensor) -> int:
    return parameter.shape[1:].numel()


def _rows(parameter: Any) -> tuple[int, int]:
    """The first row that is here, and how many are."""
    begin, rows = _stretch(parameter.shape[0] if parameter.dim() else 1, parameter.device_mesh, parameter.placements)
    here = parameter.to_local().shape
    if parameter.dim() and (here[0] != rows or here[1:] != parameter.shape[1:]):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has a part of shape {tuple(here)} here: {_ALLOWED}"
        )
    return begin, rows


@lru_cache(maxsize=4096)  # a few microseconds for every parameter and step
def _stretch(rows: int, mesh: Any, placements: Sequence[Any]) -> tuple[int, int]:
    from torch.distributed.tensor import Replicate, Shard

    begin = 0
    for dimension, placement in enumerate(placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard or placement.dim != 0:
            raise ValueError(f"a parameter has placements {tuple(placements)}: {_ALLOWED}")
        chunk = -(-rows // mesh.size(dimension))  # as torch.chunk cuts
        skipped = min(mesh.get_local_rank(dimension) * chunk, rows)
        begin, rows = begin + skipped, min(chunk, rows - skipped)
    return begin, rows


_ALLOWED = (
    "must be split along its first dimension (Shard(0)) or whole (Replicate), so that its noise is known by index"
)


def split_modules(model: nn.Module) -> list[Any]:
    """The modules of the model whose parameters FSDP2 keeps split between the passes."""
    module = sys.modules.get("torch.distributed.fsdp")  # as for DTensors
    return [] if module is None else [m for m in model.modules() if isinstance(m, module.FSDPModule)]


def agreed(value: int, model: nn.Module) -> int:
    """The value of the first of the processes that train this model together: a collective for DDP and FSDP2."""
    groups: list[dist.ProcessGroup] = []
    if isinstance(model, nn.parallel.DistributedDataParallel):
        groups = [model.process_group]
    elif split_modules(model):
        mesh = next(p.device_mesh for p in model.parameters() if is_sharded(p))  # type: ignore[attr-defined]
        groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    for group in groups:
        values = [value]
        dist.broadcast_object_list(values, group=group, group_src=0)
        value = values[0]
    return value


@contextmanager
def whole(model: nn.Module) -> Iterator[nn.Module]:
    """The model with all its parameters here, for any number of forward passes without gradients; a collective for FSDP2.

    Of a DistributedDataParallel it is the model inside, whose forward pass tells the others nothing. FSDP2's `state_dict()`
    splits the model again: read `named_parameters()`.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    parts = split_modules(model)
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield model
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)  # as FSDP2 has it by itself
            part.reshard()
        # or the next backward pass prefetches in the order of these forward passes, of which others may have made more or fewer
        for root in parts[:1] if model in parts else parts:
            with suppress(AttributeError):  # raised where there was no forward pass yet
                root.reset_iter_state()
