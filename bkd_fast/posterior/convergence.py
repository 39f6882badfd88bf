"""Whether chains have mixed and how many independent draws they are worth: R-hat, ESS and MCSE of many cells at once.

Each function takes plain tensors: histograms, moments of chains or batches, or stored traces. A cell is one scalar quantity
that is followed over the draws. All is computed in float64, some cells at a time, whatever the number of cells.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

WORKSPACE = 2**26  # bytes that the cells in work take, more or less
TAIL = 0.1586553  # of a normal law below -1, in ArviZ's digits
CONSTANT = 1e-15  # range below which ArviZ calls a trace constant


class BatchMeansESS(NamedTuple):
    """What `batch_means_ess` returns.

    ess: (cells,) float64, the smaller of the two estimates.
    disagreement: (cells,) float64, that of the short batches over that of the long ones. Above 1 by more than chance, the short
        batches are shorter than the autocorrelation reaches, and the long ones may be.
    """

    ess: Tensor
    disagreement: Tensor


def rank_rhat(values: Tensor, counts: Tensor) -> Tensor:
    """Rank-normalised split R-hat from histograms: the larger of the bulk and the folded one.

    Vehtari, Gelman, Simpson, Carpenter and Bürkner (Bayesian Analysis 2021), sections 3.1 and 4. The draws of a bin share its
    ranks, so their normal scores enter by mean and mean square over these ranks. For the folded R-hat they are spread evenly
    over the bin, which reaches half-way to its neighbours, and folded about the pooled median.

    Sequences of unequal lengths n_s count as in the one-way analysis of variance: between them
    `B = sum n_s (m_s - m)^2 / (S - 1)`, within them `W = sum (n_s - 1) v_s / sum (n_s - 1)`, and
    `R^2 = (n - 1) / n + B / (n W)` at `n = (sum n_s - sum n_s^2 / sum n_s) / (S - 1)`; equal lengths give the textbook's formula.

    Args:
        values: (cells, bins) strictly ascending positions of the bins, such as the middle codes. Best evenly spaced; an empty
            bin may lie anywhere between its neighbours.
        counts: (cells, sequences, bins) integers, how many draws of each sequence fell in each bin. A sequence is one half of
            one chain.

    Returns:
        (cells,) float64. NaN for a cell with draws in one bin only (a constant, as in ArviZ), or with a sequence of less than
        two draws. Chains that are stuck at constants of their own give a large finite value, ArviZ infinity.

    Raises:
        TypeError: counts are no integers.
        ValueError: shapes disagree, there are fewer than two sequences or bins, positions do not ascend, or a count is negative.
    """
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"counts of {counts.dtype}: must be integers")
    if values.ndim != 2 or counts.ndim != 3 or values.shape != (counts.shape[0], counts.shape[2]):
        raise ValueError(
            f"values have shape {tuple(values.shape)} and counts {tuple(counts.shape)}: "
            "must be (cells, bins) and (cells, sequences, bins)"
        )
    cells, sequences, bins = counts.shape
    if sequences < 2 or bins < 2:
        raise ValueError(f"{sequences} sequences and {bins} bins: must be at least two of each")
    if counts.dtype.is_signed and counts.numel() and bool(counts.amin() < 0):
        raise ValueError(f"a count is {int(counts.amin())}: must be at least 0")
    at_once = _cells_at_once(bins * (2 * sequences + 24))
    totals = torch.cat([block.sum(dim=(1, 2)) for block in torch.split(counts, at_once)])
    result = torch.full((cells,), torch.nan, dtype=torch.float64, device=values.device)
    for total in torch.unique(totals).tolist():  # one, unless cells miss draws
        scores = _score_sums(total, values.device)
        same = (totals == total).nonzero()[:, 0]
        for chosen in torch.split(same, at_once):
            result[chosen] = _histogram_rhat(values[chosen].double(), counts[chosen].double(), scores)
    return result


def nested_rhat(means: Tensor, variances: Tensor, draws: int, superchains: Tensor) -> Tensor:
    """Nested R-hat, for many short chains of which groups, the superchains, have one starting point each.

    Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari and Gelman (Bayesian Analysis 2024), equations 4 to 8. B is the variance
    of the superchains' means; W the mean over superchains of B_k, the variance of the means of its chains (0 for one chain),
    plus W_k, the mean variance of its chains (0 for one draw); all variances are unbiased. `R = sqrt(1 + B / W)`, at least 1. Equal to
    `posterior::rhat_nested` in R, and to `rhat_nested(method="identity")` of arviz-stats.

    Args:
        means: (chains, cells), of each chain's draws.
        variances: (chains, cells), of each chain's draws, with divisor draws - 1; not looked at if draws = 1.
        draws: of each chain.
        superchains: (chains,) integers, the superchain that a chain belongs to; as many chains in each.

    Returns:
        (cells,) float64; NaN for a constant.

    Raises:
        ValueError: shapes disagree, draws < 1, there are fewer than two superchains, or they differ in size.
    """
    _check_moments(means, variances, draws, least=1)
    if superchains.shape != means.shape[:1]:
        raise ValueError(
            f"superchains have shape {tuple(superchains.shape)}: must be ({len(means)},), one for each chain"
        )
    sizes = torch.unique(superchains, return_counts=True)[1]
    if len(sizes) < 2 or bool((sizes != sizes[0]).any()):
        raise ValueError(f"superchains of {sizes.tolist()} chains: must be at least two, all of one size")
    order = superchains.argsort().view(len(sizes), -1)
    means = means.double()[order]  # (superchains, chains of one, cells)
    within = torch.zeros_like(means[0, 0])
    if means.shape[1] > 1:
        within = within + means.var(dim=1).mean(dim=0)
    if draws > 1:
        within = within + variances.double().mean(dim=0)
    return (1 + means.mean(dim=1).var(dim=0) / within).sqrt()


def between_chain_ess(means: Tensor, variances: Tensor, draws: int) -> Tensor:
    """Effective sample size of the mean over all chains, from the variance of the chains' means.

    `chains * V / B` with B the variance of the chains' means and `V = (draws - 1) / draws * W + B` the marginal variance, W the
    mean variance of a chain (var+ in Vehtari et al., Bayesian Analysis 2021, section 3.1). It holds at any autocorrelation,
    but has itself the relative standard error sqrt(2 / (chains - 1)): .82 with 4 chains, .25 with 32. It never falls below the
    number of chains, and may exceed that of the draws.

    Args:
        means: (chains, cells), of each chain's draws.
        variances: (chains, cells), of each chain's draws, with divisor draws - 1.
        draws: of each chain, at least 2.

    Returns:
        (cells,) float64; chains * draws for a constant, as in ArviZ.

    Raises:
        ValueError: shapes disagree, draws < 2, or there are fewer than two chains.
    """
    _check_moments(means, variances, draws, least=2)
    between = means.double().var(dim=0)
    marginal = (draws - 1) / draws * variances.double().mean(dim=0) + between
    return _or_constant(len(means) * marginal / between, marginal, len(means) * draws)


def batch_means_ess(
    variance: Tensor, batch_variances: tuple[Tensor, Tensor], lengths: tuple[int, int], draws: int
) -> BatchMeansESS:
    """Effective sample size of the mean from the means of batches at two lengths, and whether these agree.

    `draws * variance / (length * batch variance)` at each length (batch means: Geyer, Statistical Science 1992). Batches
    that are shorter than the autocorrelation reaches give too large a value, and one length alone does not show it: at
    autocorrelation .99, 2000 draws are worth 10, and batches of 16 say 127. Two lengths that differ by a factor of 4 disagree
    then. Each estimate has the relative standard error sqrt(2 / (batches - 1)) by chance.

    Args:
        variance: (cells,) of the draws.
        batch_variances: two of (cells,), of the means of the short and of the long batches, with divisor batches - 1.
        lengths: draws in a short and in a long batch.
        draws: of all chains together.

    Returns:
        the smaller estimate and their ratio; draws and 1 for a constant.

    Raises:
        ValueError: shapes disagree, or not 1 <= short < long < draws.
    """
    short, long = lengths
    if not 1 <= short < long < draws:
        raise ValueError(f"lengths = {lengths} of {draws} draws: must be 1 <= short < long < draws")
    if any(batch.shape != variance.shape for batch in batch_variances) or variance.ndim != 1:
        raise ValueError(
            f"variance has shape {tuple(variance.shape)} and batch_variances "
            f"{[tuple(batch.shape) for batch in batch_variances]}: must all be (cells,)"
        )
    variance = variance.double()
    estimates = [
        _or_constant(draws * variance / (length * batch.double()), variance, draws)
        for length, batch in zip(lengths, batch_variances, strict=True)
    ]
    return BatchMeansESS(torch.minimum(*estimates), estimates[0] / estimates[1])


def trace_ess(traces: Tensor, *, rank: bool = False) -> Tensor:
    """Effective sample size of stored draws, by Geyer's initial monotone sequence over the split chains.

    Vehtari et al. (Bayesian Analysis 2021), section 3.2, in the form of ArviZ's `ess(method="mean")`, and with rank `"bulk"`. Of
    the indicators `traces <= quantile` it is ArviZ's `ess(method="quantile")`.

    Args:
        traces: (chains, draws, cells), real or bool; the middle one of an odd number of draws is left out.
        rank: of the draws' normal scores instead of themselves: robust, and finite without moments.

    Returns:
        (cells,) float64; the number of split draws for a constant, NaN if a draw is NaN (or, without rank, infinite).

    Raises:
        ValueError: not three dimensions, no chain, or fewer than four draws.
    """
    if traces.ndim != 3 or traces.shape[0] < 1 or traces.shape[1] < 4:
        raise ValueError(f"traces have shape {tuple(traces.shape)}: must be (chains, draws, cells), draws >= 4")
    chains, draws, cells = traces.shape
    half = draws // 2
    result = torch.empty(cells, dtype=torch.float64, device=traces.device)
    at_once = _cells_at_once(chains * draws * 8)
    for block, out in zip(torch.split(traces, at_once, dim=2), torch.split(result, at_once), strict=True):
        split = torch.cat([block[:, :half], block[:, draws - half :]]).double().permute(2, 0, 1).contiguous()
        out.copy_(_geyer_ess(_normal_scores(split) if rank else split))
    return result


def quantile_mcse_levels(q: float, ess: Tensor) -> tuple[Tensor, Tensor]:
    """The two levels whose quantiles' distance is twice the MCSE of the q-quantile. Needs SciPy.

    Levels 15.87 % and 84.13 % (a normal law's -1 and +1) of Beta(q ess + 1, (1 - q) ess + 1), the law of the level at which the
    estimated quantile really lies (Vehtari et al., Bayesian Analysis 2021, section 4.4). ArviZ's `mcse(method="quantile")`
    takes the sorted draws floor(lower S) and ceil(upper S), counted from 1 and within 1..S.

    Args:
        q: level in (0, 1).
        ess: effective sample size, above 0, of the indicator that a draw lies below the quantile (`trace_ess` of it; that of the
            mean stands in where there is no trace).

    Returns:
        lower and upper level, float64 in the shape of ess; NaN where ess is NaN.

    Raises:
        ValueError: q or an ess is out of range.
    """
    if not 0 < q < 1:
        raise ValueError(f"q = {q!r}: must be in (0, 1)")
    if bool((ess <= 0).any()):
        raise ValueError(f"ess of {float(ess.min()):.6g}: must be above 0")
    from scipy.special import betaincinv

    size = ess.double().cpu().numpy()
    lower, upper = (
        torch.as_tensor(betaincinv(size * q + 1, size * (1 - q) + 1, level), device=ess.device)
        for level in (TAIL, 1 - TAIL)
    )
    return lower, upper


def _cells_at_once(numbers: int) -> int:
    """How many cells fit in the workspace that take so many float64 each."""
    return max(1, WORKSPACE // (8 * numbers))


def _score_sums(total: int, device: torch.device) -> Tensor:
    """(total + 2, 2): sums of the normal scores and of their squares over the ranks 1..r, at r = 0..total, the last one twice.

    A table, for the integrals of the normal quantile function and of its square are off by up to .05 at the first rank.
    """
    ranks = torch.arange(1, total + 1, dtype=torch.float64, device=device)
    scores = torch.special.ndtri((ranks - 3 / 8) / (total + 1 / 4))
    sums = pad(torch.stack([scores, scores.square()], dim=1).cumsum(dim=0), (0, 0, 1, 0))
    return torch.cat([sums, sums[-1:]])


def _histogram_rhat(values: Tensor, counts: Tensor, score_sums: Tensor) -> Tensor:
    """`rank_rhat` of cells whose draws are equally many; values (cells, bins) and counts (cells, sequences, bins) in float64."""
    middles = (values[:, 1:] + values[:, :-1]) / 2
    if not bool((values[:, 1:] > values[:, :-1]).all()):
        raise ValueError("values do not ascend from bin to bin in every cell: they must, strictly")
    edges = torch.cat([2 * values[:, :1] - middles[:, :1], middles, 2 * values[:, -1:] - middles[:, -1:]], dim=1)
    pooled = counts.sum(dim=1)
    below = pad(pooled.cumsum(dim=1), (1, 0))
    # an edge e and its mirror image 2m - e in the median enclose the draws that are closer to it: their number is the rank of
    # |e - m|. With a sign that tells the sides apart it grows from bin to bin, through 0 at m.
    enclosed = below - _interpolate(edges, below, 2 * _median(edges, below) - edges)
    scores = torch.cat([_mean_scores(below, score_sums), _mean_scores(enclosed, score_sums)], dim=2)
    sizes = counts.sum(dim=2)[:, :, None]
    total = sizes.sum(dim=1)
    degrees = counts.shape[1] - 1
    first, second = torch.unflatten(counts @ scores / sizes, 2, (2, 2)).unbind(3)  # (cells, sequences, bulk and folded)
    overall = (sizes * first).sum(dim=1, keepdim=True) / total[:, None]
    between = (sizes * (first - overall).square()).sum(dim=1) / degrees
    within = (sizes * (second - first.square())).sum(dim=1) / (total - degrees - 1)
    length = (total - sizes.square().sum(dim=1) / total) / degrees
    rhat = ((length - 1 + between / within) / length).sqrt().amax(dim=1)
    unknown = ((pooled > 0).sum(dim=1) < 2) | (sizes < 2).any(dim=1)[:, 0]
    return rhat.masked_fill(unknown, torch.nan)


def _median(edges: Tensor, below: Tensor) -> Tensor:
    """(cells, 1): where half of the draws lie below; the middle of such a stretch if it is empty."""
    half = below[:, -1:] / 2
    # the bin that ends in the first edge with at least half of the draws below, and the one that starts in the last with at most
    ends = torch.cat([torch.searchsorted(below, half) - 1, torch.searchsorted(below, half, right=True) - 1], dim=1)
    ends = ends.clamp(0, below.shape[1] - 2)
    start, stop = below.gather(1, ends), below.gather(1, ends + 1)
    share = ((half - start) / (stop - start)).nan_to_num()
    return torch.lerp(edges.gather(1, ends), edges.gather(1, ends + 1), share).mean(dim=1, keepdim=True)


def _interpolate(edges: Tensor, below: Tensor, at: Tensor) -> Tensor:
    """How many draws lie below each position `at`, all (cells, bins + 1)."""
    bin_ = (torch.searchsorted(edges, at, right=True) - 1).clamp(0, edges.shape[1] - 2)
    left, right = edges.gather(1, bin_), edges.gather(1, bin_ + 1)
    share = ((at - left) / (right - left)).clamp(0, 1)
    return torch.lerp(below.gather(1, bin_), below.gather(1, bin_ + 1), share)


def _mean_scores(ranks: Tensor, score_sums: Tensor) -> Tensor:
    """(cells, bins, 2): mean normal score and mean square over the ranks of each bin, whose edges are at ranks (cells, bins + 1).

    The score of a negative rank is that of its absolute value, so the sum up to it is an odd function.
    """
    size = ranks.abs()
    whole = size.floor()
    row = whole.long()
    sums = torch.lerp(score_sums[row], score_sums[row + 1], (size - whole)[:, :, None]) * ranks.sign()[:, :, None]
    # an occupied bin spans at least one rank
    return sums.diff(dim=1) / ranks.diff(dim=1).clamp_min(0.5)[:, :, None]


def _check_moments(means: Tensor, variances: Tensor, draws: int, least: int) -> None:
    """Means and variances (chains, cells) of at least two chains of at least so many draws."""
    if means.ndim != 2 or means.shape != variances.shape or len(means) < 2:
        raise ValueError(
            f"means have shape {tuple(means.shape)} and variances {tuple(variances.shape)}: "
            "both must be (chains, cells) with chains >= 2"
        )
    if draws < least:
        raise ValueError(f"draws = {draws}: must be at least {least}")


def _or_constant(ess: Tensor, variance: Tensor, draws: int) -> Tensor:
    """The number of draws where these do not vary, as in ArviZ."""
    return torch.where(variance == 0, float(draws), ess)


def _normal_scores(split: Tensor) -> Tensor:
    """Normal scores of the ranks in each cell of (cells, chains, draws): ties share their mean rank, NaN stays NaN."""
    flat = split.flatten(1)
    ordered = flat.sort(dim=1).values
    # the mean of the first and the last rank of a value
    rank = (torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True) + 1) / 2.0
    scores = torch.special.ndtri((rank.double() - 3 / 8) / (flat.shape[1] + 1 / 4))
    return torch.where(flat.isnan(), flat, scores).view_as(split)


def _geyer_ess(split: Tensor) -> Tensor:
    """(cells,) from the split chains (cells, chains, draws); `_ess` of ArviZ, its loops over lags as cumulative operations."""
    chains, draws = split.shape[1:]
    means = split.mean(dim=2, keepdim=True)
    padded = 1 << (2 * draws - 1).bit_length()  # room for all lags, in a length that the FFT likes
    spectrum = torch.fft.rfft(split - means, n=padded)
    power = (spectrum.real.square() + spectrum.imag.square()).mean(dim=1)
    covariance = torch.fft.irfft(power, n=padded)[:, :draws] / draws  # mean over chains
    variance = covariance[:, :1] * draws / (draws - 1)
    marginal = covariance[:, :1] + means[:, :, 0].var(dim=1, keepdim=True)
    rho = 1 - (variance - covariance) / marginal
    rho[:, 0] = 1
    # sums of an even lag and the next are positive for a reversible chain: they are added up to the first that is not
    pairs = rho[:, 0 : draws - 1 : 2] + rho[:, 1:draws:2]
    usable = max(0, (draws - 3) // 2)  # of them; ArviZ leaves the last lags out
    count = (pairs[:, :usable] > 0).int().cumprod(dim=1).sum(dim=1, keepdim=True)
    monotone = pairs.cummin(dim=1).values
    used = torch.arange(pairs.shape[1], device=split.device) < count
    # the even lag after the last pair, unless it is where the sum breaks off
    rest = rho.gather(1, 2 * count)
    rest = torch.where((rest > 0) | (pairs.gather(1, count) >= 0), rest, 0.0)
    time = -1 + 2 * monotone.where(used, 0.0).sum(dim=1) + rest[:, 0]
    size = chains * draws
    ess = size / time.clamp_min(1 / math.log10(size))
    ess = ess.masked_fill(rho[:, 1].isnan(), torch.nan)
    flat = split.flatten(1)
    return torch.where(flat.amax(dim=1) - flat.amin(dim=1) < CONSTANT, float(size), ess)
