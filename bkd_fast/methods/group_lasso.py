"""A student's width by group lasso: hidden units whose incoming weights a proximal step has made zero are cut out.

The architecture search of Vadera, Cobb, Jalaian and Marlin (UAI 2020): widen the student, train it with a group lasso on every
hidden unit's incoming weights, prune, fine-tune.
"""

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# what may stand between layers: it leaves a unit that is 0 at 0, and units apart
PASSIVE = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


class GroupLasso:
    """The penalty strength * sum over hidden units of |(w, b)|, w a unit's (or channel's) incoming weights and b its bias.

    It is not differentiated. After every step of the optimizer each group takes the penalty's proximal step (Yuan and Lin, JRSS B
    2006), `w <- max(0, 1 - lr strength / |w|) w`, that makes groups exactly zero; with plain SGD that is proximal gradient
    descent, whose fixed points are the minima of loss + penalty. The paper differentiates the penalty, so that norms hover about
    zero and the threshold decides. With Adam the zeros are as exact, but a gradient that Adam has divided by its root mean square
    g is what strength is weighed against: the penalty is that of strength * g, coordinate by coordinate.

    The bias belongs to the group: a unit of zeros then gives 0 for every input, and cutting it out changes nothing.

    Args:
        network: Linear and Conv2d layers in sequence, with activations, pooling, dropout and Flatten between; the last layer's
            units are the outputs and not penalised.
        strength: >= 0, in the units of the loss.

    Raises:
        TypeError: a network of other modules.
        ValueError: fewer than two layers, or strength below 0.
    """

    def __init__(self, network: nn.Sequential, strength: float) -> None:
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength = {strength}: must be finite and at least 0")
        self.layers, self.strength = _layers(network)[:-1], strength

    def penalty(self) -> Tensor:
        """Its value, 0-dim."""
        return self.strength * torch.stack([norms_of(layer).sum() for layer in self.layers]).sum()

    def follow(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Take a proximal step after each step of an optimizer, at the learning rate it has then; `remove()` ends that.

        Raises:
            ValueError: the optimizer lacks a weight or bias of the hidden layers.
        """
        self._rates(optimizer)

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            for layer, lr in zip(self.layers, self._rates(optimizer), strict=True):
                self._shrink(layer, float(lr) * self.strength)

        return optimizer.register_step_post_hook(after_step)

    def _rates(self, optimizer: torch.optim.Optimizer) -> list[float | Tensor]:
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for layer in self.layers:
            missing = [name for name, parameter in layer.named_parameters() if id(parameter) not in rates]
            if missing:
                raise ValueError(f"optimizer lacks {', '.join(missing)} of {layer}: must hold every hidden layer")
        return [rates[id(layer.weight)] for layer in self.layers]

    @staticmethod
    @torch.no_grad()
    def _shrink(layer: nn.Linear | nn.Conv2d, amount: float) -> None:
        scale = (1 - amount / norms_of(layer).clamp_min(torch.finfo(layer.weight.dtype).tiny)).clamp_min(0)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(scale)


def norms_of(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """(units,) |(w, b)| of a layer's units or channels."""
    squares = layer.weight.flatten(1).square().sum(1)
    return (squares if layer.bias is None else squares + layer.bias.square()).sqrt()


@torch.no_grad()
def prune(network: nn.Sequential, threshold: float = 1e-3) -> nn.Sequential:
    """The network without the hidden units whose |(w, b)| is below a threshold: the same function where these are zero.

    Layer by layer from the input: weights that came from a unit that is gone no longer count.

    Args:
        network: as `GroupLasso` takes it; it stays as it is.
        threshold: > 0.

    Raises:
        TypeError: a network of other modules.
        ValueError: a threshold that is not positive; a layer of which no unit would be left.
    """
    if not threshold > 0:
        raise ValueError(f"threshold = {threshold}: must be positive")
    pruned = copy.deepcopy(network)
    for number, (layer, after) in enumerate(pairwise(_layers(pruned))):
        kept = (norms_of(layer) >= threshold).nonzero()[:, 0]
        if not len(kept):
            raise ValueError(
                f"threshold = {threshold}: no unit of hidden layer {number} is left; must be below {norms_of(layer).max():.3g}"
            )
        before = len(layer.weight)
        _set(layer, layer.weight[kept], None if layer.bias is None else layer.bias[kept])
        inputs = after.weight.shape[1] // before  # that a unit gives: a channel that is flattened gives several
        columns = (kept[:, None] * inputs + torch.arange(inputs, device=kept.device)).flatten()
        _set(after, after.weight[:, columns], after.bias)
    return pruned


def _set(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.clone(), layer.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), layer.weight.requires_grad)
    names = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
    for name, size in zip(names, weight.shape[:2], strict=True):
        setattr(layer, name, size)


def _layers(network: nn.Sequential) -> list[nn.Linear | nn.Conv2d]:
    """The layers with units, in their order."""
    layers = []
    for number, module in enumerate(network):
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            layers.append(module)
        elif not isinstance(module, PASSIVE):
            allowed = ", ".join(kind.__name__ for kind in (nn.Linear, nn.Conv2d, *PASSIVE))
            raise TypeError(f"network[{number}] is {module}: must be one of {allowed}, without groups of channels")
    if len(layers) < 2:
        raise ValueError(f"network has {len(layers)} layers: must have at least 2, the last one its outputs")
    return layers
