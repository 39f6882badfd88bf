"""What processes that work on one posterior tell each other: five collectives over torch.distributed, no-ops for one process."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def processes(group: dist.ProcessGroup | None = None) -> int:
    """How many there are: 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's number in the group, from 0."""
    return dist.get_rank(group) if processes(group) > 1 else 0


def reduce_min_(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The least of every element over processes, in place."""
    return _reduce_(tensor, "MIN", group)


def reduce_max_(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The greatest of every element over processes, in place."""
    return _reduce_(tensor, "MAX", group)


def reduce_sum_(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of every element over processes, in place."""
    return _reduce_(tensor, "SUM", group)


def _reduce_(tensor: Tensor, operation: str, group: dist.ProcessGroup | None) -> Tensor:
    if processes(group) > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group)
    return tensor


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Everybody's small Python value, by rank."""
    if processes(group) == 1:
        return [value]
    values = [None] * processes(group)
    dist.all_gather_object(values, value, group)
    return values


def broadcast_(tensor: Tensor, source: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The tensor of the process of that rank, in place."""
    if processes(group) > 1:
        dist.broadcast(tensor, group=group, group_src=source)
    return tensor
