"""`KDLoss`: minus the log posterior of the student's outputs under a teacher-informed prior, as a drop-in loss."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from bkd_fast.ops.faults import check_faults
from bkd_fast.ops.kd import PRIORS, REDUCTIONS, kd_energy
from bkd_fast.ops.topk import TopKLogits

Data = TypeVar("Data", Tensor, Tensor | None)


class KDLoss(nn.Module):
    """The energy of Bayesian knowledge distillation (Fang et al., ICML 2024), and three relatives, per example:

    `label_weight CE(y, q) + prior energy(q_T, p_T)`, with q = softmax(z), q_T = softmax(z / T), p_T = softmax(t / T)
    for student logits z and teacher logits t (from probabilities: p_T ~ p^(1/T)). Up to a constant it is minus the log
    of likelihood times prior, so that sampling from exp(-sum of energies) is sampling the posterior. With lambda the
    `prior_strength`, the priors' energies are

    - "dirichlet": q_T ~ Dirichlet(1 + lambda p_T): lambda CE(p_T, q_T) = -lambda sum_k p_k log q_k, up to its normaliser;
    - "continuous_categorical": -lambda sum_k q_k log p_k;
    - "reverse_kl": lambda KL(q_T || p_T);
    - "mixture": -log sum_m w_m Dirichlet(q_T; 1 + lambda p_m), normalisers included, over several teachers m.

    With temperature T the prior's logit gradient carries lambda / T, not Hinton's lambda T: `from_hinton` converts.

    Args:
        prior_strength: lambda >= 0, in pseudo-observations per example; 0 leaves plain cross entropy. Negative for "reverse_kl"
            alone, where it rewards distance from the teacher: KL(q || p) <= -log min p bounds it, and CE(p, q) has no bound.
        temperature: T > 0, of the prior only; the label term sees q at temperature 1.
        label_weight: factor of the label term, >= 0.
        prior: one of the four above.
        reduction: "mean" over all rows, labelled or not, and with chains over these too (a sampler of many chains wants
            the sum of the chains' means: multiply by their number); "sum"; or "none" for energies (..., rows).
        ignore_index: a hard label that means "no label": the row keeps its teacher term.
        label_smoothing: share of the label spread evenly over the row's unmasked classes, in [0, 1].
        signed_targets: soft targets may be negative; they must be finite and sum to 1. Such are those of corrected
            distillation (`bkd_fast.methods.semiparametric`); the energy may then have no minimum.
        mixture_weights: "entropy" (w_m ~ 1 - H_m / sum H with the entropies H of the row's p_T), "uniform", or
            probabilities of shape (teachers,) or (rows, teachers).

    Raises:
        ValueError: an argument out of range; the message names it.
    """

    mixture_weights: Tensor | str

    def __init__(
        self,
        prior_strength: float,
        temperature: float = 1.0,
        *,
        label_weight: float = 1.0,
        prior: str = "dirichlet",
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        signed_targets: bool = False,
        mixture_weights: Tensor | str = "entropy",
    ) -> None:
        super().__init__()
        signed = prior == "reverse_kl"
        allowed = "a finite number" if signed else "a finite number >= 0"
        _require(
            "prior_strength",
            prior_strength,
            (signed or prior_strength >= 0) and abs(prior_strength) < math.inf,
            allowed,
        )
        _require("temperature", temperature, 0 < temperature < math.inf, "a finite number > 0")
        _require("label_weight", label_weight, 0 <= label_weight < math.inf, "a finite number >= 0")
        _require("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "in [0, 1]")
        _require("prior", prior, prior in PRIORS, f"one of {PRIORS}")
        _require("reduction", reduction, reduction in REDUCTIONS, f"one of {REDUCTIONS}")
        if isinstance(mixture_weights, str):
            allowed = "'entropy', 'uniform' or a tensor"
            _require("mixture_weights", mixture_weights, mixture_weights in ("entropy", "uniform"), allowed)
            self.mixture_weights = mixture_weights
        else:
            self.register_buffer("mixture_weights", mixture_weights)
        self.prior_strength = float(prior_strength)
        self.temperature = float(temperature)
        self.label_weight = float(label_weight)
        self.label_smoothing = float(label_smoothing)
        self.signed_targets = signed_targets
        self.prior = prior
        self.reduction = reduction
        self.ignore_index = ignore_index
        self._posterior_temperature = 1.0

    @classmethod
    def from_hinton(
        cls, alpha: float, temperature: float, *, reduction: str = "mean", ignore_index: int = -100
    ) -> "KDLoss":
        """The loss whose gradient is exactly that of Hinton's (1 - alpha) CE(y, q) + alpha T^2 KL(p_T || q_T).

        Its value is larger by the constant alpha T^2 H(p_T), as the energy holds a cross entropy, not a divergence.
        Sampling from it is sampling a tempered posterior: see `posterior_temperature`.

        Args:
            alpha: the teacher's share, in [0, 1].
            temperature: T > 0.
        """
        _require("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
        loss = cls(
            alpha * temperature**2,
            temperature,
            label_weight=1 - alpha,
            reduction=reduction,
            ignore_index=ignore_index,
        )
        loss._posterior_temperature = 1 / (1 - alpha) if alpha < 1 else math.inf
        return loss

    @property
    def posterior_temperature(self) -> float:
        """The temperature of the posterior that this energy is sampled from: 1, and 1 / (1 - alpha) for Hinton's form.

        Hinton's loss is (1 - alpha) times the energy of `KDLoss(alpha T^2 / (1 - alpha), T)`.
        """
        return self._posterior_temperature

    def forward(
        self,
        logits: Tensor,
        target: Tensor | None = None,
        teacher_logits: Tensor | TopKLogits | None = None,
        *,
        teacher_probs: Tensor | None = None,
    ) -> Tensor:
        """The reduced energy. Gradients flow to `logits` alone: targets and teachers are data.

        Args:
            logits: student logits (..., rows, classes), float32, float64, bfloat16 or float16; arithmetic is in
                float32, for float64 in float64. Leading dimensions (chains) share targets and teachers, which are not
                copied. -inf masks a class, on which neither label nor teacher may then count.
            target: classes (rows,) int64, probabilities (rows, classes; or see `signed_targets`), or None for a batch without
                labels.
            teacher_logits: (rows, classes), for the mixture (teachers, rows, classes). Or `TopKLogits` of the rows, but for
                the mixture: read as they are, never written out in memory; classes in `indices` that are repeated are an
                error on a CPU and not looked for on CUDA. Not read where prior_strength is 0.
            teacher_probs: in their place, probabilities of the same shape; 0 is legal for "dirichlet" and "mixture".

        Returns:
            A scalar, or (..., rows) for `reduction="none"`; float32, or float64 for float64 logits.

        Raises:
            TypeError: a dtype that is not supported, `TopKLogits` for a mixture.
            ValueError: both or neither of the teacher's forms, shapes or class counts that disagree, targets or classes
                of `TopKLogits` out of range, rows of probabilities that are none, labels or teachers on masked classes.
            NonFiniteError: a row of logits that holds NaN or +inf, or nothing but -inf.
            RuntimeError: the first call on a CUDA device is inside a graph's capture.

        On CUDA, where looking at values would wait for the device, shapes and dtypes are checked here and values are not: a
        row that cannot be used gets energy NaN and gradient 0, and `check` raises its error.
        """
        if teacher_logits is not None and teacher_probs is not None:
            raise ValueError("teacher_logits and teacher_probs are both given: must be one of them")
        teacher = teacher_logits if teacher_probs is None else teacher_probs
        return kd_energy(
            logits,
            _data(target),
            TopKLogits(*map(_data, teacher)) if isinstance(teacher, TopKLogits) else _data(teacher),
            mixture_weights=self._weights(logits, teacher),
            prior=self.prior,
            teacher_is_probs=teacher_probs is not None,
            prior_strength=self.prior_strength,
            temperature=self.temperature,
            label_weight=self.label_weight,
            label_smoothing=self.label_smoothing,
            signed_target=self.signed_targets,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def check(self) -> None:
        """Raise the error of the first unusable row that any KDLoss has met on a GPU since the last check, once.

        The row's values are in the message as long as the tensors of the last call hold them. Waits for the devices that have
        computed energies; on a CPU there is nothing to do, as `forward` has raised. `bkd_fast.sample` calls it at its end and
        every 1000 steps; a training loop of your own does well to do so too.

        Raises:
            ValueError, NonFiniteError: as `forward` does on a CPU.
            RuntimeError: a CUDA graph is being captured.
        """
        check_faults()

    def _weights(self, logits: Tensor, teacher: Tensor | TopKLogits | None) -> Tensor | None:
        """The mixture weights as the operation takes them: a tensor, or None for the entropy weights."""
        if self.prior != "mixture" or not isinstance(teacher, Tensor) or teacher.dim() != 3 or not len(teacher):
            return None
        if isinstance(self.mixture_weights, Tensor):
            return _data(self.mixture_weights)
        if self.mixture_weights == "uniform":
            return torch.full((len(teacher),), 1 / len(teacher), device=logits.device)
        return None

    def extra_repr(self) -> str:
        return (
            f"prior_strength={self.prior_strength:g}, temperature={self.temperature:g}, "
            f"label_weight={self.label_weight:g}, prior={self.prior!r}, reduction={self.reduction!r}"
        )


def _data(tensor: Data) -> Data:
    """Without its graph; itself where there is none, so that `check` may find it again."""
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {value!r}: must be {allowed}")
