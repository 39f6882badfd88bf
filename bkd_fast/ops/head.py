"""The head step: KD energy, its gradient and the Langevin step of linear heads on features, K chains, in one operation.

For chain k with weight W and bias b, on features x (rows, features)::

    z      = x W^T + b
    energy = mean over rows of  label_weight CE(y, softmax(z)) + prior_strength CE(p_T, softmax(z / T))
    dz     = (label_weight (softmax(z) - y) + prior_strength / T (softmax(z / T) - p_T)) / rows
    W     <- W - lr (dz^T x        + decay W) + sigma xi
    b     <- b - lr (sum_rows dz   + decay b) + sigma xi'

with p_T = softmax(teacher / T); a row without a label has no first term. This is `kd_energy` (prior "dirichlet") followed
by `langevin_step_` in one go: between logits and parameters a linear head needs no autograd. The noise is theirs bit for
bit, xi(seed, chain + k, step, parameter, element) with the elements of W in (classes, features) order; the rest is equal
within float32 rounding. A GPU backend never writes the gradient to memory.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bkd_fast.errors import NonFiniteError
from bkd_fast.ops.langevin import LangevinStep, find_nonfinite
from bkd_fast.ops.noise import LIMITS, check_field, signed
from bkd_fast.ops.registry import find

DATA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadStep:
    """One step of K heads: the operation's arguments, in the order of its schema.

    A backend returns `(energy, nonfinite)`: float32 (chains,) and bool (2,), whether a gradient of W, of b, had NaN or
    infinite elements, which then kept their values. Backends for GPUs also record rows whose numbers cannot be used
    (ops/faults.py): they take no part, and make their chain's energy NaN. Backends for CPUs raise before anything moves.

    Attributes:
        weight: float32 (chains, classes, features), contiguous; stepped in place.
        bias: float32 (chains, classes), contiguous; stepped in place. None: no bias.
        x: features (rows, features); float32, bfloat16 or float16.
        target: classes int64 (rows,), `ignore_index` where there is no label; None: no labels. Not read where label_weight
            is 0.
        teacher: teacher logits (rows, classes); float32, bfloat16 or float16. Not read where prior_strength is 0.
        prior_strength: lambda >= 0.
        temperature: T > 0, of the prior's softmaxes (not of the posterior: that one is in sigma).
        label_weight: factor of the labels' cross entropy, >= 0.
        ignore_index: the target that means "no label".
        lr: step size on the mean energy.
        decay: precision of the Gaussian prior around 0, over the number of data.
        sigma: standard deviation of the noise added, sqrt(2 lr posterior_temperature / num_data).
        seed, chain, step: coordinates of the noise; chain is that of the first head.
        weight_parameter, bias_parameter: the numbers of W and b, coordinates of the noise.
    """

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    target: Tensor | None
    teacher: Tensor | None
    prior_strength: float
    temperature: float
    label_weight: float
    ignore_index: int
    lr: float
    decay: float
    sigma: float
    seed: int
    chain: int
    step: int
    weight_parameter: int
    bias_parameter: int


_LIBRARY = torch.library.Library("bkd_fast", "FRAGMENT")
_LIBRARY.define(
    "head_step_(Tensor(a!) weight, Tensor(b!)? bias, Tensor x, Tensor? target, Tensor? teacher, float prior_strength, "
    "float temperature, float label_weight, int ignore_index, float lr, float decay, float sigma, int seed, int chain, "
    "int step, int weight_parameter, int bias_parameter) -> (Tensor energy, Tensor nonfinite)"
)
_SEED = [field.name for field in fields(HeadStep)].index("seed")


@torch.library.impl(_LIBRARY, "head_step_", "CompositeExplicitAutograd")
def _step(*arguments: Any) -> tuple[Tensor, Tensor]:
    values = list(arguments)
    values[_SEED] %= 2**64  # a schema's integers are signed
    s = HeadStep(*values)
    energy, nonfinite = find("head_step_", s.weight.device)(s)
    return energy, nonfinite


@torch.library.register_fake("bkd_fast::head_step_", lib=_LIBRARY)
def _step_fake(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape[0]), weight.new_empty(2, dtype=torch.bool)


def head_step_(s: HeadStep) -> tuple[Tensor, Tensor]:
    """Check a step of K heads and take it, in place.

    Returns:
        The mean energy of each chain before the step, float32 (chains,), and bool (2,): whether a gradient of W, of b,
        held a NaN or an infinity (`HeadStep`).

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or devices that disagree, memory that is not contiguous, a number out of its range, targets that
            are no class.
        NonFiniteError: logits or gradients that are not finite. (On GPUs neither these nor targets raise: they are recorded.)
        Nothing was changed then.
    """
    _check(s)
    teacher = s.teacher if s.prior_strength > 0 else None
    target = s.target if s.label_weight > 0 else None
    energy, nonfinite = torch.ops.bkd_fast.head_step_(
        s.weight, s.bias, s.x, target, teacher, s.prior_strength, s.temperature, s.label_weight, s.ignore_index, s.lr,
        s.decay, s.sigma, signed(s.seed), s.chain, s.step, s.weight_parameter, s.bias_parameter,
    )  # fmt: skip
    return energy, nonfinite


def _check(s: HeadStep) -> None:
    if s.weight.dim() != 3 or s.weight.numel() == 0:
        raise ValueError(
            f"weight has shape {tuple(s.weight.shape)}: must be (chains, classes, features), none of them 0"
        )
    chains, classes, features = s.weight.shape
    if s.x.dim() != 2 or s.x.shape[1] != features or s.x.shape[0] == 0:
        raise ValueError(f"x has shape {tuple(s.x.shape)}: must be (rows, {features}), with at least one row")
    rows = s.x.shape[0]
    _check_state("weight", s.weight)
    if s.bias is not None:
        _check_shape("bias", s.bias, (chains, classes))
        _check_state("bias", s.bias)
    if s.target is not None:
        _check_shape("target", s.target, (rows,))
        if s.target.dtype != torch.int64:
            raise TypeError(f"target has dtype {s.target.dtype}: must be torch.int64, the classes")
    if s.teacher is not None:
        _check_shape("teacher", s.teacher, (rows, classes))
    elif s.prior_strength > 0:
        raise ValueError(f"teacher = None: prior_strength = {s.prior_strength} needs the teacher's logits")
    for name, tensor in (("bias", s.bias), ("x", s.x), ("target", s.target), ("teacher", s.teacher)):
        if tensor is not None and tensor.device != s.weight.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {s.weight.device}, as weight")
    for name, tensor in (("x", s.x), ("teacher", s.teacher)):
        if tensor is not None and tensor.dtype not in DATA_DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}: must be one of {DATA_DTYPES}")
    for name in ("prior_strength", "label_weight", "lr", "decay", "sigma"):
        value = getattr(s, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value}: must be finite and at least 0")
    if not 0 < s.temperature < math.inf:
        raise ValueError(f"temperature = {s.temperature}: must be finite and positive")
    for name in ("seed", "chain", "step"):
        check_field(name, getattr(s, name))
    check_field("chain", s.chain + chains - 1, "the last chain")
    for name in ("weight_parameter", "bias_parameter"):
        check_field("parameter", getattr(s, name), name)
    if classes * features > LIMITS["element"]:
        raise ValueError(f"weight has {classes * features} elements in a chain: the limit is 2**38")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {shape}")


def _check_state(name: str, tensor: Tensor) -> None:
    """What is stepped in place: float32, so that it holds the chain, and contiguous, so that elements are in order."""
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {tensor.dtype}: must be torch.float32")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}: must be contiguous")


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits (chains, rows, classes) of features (rows, features) in the heads' dtype."""
    x = x.expand(len(weight), -1, -1)
    return x @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


@torch.no_grad()
def composed_head_step_(s: HeadStep, real: torch.dtype) -> tuple[Tensor, Tensor]:
    """The step as the two operations that it is, for backends without a kernel of their own: gradients in `real`, in memory.

    One chain's gradient is there at a time: it stays in the cache, and its memory is used again. Nothing moves before the
    values of every row are known to be good, and no gradient can overflow.
    """
    rows = len(s.x)
    x = s.x.to(real)
    logits = logits_of(x, s.weight.to(real), None if s.bias is None else s.bias.to(real))
    energy, dz = torch.ops.bkd_fast.kd_energy(
        logits, s.target, s.teacher, None, None, None, "dirichlet", False, False, s.prior_strength, s.temperature, s.label_weight,
        0.0, False, s.ignore_index, "none",
    )  # fmt: skip
    of_weight = torch.empty(s.weight.shape[1:], dtype=real)

    def gradients(k: int) -> list[Tensor]:
        torch.addmm(of_weight, dz[k].T, x, beta=0, alpha=1 / rows, out=of_weight)
        both = [of_weight] if s.bias is None else [of_weight, dz[k].mean(0)]
        return [gradient.to(torch.float32) for gradient in both]

    # |dz| is at most this: only features near the end of float32 make sums that a look at every gradient is worth
    low, high = x.aminmax()  # a fifteenth of the time of vector_norm(x, inf), which was a third of a small head's step
    largest = (s.label_weight + s.prior_strength / s.temperature) * float(torch.maximum(-low, high))
    if rows * largest > torch.finfo(torch.float32).max / 2:
        for k in range(len(s.weight)):
            if bool(find_nonfinite(gradients(k)).any()):
                raise NonFiniteError(f"the gradient of weight[{k}] has a NaN or an infinity; nothing was changed")
    langevin_step_ = find("langevin_step_", s.weight.device)
    numbers = [s.weight_parameter] if s.bias is None else [s.weight_parameter, s.bias_parameter]
    for k, weight in enumerate(s.weight):
        langevin_step_(
            LangevinStep(
                theta=[weight] if s.bias is None else [weight, s.bias[k]],
                gradient=gradients(k),
                center=(),
                mean=(),
                m2=(),
                nonfinite=None,
                lr=s.lr,
                decay=s.decay,
                sigma=s.sigma,
                seed=s.seed,
                chain=s.chain + k,
                step=s.step,
                parameters=numbers,
                first_elements=[0] * len(numbers),
                draws=0,
            )
        )
    return energy.mean(1).to(torch.float32), torch.zeros(2, dtype=torch.bool, device=s.weight.device)
