"""Convergence figures of many cells at once: R-hat from histograms, effective sample sizes, quantile errors. Pure functions.

A sequence is a stretch of one chain (a half, usually). Everything is float64. References: Vehtari, Gelman, Simpson, Carpenter and
Buerkner, Bayesian Analysis 2021 (R-hat, ESS, quantile MCSE), as ArviZ computes them; Margossian, Hoffman, Sountsov, Riou-Durand,
Vehtari and Gelman, Bayesian Analysis 2024 (nested R-hat).
"""

import math
from collections import Counter

import torch
from torch import Tensor

CHUNK_CELLS = 2**9  # at a time, of eight sequences of 128 bins: 4 MB an array, which a cache holds


def rank_rhat(edges: Tensor, counts: Tensor) -> Tensor:
    """Rank-normalised split R-hat (Vehtari et al., 2021): the greater of the bulk's and the tails' (folded), from histograms.

    Draws of one bin share the ranks that they have together: the mean and the mean square of the normal scores over these ranks
    are integrals, so that no variance within bins is lost. Folding takes the draws of a bin as evenly spread. On 128 bins to the
    pooled range the result differs from that of the draws, where it is below 1.06, by 1.7e-3 or less in 99 % of cells (2.5e-3 in
    the worst of 1500 at autocorrelation .9 and 250 draws a chain; 6e-3 to 1e-2 where tails are heavy, whose range leaves the
    bulk few bins).

    Args:
        edges: (cells, bins + 1), ascending; empty bins may have no width.
        counts: (cells, sequences, bins), draws of each sequence. Lengths may differ by cell and, somewhat, by sequence.

    Returns:
        (cells,); NaN where a sequence has fewer than two draws, there are fewer than two sequences, or all draws are in one bin.

    Raises:
        ValueError: shapes that disagree.
    """
    if edges.dim() != 2 or counts.dim() != 3 or counts.shape[::2] != (len(edges), edges.shape[1] - 1):
        raise ValueError(
            f"edges have shape {tuple(edges.shape)} and counts {tuple(counts.shape)}: must be (cells, bins + 1) and "
            "(cells, sequences, bins)"
        )
    out = torch.empty(len(edges), dtype=torch.float64, device=edges.device)
    for begin in range(0, len(edges), CHUNK_CELLS):
        cells = slice(begin, begin + CHUNK_CELLS)
        out[cells] = _rank_rhat(edges[cells].double(), counts[cells].double())
    return out


def _rank_rhat(edges: Tensor, counts: Tensor) -> Tensor:
    below = torch.nn.functional.pad(counts.sum(1).cumsum(1), (1, 0))  # pooled draws below every edge
    bulk = _rhat_of_ranks(below[:, :-1], below[:, 1:], counts)
    half = below[:, -1:] / 2
    middle = (below[:, 1:] < half).sum(1, keepdim=True).clamp(max=counts.shape[2] - 1)  # the bin of the median
    inside = (half - below.gather(1, middle)) / torch.diff(below, dim=1).gather(1, middle).clamp_min(1)
    reached = edges.gather(1, middle) + inside * torch.diff(edges, dim=1).gather(1, middle)
    # with just half of the draws on either side of a gap, the median is the gap's middle
    passed = edges.gather(1, (below <= half).sum(1, keepdim=True) - 1)
    median = torch.where(inside == 1, (reached + passed) / 2, reached)
    # how many draws are nearer to the median than an edge is: those between it and its mirror image
    nearer = (below - _interpolated(edges, below, 2 * median - edges)).abs()
    low, high = torch.minimum(nearer[:, :-1], nearer[:, 1:]), torch.maximum(nearer[:, :-1], nearer[:, 1:])
    # the median's bin is two: a part on either side
    zero, left, right = torch.zeros_like(half), nearer.gather(1, middle), nearer.gather(1, middle + 1)
    low, high = torch.cat([low.scatter(1, middle, zero), zero], 1), torch.cat([high.scatter(1, middle, left), right], 1)
    at = middle[:, None].expand(-1, counts.shape[1], -1)
    of_middle = counts.gather(2, at)
    folded = torch.cat([counts.scatter(2, at, inside[:, None] * of_middle), (1 - inside[:, None]) * of_middle], 2)
    constant = (counts.sum(1) > 0).sum(1) <= 1
    return torch.maximum(bulk, _rhat_of_ranks(low, high, folded)).masked_fill(constant, torch.nan)


def _interpolated(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Row by row the piecewise linear function with knots (x, y), constant beyond them."""
    after = torch.searchsorted(x, at.contiguous()).clamp(1, x.shape[1] - 1)
    x0, x1, y0, y1 = (array.gather(1, place) for array in (x, y) for place in (after - 1, after))
    return y0 + ((at - x0) / (x1 - x0).clamp_min(1e-300)).clamp(0, 1) * (y1 - y0)


def _rhat_of_ranks(low: Tensor, high: Tensor, counts: Tensor) -> Tensor:
    """R-hat of normal scores: the draws of a bin have the pooled ranks low + 1 .. high, (cells, bins)."""
    total = counts.sum((1, 2))[:, None]
    # rank r has the score Phi^-1((r - 3/8) / (n + 1/4)): sums over ranks are integrals from low + 1/2 - 3/8 on
    low, high = (((ranks + 0.125) / (total + 0.25)).clamp(1e-12, 1 - 1e-12) for ranks in (low, high))
    z_low, z_high = torch.special.ndtri(low), torch.special.ndtri(high)
    density_low, density_high = (torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) for z in (z_low, z_high))
    share = high - low
    wide = share > 1e-9
    mean_score = torch.where(wide, (density_low - density_high) / share, z_low)
    mean_square = torch.where(wide, 1 + (z_low * density_low - z_high * density_high) / share, z_low.square())
    draws = counts.sum(2)
    mean = (counts * mean_score[:, None]).sum(2) / draws
    square = (counts * mean_square[:, None]).sum(2) / draws
    variance = (square - mean.square()) * draws / (draws - 1)
    number = draws.mean(1)
    rhat = (mean.var(1) / variance.mean(1) + (number - 1) / number).sqrt()
    return rhat.masked_fill((draws < 2).any(1), torch.nan)


def nested_rhat(means: Tensor, variances: Tensor, superchains: Tensor) -> Tensor:
    """Nested R-hat (Margossian et al., 2024): sqrt(1 + B / W) for superchains of chains that began together.

    B is the variance of the superchains' means; W the mean over superchains of the variance of their chains' means (0 for
    one chain) plus the mean variance within the chains. For chains too short for split R-hat, when there are many.

    Args:
        means, variances: (chains, cells) of each chain's draws, variances with n - 1 (0 for one draw).
        superchains: int64 (chains,), which one each chain belongs to; all equally large.

    Returns:
        (cells,).

    Raises:
        ValueError: fewer than two superchains, or unequal sizes.
    """
    sizes = Counter(superchains.tolist())
    if len(sizes) < 2 or len({*sizes.values()}) > 1:
        raise ValueError(
            f"superchains has groups of {[*sizes.values()]} chains: must be at least two, and equally large"
        )
    of_groups = [(means[superchains == g].double(), variances[superchains == g].double()) for g in sorted(sizes)]
    centres = torch.stack([mean.mean(0) for mean, _ in of_groups])
    within = torch.stack(
        [variance.mean(0) + (mean.var(0) if len(mean) > 1 else 0.0) for mean, variance in of_groups]
    ).mean(0)
    return (1 + centres.var(0) / within).sqrt()


def between_chain_ess(means: Tensor, variances: Tensor, draws: int) -> Tensor:
    """Effective draws of the mean over all chains, from how far apart their means are: M V / B.

    B is the variance of the chains' means, V = (n - 1) / n W + B that of the draws, W the mean variance within chains: a short
    chain's own variance is too small. Honest whatever the autocorrelation, if the chains began well apart; its relative standard
    error is sqrt(2 / (chains - 1)).

    Args:
        means, variances: (chains, cells) of each chain's draws; at least two chains.
        draws: of one chain; the result is at most chains * draws * log10(chains * draws), as in ArviZ.

    Returns:
        (cells,); NaN where nothing varies.
    """
    chains = len(means)
    between = means.double().var(0)
    ess = chains * (variances.double().mean(0) * (draws - 1) / draws + between) / between
    total = chains * draws
    return torch.where(variances.mean(0) > 0, ess.clamp(max=total * math.log10(max(total, 2))), torch.nan)


def batch_means_ess(sums: Tensor, length: int, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Effective draws of the mean over all chains by batch means, at batches of `length` and of four times that.

    A short batch misleads: where the longer one gives clearly fewer, the chain's memory is longer than the batches, and even
    the smaller figure is too large.

    Args:
        sums: (chains, cells, batches) of `length` consecutive draws each; whole batches only, at least eight.
        length: draws of a batch.
        variances: (chains, cells) of each chain's draws.

    Returns:
        (cells,) for each scale; NaN where nothing varies.
    """
    found = []
    for factor in (1, 4):
        number = sums.shape[2] // factor
        grouped = sums[..., : number * factor].double().reshape(*sums.shape[:2], number, factor)
        means = grouped.sum(3) / (length * factor)
        # the mean of a chain's N draws has the variance of the batch means by N / b; one of independent draws, variance / N
        ratio = variances.double().mean(0) / means.var(2).mean(0)
        found.append(torch.where(variances.mean(0) > 0, len(sums) * number * ratio, torch.nan))
    return found[0], found[1]


def trace_ess(traces: Tensor, *, rank: bool = False) -> Tensor:
    """Effective draws of the mean by Geyer's initial monotone sequence over split chains: ArviZ's ess, method "mean".

    Args:
        traces: (chains, draws, cells), at least four draws.
        rank: of rank-normalised draws: method "bulk".

    Returns:
        (cells,); all draws where nothing varies, as ArviZ has it.

    Raises:
        ValueError: fewer than four draws.
    """
    if traces.dim() != 3 or traces.shape[1] < 4:
        raise ValueError(
            f"traces have shape {tuple(traces.shape)}: must be (chains, draws, cells) with at least 4 draws"
        )
    half = traces.shape[1] // 2
    split = torch.cat([traces[:, :half], traces[:, -half:]]).double()
    step = max(1, 2**22 // (split.shape[0] * split.shape[1]))
    parts = [split[..., begin : begin + step] for begin in range(0, split.shape[2], step)]
    return torch.cat([_geyer_ess(_scores(part) if rank else part) for part in parts])


def _scores(traces: Tensor) -> Tensor:
    """Normal scores of the ranks of each cell's draws, ties by their mean rank."""
    flat = traces.flatten(0, 1).T.contiguous()
    ascending = flat.sort(1).values
    left, right = (torch.searchsorted(ascending, flat, right=after) for after in (False, True))
    ranks = (left + right + 1).double() / 2
    scores: Tensor = torch.special.ndtri((ranks - 0.375) / (flat.shape[1] + 0.25))
    return scores.T.reshape(traces.shape)


def _geyer_ess(traces: Tensor) -> Tensor:
    chains, draws, _ = traces.shape
    centred = traces - traces.mean(1, keepdim=True)
    padded = 2 ** math.ceil(math.log2(2 * draws))
    spectrum = torch.fft.rfft(centred, n=padded, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=padded, dim=1)[:, :draws].mean(0) / draws
    within = covariance[0] * draws / (draws - 1)
    plus = covariance[0] + (traces.mean(1).var(0) if chains > 1 else 0.0)
    correlation = 1 - (within - covariance) / plus
    correlation[0] = 1
    pairs = correlation[: draws // 2 * 2].reshape(draws // 2, 2, -1)
    even, pair = pairs[:, 0], pairs.sum(1)
    # pairs up to the first that is not positive, or to the last that ArviZ looks at
    last = max(0, -(-(draws - 4) // 2))
    stopped = (pair[: last + 1] <= 0).int()
    stop = torch.where(stopped.any(0), stopped.argmax(0), min(last, len(pair) - 1))
    before = torch.arange(len(pair), device=pair.device)[:, None] < stop
    decreasing = pair.cummin(0).values
    tail_even, tail_pair = even.gather(0, stop[None])[0], pair.gather(0, stop[None])[0]
    tail = torch.where((tail_even > 0) | (tail_pair >= 0), tail_even, 0.0)
    total = chains * draws
    time = -1 + 2 * (decreasing * before).sum(0) + tail
    ess = total / time.clamp_min(1 / math.log10(total))
    spread = traces.amax((0, 1)) - traces.amin((0, 1))
    return torch.where(spread < torch.finfo(torch.float64).resolution, float(total), ess)


def quantile_mcse_levels(q: float, ess: Tensor) -> tuple[Tensor, Tensor]:
    """The levels between which a q quantile would fall by its Monte Carlo error, one standard error to either side.

    Half the distance of the two quantiles is the MCSE (Vehtari et al., 2021, section 4.4: beta-distributed ranks).

    Args:
        q: in [0, 1].
        ess: effective draws of the indicator of being below the quantile, or of the mean as its estimate.
    """
    from scipy.special import betaincinv

    a, b = (ess * q + 1).cpu().numpy(), (ess * (1 - q) + 1).cpu().numpy()
    low, high = (torch.from_numpy(betaincinv(a, b, level)).to(ess.device) for level in (0.1586553, 0.8413447))
    return low, high
