"""K networks of one architecture as one module: parameters with a leading axis of chains, for samplers with `chains=K`."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class StackedModule(nn.Module):
    """K copies of a network, whose parameters and buffers are stacked along a leading axis of chains.

    `forward` evaluates all of them on the same input by `torch.vmap`. What a sampler with `chains=K` wants is the gradient of
    each chain's own mean loss, so call backward on their *sum*: K times a mean over everything, as `sample` does::

        student = bkd.StackedModule(network, chains=64)
        sampler = bkd.SGLD(student.named_parameters(), lr, num_data=N, chains=64)
        logits = student(x)                                  # (64, batch, classes)
        (64 * loss_fn(logits, target, teacher_logits)).backward()

    Args:
        module: a network, copied K times; or K networks of one architecture.
        chains: K, at least 1; with a list of networks it may be left out.

    Raises:
        ValueError: chains is missing or below 1, or not the number of networks; networks whose parameters or buffers differ in
            name or shape.
    """

    def __init__(self, module: nn.Module | Sequence[nn.Module], chains: int | None = None) -> None:
        super().__init__()
        if isinstance(module, nn.Module):
            if chains is None or chains < 1:
                raise ValueError(f"chains = {chains}: must be at least 1")
            modules: Sequence[nn.Module] = [module] * chains
        else:
            modules = list(module)
            if not modules or chains not in (None, len(modules)):
                raise ValueError(f"chains = {chains} with {len(modules)} networks: must be their number, at least 1")
        self.chains = len(modules)
        states = [_tensors(m) for m in modules]
        for number, state in enumerate(states[1:], start=1):
            shapes = [{name: tensor.shape for name, tensor in s.items()} for s in (states[0], state)]
            if shapes[0] != shapes[1]:
                different = sorted(dict(set(shapes[0].items()) ^ set(shapes[1].items())))
                raise ValueError(f"network {number} differs from network 0 in {', '.join(different[:5])}")
        self.stacked = copy.deepcopy(modules[0])
        stacks = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
        _put(self.stacked, stacks, trainable=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What each network gives for the same arguments, stacked along a leading axis of chains."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(self.stacked, (parameters, buffers), args, kwargs)

        parameters: dict[str, Tensor] = dict(self.stacked.named_parameters())
        return torch.vmap(one, randomness="different")(parameters, dict(self.stacked.named_buffers()))

    def chain(self, k: int, into: nn.Module | None = None) -> nn.Module:
        """The network of chain k, of views: it moves on with the chain.

        Args:
            k: in [0, chains).
            into: a network that an earlier call gave, to be turned to this chain; None: a new one.
        """
        if not 0 <= k < self.chains:
            raise ValueError(f"k = {k}: must be in [0, {self.chains})")
        network = copy.deepcopy(self.stacked) if into is None else into
        _put(network, {name: tensor.detach()[k] for name, tensor in _tensors(self.stacked).items()}, trainable=False)
        for mine, theirs in zip(network.modules(), self.stacked.modules(), strict=True):
            mine.training = theirs.training
        return network


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _put(module: nn.Module, tensors: dict[str, Tensor], trainable: bool) -> None:
    """Give a network other parameters and buffers, by name; those that share a tensor go on sharing."""
    replaced: dict[int, Tensor] = {}
    for name, old in list(_tensors(module).items()):
        new = tensors[name]
        if isinstance(old, nn.Parameter):
            replaced[id(old)] = nn.Parameter(new, requires_grad=trainable and old.requires_grad)
        else:
            replaced[id(old)] = new
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = replaced[id(tensor)]  # type: ignore[assignment]
