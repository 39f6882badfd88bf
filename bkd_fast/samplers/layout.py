"""From a parameter group to what one launch takes: tensors of one dtype and device, gradients in the parameter's order.

The noise of an element depends on its index in the parameter's dense storage order (logical order for contiguous tensors,
NHWC for channels_last), of a sharded parameter in the whole one's. A parameter that does not fill its memory densely goes through
a contiguous copy, in logical order.

Frameworks replace parameters, and gradients move when they are freed, so every step looks at every tensor. What it found is kept
(`Layout`, `State`), and the next step only asks whether each is what it was: a few C calls a tensor, where finding out
takes microseconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter, is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from bkd_fast.ops.langevin import PLAIN, is_dense, same_order
from bkd_fast.sharding import first_element, is_sharded, local


@dataclass
class Launch:
    """Parameters of one dtype and device of one group, in one call; of sharded ones the parts that are here."""

    indices: list[int] = field(default_factory=list)  # positions in the group
    parameters: list[int] = field(default_factory=list)  # their numbers in the noise
    theta: list[Tensor] = field(default_factory=list)
    gradient: list[Tensor] = field(default_factory=list)
    first_elements: list[int] = field(default_factory=list)  # indices in the whole parameters
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (parameter, the dense copy that stands for it)
    identity: object | None = None  # stands for all of it but the gradients, where it was kept from an earlier step
    addresses: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of theta and gradient, if ordinary tensors
    seen: "State | None" = None  # where a `Layout` keeps the launch: the sampler's state as the last step found it
    states: dict[str, list[Tensor]] = field(
        default_factory=dict
    )  # the sampler's state by name, where it is as it was seen

    def look_up_addresses(self) -> None:
        if set(map(type, [*self.theta, *self.gradient])) <= PLAIN:
            self.addresses = {
                "theta": tuple(map(Tensor.data_ptr, self.theta)),
                "gradient": tuple(map(Tensor.data_ptr, self.gradient)),
            }

    def check_memory(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a parameter or gradient whose memory was freed behind its back."""
        for what, tensors in (("", self.theta), ("the gradient of ", self.gradient)):
            addresses = self.addresses.get("gradient" if what else "theta", ())
            if 0 in addresses:
                for index, tensor, address in zip(self.indices, tensors, addresses, strict=True):
                    if address == 0 and tensor.numel():
                        raise ValueError(f"{what}{name_of(group, index)} has no memory: its storage was freed")

    def of(self, indices: Sequence[int]) -> "Launch":
        """The part of it with the parameters at these positions of the group."""
        kept = [n for n, index in enumerate(self.indices) if index in indices]
        theta = [self.theta[n] for n in kept]
        return Launch(
            [self.indices[n] for n in kept],
            [self.parameters[n] for n in kept],
            theta,
            [self.gradient[n] for n in kept],
            [self.first_elements[n] for n in kept],
            [(parameter, copy) for parameter, copy in self.copies if any(copy is t for t in theta)],
        )

    def takes(self, params: Sequence[Tensor], gradient: Sequence[Tensor]) -> bool:
        """Whether these parameters and gradients themselves are in it, not copies or parts, and are ordinary tensors."""
        return (
            set(map(type, [*self.theta, *gradient])) <= PLAIN
            and all(map(is_, self.theta, [params[index] for index in self.indices]))
            and all(map(is_, self.gradient, gradient))
        )

    def write_back(self) -> None:
        """Bring the new values of dense copies home, and tell autograd that the parameters changed."""
        for parameter, copy in self.copies:
            parameter.copy_(copy)
        torch.autograd.graph.increment_version(self.theta)


class State:
    """What a sampler keeps for each parameter of a launch, as it was seen; held by nobody here, for others may free it."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(map(id, parameters))
        self._tensors: dict[str, list[ref[Tensor]]] = {}
        self.addresses: dict[str, tuple[int, ...]] = {}
        self.fits = False  # every parameter, as the sampler found
        self.prior_means: list[Tensor] | None = None  # the sampler's own

    def keep(self, name: str, tensors: list[Tensor]) -> None:
        self._tensors[name], self.addresses[name] = list(map(ref, tensors)), tuple(map(Tensor.data_ptr, tensors))

    def found(self, entries: Mapping[int, Mapping[str, Any]]) -> dict[str, list[Tensor]]:
        """The tensors that were kept, by name. Unless each is the one that it was, in the same memory, and there are no others:
        none, and nothing is kept any more.

        Args:
            entries: the sampler's, by the parameter's `id`.
        """
        mine = [entries.get(parameter, {}) for parameter in self._parameters]
        lists = {}
        for name, kept in self._tensors.items():
            lists[name] = [entry.get(name, name) for entry in mine]
            same = all(map(is_, [tensor() for tensor in kept], lists[name]))
            if not same or tuple(map(Tensor.data_ptr, lists[name])) != self.addresses[name]:
                break
        else:
            if sum(map(len, mine)) == len(lists) * len(mine):
                return lists
        self._tensors, self.addresses, self.fits = {}, {}, False
        return {}


class Layout:
    """The launches of one group from step to step.

    Where one launch serves the group and takes its tensors as they are, it is kept for as long as every parameter is the same
    one, in the same memory, and every parameter and gradient looks as it did.
    """

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._kept: Launch | None = None  # without gradients, which others may want to free
        self._addresses: tuple[int, ...] = ()
        self._looks: tuple[Any, ...] = ()
        self._order: Callable[[Tensor], Any] = Tensor.stride
        self._chains = 1

    def launches(self, group: dict[str, Any]) -> list[Launch]:
        """As the function of that name."""
        params = group["params"]
        everything = list(map(_grad, params))
        gradient = [g for g in everything if g is not None]
        if self._kept is not None and self._stands(group, everything, gradient):
            kept, addresses = self._kept, {"theta": self._addresses, "gradient": tuple(map(Tensor.data_ptr, gradient))}
            return [
                Launch(  # by hand: `replace` takes as long as all of this
                    kept.indices, kept.parameters, kept.theta, gradient, kept.first_elements, kept.copies, kept.identity,
                    addresses, kept.seen,
                )
            ]  # fmt: skip
        self._kept = None
        found = launches(group)
        if len(found) == 1 and found[0].takes(params, gradient):
            launch = found[0]
            launch.seen = State(launch.theta)
            self._params, self._chains = list(params), group["chains"]
            contiguous = all(map(Tensor.is_contiguous, launch.theta + gradient))
            self._order = Tensor.is_contiguous if contiguous else Tensor.stride  # one is told sooner than the other
            self._addresses = launch.addresses["theta"]
            self._looks = _looks(launch.theta, gradient, self._order)
            self._kept = replace(launch, gradient=[], identity=object())
        return found

    def _stands(self, group: dict[str, Any], everything: list[Tensor | None], gradient: list[Tensor]) -> bool:
        assert self._kept is not None
        theta, params = self._kept.theta, group["params"]
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return False
        if len(gradient) != len(theta) or group["chains"] != self._chains:
            return False
        if len(theta) < len(params) and [i for i, g in enumerate(everything) if g is not None] != self._kept.indices:
            return False
        addresses = tuple(map(Tensor.data_ptr, theta))
        return addresses == self._addresses and _looks(theta, gradient, self._order) == self._looks


_grad, _dtype = attrgetter("grad"), attrgetter("dtype")


def _looks(theta: list[Tensor], gradient: list[Tensor], order: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    """What a launch relies on beside the addresses; `order` tells that of a tensor's memory. A gradient has its parameter's shape
    and device: torch sees to that."""
    return (
        set(map(type, gradient)),
        [*map(_dtype, theta), *map(_dtype, gradient)],
        list(map(Tensor.numel, theta)),
        [*map(order, theta), *map(order, gradient)],
    )


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
        numbers = [group["parameter_ids"][index] for index in indices]
        return _with_addresses([Launch(indices, numbers, theta, gradient, first)])
    by_kind: dict[tuple[torch.dtype, torch.device], Launch] = {}
    for index, parameter, g, begin in zip(indices, theta, gradient, first, strict=True):
        _check(group, index, parameter, g)
        launch = by_kind.setdefault((parameter.dtype, parameter.device), Launch())
        launch.indices.append(index)
        launch.parameters.append(group["parameter_ids"][index])
        if not (parameter.is_contiguous() if group["chains"] > 1 else is_dense(parameter)):
            copy = parameter.contiguous()
            launch.copies.append((parameter, copy))
            parameter = copy
        launch.theta.append(parameter)
        launch.gradient.append(in_order_of(g, parameter))
        launch.first_elements.append(begin)
    return _with_addresses(list(by_kind.values()))


def _with_addresses(found: list[Launch]) -> list[Launch]:
    for launch in found:
        launch.look_up_addresses()
    return found


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
