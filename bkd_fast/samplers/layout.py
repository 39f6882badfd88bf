"""From a parameter group to what one launch takes: tensors of one dtype and device, gradients in the parameter's order.

The noise of an element depends on its index in the parameter's dense storage order (logical order for contiguous tensors,
NHWC for channels_last), of a sharded parameter in the whole one's. A parameter that does not fill its memory densely goes through
a contiguous copy, in logical order.
Nothing here is kept between steps: frameworks replace parameters, and gradients move when they are freed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bkd_fast.ops.langevin import is_dense, same_order
from bkd_fast.sharding import first_element, is_sharded, local


@dataclass
class Launch:
    """Parameters of one dtype and device of one group, in one call; of sharded ones the parts that are here."""

    indices: list[int] = field(default_factory=list)  # positions in the group
    theta: list[Tensor] = field(default_factory=list)
    gradient: list[Tensor] = field(default_factory=list)
    first_elements: list[int] = field(default_factory=list)  # indices in the whole parameters
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (parameter, the dense copy that stands for it)

    def of(self, indices: Sequence[int]) -> "Launch":
        """The part of it with the parameters at these positions of the group."""
        kept = [n for n, index in enumerate(self.indices) if index in indices]
        theta = [self.theta[n] for n in kept]
        return Launch(
            [self.indices[n] for n in kept],
            theta,
            [self.gradient[n] for n in kept],
            [self.first_elements[n] for n in kept],
            [(parameter, copy) for parameter, copy in self.copies if any(copy is t for t in theta)],
        )

    def write_back(self) -> None:
        """Bring the new values of dense copies home, and tell autograd that the parameters changed."""
        for parameter, copy in self.copies:
            parameter.copy_(copy)
        torch.autograd.graph.increment_version(self.theta)


def launches(group: dict[str, Any], positions: Sequence[int] | None = None) -> list[Launch]:
    """The launches of one group's parameters (of those at `positions`) that have a gradient. Call it without autograd.

    Raises:
        TypeError: a gradient is sparse, or of another dtype than its parameter. ValueError: or on another device, or a
            parameter has no leading axis of the group's chains any more.
    """
    params = group["params"]
    everything = [(index, params[index], params[index].grad) for index in positions or range(len(params))]
    with_gradient = [entry for entry in everything if entry[2] is not None]
    if not with_gradient:
        return []
    indices, theta, gradient = (list(column) for column in zip(*with_gradient, strict=True))
    if group["chains"] > 1:
        _check_chains(group, indices)
    first = [0] * len(indices)
    if any(map(is_sharded, theta)):
        first = [_first_element(group, index) for index in indices]
        theta, gradient = list(map(local, theta)), [_local_gradient(group, index) for index in indices]
    if _are_of_one_kind(theta + gradient):
        return [Launch(indices, theta, gradient, first)]
    by_kind: dict[tuple[torch.dtype, torch.device], Launch] = {}
    for index, parameter, g, begin in zip(indices, theta, gradient, first, strict=True):
        _check(group, index, parameter, g)
        launch = by_kind.setdefault((parameter.dtype, parameter.device), Launch())
        launch.indices.append(index)
        if not (parameter.is_contiguous() if group["chains"] > 1 else is_dense(parameter)):
            copy = parameter.contiguous()
            launch.copies.append((parameter, copy))
            parameter = copy
        launch.theta.append(parameter)
        launch.gradient.append(in_order_of(g, parameter))
        launch.first_elements.append(begin)
    return list(by_kind.values())


def _are_of_one_kind(tensors: list[Tensor]) -> bool:
    """Whether all are contiguous, of one dtype and device: the usual case, seen at a fraction of what a launch of its own costs
    each tensor."""
    return (
        {tensor.layout for tensor in tensors} == {torch.strided}
        and len({tensor.dtype for tensor in tensors}) == 1
        and len({tensor.device for tensor in tensors}) == 1
        and all(map(Tensor.is_contiguous, tensors))
    )


def _check_chains(group: dict[str, Any], indices: Sequence[int]) -> None:
    for index in indices:
        shape = group["params"][index].shape
        if not shape or shape[0] != group["chains"]:
            raise ValueError(
                f"{name_of(group, index)} has shape {tuple(shape)}: must have a leading axis of {group['chains']} chains"
            )
        if is_sharded(group["params"][index]):
            raise ValueError(
                f"{name_of(group, index)} is a DTensor in a group of {group['chains']} chains: must have chains = 1; give each "
                "chain processes of its own"
            )


def _first_element(group: dict[str, Any], index: int) -> int:
    try:
        return first_element(group["params"][index])
    except ValueError as error:
        raise ValueError(f"{name_of(group, index)}: {error}") from error


def _local_gradient(group: dict[str, Any], index: int) -> Tensor:
    parameter = group["params"][index]
    placements, own = (getattr(tensor, "placements", None) for tensor in (parameter.grad, parameter))
    if placements != own:
        raise ValueError(f"the gradient of {name_of(group, index)} has placements {placements}: must be {own}")
    return local(parameter.grad)


def _check(group: dict[str, Any], index: int, parameter: Tensor, gradient: Tensor) -> None:
    if gradient.layout != torch.strided:
        raise TypeError(f"the gradient of {name_of(group, index)} is {gradient.layout}: must be dense (torch.strided)")
    if gradient.dtype != parameter.dtype:
        raise TypeError(f"the gradient of {name_of(group, index)} is {gradient.dtype}: must be {parameter.dtype}")
    if gradient.device != parameter.device:
        raise ValueError(
            f"the gradient of {name_of(group, index)} is on {gradient.device}: must be on {parameter.device}"
        )


def in_order_of(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` itself if its memory is in the order of `like`, else a copy that is."""
    return tensor if same_order(tensor, like) else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def name_of(group: dict[str, Any], index: int) -> str:
    """How messages call a parameter: its name if the sampler was given names, else its number and shape."""
    names = group.get("param_names")
    if names:
        return f"parameter {names[index]!r}"
    return f"parameter {group['parameter_ids'][index]} of shape {tuple(group['params'][index].shape)}"
