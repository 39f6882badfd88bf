"""Faithful distillation: whether a student answers as its teacher does near its inputs, and a loss and a posterior to that end.

After T. A. Lamb et al., *Faithful Knowledge Distillation*, arXiv:2306.04431 (2023). **Reconstructed from the abstract**, which
asks whether teacher and student disagree close to an input and whether the student is as confident there, and has empirical and
certified answers; the formulas, and that the bounds are intervals, are ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bkd_fast.distill import KDLoss
from bkd_fast.methods.bounds import Box, Method, ball, check_fixed, logit_bounds, softmax_bounds
from bkd_fast.posterior.evaluation import evaluating
from bkd_fast.sampling import Callback, Draw
from bkd_fast.sketch import QuantileSketch
from bkd_fast.stacked import StackedModule

STEP = 2.5  # a step of PGD in units of radius / steps: the ball's far side is within reach (Madry et al., ICLR 2018)


class Attack(NamedTuple):
    """What projected gradient ascent found: the largest value of each row, (rows,), and where, like x."""

    values: Tensor
    points: Tensor


@torch.no_grad()
def attack(
    objective: Callable[[Tensor], Tensor], x: Tensor, box: Box, *, steps: int = 20, restarts: int = 0, seed: int = 0
) -> Attack:
    """Large values of an objective in a box by projected gradient ascent (Madry et al., ICLR 2018): sign steps, best one kept.

    It starts at x, so that no value is below the one there, and again at `restarts` points drawn uniformly from the box. Without
    restarts nothing is random.

    Args:
        objective: gives (rows,) for inputs (rows, ...), each row's of its own input alone, differentiable.
        x: in the box.
        box: `ball` of x.
        steps: per start; 0 evaluates the starts alone.

    Raises:
        ValueError: counts that are negative; an x that is not in the box.
    """
    for name, count in (("steps", steps), ("restarts", restarts)):
        if count < 0:
            raise ValueError(f"{name} = {count}: must be at least 0")
    if x.shape != box.lower.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}: must be that of the box, {tuple(box.lower.shape)}")
    if not bool(((x >= box.lower) & (x <= box.upper)).all()):
        raise ValueError("x is outside the box: must be in it")
    generator = torch.Generator(x.device).manual_seed(seed)
    step = (box.upper - box.lower) * (STEP / (2 * max(steps, 1)))
    values, points = objective(x), x.detach().clone()
    for restart in range(restarts + 1):
        at = x.detach()
        if restart > 0:
            part = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            at = torch.lerp(box.lower, box.upper, part).clamp(*box)
        for number in range(steps + 1):
            with torch.set_grad_enabled(number < steps):
                at.requires_grad_(number < steps)
                found = objective(at)
                total = found.sum()
            better = found > values
            values = torch.where(better, found.detach(), values)
            points = torch.where(better.view(-1, *[1] * (x.dim() - 1)), at.detach(), points)
            if number < steps:
                (gradient,) = torch.autograd.grad(total, at)
                at = (at.detach() + step * gradient.sign()).clamp(*box)
    return Attack(values, points)


def calibration_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """(rows,) max_c |q_c - p_c|, for logits or logarithms of probabilities (rows, classes) of student and teacher.

    Raises:
        ValueError: shapes that differ.
    """
    _check_alike(student, teacher)
    return (student.softmax(-1) - teacher.softmax(-1)).abs().amax(-1)


@dataclass(frozen=True)
class Faithfulness:
    """How faithful a student is to its teacher on the box around each input; (rows,) each.

    With delta the relative calibration gap, the largest `calibration_gap` in the box: gap <= gap_found <= delta <= gap_certified,
    up to what the networks round in their own dtype.

    Attributes:
        gap: at the input itself.
        gap_found: the largest one that `attack` found.
        gap_certified: that none exceeds.
        agrees: both have the same arg max at the input itself.
        agrees_found: and at every input that was tried: no disagreement was found.
        agrees_certified: and everywhere in the box: the bounds of both leave the same class.
    """

    gap: Tensor
    gap_found: Tensor
    gap_certified: Tensor
    agrees: Tensor
    agrees_found: Tensor
    agrees_certified: Tensor


def faithfulness(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    box: Box,
    *,
    steps: int = 20,
    restarts: int = 2,
    seed: int = 0,
    method: Method = "ibp",
) -> Faithfulness:
    """Whether the student's class and confidences are the teacher's, at every input and on the box around it.

    Args:
        student, teacher: from inputs to logits; of layers that `logit_bounds` can do, fixed. A `StackedModule` is the mean of its
            networks' probabilities: a posterior mean, of its draws.
        x: inputs (rows, ...).
        box: `ball` of x.
        steps, restarts, seed: of `attack`, once for the gap and once for a disagreement.
        method: of `logit_bounds`.

    Raises:
        ValueError, MissingLibraryError: as `attack` and `logit_bounds` do; logits of different shapes.
    """
    check_fixed(student, "student")
    check_fixed(teacher, "teacher")

    def gap(z: Tensor) -> Tensor:
        return calibration_gap(_log_probs(student, z), _log_probs(teacher, z))

    def disagreement(z: Tensor) -> Tensor:
        """By how much the student's log odds prefer another class to the teacher's; positive where they disagree."""
        ours, chosen = _log_probs(student, z), _log_probs(teacher, z).argmax(-1, keepdim=True)
        return ours.scatter(-1, chosen, -math.inf).amax(-1) - ours.gather(-1, chosen)[:, 0]

    with torch.no_grad():
        here, apart = gap(x), disagreement(x)
    gaps = attack(gap, x, box, steps=steps, restarts=restarts, seed=seed)
    apart_found = attack(disagreement, x, box, steps=steps, restarts=restarts, seed=seed).values
    with torch.no_grad():
        apart_found = torch.maximum(apart_found, disagreement(gaps.points))
    ours, theirs = (_prob_bounds(model, box, method) for model in (student, teacher))
    ours_certain, theirs_certain = _certain_class(*ours), _certain_class(*theirs)
    return Faithfulness(
        here,
        gaps.values,
        certified_gap(ours[0], theirs[0]),
        apart <= 0,
        apart_found <= 0,
        (ours_certain == theirs_certain) & (ours_certain >= 0),
    )


def certified_gap(student: Box, teacher: Box) -> Tensor:
    """(rows,) the largest `calibration_gap` that two boxes of probabilities (rows, classes) allow, at most 1.

    Raises:
        ValueError: shapes that differ.
    """
    _check_alike(student.lower, teacher.lower)
    apart = torch.maximum(student.upper - teacher.lower, teacher.upper - student.lower)
    return apart.amax(-1).clamp(max=1)


def _log_probs(model: nn.Module, x: Tensor) -> Tensor:
    """(rows, classes) log probabilities; of several networks, of the mean of their probabilities."""
    found: Tensor = model(x).log_softmax(-1)
    return found.logsumexp(0) - math.log(len(found)) if isinstance(model, StackedModule) else found


def _prob_bounds(model: nn.Module, box: Box, method: Method) -> tuple[Box, Box]:
    """Boxes (rows, classes) of the probabilities, and of what their order is read from: the logits, which bound it more tightly,
    or, of a mean over networks, the probabilities."""
    if not isinstance(model, StackedModule):
        logits = logit_bounds(model, box, method)
        return softmax_bounds(logits), logits
    found = [softmax_bounds(logit_bounds(model.chain(k), box, method)) for k in range(model.chains)]
    rounding = (len(found) + 1) * torch.finfo(torch.float64).eps
    mean = Box(*(torch.stack(ends).mean(0) for ends in zip(*found, strict=True))).widened(rounding)
    return mean, mean


def _certain_class(_: Box, scores: Box) -> Tensor:
    """(rows,) the class whose score is above every other's throughout the box; -1 where none is."""
    best = scores.lower.argmax(-1, keepdim=True)
    others = scores.upper.scatter(-1, best, -math.inf).amax(-1)
    return torch.where(scores.lower.gather(-1, best)[:, 0] > others, best[:, 0], -1)


def _check_alike(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"student gives {tuple(student.shape)} and teacher {tuple(teacher.shape)}: must be alike")


# ---- training, and sampling ----


class FaithfulLoss(nn.Module):
    """`CE(y, q(x)) + beta max_{x' in the ball about x} KL(p(x') || q(x'))`, the mean over a batch: the teacher, too, sees x'.

    The maximum is looked for by `attack` from x, without restarts: a function of the parameters and the data, with nothing random
    in it. Its gradient is that at the point found (Danskin's theorem). Both terms are `KDLoss`'s; with eps = 0 this is the energy
    of Bayesian knowledge distillation with prior_strength = beta, up to the teacher's entropy.

    It takes x where `KDLoss` takes the teacher's logits. In training: `loss(student(x), y, x)`. As the energy of a posterior,
    `exp(-N loss)` times the prior on the parameters, `nn.Identity()` in the teacher's place hands x on::

        loss = FaithfulLoss(student, teacher, beta=5.0, eps=0.1)
        sampler = bkd.SGLD(student.parameters(), lr, num_data=N, prior_precision=1.0)
        for draw in bkd.sample(student, sampler, loss, loader, teacher=nn.Identity(), num_draws=100): ...

    Args:
        student: the network that is trained, one (no `StackedModule`: each of its networks would have an x' of its own).
        teacher: a fixed network; neither is a submodule of the loss, which leaves their devices and modes alone.
        beta: >= 0, in pseudo-observations per example.
        eps, lower, upper: of `ball`.
        steps: of `attack`: each costs one forward and one backward pass of both networks.

    Raises:
        ValueError: beta out of range, a StackedModule, a teacher that is not fixed. And when called: as `ball` and `KDLoss` do.
    """

    reduction = "mean"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        beta: float,
        eps: float,
        lower: Tensor | float = 0.0,
        upper: Tensor | float = 1.0,
        steps: int = 10,
    ) -> None:
        super().__init__()
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta = {beta}: must be a finite number >= 0")
        if isinstance(student, StackedModule):
            raise ValueError("student is a StackedModule: must be one network")
        check_fixed(teacher, "teacher")
        self._networks = (student, teacher)  # in a tuple, where nn.Module does not look for submodules
        self.beta, self.eps, self.lower, self.upper, self.steps = beta, eps, lower, upper, steps
        self._label, self._prior = KDLoss(0.0), KDLoss(beta, label_weight=0.0)

    def forward(self, logits: Tensor, target: Tensor | None, x: Tensor) -> Tensor:
        """The scalar loss.

        Args:
            logits: the student's of x, (rows, classes).
            target: as `KDLoss` takes it.
            x: inputs (rows, ...).
        """
        points = self.worst(x)
        student, teacher = self._networks
        with torch.no_grad():
            answers = teacher(points)
            entropy = torch.special.entr(answers.softmax(-1)).sum(-1).mean()
        prior: Tensor = self._prior(student(points), None, answers) - self.beta * entropy
        energy: Tensor = self._label(logits, target) + prior
        return energy

    def worst(self, x: Tensor) -> Tensor:
        """The x' of every row, like x: where the attack found the largest divergence."""
        student, teacher = self._networks

        def divergence(z: Tensor) -> Tensor:
            theirs: Tensor = teacher(z).log_softmax(-1)
            apart: Tensor = theirs - student(z).log_softmax(-1)
            return (theirs.exp() * apart).sum(-1)

        return attack(divergence, x, ball(x, self.eps, self.lower, self.upper), steps=self.steps).points

    def check(self) -> None:
        """What `KDLoss.check` does."""
        self._prior.check()


# ---- over the posterior ----


class GapDraws:
    """Gaps in [0, 1], (rows,), of posterior draws: their mean and their quantiles over draws, streamed."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._sum = torch.zeros(rows, dtype=torch.float64, device=device)
        self._sketch = QuantileSketch((rows,), 2.0**-15, center=0.5, device=device)
        self._draws = 0

    def update(self, gaps: Tensor) -> None:
        """One draw's."""
        self._sketch.update(gaps)
        self._sum += gaps
        self._draws += 1

    @property
    def mean(self) -> Tensor:
        """float64 (rows,): over draws; NaN without any."""
        return self._sum / self._draws

    def quantile(self, q: float) -> Tensor:
        """float32 (rows,): over draws, as `QuantileSketch.quantile` has it, to a resolution of 2^-15."""
        return self._sketch.quantile(q)


class PosteriorGap(Callback):
    """Follows `bkd_fast.sample`: the relative calibration gap of every draw, bounded from both sides.

    The gap is convex in the student's probabilities: that of the posterior mean, which `faithfulness` of a `StackedModule` of
    draws tells, is at most the mean of these.

    Args:
        teacher, x, box, steps, restarts, seed: as in `faithfulness`.

    Attributes:
        found: `GapDraws` of what `attack` found.
        certified: `GapDraws` of what no gap exceeds.

    Raises:
        ValueError: as `logit_bounds` does, now for the teacher and at a draw for the student.
    """

    def __init__(
        self, teacher: nn.Module, x: Tensor, box: Box, *, steps: int = 20, restarts: int = 0, seed: int = 0
    ) -> None:
        self._teacher, self._x, self._box = teacher, x, box
        self._bounds = softmax_bounds(logit_bounds(teacher, box))
        self._settings = {"steps": steps, "restarts": restarts, "seed": seed}
        self.found, self.certified = (GapDraws(len(x), x.device) for _ in range(2))

    def on_draw(self, draw: Draw) -> None:
        with evaluating(draw.model):
            found = attack(
                lambda z: calibration_gap(draw.model(z), self._teacher(z)), self._x, self._box, **self._settings
            )
            self.found.update(found.values)
            self.certified.update(certified_gap(softmax_bounds(logit_bounds(draw.model, self._box)), self._bounds))
