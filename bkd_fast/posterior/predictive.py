"""The posterior predictive: streams draws of logits into means, variances, entropies and certified quantiles per class."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bkd_fast.errors import warn
from bkd_fast.ops.predictive import (
    SMALLEST_REFERENCE,
    PredictiveState,
    Rows,
    empty_state,
    predictive_update_,
    sorted_rows,
    state_on,
)
from bkd_fast.ops.sketch import (
    CODE_MAX,
    CODE_MIN,
    CODES_PER_UNIT,
    MAX_COUNT,
    check_room,
    sketch_deviance_quantile,
    sketch_merge_,
    sketch_quantile,
    sketch_sort_,
)
from bkd_fast.posterior.evaluation import Draw, RowOrder, batches_of, check_loader, evaluating, logits_of_snapshots
from bkd_fast.posterior.streams import Stream, Streams, check_stream

VERSION = 1
SNAPSHOTS = 32  # evaluated together: each batch is loaded, and each cell's state touched, once for all
NAMED_ROWS = 5  # of the rows with invalid logits, in the warning


@dataclass
class _Pending:
    """Snapshots that wait for their evaluation, all of one model over one loader."""

    model: nn.Module
    loader: Iterable[Any]
    rows: RowOrder
    snapshots: list[Mapping[str, Tensor]] = field(default_factory=list)
    draws: Streams = field(default_factory=Streams)


class PosteriorPredictive:
    """Streaming summary of p_s = softmax(logits_s) over posterior draws s = 1 .. n, for fixed rows.

    Memory is 144 bytes per cell (64 bins), however many draws. Quantiles come from a histogram of logit(p) whose bins
    follow the data: the order statistic ceil(q n) is certified to lie within `quantile_bounds`, about 2 R / 63 wide on
    the logit scale at most, R the cell's range (2 R / 127 with 128 bins); up to `bins` draws are kept exactly. Counts
    and histogram depend only on the multiset of draws, not on their order, split or merges; means, entropies and the
    mutual information then agree to about 1e-6, variances to 1e-5.

    Every result is float32 on `device`: (num_rows, num_classes), or (num_rows,); NaN for rows without draws. Rows need not
    have equal numbers of draws. A row of a draw that holds NaN or +inf, or nothing but -inf, is excluded, counted in
    `invalid_counts` and warned about once; a class at -inf is masked (p = 0).

    On a GPU no update waits for the device: the warning comes with the next result, merge or state_dict, and so does the error
    about row ids that came on a GPU and are out of range or repeated (those rows are left out). Only near 65,535 draws each
    update looks whether there is room.

    Args:
        num_rows: examples, N.
        num_classes: classes, C >= 2.
        bins: counters per cell, 64 or 128 (the narrower bins for twice the memory).
        stream: (run, chain) that `update_logits` draws belong to; None: a new random run, chain 0. Draws are numbered
            in the order of their calls. `merge_` refuses to count a draw twice.
        device: where the state and every result are; None: torch's default. Logits from elsewhere are moved there.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        num_rows: int,
        num_classes: int,
        *,
        bins: int = 64,
        stream: Stream | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._state = empty_state(num_rows, num_classes, bins, None if device is None else torch.device(device))
        self._stream = (secrets.randbits(64), 0) if stream is None else check_stream(stream)
        self._streams = Streams()
        # draws of our own stream by row, invalid ones included; the last number is that of rows that were left out
        self._offered = torch.zeros(num_rows + 1, dtype=torch.int32, device=self.device)
        self._numbered = 0  # of them, how many `_streams` lists
        self._most_offered = self._most_held = 0  # no row has more of them, and of all draws
        self._faults = torch.zeros(2, dtype=torch.int64, device=self.device)  # see `sorted_rows`
        self._pending: _Pending | None = None
        self._warned_invalid = self._warned_bfloat16 = False

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_rows={self.num_rows}, num_classes={self.num_classes}, bins={self.bins}, "
            f"draws={int(self.counts.max()) if self.num_rows else 0})"
        )

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
        return self._state.tiles.counters.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the state and the results are."""
        return self._state.mean.device

    # ---- taking draws ----

    def update_logits(self, logits: Tensor, rows: Tensor | None = None) -> None:
        """Take one draw of logits, or several at once (cheaper: the state is touched once).

        Args:
            logits: (B, C) or (W, B, C); float32, float16, float64 (rounded to float32) or bfloat16 (with a warning: its
                steps of 1/16 near 8 are coarser than most posteriors).
            rows: int64 (B,): the row of each row of the batch, each at most once. None: 0 .. N-1, and B = N.

        Raises:
            TypeError: a dtype that is not supported.
            ValueError: shapes that disagree, rows out of range or repeated (later, if rows are on a GPU), more than 65,535 draws
                in a row. Nothing is changed then.
        """
        self.flush()
        logits = self._checked_logits(logits)
        draws, size = logits.shape[:2]
        places = None if rows is None else self._sorted(rows, size)
        self._check_new(places, draws)
        self._add(logits, places)
        if places is None:
            self._offered[:-1] += draws
        else:
            self._offered.index_add_(0, places.order, torch.full_like(places.order, draws, dtype=torch.int32))
        if size:
            self._most_offered += draws

    def _sorted(self, rows: Tensor, size: int) -> Rows:
        return sorted_rows(rows, size, self.num_rows, self.device, self._faults)

    def _check_new(self, places: Rows | None, draws: int) -> None:
        """Refuse draws of our own stream that are here already: by a bound first, then by looking at the device."""
        try:
            self._streams.check_new(self._stream, self._numbered, self._most_offered + draws)
        except ValueError:
            self._number_draws()
            offered = self._offered[:-1] if places is None else self._offered[places.order]
            end = int(offered.max()) + draws if offered.numel() else 0
            if end > self._numbered:
                self._streams.check_new(self._stream, self._numbered, end)

    def _number_draws(self) -> None:
        """List the draws of our own stream in `_streams`; waits for the device."""
        self._most_offered = int(self._offered[:-1].max()) if self.num_rows else 0
        self._streams.add(self._stream, self._numbered, self._most_offered)
        self._numbered = self._most_offered

    def update(self, draw: Draw, loader: Iterable[Any], rows: RowOrder = "order") -> None:
        """Take one draw of a model: its logits on every batch of the loader.

        Keeps a snapshot of the draw; 32 of them are evaluated together, in eval mode and without gradients, or fewer when a
        result, a merge or a state_dict is asked for. Until then the model and the loader are kept, too.

        Args:
            draw: has `model`, `run`, `chain`, `index` and `snapshot()`, as the draws of `bkd_fast.sample`.
            loader: batches x, (x,), (x, y) or (x, y, ...), x a tensor (B, ...); read once per evaluation.
            rows: "order": the rows are the loader's examples in order, all of them. "last": the last element of each batch
                holds the int64 row ids.

        Raises:
            TypeError, ValueError: a draw that is here already, a loader that shuffles or whose batches do not fit the rows
                (where that can be seen only while reading it, at the evaluation), logits of another shape.
        """
        check_loader(loader, rows, self.num_rows)
        stream = check_stream((draw.run, draw.chain))
        if stream == self._stream:
            self._number_draws()
        pending = self._pending
        for held in (self._streams, pending.draws) if pending is not None else (self._streams,):
            held.check_new(stream, draw.index, draw.index + 1)
        if pending is not None and (
            pending.model is not draw.model or pending.loader is not loader or pending.rows != rows
        ):
            self.flush()
            pending = None
        if pending is None:
            pending = _Pending(draw.model, loader, rows)
        pending.snapshots.append(draw.snapshot())
        pending.draws.add(stream, draw.index, draw.index + 1)
        self._pending = pending
        if len(pending.snapshots) == SNAPSHOTS:
            self.flush()

    def flush(self) -> None:
        """Evaluate the snapshots that wait. Every result does so first.

        Raises:
            What the model or the loader raises. If batches were taken before, their rows keep these draws (`counts` shows
            them) and a note on the exception says so; the other rows lack them. The snapshots are dropped.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        taken = 0
        try:
            with torch.no_grad(), evaluating(pending.model):
                for x, rows in batches_of(pending.loader, pending.rows, self.num_rows):
                    logits = logits_of_snapshots(pending.model, pending.snapshots, x, self.num_classes)
                    logits = self._checked_logits(logits)
                    self._add(logits, self._sorted(rows, logits.shape[1]))
                    if taken == 0:
                        self._streams.update(pending.draws)
                    taken += len(rows)
        except Exception as error:
            if taken:
                error.add_note(f"{taken} rows had taken these {len(pending.snapshots)} draws; the others lack them")
            raise

    def _checked_logits(self, logits: Tensor) -> Tensor:
        if logits.dim() not in (2, 3) or logits.shape[-1] != self.num_classes:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)}: must be (rows, {self.num_classes}) or "
                f"(draws, rows, {self.num_classes})"
            )
        if logits.dtype == torch.bfloat16:
            if not self._warned_bfloat16:
                self._warned_bfloat16 = True
                warn(
                    "logits are bfloat16, with steps of 1/16 near 8: quantiles and variances show the rounding. Compute "
                    "the last layer in float32 or float16."
                )
        elif logits.dtype not in (torch.float32, torch.float16, torch.float64):
            raise TypeError(f"logits have dtype {logits.dtype}: must be float32, float16, float64 or bfloat16")
        # a copy from a GPU must be waited for, one to a GPU must not
        logits = logits.detach().to(self.device, torch.float32, non_blocking=self.device.type != "cpu")
        return logits if logits.dim() == 3 else logits[None]

    def _add(self, logits: Tensor, rows: Rows | None) -> None:
        draws = logits.shape[0]
        if self._most_held + draws > MAX_COUNT:
            self._most_held = self._look_for_most()
        predictive_update_(self._state, logits, rows, most=self._most_held)
        self._most_held += draws
        if self.device.type == "cpu":
            self._warn_of_invalid()

    def _look_for_most(self) -> int:
        return int(self._state.tiles.counts.max()) if self.num_rows else 0

    def _warn_of_invalid(self) -> None:
        if not self._warned_invalid and self._state.invalid.any():
            self._warned_invalid = True
            ids = self._state.invalid.nonzero().flatten().tolist()
            more = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
            warn(
                f"logits of rows {', '.join(map(str, ids[:NAMED_ROWS]))}{more} hold NaN or +inf, or are all -inf: these rows "
                "of these draws are excluded from every result. `invalid_counts` counts them; this is the only warning."
            )

    def _raise_recorded(self) -> None:
        """Once: afterwards the other rows' results can be read."""
        left_out, one = self._faults.tolist()
        if left_out:
            self._faults.zero_()
            raise ValueError(
                f"{left_out} row ids of earlier updates were left out, rows holds {one}: must be in 0 .. {self.num_rows - 1}, "
                "each at most once in a call"
            )

    # ---- results ----

    def _flushed(self) -> PredictiveState:
        """The state with all draws; what updates on a GPU did not wait for is looked at now."""
        self.flush()
        if self.device.type != "cpu":
            self._raise_recorded()
            self._warn_of_invalid()
        return self._state

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

    @property
    def streams(self) -> list[tuple[Stream, tuple[int, int]]]:
        """The draws held: ((run, chain), (start, end)) for each interval of draw indices, end exclusive."""
        self.flush()
        self._number_draws()
        return self._streams.items()

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

    def quantile(self, q: float) -> Tensor:
        """(N, C): the q quantile of p over draws: NumPy's `inverted_cdf` order statistic, interpolated within its bin.

        Raises:
            ValueError: q is not in [0, 1].
        """
        found = sketch_quantile(self._flushed().tiles, q)
        p = (found.point.double() / CODES_PER_UNIT).sigmoid().float()
        masked: Tensor = (found.upper == CODE_MIN) & ~p.isnan()
        return p.masked_fill(masked, 0)

    def quantile_bounds(self, q: float) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (N, C): certainly lower <= the order statistic ceil(q n) of p <= upper.

        The bounds are the bin's, one code (1/1024 logit) wider on both sides, since codes are rounded in float32; 0 or 1
        where |logit| exceeds 32, the codes' range.

        Raises:
            ValueError: q is not in [0, 1].
        """
        found = sketch_quantile(self._flushed().tiles, q)
        empty = found.point.isnan()
        lower = ((found.lower.double() - 1.5) / CODES_PER_UNIT).sigmoid().float()
        upper = ((found.upper.double() + 1.5) / CODES_PER_UNIT).sigmoid().float()
        # rounded outwards
        lower = torch.nextafter(lower, torch.zeros_like(lower)).masked_fill(found.lower == CODE_MIN, 0)
        upper = torch.nextafter(upper, torch.ones_like(upper)).masked_fill(found.upper == CODE_MAX, 1)
        return lower.masked_fill(empty, torch.nan), upper.masked_fill(empty, torch.nan)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (N, C): the equal-tailed credible interval of p, `quantile` at (1 -/+ level) / 2.

        Raises:
            ValueError: level is not in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level = {level!r}: must be in (0, 1)")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def deviance_upper(self, level: float) -> Tensor:
        """(N,): U of the credible interval [0, U] of the deviance (Fang et al., ICML 2024).

        The `level` quantile of the values -2 log p_sk over draws s and classes k, each weighing p_sk / n. Read off the
        histogram (8 points per bin): an estimate, without certificate.

        Raises:
            ValueError: level is not in (0, 1].
        """
        return sketch_deviance_quantile(self._flushed().tiles, level)

    # ---- merging and saving ----

    def merge_(self, other: "PosteriorPredictive") -> None:
        """Take all draws of another posterior over the same rows, on any device, which stays as it is.

        Raises:
            TypeError: other is no PosteriorPredictive.
            ValueError: numbers of rows, classes or bins that differ, draws that both hold (a posterior merged with itself
                or with an earlier copy), or more than 65,535 pooled draws in a row. Nothing is changed then.
        """
        if not isinstance(other, PosteriorPredictive):
            raise TypeError(f"other is a {type(other).__name__}: must be a PosteriorPredictive")
        mine, theirs = self._flushed(), other._flushed()
        for name in ("num_rows", "num_classes", "bins"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other has {name} = {getattr(other, name)}: must be {getattr(self, name)}")
        self._number_draws()
        other._number_draws()
        self._streams.check_disjoint(other._streams)
        theirs = state_on(theirs, self.device)
        check_room(mine.tiles.counts, theirs.tiles.counts)
        n, m = mine.tiles.counts.double(), theirs.tiles.counts.double()
        self._merge_divergence(theirs, keep=self._streams.items() <= other._streams.items())
        mean, other_mean = self._cells(mine.mean), self._cells(theirs.mean).double()
        share = (m / (n + m).clamp_min(1))[:, None]
        difference = other_mean - mean
        self._cells(mine.m2).add_((self._cells(theirs.m2).double() + difference.square() * n[:, None] * share).float())
        mean.add_((difference * share).float())
        mine.entropy.add_(theirs.entropy)
        mine.invalid.add_(theirs.invalid)
        sketch_merge_(mine.tiles, theirs.tiles)
        self._most_held += other._most_held
        self._streams.update(other._streams)

    def _merge_divergence(self, theirs: PredictiveState, keep: bool) -> None:
        """Pool the divergences, both taken from one reference: ours, if `keep`, where both have draws.

        E KL(p || s) = E KL(p || r) + sum_k mean_k (log r_k - log s_k) - r_k + s_k, exactly.
        """

        def moved(state: PredictiveState, target: Tensor) -> Tensor:
            mean = self._cells(state.mean).double()
            reference = self._cells(state.reference).double().clamp_min(SMALLEST_REFERENCE)
            shift = mean * (reference.log() - target.log()) - reference + target
            return torch.where(state.tiles.counts > 0, state.divergence + state.tiles.counts * shift.sum(1), 0.0)

        mine = self._state
        ours = mine.tiles.counts > 0
        if not keep:
            ours &= theirs.tiles.counts == 0
        reference = torch.where(ours[:, None], self._cells(mine.reference), self._cells(theirs.reference))
        target = reference.double().clamp_min(SMALLEST_REFERENCE)
        mine.divergence.copy_(moved(mine, target) + moved(theirs, target))
        self._cells(mine.reference).copy_(reference)

    def state_dict(self) -> dict[str, Tensor | int]:
        """Everything, as tensors (copies, on `device`) and plain integers.

        Equal multisets of draws give equal histograms, bit for bit.
        """
        state = self._flushed()
        self._number_draws()
        sketch_sort_(state.tiles)
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        run, chain = self._stream
        return {
            "version": VERSION,
            "num_rows": self.num_rows,
            "num_classes": self.num_classes,
            "bins": self.bins,
            "run": run,
            "chain": chain,
            "streams": self._streams.to_tensor(),
            **tensors,
        }

    def _tensors(self) -> dict[str, Tensor]:
        tiles, *others = self._state
        names = PredictiveState._fields[1:]
        return {
            "counters": tiles.counters,
            "minimum": tiles.minimum,
            "maximum": tiles.maximum,
            "counts": tiles.counts,
            **dict(zip(names, others, strict=True)),
            "offered": self._offered[:-1],
        }

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Become the posterior that was saved, on any device, which further draws then continue; what was here is dropped.

        Raises:
            ValueError: a missing entry, another version, number of rows, classes or bins, or a tensor of another shape or
                dtype. Nothing is changed then.
        """
        own = self._tensors()
        expected = ["version", "num_rows", "num_classes", "bins", "run", "chain", "streams", *own]
        if missing := [name for name in expected if name not in state]:
            raise ValueError(f"state lacks {', '.join(missing)}")
        numbers = {"version": VERSION, "num_rows": self.num_rows, "num_classes": self.num_classes, "bins": self.bins}
        for name, number in numbers.items():
            if int(state[name]) != number:
                raise ValueError(f"state has {name} = {int(state[name])}: must be {number}")
        loaded: dict[str, Tensor] = {}
        for name, tensor in own.items():
            value = state[name]
            if not isinstance(value, Tensor) or value.shape != tensor.shape or value.dtype != tensor.dtype:
                kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"state has {name}: {kind}: must be {tensor.dtype} {tuple(tensor.shape)}")
            loaded[name] = value
        rows = state["streams"]
        if not isinstance(rows, Tensor):
            raise ValueError(f"state has streams: {type(rows).__name__}: must be a tensor (intervals, 4)")
        streams = Streams.from_tensor(rows)
        stream = check_stream((int(state["run"]), int(state["chain"])))
        self._pending = None
        for name, tensor in own.items():
            tensor.copy_(loaded[name])
        self._faults.zero_()
        self._streams, self._stream = streams, stream
        self._numbered = self._most_offered = int(self._offered[:-1].max()) if self.num_rows else 0
        self._most_held = self._look_for_most()
