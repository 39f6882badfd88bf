"""What a state of the posterior predictive says: moments, entropies, quantiles, intervals, probabilities beyond a value."""

import torch
from torch import Tensor

from bkd_fast.ops.predictive import PredictiveState
from bkd_fast.ops.sketch import Tiles, sketch_deviance_quantile, sketch_quantile
from bkd_fast.posterior.probabilities import bounds_of, point_of, shortest_of, tails_of
from bkd_fast.sketch import broadcasts

ROUNDING = 1e-5  # of a row's mean probabilities, whose sum is 1


class PredictiveSummary:
    """Every result of the posterior predictive, float32 on the state's device; NaN for rows without draws.

    Moments are (num_rows, num_classes), entropies (num_rows,). What comes from the sketch is (num_rows, tracked): all classes, or
    for each row the `tracked_classes`.
    """

    _state: PredictiveState
    _sketch: Tiles  # of the tracked classes; the state's own where these are all
    _tracked: Tensor | None  # int32 (rows, tracked); None: all

    def _flushed(self) -> PredictiveState:
        """The state with all draws."""
        raise NotImplementedError

    def _sketched(self) -> Tiles:
        self._flushed()
        return self._sketch

    @property
    def num_rows(self) -> int:
        """N."""
        return self._state.tiles.counts.numel()

    @property
    def num_classes(self) -> int:
        """C."""
        return self._state.tiles.row_cells

    @property
    def bins(self) -> int:
        """Counters per cell."""
        return self._sketch.counters.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the state and the results are."""
        return self._state.mean.device

    @property
    def tracked_classes(self) -> Tensor:
        """int64 (N, tracked): the classes whose quantiles are kept, in the order of the sketch's results; -1 until chosen."""
        if self._tracked is None and self._sketch.row_cells < self.num_classes:
            return torch.full((self.num_rows, self._sketch.row_cells), -1, device=self.device)
        if self._tracked is None:
            return torch.arange(self.num_classes, device=self.device).expand(self.num_rows, -1)
        return self._tracked.long()

    def _cells(self, cells: Tensor) -> Tensor:
        return cells[: self.num_rows * self.num_classes].view(self.num_rows, self.num_classes)

    def _draws(self, least: int = 1) -> Tensor:
        """float64 (N,): draws per row, NaN where fewer than `least`."""
        counts = self._state.tiles.counts.double()
        return counts.masked_fill(counts < least, torch.nan)

    @property
    def counts(self) -> Tensor:
        """int64 (N,): valid draws of each row."""
        return self._flushed().tiles.counts.long()

    @property
    def invalid_counts(self) -> Tensor:
        """int64 (N,): draws that were excluded, their logits holding NaN or +inf, or being all -inf."""
        return self._flushed().invalid.long()

    # ---- moments and entropies ----

    @property
    def mean(self) -> Tensor:
        """(N, C): the posterior predictive probability E p."""
        state = self._flushed()
        return self._cells(state.mean).masked_fill((state.tiles.counts == 0)[:, None], torch.nan)

    @property
    def variance(self) -> Tensor:
        """(N, C): the variance of p over draws, with n - 1; NaN below two draws."""
        state = self._flushed()
        variance = torch.div(self._cells(state.m2).double(), (self._draws(least=2) - 1)[:, None])
        return variance.clamp_min(0).float()

    @property
    def expected_entropy(self) -> Tensor:
        """(N,): E H[p] in nats, the aleatoric part of the predictive entropy."""
        return torch.div(self._flushed().entropy, self._draws()).float()

    @property
    def predictive_entropy(self) -> Tensor:
        """(N,): H[E p] in nats."""
        entropy: Tensor = torch.special.entr(self.mean.double()).sum(1)
        return entropy.float()

    @property
    def mutual_information(self) -> Tensor:
        """(N,): H[E p] - E H[p] in nats (BALD; Houlsby et al., 2011), computed as E KL(p || r) - KL(E p || r).

        Both divergences are small where the posterior is tight, so that nothing cancels: about 1e-4 relative error at 1e-6.
        """
        state = self._flushed()
        mean, reference = self._cells(state.mean).double(), self._cells(state.reference).double()
        of_mean: Tensor = torch.special.xlogy(mean, mean / reference) - mean + reference
        expected = torch.div(state.divergence, self._draws())
        return torch.sub(expected, of_mean.sum(1)).clamp_min(0).float()

    @property
    def mean_deviance(self) -> Tensor:
        """(N,): E sum_k -2 p_k log p_k = 2 E H[p], the ranking score of Fang et al. (ICML 2024)."""
        return 2 * self.expected_entropy

    # ---- from the sketch ----

    def quantile(self, q: float) -> Tensor:
        """(N, tracked): the q quantile of p over draws: NumPy's `inverted_cdf` order statistic, interpolated within its bin.

        Raises:
            ValueError: q is not in [0, 1].
        """
        return point_of(sketch_quantile(self._sketched(), q))

    def quantile_bounds(self, q: float) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (N, tracked): certainly lower <= the order statistic ceil(q n) of p <= upper.

        The bounds are the bin's, one code (1/1024 logit) wider on both sides, since codes are rounded in float32; 0 or 1
        where |logit| exceeds 32, the codes' range.

        Raises:
            ValueError: q is not in [0, 1].
        """
        return bounds_of(sketch_quantile(self._sketched(), q))

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (N, tracked): the equal-tailed credible interval of p, `quantile` at (1 -/+ level) / 2.

        Raises:
            ValueError: level is not in (0, 1).
        """
        check_level(level)
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def highest_density_interval(self, level: float) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (N, tracked): the shortest interval of p that holds `level` of the draws.

        Read off the histogram, draws taken as evenly spread within a bin: an estimate, without certificate.

        Raises:
            ValueError: level is not in (0, 1).
        """
        check_level(level)
        return shortest_of(self._sketched(), level)

    def exceedance(self, threshold: float | Tensor) -> Tensor:
        """(N, tracked): the posterior probability P(p > threshold), interpolated within the bin of the threshold.

        Args:
            threshold: in [0, 1]; a number, or a tensor that broadcasts to (N, tracked).

        Raises:
            ValueError: a threshold out of range or of another shape.
        """
        return self._tails(threshold)[1]

    def exceedance_bounds(self, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (N, tracked): certainly lower <= the share of draws with p > threshold <= upper.

        Raises:
            ValueError: a threshold out of range or of another shape.
        """
        lower, _, upper = self._tails(threshold)
        return lower, upper

    def _tails(self, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tiles = self._sketched()
        shape = (self.num_rows, tiles.row_cells)
        values = torch.as_tensor(threshold, dtype=torch.float64, device=self.device)
        if not broadcasts(values.shape, shape):
            raise ValueError(f"threshold has shape {tuple(values.shape)}: must broadcast to {shape}")
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"threshold = {threshold!r}: must be in [0, 1]")
        return tails_of(tiles, values.expand(shape))

    def deviance_upper(self, level: float) -> Tensor:
        """(N,): U of the credible interval [0, U] of the deviance (Fang et al., ICML 2024).

        The `level` quantile of the values -2 log p_sk over draws s and classes k, each weighing p_sk / n. Read off the
        histogram (8 points per bin): an estimate, without certificate. Classes that are not tracked count as the least probable
        ones, so they may hold less than 1 - level of the mean probability.

        Raises:
            ValueError: level is not in (0, 1], or classes that are not tracked hold more of some row.
        """
        if not 0 < level <= 1:
            raise ValueError(f"level = {level!r}: must be in (0, 1]")
        tiles = self._sketched()
        levels = torch.full((self.num_rows,), level, dtype=torch.float64, device=self.device)
        if self._tracked is not None:
            tracked = self._cells(self._state.mean).gather(1, self._tracked.long()).double().sum(1)
            levels = levels / tracked.clamp(max=1)
            short = (levels > 1 + ROUNDING) & (tiles.counts > 0)
            if bool(short.any()):
                row = int(short.int().argmax())
                raise ValueError(
                    f"level = {level!r}: the tracked classes of row {row} hold {float(tracked[row]):.6g} of its mean "
                    f"probability, and {int(short.sum()) - 1} more rows fall short too: track more classes"
                )
        return sketch_deviance_quantile(tiles, levels.nan_to_num(level).clamp(max=1))


def check_level(level: float) -> None:
    """Raise ValueError unless level is in (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level = {level!r}: must be in (0, 1)")
