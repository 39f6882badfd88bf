"""A self-check for any sampler in the form of a torch optimizer: the temperature that it samples at, its noise, its manners."""

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from bkd_fast.errors import BKDFastWarning

SHAPES = ((200, 500), (40, 1000), (40, 1000), (20003,))  # two alike: what goes by shape shows there
SMALLEST = 100  # elements of a tensor, below which its noise cannot be told from chance
SIGMAS = 5.0  # standard errors: one false alarm in 1.7 million
ALLOWANCE = 0.005  # of the temperature: what extrapolation leaves of the finite step's bias in other integrators
UNKNOWN = 0.1  # share of the temperature: a standard error above it tells nothing
STEP = 0.2  # share of its distance from the mode that a coordinate of the larger curvature goes in a step
BLOCK = 200  # steps of burn-in and of either half of the first average; doubled until the halves agree
MAX_STEPS = 3000
DRIFT_SIGMAS = 3.0  # of the halves' difference; a false alarm costs time only
NOTHING = 1e-9  # of the wanted variance: the chain has come to rest

PROBES = 8  # at most: a sampler that scales by its gradients responds otherwise at another curvature
WARM_UP, NOISE_STEPS, FOLLOWED_STEPS = 2, 8, 100  # of the probe, in this order
IMPULSE = 10.0  # standard deviations of the gradient
FAINT = 1e-4  # of the largest response to the impulse: may be rounding
REPEATED = 1e-4  # share of a step's noise that is as good as none: rounding leaves 1e-10, momentum 1/8
OFFSET_SIGMAS = 8.0  # of the largest of a million correlations: one false alarm in a billion

Copies: TypeAlias = Literal["identical chains", "reproducible by torch.manual_seed", "not reproducible"]


@dataclass(frozen=True)
class SamplerCheck:
    """What `check_sampler` found; printing it gives a table and, in words, what is wrong.

    Attributes:
        name: the class.
        lr: as given or the class's default; NaN if there is none.
        num_data: N.
        expected: the temperature that it ought to have.
        temperature: the one that it has: N l Var(theta) at curvature l of the mean loss, extrapolated to l = 0. 0: it comes to
            rest; infinite: it diverges.
        standard_error: of `temperature`.
        stationary: the variance did not drift over the averaged steps.
        steps: that the chain took.
        curvature: the larger one of the two.
        effective_lr: how far a gradient moves a parameter within 100 steps, per unit of it: lr for SGLD, lr / (1 - mu) with
            momentum; 0 where no such move is seen.
        remembers: a gradient moves the parameters at later steps too (momentum). Noise then is correlated over steps rightly.
        fresh_noise: least share of a step's noise (its variance) that the steps before do not determine: 1 for white noise,
            less with momentum, 0 where noise comes again, NaN where none is seen.
        step_correlation: largest correlation between the noise of two steps, in standard errors.
        tensor_correlation: of two tensors in one step, element by element, in standard errors.
        offset_correlation: of the noise of a step, or of two consecutive ones, with itself shifted, in standard errors: the
            largest over all shifts, expected to be about 5.
        gradient_kept: `.grad` is the same tensor after a step and has the same values.
        in_place: parameters stay at their address.
        counted: autograd's version counter sees that they changed (it does not through `.data`).
        still_at_zero_lr: lr = 0 moves nothing; None where `param_groups` has no lr.
        copies: what a second instance draws that was built alike.
    """

    name: str
    lr: float
    num_data: float
    expected: float
    temperature: float
    standard_error: float
    stationary: bool
    steps: int
    curvature: float
    effective_lr: float
    remembers: bool
    fresh_noise: float
    step_correlation: float
    tensor_correlation: float
    offset_correlation: float
    gradient_kept: bool
    in_place: bool
    counted: bool
    still_at_zero_lr: bool | None
    copies: Copies

    @property
    def ok(self) -> bool:
        """Everything holds that has to."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words; empty if nothing is."""
        off = abs(self.temperature - self.expected)
        told = [
            (not self.effective_lr > 0, "a gradient does not move the parameters downhill"),
            (not self.stationary, f"not stationary after {self.steps} steps: the variance still drifts"),
            (
                self.standard_error > UNKNOWN * max(self.expected, self.temperature),
                f"temperature {self.temperature:.2g} +- {self.standard_error:.2g} is no figure yet: take larger shapes",
            ),
            (
                not off <= SIGMAS * self.standard_error + ALLOWANCE * self.expected,
                f"temperature {self.temperature:.4g} in place of {self.expected:g}{self._likeness()}",
            ),
            (
                self.expected > 0 and math.isnan(self.fresh_noise),
                "no noise is seen: there is none, or all elements of a tensor share it",
            ),
            (self.fresh_noise < REPEATED, "a step's noise is made of that of the steps before (or it has none)"),
            (
                not self.remembers and self.step_correlation > SIGMAS,
                "the noise of different steps is correlated, and no momentum explains it",
            ),
            (self.tensor_correlation > SIGMAS, "the noise of two tensors is correlated"),
            (self.offset_correlation > OFFSET_SIGMAS, "stretches of noise occur twice, shifted"),
            (not self.gradient_kept, "the gradient is changed"),
            (not self.in_place, "parameters are moved to other memory: what shares it keeps old values"),
            (self.still_at_zero_lr is False, "parameters move at lr = 0"),
        ]
        return [words for wrong, words in told if wrong]

    def _likeness(self) -> str:
        """Which of the usual mistakes has this ratio of temperatures, if any."""
        ratio = self.temperature / self.expected if self.expected > 0 else math.nan
        for mistake, words in [
            (0.5, "noise of variance lr for 2 lr"),
            (self.num_data, "noise that is not divided by sqrt(num_data)"),
            (1 / self.num_data, "noise that is divided by sqrt(num_data) twice"),
            (self.lr * self.num_data / 2, "noise of standard deviation lr"),
            (self.lr**2, "noise that is multiplied by lr once more"),
        ]:
            if mistake != 1 and abs(ratio / mistake - 1) < 0.02:
                return f": {mistake:.4g} times it, as with {words}"
        return ""

    def __str__(self) -> str:
        def yes(holds: bool | None) -> str:
            return "-" if holds is None else "yes" if holds else "no"

        rows = [
            ("temperature", f"{self.temperature:#.4g} +- {self.standard_error:.2g}", f"expected {self.expected:g}"),
            (
                "stationary",
                yes(self.stationary),
                f"{self.steps} steps at curvature {self.curvature:.3g} and half of it",
            ),
            ("effective lr", f"{self.effective_lr:.3g}", "with momentum" if self.remembers else "no momentum"),
            ("new noise in a step", f"{self.fresh_noise:.3g}", "1 white, 0 repeated"),
            ("noise: steps", f"{self.step_correlation:.1f}", "standard errors" + ", momentum" * self.remembers),
            ("noise: tensors", f"{self.tensor_correlation:.1f}", f"standard errors, at most {SIGMAS:g}"),
            ("noise: any offset", f"{self.offset_correlation:.1f}", f"standard errors, at most {OFFSET_SIGMAS:g}"),
            ("gradient kept", yes(self.gradient_kept), ""),
            ("moves in place", yes(self.in_place), "" if self.counted else "not told to autograd"),
            ("still at lr = 0", yes(self.still_at_zero_lr), ""),
            ("a second instance", self.copies, ""),
        ]
        wide, wider = (max(len(row[i]) for row in rows[:-1]) for i in (0, 1))
        lines = [f"{self.name}, num_data = {self.num_data:g}: {'ok' if self.ok else 'WRONG'}"]
        lines += [f"  {name:{wide}}  {value:{wider}}  {remark}".rstrip() for name, value, remark in rows]
        return "\n".join(lines + [f"  - {problem}" for problem in self.problems])


def check_sampler(
    opt_class: type[torch.optim.Optimizer],
    *,
    num_data: float,
    curvature: float | None = None,
    expected: float | None = None,
    shapes: Sequence[Sequence[int]] = SHAPES,
    **kwargs: Any,
) -> SamplerCheck:
    r"""Run a sampler where everything is known, and report what it does: its temperature, repeated noise, its manners.

    The target is exp(-num_data L / T), L = l/2 |theta|^2 the mean loss whose gradients the sampler gets, on independent
    coordinates: a quarter of them have curvature l, the others l/2. At stationarity T(l) = num_data l Var(theta); SGLD and its
    momentum form have 1 / T(l) linear in l at any step size, so extrapolating to l = 0 takes their bias away.

    Noise is what tells coordinates of one gradient apart. Over steps it is whitened first, for momentum correlates the moves
    of a correct sampler; what remains has to be there, and to occur once. Draws from torch's global generator, and leaves it
    as it was. Takes some seconds, on one thread of torch.

    Args:
        opt_class: a class of optimizers, ours or another's. A constructor that has a parameter `num_data` gets it.
        num_data: N. 1 for a class whose gradients are those of the *summed* loss.
        curvature: l; None takes one at which a step goes a fifth of the way, as measured.
        expected: temperature that it ought to have, if that is not kwargs["temperature"], or 1.
        shapes: of the parameters, at least two; the more elements, the smaller the standard error (.0014 for the default).
        **kwargs: the constructor's, in its own units. A prior among them (weight decay) reads as a lower temperature.

    Returns:
        the findings; `.ok`, `.problems`, and a table as str.

    Raises:
        TypeError: opt_class is no class of optimizers; num_data, curvature or expected is no number.
        ValueError: one of them is out of its range; a shape has fewer than 100 elements; there is no lr above 0 and no curvature.
    """
    _check(opt_class, num_data, curvature, expected, shapes)
    names = inspect.signature(opt_class).parameters
    lr = kwargs.get("lr", names["lr"].default if "lr" in names else math.nan)
    lr = float(lr) if isinstance(lr, Real | Tensor) else math.nan
    if curvature is None and not lr > 0:
        raise ValueError(f"lr = {lr}: must be above 0, or give a curvature")
    if "num_data" in names:
        kwargs["num_data"] = num_data
    wanted = float(kwargs.get("temperature", 1.0) if expected is None else expected)
    width = wanted or 1.0  # temperature that the chain starts from
    uphill = -1.0 if kwargs.get("maximize") else 1.0

    def chain(start: Tensor) -> _Chain:
        return _Chain(lambda parameters: opt_class(parameters, **kwargs), shapes, start)

    with torch.random.fork_rng(devices=[]), _one_thread():
        zeros = torch.zeros(sum(math.prod(shape) for shape in shapes))
        largest = STEP / lr if curvature is None else curvature
        for _ in range(PROBES):
            probe = _probe(chain(zeros), uphill * math.sqrt(largest * width / num_data))
            if curvature is not None or not probe.effective_lr > 0:
                break
            before, largest = largest, STEP / probe.effective_lr
            if abs(largest / before - 1) < 0.1:
                break
        curvatures = torch.full_like(zeros, largest / 2)
        curvatures[::4] = largest
        start = torch.randn_like(zeros) * (width / (num_data * curvatures)).sqrt()
        temperature, error, stationary, steps = _temperature(chain(start), curvatures * uphill, num_data, width)
        kept, in_place, counted = _manners(chain(start), curvatures * start)
        still = _still_at_zero_lr(chain(start), curvatures * start)
        copies = _copies(lambda: chain(start).step(curvatures * start))
    return SamplerCheck(
        name=opt_class.__name__,
        lr=lr,
        num_data=float(num_data),
        expected=wanted,
        temperature=temperature,
        standard_error=error,
        stationary=stationary,
        steps=steps,
        curvature=largest,
        effective_lr=probe.effective_lr,
        remembers=probe.remembers,
        fresh_noise=probe.fresh_noise,
        step_correlation=probe.step_correlation,
        tensor_correlation=probe.tensor_correlation,
        offset_correlation=probe.offset_correlation,
        gradient_kept=kept,
        in_place=in_place,
        counted=counted,
        still_at_zero_lr=still,
        copies=copies,
    )


def _check(
    opt_class: object, num_data: object, curvature: object, expected: object, shapes: Sequence[Sequence[int]]
) -> None:
    if not (inspect.isclass(opt_class) and issubclass(opt_class, torch.optim.Optimizer)):
        raise TypeError(f"opt_class = {opt_class!r}: must be a class of torch.optim.Optimizer")
    for name, value in (("num_data", num_data), ("curvature", curvature), ("expected", expected)):
        if value is None and name != "num_data":
            continue
        if not isinstance(value, Real):
            raise TypeError(f"{name} = {value!r}: must be a number")
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "expected"):
            raise ValueError(f"{name} = {value}: must be finite and {'at least' if name == 'expected' else 'above'} 0")
    if len(shapes) < 2 or min(math.prod(shape) for shape in shapes) < SMALLEST:
        raise ValueError(f"shapes = {shapes}: must be at least two, each of at least {SMALLEST} elements")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors of this size gain little from a second thread, and beside other work wait for it at every operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Chain:
    """One instance of the class, on parameters of its own."""

    def __init__(
        self, make: Callable[[list[Tensor]], torch.optim.Optimizer], shapes: Sequence[Sequence[int]], start: Tensor
    ) -> None:
        self.sizes = [math.prod(shape) for shape in shapes]
        self.parameters = [
            part.reshape(tuple(shape)).clone().requires_grad_()
            for part, shape in zip(torch.split(start, self.sizes), shapes, strict=True)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BKDFastWarning)  # of samplers that draw the same noise: here they shall
            self.optimizer = make(self.parameters)

    def step(self, gradient: Tensor) -> Tensor:
        """One step with this gradient (n,); the parameters after it (n,)."""
        parts = torch.split(gradient, self.sizes)
        self.given = [part.reshape(p.shape).clone() for part, p in zip(parts, self.parameters, strict=True)]
        for parameter, given in zip(self.parameters, self.given, strict=True):
            parameter.grad = given
        self.optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters])


# ---- temperature ----


def _temperature(chain: _Chain, curvatures: Tensor, num_data: float, width: float) -> tuple[float, float, bool, int]:
    """Temperature, its standard error, whether the chain was stationary, and its steps."""
    theta = torch.cat([parameter.detach().flatten() for parameter in chain.parameters])
    steps = 0

    def average(length: int) -> Tensor:
        """Temperature of every coordinate over so many steps (n,): independent, whatever its correlation over time."""
        nonlocal theta, steps
        squares = torch.zeros_like(theta)
        for _ in range(length):
            theta = chain.step(curvatures * theta)
            steps += 1
            if not math.isfinite(float(theta.sum())):
                raise FloatingPointError("the chain diverges")
            squares.addcmul_(theta, theta)
        return squares.double() * curvatures.abs() * (num_data / length)

    def mean(values: Tensor) -> tuple[float, float]:
        return float(values.mean()), float(values.std()) / math.sqrt(values.numel())

    large = curvatures.abs() == curvatures.abs().max()
    groups = [large, ~large]
    length = BLOCK
    try:
        average(length)
        while True:
            first, second = average(length), average(length)
            if float(second.mean()) < NOTHING * width:
                return 0.0, 0.0, True, steps
            drifts = [mean((second - first)[group]) for group in groups]
            stationary = all(abs(drift) < DRIFT_SIGMAS * error for drift, error in drifts)
            length *= 2
            if stationary or steps + 2 * length > MAX_STEPS:
                break
    except ArithmeticError:  # also what a sampler of ours raises of its own
        return math.inf, math.nan, False, steps
    (t, error), (t_half, error_half) = (mean((first + second)[group] / 2) for group in groups)
    inverse = 2 / t_half - 1 / t
    if inverse <= 0:
        return math.nan, math.nan, stationary, steps
    return 1 / inverse, math.hypot(2 * error_half / t_half**2, error / t**2) / inverse**2, stationary, steps


# ---- noise ----


@dataclass(frozen=True)
class _Probe:
    """The fields of `SamplerCheck` of the same names."""

    effective_lr: float
    remembers: bool
    fresh_noise: float
    step_correlation: float
    tensor_correlation: float
    offset_correlation: float


def _probe(chain: _Chain, size: float) -> _Probe:
    """Steps under one gradient for all coordinates, whose noise is what tells them apart; then an impulse of random signs."""
    uniform = torch.full((sum(chain.sizes),), size)
    signs = torch.randint_like(uniform, 2) * 2 - 1
    for _ in range(WARM_UP):
        before = chain.step(uniform)
    moves = []
    for step in range(NOISE_STEPS + FOLLOWED_STEPS):
        # of one magnitude, so that what is made of squared gradients stays alike
        gradient = IMPULSE * signs * uniform if step == NOISE_STEPS else uniform
        after = chain.step(gradient)
        moves.append(_centred(after.double() - before.double(), chain.sizes))
        before = after
    noise, followed = torch.stack(moves[:NOISE_STEPS]), torch.stack(moves[NOISE_STEPS:])

    impulse = IMPULSE * abs(size)  # downhill is against it, or with it where the sampler maximizes and size is negative
    scale = math.sqrt(signs.numel()) * impulse  # of a response's standard error
    responses = -(followed @ signs.double()) / (signs.numel() * impulse)
    seen = (SIGMAS * followed.std(dim=1) / scale).clamp(min=FAINT * float(responses.abs().max()))
    remembers = bool((responses.abs() > seen)[1:4].any())
    last = FOLLOWED_STEPS if remembers else 1
    effective_lr, error = float(responses[:last].sum()), float(followed[1 : last + 1].sum(dim=0).std()) / scale
    return _Probe(
        effective_lr if abs(effective_lr) > SIGMAS * error else 0.0,
        remembers,
        *_repetition([part.contiguous() for part in torch.split(noise, chain.sizes, dim=1)]),
    )


def _centred(move: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([part - part.mean() for part in torch.split(move, sizes)])


def _repetition(noise: list[Tensor]) -> tuple[float, float, float, float]:
    """Fresh share, and correlations between steps, tensors and offsets in standard errors, of noises (steps, elements).

    A sampler that filters its noise over time, as momentum does, makes a step's noise of the steps before and of something
    new. The QR decomposition takes the new apart without knowing the filter: white, of unit variance, uncorrelated over steps
    at the same element.
    """
    if any(float(part.abs().max()) == 0 for part in noise):
        return (math.nan,) * 4
    steps = len(noise[0])
    shares, correlations, white = [], [], []
    for part in noise:
        q, r = torch.linalg.qr(part.T)
        r = (r / part.norm(dim=1)).nan_to_num()  # column t: what step t's noise is made of
        shares.append(float(r.diagonal().square().min()))
        correlations.append(float(r.triu(1).abs().max()) * math.sqrt(part.shape[1]))
        white.append(q.T * math.sqrt(part.shape[1]))
    pairs = []
    for a, b in itertools.combinations(white, 2):
        common = min(a.shape[1], b.shape[1])
        pairs.append(abs(float((a[:, :common] * b[:, :common]).sum())) / math.sqrt(steps * common))
    return min(shares), max(correlations), max(pairs), _largest_at_an_offset(torch.cat(white, dim=1))


def _largest_at_an_offset(white: Tensor) -> float:
    """Largest correlation of (steps, n) with itself shifted, in a step and between consecutive ones, in standard errors."""
    steps, n = white.shape
    spectrum = torch.fft.rfft(white, n=1 << (2 * n - 1).bit_length())
    within = torch.fft.irfft(spectrum.abs().square().sum(dim=0)) / math.sqrt(steps * n)
    between = torch.fft.irfft((spectrum[1:] * spectrum[:-1].conj()).sum(dim=0)) / math.sqrt((steps - 1) * n)
    return max(float(within[1:n].abs().max()), float(between[1:].abs().max()))


# ---- manners ----


def _manners(chain: _Chain, gradient: Tensor) -> tuple[bool, bool, bool]:
    """Whether gradients are kept, parameters stay where they are, and autograd's version counter sees them change."""
    kept = in_place = counted = True
    given: list[Tensor] = []
    for _ in range(2):  # the first step may make state of its gradient, which the second changes
        before = [(p.data_ptr(), p._version) for p in chain.parameters]
        chain.step(gradient)
        given += chain.given
        kept &= all(p.grad is own for p, own in zip(chain.parameters, chain.given, strict=True))
        for parameter, (place, version) in zip(chain.parameters, before, strict=True):
            in_place &= parameter.data_ptr() == place
            counted &= parameter._version > version
    return kept and torch.equal(torch.cat([own.flatten() for own in given]), gradient.repeat(2)), in_place, counted


def _still_at_zero_lr(chain: _Chain, gradient: Tensor) -> bool | None:
    if not all("lr" in group for group in chain.optimizer.param_groups):
        return None
    for group in chain.optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in chain.parameters]
    with suppress(ValueError):  # a sampler that refuses does not move either
        chain.step(gradient)
    return all(torch.equal(a, b) for a, b in zip(before, chain.parameters, strict=True))


def _copies(first_step: Callable[[], Tensor]) -> Copies:
    torch.manual_seed(0)
    first, second = first_step(), first_step()
    if torch.equal(first, second):
        return "identical chains"
    torch.manual_seed(0)
    return "reproducible by torch.manual_seed" if torch.equal(first, first_step()) else "not reproducible"
