"""Operation B, the KD energy: minus the log posterior of each row of logits, with its gradient, in one pass.

With student logits z, teacher distribution p, temperature T, q = softmax(z), q_T = softmax(z / T) and p_T ~ p^(1/T)::

    energy = label_weight CE(y', q) + prior energy(q_T, p_T)        y' = (1 - s) y + s / (unmasked classes)

for the priors of `PRIORS` (docs/methods.md; csrc/kd.h holds the derivations). The gradient is computed with the energy
and kept for the backward pass, which only multiplies it by the incoming gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bkd_fast.ops.faults import Fault, Form, Inputs, error_of, records, register_of
from bkd_fast.ops.registry import find
from bkd_fast.ops.topk import TopKLogits, check_fields

PRIORS = ("dirichlet", "continuous_categorical", "reverse_kl", "mixture")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TENSORS = 6  # the operation's first arguments; the others are settings
BY_LABEL = 2  # which of the settings is teacher_by_label


@dataclass(frozen=True, slots=True)
class Problem:
    """What a backend is given: checked, contiguous tensors and the settings.

    A backend returns `(energy, gradient, bad_row, fault)`: the energies (chains, rows), or where `summed` `total_factor`
    times their sum, a number or a tensor, in `accumulator`; `scale` times their gradient, like `logits`; and the first
    unusable row, counted through the chains, with the name of its fault (`faults.FAULTS`), or -1 and "". Where there is a
    `register`, the fault goes there with the `stamp`, nothing waits for the device, and what is returned is -1 and "".
    """

    logits: Tensor  # (chains, rows, classes)
    labels: Tensor | None  # (rows,) int64
    soft: Tensor | None  # (rows, classes)
    teacher: Tensor | None  # (teachers, rows, classes), or with indices (1, rows, k); None: no prior
    weights: Tensor | None  # (teachers,) or (rows, teachers) float64; None: the entropy weights
    prior: str
    teacher_is_probs: bool
    prior_strength: float
    temperature: float
    label_weight: float
    label_smoothing: float
    ignore_index: int
    scale: float
    summed: bool
    total_factor: float = 1.0
    register: Tensor | None = None  # int64 (1,)
    stamp: int = 0
    indices: Tensor | None = None  # int32 or int64 (rows, k): the classes that `teacher`, a top-k one, has logits of
    rest: Tensor | None = None  # float32 (rows,): its logit of each other class
    signed_target: bool = False  # soft labels may be negative
    teacher_by_label: bool = False  # `teacher` is (1, classes, classes), its row y of the rows of label y

    @property
    def accumulator(self) -> torch.dtype:
        return accumulator_of(self.logits.dtype)

    @property
    def tolerance_teacher(self) -> float:
        return sum_tolerance(self.teacher)

    @property
    def tolerance_target(self) -> float:
        return sum_tolerance(self.soft)


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the energies of logits of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_tolerance(probabilities: Tensor | None) -> float:
    """How far from 1 a row of probabilities may sum: a few roundings of its dtype, and printed decimals."""
    half = probabilities is not None and probabilities.dtype in (torch.bfloat16, torch.float16)
    return 1e-2 if half else 1e-3


def _folds_scale(dtype: torch.dtype) -> bool:
    """Whether the gradient is stored with the mean's 1 / rows in it: in float16 that could underflow."""
    return dtype != torch.float16


_LIBRARY = torch.library.Library("bkd_fast", "FRAGMENT")
_LIBRARY.define(
    "kd_energy(Tensor logits, Tensor? target, Tensor? teacher, Tensor? indices, Tensor? rest, Tensor? mixture_weights, "
    "str prior, bool teacher_is_probs, bool teacher_by_label, float prior_strength, float temperature, float label_weight, "
    "float label_smoothing, bool signed_target, int ignore_index, str reduction) -> (Tensor energy, Tensor gradient)"
)


@torch.library.impl(_LIBRARY, "kd_energy", "CompositeExplicitAutograd")
def _energy_of(
    logits: Tensor,
    target: Tensor | None,
    teacher: Tensor | None,
    indices: Tensor | None,
    rest: Tensor | None,
    mixture_weights: Tensor | None,
    prior: str,
    teacher_is_probs: bool,
    teacher_by_label: bool,
    prior_strength: float,
    temperature: float,
    label_weight: float,
    label_smoothing: float,
    signed_target: bool,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape[-2:]
    count = logits.numel() // classes
    inverse = 1.0 / count if reduction == "mean" else 1.0
    hard = target is not None and not target.is_floating_point()
    if prior_strength == 0:
        teacher, indices, rest, mixture_weights = None, None, None, None
    teacher_by_label = teacher_by_label and teacher is not None
    form = Form(
        teacher_is_probs=teacher_is_probs,
        several_teachers=teacher is not None and teacher.dim() == 3 and teacher.shape[0] > 1,
        weights_per_row=mixture_weights is not None and mixture_weights.dim() == 2,
    )
    inputs = Inputs(logits, target, teacher, indices, rest, mixture_weights, ignore_index, teacher_by_label)
    register = register_of(logits.device) if records(logits.device) else None
    problem = Problem(
        logits=_with_leading(logits).contiguous(),
        labels=target.contiguous() if target is not None and hard else None,
        soft=target.contiguous() if target is not None and not hard else None,
        teacher=_with_leading(teacher).contiguous() if teacher is not None else None,
        weights=mixture_weights.to(torch.float64).contiguous() if mixture_weights is not None else None,
        prior=prior if teacher is not None else "none",
        teacher_is_probs=teacher_is_probs,
        prior_strength=prior_strength,
        temperature=temperature,
        label_weight=label_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        scale=inverse if _folds_scale(logits.dtype) else 1.0,
        summed=reduction != "none",
        total_factor=inverse,
        register=register.word if register is not None else None,
        stamp=register.begin(form, inputs) if register is not None else 0,
        indices=indices.contiguous() if indices is not None else None,
        rest=rest.to(torch.float32).contiguous() if rest is not None else None,
        signed_target=signed_target,
        teacher_by_label=teacher_by_label,
    )
    energy, gradient, bad_row, fault = find("kd_energy", logits.device)(problem)
    if bad_row >= 0:
        raise error_of(Fault(fault, bad_row // rows, bad_row % rows, 0, form), inputs)
    gradient = gradient.squeeze(0) if logits.dim() == 2 else gradient.reshape(logits.shape)
    if reduction == "none":
        return energy.reshape(logits.shape[:-1]), gradient
    if not isinstance(energy, Tensor):
        energy = torch.scalar_tensor(energy, dtype=problem.accumulator)
    return energy, gradient


def _with_leading(tensor: Tensor) -> Tensor:
    """(..., rows, classes) as (leading, rows, classes)."""
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor.reshape(-1, *tensor.shape[-2:])


@torch.library.register_fake("bkd_fast::kd_energy", lib=_LIBRARY)
def _energy_fake(logits: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:-1] if settings[-1] == "none" else ()
    energy = logits.new_empty(shape, dtype=accumulator_of(logits.dtype))
    return energy, torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, reduction = inputs[0], inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.private = False  # whether nobody but the graph has the gradient
    ctx.save_for_backward(output[1])
    ctx.inputs = len(inputs)
    # what the saved gradient lacks of the loss's
    ctx.rest = logits.numel() // logits.shape[-1] if reduction == "mean" and not _folds_scale(logits.dtype) else 1


def _backward(ctx: Any, grad_energy: Tensor | None, grad_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_gradient is not None:
        raise RuntimeError(
            "KDLoss cannot be differentiated twice: its backward pass multiplies a gradient that the forward pass "
            "computed (use plain torch operations where a Hessian is needed)"
        )
    nothing = (None,) * (ctx.inputs - 1)
    if grad_energy is None:
        return None, *nothing
    (gradient,) = ctx.saved_tensors
    if grad_energy.dim() == 0:
        if ctx.private and _is_last_use(grad_energy) and _scaled(gradient, grad_energy, ctx.rest):
            return gradient, *nothing
        return gradient * (grad_energy / ctx.rest), *nothing
    return gradient * grad_energy.unsqueeze(-1).to(gradient.dtype), *nothing


def _is_last_use(grad_energy: Tensor) -> bool:
    """Whether nobody sees the saved gradient again, so that it may become the answer itself: the incoming one is a plain
    number, and this is the graph's last use."""
    return (
        type(grad_energy) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(grad_energy)
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


def _scaled(gradient: Tensor, grad_energy: Tensor, rest: int) -> bool:
    """Whether `gradient` now is what it was times `grad_energy` / `rest`. A factor of 1, the usual one, costs no pass over it:
    on a CPU a look says so, and a GPU looks itself."""
    if grad_energy.device.type == "cpu":
        return rest == 1 and grad_energy.item() == 1.0
    if grad_energy.device == gradient.device:
        find("kd_scale_", gradient.device)(gradient, grad_energy, rest)
        return True
    return False


def _setup_operation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # compiled graphs refuse a second derivative themselves, and ask for the derivative of every differentiable output
    ctx.mark_non_differentiable(output[1])
    _setup_context(ctx, inputs, output)


torch.library.register_autograd("bkd_fast::kd_energy", _backward, setup_context=_setup_operation, lib=_LIBRARY)


def _vmap(
    energy_of: Callable[..., tuple[Tensor, Tensor]], info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """A mapped dimension of logits alone is one of chains; one that teachers or targets share joins the rows."""
    settings = list(arguments[TENSORS:])
    tensors = [
        tensor.movedim(dim, 0) if dim is not None else tensor
        for tensor, dim in zip(arguments[:TENSORS], in_dims[:TENSORS], strict=True)
    ]
    size, mapped = info.batch_size, [dim is not None for dim in in_dims[:TENSORS]]
    logits = tensors[0] if mapped[0] else tensors[0].expand(size, *tensors[0].shape)
    rows, classes, reduction = logits.shape[-2], logits.shape[-1], settings[-1]
    settings[-1] = "none"
    if not any(mapped[1:]):
        energy, gradient = energy_of(logits, *tensors[1:], *settings)
    elif settings[BY_LABEL] and mapped[2]:  # tables, which have no rows that the mapped dimension could join
        parts = [
            energy_of(logits[i], *(x[i] if m else x for x, m in zip(tensors[1:], mapped[1:], strict=True)), *settings)
            for i in range(size)
        ]
        energy, gradient = (torch.stack(each) for each in zip(*parts, strict=True))
    else:
        # per-row tensors get a dimension of `size` beside the rows, then both become one
        target, teacher, indices, rest, weights = (
            None if tensor is None else tensor if mapped[i + 1] else tensor.expand(size, *tensor.shape)
            for i, tensor in enumerate(tensors[1:])
        )
        if target is not None:
            target = target.reshape(size * rows, *target.shape[2:])
        if settings[BY_LABEL]:
            teacher = tensors[2]
        elif teacher is not None:
            teacher = teacher.movedim(0, -3).reshape(*teacher.shape[1:-2], size * rows, teacher.shape[-1])
        if indices is not None and rest is not None:
            indices, rest = indices.reshape(size * rows, -1), rest.reshape(size * rows)
        if weights is not None:
            weights = weights if weights.dim() == 3 else weights.unsqueeze(1).expand(size, rows, weights.shape[-1])
            weights = weights.reshape(size * rows, -1)
        merged = logits.movedim(0, -3)
        flat = merged.reshape(*merged.shape[:-3], size * rows, classes)
        energy, gradient = energy_of(flat, target, teacher, indices, rest, weights, *settings)
        energy = energy.reshape(merged.shape[:-1]).movedim(-2, 0)
        gradient = gradient.reshape(merged.shape).movedim(-3, 0)
    if reduction != "none":
        energy = energy.reshape(size, -1).sum(-1)
    if reduction == "mean":
        count = logits[0].numel() // classes
        energy = energy / count
        gradient = gradient / count if _folds_scale(logits.dtype) else gradient
    return (energy, gradient), (0, 0)


@torch.library.register_vmap("bkd_fast::kd_energy", lib=_LIBRARY)
def _vmap_of_operation(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    return _vmap(torch.ops.bkd_fast.kd_energy, info, in_dims, *arguments)


def _eager(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The operation past torch's dispatcher, which costs more than a small batch, where nothing there would see it."""
    logits = arguments[0]
    plain = logits.device.type in ("cpu", "cuda") and type(logits) in (Tensor, torch.nn.Parameter)
    if plain and not torch._C._len_torch_dispatch_stack():
        return _energy_of(*arguments)
    energy, gradient = torch.ops.bkd_fast.kd_energy(*arguments)
    return energy, gradient


class _Energy(torch.autograd.Function):
    """The operation for eager mode: a library's operation has its autograd too, at several times the overhead."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, settings = inputs  # in one tuple: every input costs the graph something
        arguments = (*tensors, *settings)
        energy, gradient = _eager(*arguments)
        _setup_context(ctx, arguments, (energy, gradient))
        ctx.inputs = len(inputs)
        ctx.private = True
        return energy, gradient

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


class _TransformedEnergy(torch.autograd.Function):
    """The operation for torch.func, which differentiates no operation of a library and asks for a separate context."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        energy, gradient = torch.ops.bkd_fast.kd_energy(*arguments)
        return energy, gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _vmap(_TransformedEnergy.apply, info, in_dims, *arguments)


def kd_energy(
    logits: Tensor,
    target: Tensor | None,
    teacher: Tensor | TopKLogits | None,
    *,
    mixture_weights: Tensor | None = None,
    prior: str = "dirichlet",
    teacher_is_probs: bool = False,
    teacher_by_label: bool = False,
    prior_strength: float,
    temperature: float = 1.0,
    label_weight: float = 1.0,
    label_smoothing: float = 0.0,
    signed_target: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The KD energy of a batch of logits; `bkd_fast.KDLoss` is its public face and documents the arguments.

    Args:
        logits: (..., rows, classes), float32, float64, bfloat16 or float16.
        target: (rows,) int64, (rows, classes) floating, or None.
        teacher: (rows, classes), or (teachers, rows, classes) for the mixture; logits, or probabilities where
            `teacher_is_probs`. Or, for one teacher, its top k. Not read where `prior_strength` is 0. With `teacher_by_label`,
            for "reverse_kl" alone, a table (classes, classes) whose row y is the teacher of every row of hard label y; a row
            of label `ignore_index` has neither term.
        mixture_weights: (teachers,) or (rows, teachers); None: the entropy weights.
        prior_strength: negative for "reverse_kl" alone, where it rewards distance from the teacher, which KL(q || p) <=
            -log min p bounds.
        signed_target: soft targets may be negative; they must be finite and sum to 1.

    Returns:
        Energies (..., rows) for `reduction="none"`, else a scalar; float32, or float64 for float64 logits.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes or class counts that disagree, or targets, teachers or weights out of range.
        NonFiniteError: logits of a row that are NaN, +inf, or -inf throughout.

    On CUDA values are not looked at here, as that would wait for the device: an unusable row gets energy NaN and gradient 0,
    and `faults.check_faults` raises. The first call on a device must not be inside a CUDA graph's capture (RuntimeError).
    """
    _check(logits, target, teacher, mixture_weights, prior, teacher_is_probs, teacher_by_label, prior_strength)
    values, indices, rest = teacher if isinstance(teacher, TopKLogits) else (teacher, None, None)
    tensors = (logits, target, values, indices, rest, mixture_weights)
    settings = (
        prior, teacher_is_probs, teacher_by_label, prior_strength, temperature, label_weight, label_smoothing, signed_target,
        ignore_index, reduction,
    )  # fmt: skip
    energy: Tensor
    if torch.compiler.is_compiling():
        energy, _ = torch.ops.bkd_fast.kd_energy(*tensors, *settings)
    elif torch._C._are_functorch_transforms_active():
        energy, _ = _TransformedEnergy.apply(*tensors, *settings)
    elif logits.requires_grad and torch.is_grad_enabled():
        energy, _ = _Energy.apply(*tensors, settings)
    else:
        energy, _ = _eager(*tensors, *settings)
    return energy


def _check(
    logits: Tensor,
    target: Tensor | None,
    teacher: Tensor | TopKLogits | None,
    weights: Tensor | None,
    prior: str,
    teacher_is_probs: bool,
    teacher_by_label: bool,
    prior_strength: float,
) -> None:
    """Shapes, dtypes and devices; values are checked where they are read."""
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits has dtype {logits.dtype}: must be one of {DTYPES}")
    if logits.dim() < 2 or logits.numel() == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: must be (..., rows, classes), none of them 0")
    rows, classes = logits.shape[-2:]
    beside = f"for logits of shape {tuple(logits.shape)}"
    if target is not None:
        if target.dtype == torch.int64:
            if target.shape != (rows,):
                raise ValueError(f"target has shape {tuple(target.shape)}: must be ({rows},) {beside}")
        elif target.dtype not in DTYPES:
            raise TypeError(f"target has dtype {target.dtype}: must be int64 (classes) or floating (probabilities)")
        elif target.shape != (rows, classes):
            raise ValueError(f"target has shape {tuple(target.shape)}: must be ({rows}, {classes}) {beside}")
    if teacher is None:
        if prior_strength != 0:
            raise ValueError(
                f"teacher_logits = None: prior_strength = {prior_strength} needs teacher_logits or teacher_probs"
            )
        return
    if prior_strength < 0 and prior != "reverse_kl":
        raise ValueError(f"prior_strength = {prior_strength}: must be at least 0 for the prior {prior!r}")
    name = "teacher_probs" if teacher_is_probs else "teacher_logits"
    if teacher_by_label:
        if prior != "reverse_kl":
            raise ValueError(f"prior = {prior!r}: must be 'reverse_kl' where teachers are by label")
        if isinstance(teacher, TopKLogits):
            raise TypeError(f"{name} is TopKLogits: must be a table ({classes}, {classes}) where teachers are by label")
        if target is None or target.is_floating_point():
            raise TypeError(f"{name} by label: target must be classes, int64 of shape ({rows},)")
    if isinstance(teacher, TopKLogits):
        if teacher_is_probs or prior == "mixture":
            raise TypeError(
                f"{name} is TopKLogits: must be a tensor for {'probabilities' if teacher_is_probs else 'a mixture'}"
            )
        check_fields(teacher, classes)
        name, teacher = "teacher_logits.values", teacher.values
        if teacher.dim() != 2 or len(teacher) != rows:
            raise ValueError(f"{name} has shape {tuple(teacher.shape)}: must be ({rows}, k) {beside}")
    else:
        if teacher.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {teacher.dtype}: must be one of {DTYPES}")
        its_rows = classes if teacher_by_label else rows
        wanted = f"(teachers, {rows}, {classes})" if prior == "mixture" else f"({its_rows}, {classes})"
        if (
            teacher.dim() != (3 if prior == "mixture" else 2)
            or teacher.shape[-2:] != (its_rows, classes)
            or not teacher.shape[0]
        ):
            raise ValueError(f"{name} has shape {tuple(teacher.shape)}: must be {wanted} {beside}")
    if weights is not None:
        if weights.dtype not in DTYPES:
            raise TypeError(f"mixture_weights has dtype {weights.dtype}: must be one of {DTYPES}")
        teachers = teacher.shape[0]
        if weights.shape not in ((teachers,), (rows, teachers)):
            raise ValueError(
                f"mixture_weights has shape {tuple(weights.shape)}: must be ({teachers},) or ({rows}, {teachers}) "
                f"for {name} of shape {tuple(teacher.shape)}"
            )
    for argument, tensor in (("target", target), (name, teacher), ("mixture_weights", weights)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{argument} is on {tensor.device}: must be on {logits.device}, as logits")
