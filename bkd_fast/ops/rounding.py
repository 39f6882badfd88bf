"""The noise of 16-bit parameters: how much to inject, so that noise and stochastic rounding together have the variance wanted.

Stochastic rounding to a grid of spacing u adds variance of its own: u^2 r (1 - r) at the fraction r of a spacing. Normal
noise of variance s^2 around a point of the grid, rounded so, has in all (r (1 - r) as a Fourier series, averaged over the
noise)::

    V = s^2 + u^2 / 6 - (u / pi)^2 sum_{n >= 1} exp(-2 pi^2 n^2 s^2 / u^2) / n^2                            (1)

`noise_table` solves (1) for s. Only V / u^2 matters, and u is a power of two, so one table over the exponents serves all
parameters of a dtype. For V far below u^2, s = sqrt(pi / 2) V / u: jumps to a neighbour, as rare as V asks. For V >= u^2,
s^2 = V - u^2 / 6, to 1e-8.

What it leaves out: in (1) the point before the noise is on the grid, and the gradient moves it off by some d. For V << u^2
that raises the variance by the share E d^2 u^2 / (pi V^2), less above, nothing from V = u^2 on. The full gradient of a
posterior of standard deviation sd makes it u^2 / (4 pi sd^2), 0.5 % at u = sd / 4 (samplers warn where u is larger); minibatch
noise makes it noise_share u^2 / (pi V) (docs/samplers.md §6). And float32 itself loses noise below V = 1e-5 u^2.
"""

import functools
import math

import torch
from torch import Tensor

FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10}
BIASES = {torch.bfloat16: 127, torch.float16: 15}  # of the exponent field
TABLE_SIZES = {torch.bfloat16: 256, torch.float16: 32}  # exponent fields

_END = 2.0  # V / u^2 from which s^2 = V - u^2 / 6 to float64's precision
_POINTS = 4096  # of the solution up to there, joined by straight lines: relative error of s below 1e-6 (tests: 5e-8)
_LINEAR = 0.08  # V / u^2 below which s = sqrt(pi / 2) V / u to float64's precision
_HARMONICS = 20  # of the series, beyond which terms vanish from _LINEAR on


def noise_table(sigma: float | Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Standard deviations to inject into parameters of a 16-bit dtype so that their steps have standard deviation `sigma`.

    Args:
        sigma: the standard deviation wanted of noise and rounding together, at least 0. With a 0-dim tensor everything stays on
            its device and nothing waits for it; the constants go there at the first call: make one before capturing a graph.
            With a tensor (chains,) there is a table for each.
        dtype: torch.bfloat16 or torch.float16.
        device: where the table of a number goes; None for the CPU. A tensor's is its own.

    Returns:
        float32 (256,) or (32,), with chains (chains, 256) or (chains, 32), by exponent field: `LangevinStep.noise_table`. Not to
        be written to: calls share it.

    Raises:
        TypeError: another dtype. ValueError: a number that is negative or not finite.
    """
    if dtype not in TABLE_SIZES:
        raise TypeError(f"dtype = {dtype}: must be one of {tuple(TABLE_SIZES)}")
    if isinstance(sigma, Tensor):
        return _table(sigma, dtype)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma = {sigma}: must be finite and at least 0")
    return _table_of_number(float(sigma), dtype, device or torch.device("cpu"))


@functools.lru_cache(maxsize=64)  # a group's is asked for at every step, and changes with lr
def _table_of_number(sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _table(torch.tensor(sigma, dtype=torch.float64), dtype).to(device, non_blocking=True)


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from each finite x (float32 or float64) to the next number of a 16-bit dtype away from zero."""
    lowest = 1 - BIASES[dtype]
    exponent = (torch.frexp(x).exponent - 1).clamp(min=lowest).masked_fill(x == 0, lowest)
    return torch.ldexp(torch.ones_like(x), exponent - FRACTION_BITS[dtype])


def _table(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    spacings, solution = _constants(dtype, sigma.device)
    wanted = (sigma.detach().double().unsqueeze(-1) / spacings).square()
    position = wanted.clamp(max=_END) * (_POINTS / _END)
    below = position.long().clamp_(max=_POINTS - 1)
    between = torch.lerp(solution.take(below), solution.take(below + 1), position - below)
    beyond = (wanted - 1 / 6).clamp_(min=0).sqrt_()  # below the solution everywhere, and equal to it from _END on
    return (spacings * torch.maximum(between, beyond)).float()


@functools.cache
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The spacing u of every exponent field, and s / u at equidistant V / u^2 from 0 to _END; float64."""
    # subnormals are spaced as the lowest binade; the last field has no finite numbers
    exponent = torch.arange(TABLE_SIZES[dtype]).clamp(1, 2 * BIASES[dtype]) - BIASES[dtype]
    spacings = torch.ldexp(torch.ones(len(exponent), dtype=torch.float64), exponent - FRACTION_BITS[dtype])
    wanted = torch.linspace(0, _END, _POINTS + 1, dtype=torch.float64)
    solution = torch.where(wanted < _LINEAR, math.sqrt(math.pi / 2) * wanted, _solve(wanted.clamp(min=_LINEAR)))
    return spacings.to(device), solution.to(device)


def _solve(wanted: Tensor) -> Tensor:
    """s / u of equation (1) for V / u^2 >= _LINEAR. V is convex in s and at least s^2, so that Newton descends from sqrt(V)."""
    n_squared = torch.arange(1, _HARMONICS + 1, dtype=torch.float64).square()[:, None]
    s = wanted.sqrt()
    for _ in range(8):
        terms = torch.exp(-2 * math.pi**2 * n_squared * s.square())
        variance = s.square() + 1 / 6 - (terms / n_squared).sum(0) / math.pi**2
        slope = 2 * s * (1 + 2 * terms.sum(0))
        s = s - (variance - wanted) / slope
    return s
