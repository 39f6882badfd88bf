"""Interval bound propagation: what a network's logits and class probabilities can be over a box of inputs, certified.

The bounds are those of the function that the parameters define in exact arithmetic. They are computed in float64 and rounded
outward by the standard error bounds of sums and products (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1),
which hold for every order of summation; underflow is left aside. What the network itself rounds when it runs in float32 is not
in them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bkd_fast.errors import MissingLibraryError

Method: TypeAlias = Literal["ibp", "crown"]

EPS = torch.finfo(torch.float64).eps  # twice the unit roundoff, so that first-order terms below are counted twice
FUNCTION_ERROR = 4 * EPS  # of an elementary function, relative


class Box(NamedTuple):
    """All tensors between two of one shape, element by element."""

    lower: Tensor
    upper: Tensor

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value of each element."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def widened(self, by: Tensor | float) -> "Box":
        """By what rounding may have taken away at each end."""
        return Box(self.lower - by, self.upper + by)


def ball(x: Tensor, eps: float, lower: Tensor | float = 0.0, upper: Tensor | float = 1.0) -> Box:
    """The l-infinity ball of radius `eps` about each input, cut to the range of the data; corners in x's dtype.

    Args:
        x: inputs (rows, ...), floating point.
        eps: >= 0, in units of x.
        lower, upper: the range of the data; tensors broadcast to x (images minus their mean: -mean and 1 - mean).

    Raises:
        TypeError: x is not floating point.
        ValueError: eps is negative or not finite; ends that do not broadcast to x; an input outside its range.
    """
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: must be floating point")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps = {eps}: must be a finite number >= 0")
    ends = []
    for name, end in (("lower", lower), ("upper", upper)):
        tensor = torch.as_tensor(end, dtype=x.dtype, device=x.device)
        try:
            ends.append(tensor.expand(x.shape))
        except RuntimeError as error:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must broadcast to {tuple(x.shape)}") from error
    low, high = ends
    outside = ~((x >= low) & (x <= high))  # NaN is
    if bool(outside.any()):
        at = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"x{list(at)} = {x[at].item():g}: must be in the data's range [{low[at].item():g}, {high[at].item():g}]"
        )
    return Box(torch.maximum(x.detach() - eps, low), torch.minimum(x.detach() + eps, high))


@torch.no_grad()
def logit_bounds(model: nn.Module, box: Box, method: Method = "ibp") -> Box:
    """What each logit can be for inputs in the box.

    Args:
        model: of the layers in `LAYERS`, in `nn.Sequential`s; batch norm and dropout in eval mode.
        box: of inputs (rows, ...).
        method: "ibp", our own; or "crown", tighter and much slower, by auto_LiRPA, which rounds to nearest in the model's dtype
            and has layers of its own.

    Returns:
        float64 (rows, classes) each.

    Raises:
        ValueError: a layer that is not supported, or not fixed (in training mode); a box whose ends are out of order or shape;
            an unknown method.
        MissingLibraryError: "crown" without auto_LiRPA.
    """
    if method not in get_args(Method):
        raise ValueError(f"method = {method!r}: must be one of {get_args(Method)}")
    if box.lower.shape != box.upper.shape or not bool((box.lower <= box.upper).all()):
        raise ValueError("box: lower must be at most upper, element by element")
    check_fixed(model)
    if method == "crown":
        return _crown(model, box)
    box = Box(box.lower.double(), box.upper.double())
    for name, layer in _layers(model):
        if type(layer) not in LAYERS:
            raise ValueError(
                f"layer {name} is a {type(layer).__name__}: must be one of {', '.join(t.__name__ for t in LAYERS)}"
            )
        box = LAYERS[type(layer)](layer, box)
    return box


def softmax_bounds(logits: Box) -> Box:
    """What each class probability can be for logits in a box, each end attained at a corner of it.

    `upper_c = 1 / (1 + sum_{j != c} exp(l_j - u_c))` and `lower_c = 1 / (1 + sum_{j != c} exp(u_j - l_c))`, as the logistic
    function of u_c - log sum_{j != c} exp l_j, so that nothing overflows. The ends belong to different corners: one point of
    the box attains one class's end.

    Args:
        logits: (rows, classes) each.

    Returns:
        float64 of the same shape, rounded outward.
    """
    box = Box(logits.lower.double(), logits.upper.double())
    classes = box.lower.shape[-1]
    found = Box(
        (box.lower - _log_sum_of_others(box.upper)).sigmoid(), (box.upper - _log_sum_of_others(box.lower)).sigmoid()
    )
    # `classes` additions in the logarithm, each off by a few roundings of its result; the logistic function has slope <= 1/4
    scale = 1 + math.log(classes) + box.magnitude.amax(-1, keepdim=True)
    return Box(*(end.clamp(0, 1) for end in found.widened(4 * (classes + 1) * EPS * scale)))


def _log_sum_of_others(z: Tensor) -> Tensor:
    """log sum_{j != c} exp z_j of every class c (..., classes): no difference of sums, so nothing cancels."""
    end = z.new_full((*z.shape[:-1], 1), -math.inf)
    before = torch.cat([end, z[..., :-1].logcumsumexp(-1)], -1)
    after = torch.cat([z[..., 1:].flip(-1).logcumsumexp(-1).flip(-1), end], -1)
    return torch.logaddexp(before, after)


def check_fixed(model: nn.Module, what: str = "model") -> None:
    """Refuse a network whose output is random, or depends on the batch.

    Raises:
        ValueError: dropout in training mode, batch norm that uses its batch's statistics; the message names the layer.
    """
    for name, module in model.named_modules():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        )
        if drops or batch_norm:
            why = "is in training mode" if module.training else "has no running statistics"
            raise ValueError(f"{what}: layer {name or 'itself'} ({type(module).__name__}) {why}: must be fixed, eval()")


def _layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers in their order, by name. A subclass of Sequential may do something else: it is a layer, and not supported."""
    if type(model) is not nn.Sequential:
        yield prefix or "itself", model
        return
    for name, child in model.named_children():
        yield from _layers(child, f"{prefix}.{name}" if prefix else name)


# ---- layers ----


def _affine(layer: nn.Module, box: Box) -> Box:
    """Linear and convolution: W mid + b -/+ |W| radius.

    n products and a bias, in any order, are off by (n + 1) u sum |w| |x| + |b| at most, u the unit roundoff, the centre and the
    radius together (|mid| + radius is the magnitude); forming mid, radius and the two ends costs 6 u more.
    """
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    slack = (weight[0].numel() + 5) * EPS

    def image(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        parameters = {"weight": w} if b is None else {"weight": w, "bias": b}
        found: Tensor = functional_call(layer, parameters, (x,))
        return found

    centre = image((box.lower + box.upper) / 2, weight, bias)
    radius = image(
        (box.upper - box.lower) / 2 + slack * box.magnitude,
        weight.abs(),
        None if bias is None else slack * bias.abs(),
    )
    return Box(centre - radius, centre + radius)


def _batch_norm(layer: nn.Module, box: Box) -> Box:
    """In eval mode scale (x - mean) + bias, channel by channel."""
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert layer.running_mean is not None and layer.running_var is not None

    def channels(values: Tensor) -> Tensor:
        return values.double().view(-1, *[1] * (box.lower.dim() - 2))

    mean, scale = channels(layer.running_mean), (channels(layer.running_var) + layer.eps).rsqrt()
    bias = torch.zeros_like(mean)
    if layer.affine:
        scale, bias = scale * channels(layer.weight), channels(layer.bias)
    ends = [(end - mean) * scale + bias for end in box]
    slack = 2 * FUNCTION_ERROR * ((box.magnitude + mean.abs()) * scale.abs() + bias.abs())
    return Box(torch.minimum(*ends), torch.maximum(*ends)).widened(slack)


def _average(layer: nn.Module, box: Box) -> Box:
    """Averages over windows, which have no more elements than an image."""
    if getattr(layer, "divisor_override", None) is not None:
        raise ValueError("AvgPool2d has a divisor_override: must be None, an average")
    slack = (math.prod(box.lower.shape[-2:]) + 4) * EPS
    return Box(layer(box.lower), layer(box.upper)).widened(slack * layer(box.magnitude))


def _max_pool(layer: nn.Module, box: Box) -> Box:
    if layer.return_indices:
        raise ValueError("MaxPool2d has return_indices = True: must be False")
    return Box(layer(box.lower), layer(box.upper))


def _leaky_relu(layer: nn.Module, box: Box) -> Box:
    assert isinstance(layer, nn.LeakyReLU)
    if layer.negative_slope < 0:
        raise ValueError(f"LeakyReLU has negative_slope = {layer.negative_slope}: must be >= 0")
    slope = layer.negative_slope
    return _monotone(lambda x: functional.leaky_relu(x, slope), box)


def _monotone(function: Callable[[Tensor], Tensor], box: Box) -> Box:
    """An increasing elementary function, a few roundings off."""
    found = Box(*map(function, box))
    return found.widened(FUNCTION_ERROR * found.magnitude)


def _same(layer: nn.Module, box: Box) -> Box:
    return Box(*map(layer, box))


LAYERS: dict[type[nn.Module], Callable[[nn.Module, Box], Box]] = {
    nn.Linear: _affine,
    nn.Conv2d: _affine,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda _, box: Box(
        box.lower.relu(), box.upper.relu()
    ),  # exact; not the layer itself, which may be in place
    nn.LeakyReLU: _leaky_relu,
    nn.Tanh: lambda _, box: _monotone(torch.tanh, box),
    nn.Sigmoid: lambda _, box: _monotone(torch.sigmoid, box),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average,
    nn.AdaptiveAvgPool2d: _average,
    nn.Flatten: _same,
    nn.Identity: _same,
    nn.Dropout: lambda _, box: box,
    nn.Dropout2d: lambda _, box: box,
}


def _crown(model: nn.Module, box: Box) -> Box:
    """CROWN (Zhang et al., NeurIPS 2018), linear bounds carried backward through the network."""
    try:
        from auto_LiRPA import (  # type: ignore[import-not-found, unused-ignore]
            BoundedModule,
            BoundedTensor,
            PerturbationLpNorm,
        )
    except ImportError as error:
        raise MissingLibraryError(
            "auto_LiRPA is not installed: pip install git+https://github.com/Verified-Intelligence/auto_LiRPA"
        ) from error
    middle = (box.lower + box.upper) / 2
    region = PerturbationLpNorm(norm=math.inf, x_L=box.lower, x_U=box.upper)
    bounded = BoundedModule(model, torch.empty_like(middle))
    lower, upper = bounded.compute_bounds(x=(BoundedTensor(middle, region),), method="CROWN")
    return Box(lower.double(), upper.double())
