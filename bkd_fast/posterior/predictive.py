"""The posterior predictive: streams draws of logits into means, variances, entropies and certified quantiles per class."""

import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bkd_fast.collectives import gather, rank, reduce_sum_
from bkd_fast.errors import StateFileError, warn
from bkd_fast.ops.predictive import (
    PickedCodes,
    PredictiveState,
    Rows,
    empty_state,
    predictive_update_,
    sorted_rows,
    state_on,
)
from bkd_fast.ops.sketch import (
    MAX_COUNT,
    check_room,
    empty_tiles,
    sketch_merge_,
    sketch_sort_,
    sketch_update_,
    tiles_on,
)
from bkd_fast.posterior.chains import ChainRecord, Piece, chains_from_dict, chains_to_dict, check_tensor
from bkd_fast.posterior.classes import ChosenClasses, Track
from bkd_fast.posterior.diagnostics import Diagnostics
from bkd_fast.posterior.evaluation import Draw, RowOrder, batches_of, check_loader, evaluating, logits_of_snapshots
from bkd_fast.posterior.export import QUANTILES, to_arviz, to_html, to_pandas, to_xarray
from bkd_fast.posterior.plots import Plots
from bkd_fast.posterior.pooling import (
    join_records,
    join_states_,
    join_tiles,
    merge_moments_,
    pool_chains,
    pool_moments_,
    pool_tiles_,
)
from bkd_fast.posterior.saving import load_state, save_state, sidecar_of
from bkd_fast.posterior.streams import Stream, Streams, check_stream
from bkd_fast.posterior.summary import PredictiveSummary
from bkd_fast.sharding import split_modules

VERSION = 1
SNAPSHOTS = 32  # evaluated together: each batch is loaded, and each cell's state touched, once for all
NAMED_ROWS = 5  # of the rows with invalid logits, in the warning


@dataclass(frozen=True)
class _Origin:
    """Where a draw comes from: its stream, the cycle of its schedule, and its number."""

    stream: Stream
    cycle: int
    index: int


@dataclass
class _Pending:
    """Snapshots that wait for their evaluation, all of one model over one loader."""

    model: nn.Module
    loader: Iterable[Any]
    rows: RowOrder
    snapshots: list[Mapping[str, Tensor]] = field(default_factory=list)
    draws: Streams = field(default_factory=Streams)
    origins: list["_Origin"] = field(default_factory=list)  # of every snapshot


class PosteriorPredictive(PredictiveSummary):
    """Streaming summary of p_s = softmax(logits_s) over posterior draws s = 1 .. n, for fixed rows.

    Memory is 144 bytes per cell (64 bins), however many draws; 12 for a class that is not tracked. Quantiles come from a
    histogram of logit(p) whose bins follow the data: the order statistic ceil(q n) is certified to lie within
    `quantile_bounds`, about 2 R / 63 wide on the logit scale at most, R the cell's range (2 R / 127 with 128 bins); up to
    `bins` draws are kept exactly. Counts and histogram depend only on the multiset of draws, not on their order, split or
    merges; means, entropies and the mutual information then agree to about 1e-6, variances to 1e-5.

    Every result is float32 on `device`; NaN for rows without draws. Rows need not have equal numbers of draws. A row of a draw
    that holds NaN or +inf, or nothing but -inf, is excluded, counted in `invalid_counts` and warned about once; a class at
    -inf is masked (p = 0).

    On a GPU no update waits for the device: the warning comes with the next result, merge or state_dict, and so does the error
    about row ids that came on a GPU and are out of range or repeated (those rows are left out). Only near 65,535 draws, and
    with diagnostics, each update looks.

    Args:
        num_rows: examples, N.
        num_classes: classes, C >= 2.
        bins: counters per cell, 64 or 128 (the narrower bins for twice the memory).
        track: the classes whose quantiles are kept. "all"; "topk:k", for each row the k most probable ones when the first draw
            comes, and the label where `labels` are given (k + 1 then); "label"; or int64 (N, k) class ids. Moments and entropies
            are of all classes whatever is tracked.
        labels: int64 (N,), the classes that "topk:k", "label" and the diagnostics know as the rows' labels.
        diagnostics: keep what `diagnostics()` needs, for the label (with `labels`) and the class that is the most probable one
            when the first draw comes: 0.8 to 1.3 kB per chain, row and such class.
        traces: with diagnostics, keep every draw of the first of these classes as well, 2 bytes each.
        num_draws: with diagnostics, draws that each chain will give; None: not known, and a chain is halved at a power of two.
        stream: (run, chain) that `update_logits` draws belong to; None: a new random run, chain 0. Draws are numbered
            in the order of their calls. `merge_` refuses to count a draw twice.
        device: where the state and every result are; None: torch's default. Logits from elsewhere are moved there.

    Raises:
        TypeError, ValueError: a number out of range; classes or labels of another shape or dtype, out of range or repeated in a
            row; "label" without labels; traces or num_draws without diagnostics.
    """

    def __init__(
        self,
        num_rows: int,
        num_classes: int,
        *,
        bins: int = 64,
        track: Track = "all",
        labels: Tensor | None = None,
        diagnostics: bool = False,
        traces: bool = False,
        num_draws: int | None = None,
        stream: Stream | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        place = None if device is None else torch.device(device)
        whole = isinstance(track, str) and track == "all"
        self._state = empty_state(num_rows, num_classes, bins, place, histogram=whole)
        self._classes = ChosenClasses(num_rows, num_classes, track, labels, diagnostics, self.device)
        self._sketch = self._state.tiles if whole else empty_tiles(num_rows, self._classes.width, bins, place)
        if num_draws is not None and num_draws < 2:
            raise ValueError(f"num_draws = {num_draws}: must be at least 2")
        if not diagnostics and (traces or num_draws is not None):
            raise ValueError(f"traces = {traces} and num_draws = {num_draws}: need diagnostics=True")
        self._traced, self._num_draws = traces, num_draws
        self._chains: dict[Piece, ChainRecord] = {}
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
    def _tracked(self) -> Tensor | None:  # type: ignore[override]
        return self._classes.tracked

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
        self._classes.check_chosen()
        self._check_new(places, draws)
        first = self._most_offered
        self._add(logits, places, [_Origin(self._stream, 0, first + w) for w in range(draws)])
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

        Where tracked or diagnostic classes are still to be chosen, the draw's live model is evaluated once for them, at once.

        Args:
            draw: has `model`, `run`, `chain`, `index` and `snapshot()`, as the draws of `bkd_fast.sample`; `cycle`, if it has
                one, tells apart the cycles of a schedule, which the diagnostics take for chains.
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
        if not self._classes.chosen:
            self.choose_classes(draw.model, loader, rows)
        if pending is None:
            pending = _Pending(draw.model, loader, rows)
        pending.snapshots.append(draw.snapshot())
        pending.draws.add(stream, draw.index, draw.index + 1)
        pending.origins.append(_Origin(stream, int(getattr(draw, "cycle", 0)), draw.index))
        self._pending = pending
        if len(pending.snapshots) == SNAPSHOTS or split_modules(
            draw.model
        ):  # whose parameters are here for this draw only
            self.flush()

    def choose_classes(self, model: nn.Module, loader: Iterable[Any], rows: RowOrder = "order") -> None:
        """Choose the classes that "topk:k" and the diagnostics leave to the rows' logits: a model's most probable ones.

        Once, and before the first draw; `update` does so by itself, with its first draw. Chains that run apart and are merged
        later must choose the same classes: give all of them one model, such as the warm-started student.

        Args:
            model: evaluated once, in eval mode and without gradients.
            loader, rows: as for `update`.

        Raises:
            ValueError: there is nothing (more) to choose, or rows that the loader does not give.
        """
        check_loader(loader, rows, self.num_rows)
        self._classes.check_open()
        choice = self._classes.choice()
        with torch.no_grad(), evaluating(model):
            for x, ids in batches_of(loader, rows, self.num_rows):
                logits = logits_of_snapshots(model, [{}], x, self.num_classes)
                choice.take(self._checked_logits(logits)[0], self._sorted(ids, logits.shape[1]))
        self._classes.choose(choice)

    def choose_classes_by(self, logits: Tensor) -> None:
        """`choose_classes` by logits (N, C) that are there already.

        Raises:
            TypeError, ValueError: as for `update_logits`; there is nothing (more) to choose.
        """
        self._classes.check_open()
        checked = self._checked_logits(logits)
        if len(checked) != 1 or checked.shape[1] != self.num_rows:
            raise ValueError(f"logits have shape {tuple(logits.shape)}: must be ({self.num_rows}, {self.num_classes})")
        every = torch.arange(self.num_rows, device=self.device)
        choice = self._classes.choice()
        choice.take(checked[0], Rows(every, every))
        self._classes.choose(choice)

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
                    self._add(logits, self._sorted(rows, logits.shape[1]), pending.origins)
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

    def _add(self, logits: Tensor, rows: Rows | None, origins: list[_Origin]) -> None:
        draws = logits.shape[0]
        if self._most_held + draws > MAX_COUNT:
            self._most_held = self._look_for_most()
        picked = predictive_update_(self._state, logits, rows, picked=self._classes.picked, most=self._most_held)
        self._most_held += draws
        if self._tracked is not None:
            codes = picked.codes[..., : self._classes.width]
            sketch_update_(self._sketch, codes, picked.valid, picked.order)
        if self._classes.watched is not None:
            self._record(picked, origins)
        if self.device.type == "cpu":
            self._warn_of_invalid()

    def _record(self, picked: PickedCodes, origins: list[_Origin]) -> None:
        """The draws at the diagnostic cells, each in its chain's record."""
        codes = picked.codes[..., self._classes.width_of_sketch :]
        draws: dict[Piece, list[int]] = {}
        for w, origin in enumerate(origins):
            piece = self._piece_of(origin)
            draws.setdefault(piece, []).append(w)
            if piece not in self._chains:
                self._chains[piece] = ChainRecord.empty(
                    self.num_rows, codes.shape[2], self._num_draws, self._traced, self.device
                )
        for piece, mine in draws.items():
            self._chains[piece].add(codes[mine], picked.valid[mine], picked.order)

    def _piece_of(self, origin: _Origin) -> Piece:
        """The piece that a draw goes on with, the last one of its chain that began before it; else a new one."""
        mine = (*origin.stream, origin.cycle)
        begun = [piece for piece in self._chains if piece[:3] == mine and piece.start <= origin.index]
        return max(begun, key=lambda piece: piece.start, default=Piece(*mine, origin.index))

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

    @property
    def streams(self) -> list[tuple[Stream, tuple[int, int]]]:
        """The draws held: ((run, chain), (start, end)) for each interval of draw indices, end exclusive."""
        self.flush()
        self._number_draws()
        return self._streams.items()

    @property
    def plot(self) -> Plots:
        """Figures: `.intervals()`, `.reliability(labels)`, `.risk_coverage(labels)`, `.convergence()`."""
        return Plots(self)

    def to_xarray(self, quantiles: Sequence[float] = QUANTILES) -> Any:
        """Every result as an xarray.Dataset: dimensions row, class (moments), tracked (the sketch), quantile.

        Raises:
            MissingLibraryError: xarray is not installed. ValueError: a quantile is not in [0, 1].
        """
        return to_xarray(self, quantiles)

    def to_pandas(self, level: float = 0.95) -> tuple[Any, Any]:
        """(rows, cells), two pandas.DataFrame: a line for each row; one for each row and tracked class, with its interval.

        Raises:
            MissingLibraryError: pandas is not installed. ValueError: level is not in (0, 1).
        """
        return to_pandas(self, level)

    def to_arviz(self, quantiles: Sequence[float] = QUANTILES) -> Any:
        """What ArviZ works on, with `to_xarray` as the group `streaming_summary` and kept traces as `posterior`.

        Raises:
            MissingLibraryError: ArviZ is not installed. ValueError: a quantile is not in [0, 1].
        """
        return to_arviz(self, quantiles)

    def _repr_html_(self) -> str:
        return to_html(self)

    @property
    def has_diagnostics(self) -> bool:
        """Whether `diagnostics()` has something to say."""
        self.flush()
        return bool(self._chains)

    def diagnostics(self) -> Diagnostics:
        """Whether the chains agree, and what their draws are worth, at the diagnostic classes.

        Raises:
            ValueError: the posterior keeps no diagnostics, or has no draw.
        """
        self._flushed()
        if not self._classes.watches:
            raise ValueError("diagnostics = False: must be True when the posterior is made, before its first draw")
        if not self._chains or self._classes.watched is None:
            raise ValueError("the posterior has no draws to diagnose")
        return Diagnostics(self._classes.watched.long(), self._chains)

    # ---- merging and saving ----

    def merge_(self, other: "PosteriorPredictive") -> None:
        """Take all draws of another posterior over the same rows, on any device, which stays as it is.

        Raises:
            TypeError: other is no PosteriorPredictive.
            ValueError: numbers of rows, classes or bins that differ, tracked or diagnostic classes that do, draws that both hold
                (a posterior merged with itself or with an earlier copy), or more than 65,535 pooled draws in a row. Nothing is
                changed then.
        """
        if not isinstance(other, PosteriorPredictive):
            raise TypeError(f"other is a {type(other).__name__}: must be a PosteriorPredictive")
        mine, theirs = self._flushed(), other._flushed()
        for name in ("num_rows", "num_classes", "bins"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other has {name} = {getattr(other, name)}: must be {getattr(self, name)}")
        self._classes.check_same(other._classes)
        self._number_draws()
        other._number_draws()
        self._streams.check_disjoint(other._streams)
        theirs, sketch = state_on(theirs, self.device), tiles_on(other._sketch, self.device)
        check_room(mine.tiles.counts, theirs.tiles.counts)
        merge_moments_(mine, theirs, keep=self._streams.items() <= other._streams.items())
        sketch_merge_(self._sketch, sketch)
        if self._tracked is not None:
            mine.tiles.counts.add_(theirs.tiles.counts)
        self._chains.update({piece: record.on(self.device) for piece, record in other._chains.items()})
        self._most_held += other._most_held
        self._streams.update(other._streams)

    def merge_across_(self, group: dist.ProcessGroup | None = None) -> None:
        """Pool the posteriors of all processes of a group, each of other draws for the same rows: every process then has all.

        The histogram's bits are those of one process that took all draws. Traffic is that of two all-reduces of the state.
        Nothing happens without torch.distributed.

        Raises:
            ValueError: settings or classes that differ between processes, draws that two of them hold, or more than 65,535 pooled
                draws in a row; on every process alike, and nothing is changed then.
        """
        state = self._flushed()
        self._number_draws()
        chosen = {name: getattr(self._classes, name) for name in ("tracked", "watched")}
        hashes = {
            n: None if c is None else hashlib.sha256(c.cpu().numpy().tobytes()).hexdigest() for n, c in chosen.items()
        }
        everybody = gather(({**self._settings(), **hashes}, self._streams.to_tensor().tolist()), group)
        for source, (settings, _) in enumerate(everybody):
            for name, value in everybody[0][0].items():
                if settings[name] != value:
                    raise ValueError(
                        f"the posterior of process {source} has {name} = {settings[name]}: must be {value}, that of process 0"
                    )
        streams = [Streams.from_tensor(torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)) for _, rows in everybody]
        pooled = Streams()
        for other in streams:
            pooled.check_disjoint(other)
            pooled.update(other)
        check_room(reduce_sum_(state.tiles.counts.clone(), group), 0)
        order = sorted(range(len(streams)), key=lambda source: (streams[source].items(), source)).index(rank(group))
        pool_moments_(state, order, group)
        pool_tiles_(self._sketch, group)
        state.tiles.counts.copy_(self._sketch.counts)
        self._chains = pool_chains(self._chains, self.num_rows, self.device, group)
        self._streams = pooled
        self._most_held = self._look_for_most()

    @classmethod
    def join_rows(
        cls, parts: Sequence["PosteriorPredictive"], rows: Sequence[slice] | None = None
    ) -> "PosteriorPredictive":
        """One posterior of the rows of all parts, in order: shards of the rows that took the same draws. The parts stay.

        Args:
            parts: the shards.
            rows: of each part a stretch of its rows, slice(begin, end), to take in the place of all.

        Raises:
            ValueError: no part, rows that are no stretch of their part's, or parts of other classes, bins, numbers of tracked
                classes, draws or device.
        """
        if not parts:
            raise ValueError("parts is empty: must hold at least one posterior")
        first = parts[0]
        taken = [slice(0, part.num_rows) for part in parts] if rows is None else list(rows)
        if len(taken) != len(parts):
            raise ValueError(f"rows has {len(taken)} stretches: must have {len(parts)}, one for each part")
        for part, here in zip(parts, taken, strict=True):
            if (
                here.start is None
                or here.stop is None
                or here.step
                or not 0 <= here.start <= here.stop <= part.num_rows
            ):
                raise ValueError(
                    f"rows holds {here}: must be slice(begin, end) with 0 <= begin <= end <= {part.num_rows}"
                )
        for part in parts:
            part.flush()
            part._number_draws()
        for i, part in enumerate(parts):
            for name, mine, theirs in (
                ("num_classes", first.num_classes, part.num_classes),
                ("bins", first.bins, part.bins),
                ("device", first.device, part.device),
                ("tracked", first._classes.width_of_sketch, part._classes.width_of_sketch),
                ("diagnostics", first._classes.watches, part._classes.watches),
                ("streams", first._streams, part._streams),
                ("chains", first._chains.keys(), part._chains.keys()),
            ):
                if mine != theirs:
                    raise ValueError(
                        f"part {i} has another {name} than part 0: shards of rows must be alike and hold the same draws"
                    )
        joined = cls(
            sum(here.stop - here.start for here in taken),
            first.num_classes,
            bins=first.bins,
            stream=first._stream,
            device=first.device,
        )
        states = [part._flushed() for part in parts]
        joined._classes = first._classes.joined([part._classes for part in parts], taken)
        if joined._tracked is not None:
            joined._state = empty_state(joined.num_rows, joined.num_classes, first.bins, first.device, histogram=False)
        joined._sketch = join_tiles([part._sketch for part in parts], taken)
        if joined._tracked is None:
            joined._state = joined._state._replace(tiles=joined._sketch)
        join_states_(joined._state, states, taken)
        joined._traced, joined._num_draws = first._traced, first._num_draws
        joined._chains = {
            piece: join_records([part._chains[piece].on(first.device) for part in parts], taken)
            for piece in first._chains
        }
        joined._offered[:-1] = torch.cat([part._offered[:-1][here] for part, here in zip(parts, taken, strict=True)])
        joined._streams.update(first._streams)
        joined._numbered = joined._most_offered = max(part._numbered for part in parts)
        joined._most_held = joined._look_for_most()
        return joined

    def state_dict(self) -> dict[str, Tensor | int]:
        """Everything, as tensors (copies, on `device`) and plain integers.

        Equal multisets of draws give equal histograms, bit for bit.
        """
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in self._as_dict().items()}

    def _as_dict(self) -> dict[str, Tensor | int]:
        """`state_dict` without copies."""
        state = self._flushed()
        self._number_draws()
        sketch_sort_(self._sketch)
        chosen = {"tracked": self._classes.tracked, "watched": self._classes.watched}
        return {
            "version": VERSION,
            **self._settings(),
            "run": self._stream[0],
            "chain": self._stream[1],
            "streams": self._streams.to_tensor(),
            **self._arrays(state),
            **{name: classes for name, classes in chosen.items() if classes is not None},
            **chains_to_dict(self._chains),
        }

    def _settings(self) -> dict[str, int]:
        """What two states must have in common to be loaded into each other."""
        return {
            "num_rows": self.num_rows,
            "num_classes": self.num_classes,
            "bins": self.bins,
            "width": self._classes.width,
            "diagnostics": int(self._classes.watches),
        }

    def _arrays(self, state: PredictiveState) -> dict[str, Tensor]:
        _, *others = state
        return {
            **dict(zip(("counters", "minimum", "maximum"), self._sketch[:3], strict=True)),
            "counts": state.tiles.counts,
            **dict(zip(PredictiveState._fields[1:], others, strict=True)),
            "offered": self._offered[:-1],
        }

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Become the posterior that was saved, on any device, which further draws then continue; what was here is dropped.

        Raises:
            ValueError: a missing entry, another version, number of rows, classes, bins or tracked classes, with diagnostics or
                without, or a tensor of another shape or dtype. Nothing is changed then.
        """
        own = self._arrays(self._state)
        numbers = {"version": VERSION, **self._settings()}
        if missing := [name for name in (*numbers, "run", "chain", "streams", *own) if name not in state]:
            raise ValueError(f"state lacks {', '.join(missing)}")
        for name, number in numbers.items():
            if int(state[name]) != number:
                raise ValueError(f"state has {name} = {int(state[name])}: must be {number}")
        loaded = {name: check_tensor(state, name, tensor.dtype, tensor.shape) for name, tensor in own.items()}
        rows = state["streams"]
        if not isinstance(rows, Tensor):
            raise ValueError(f"state has streams: {type(rows).__name__}: must be a tensor (intervals, 4)")
        streams = Streams.from_tensor(rows)
        stream = check_stream((int(state["run"]), int(state["chain"])))
        classes = self._classes.loaded(state)
        chains = chains_from_dict(state, self.num_rows, self.device)
        self._pending = None
        for name, tensor in own.items():
            tensor.copy_(loaded[name])
        self._sketch.counts.copy_(loaded["counts"])
        self._classes, self._chains = classes, chains
        self._faults.zero_()
        self._streams, self._stream = streams, stream
        self._numbered = self._most_offered = int(self._offered[:-1].max()) if self.num_rows else 0
        self._most_held = self._look_for_most()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the posterior: `path`.json and a safetensors file beside it, which the JSON names with its checksum. No pickle.

        An earlier state of that name is replaced in one step, when the new one is safe on disk.

        Returns:
            The path of the JSON file.

        Raises:
            StateFileError: it cannot be written; the earlier state is intact then.
        """
        return save_state(
            path,
            "posterior",
            self._as_dict(),
            {
                "track": "all" if self._classes.tracks_all else "classes",
                "traces": self._traced,
                "num_draws": self._num_draws,
                "streams": [
                    {"run": run, "chain": chain, "draws": [start, end]}
                    for (run, chain), (start, end) in self._streams.items()
                ],
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> Self:
        """The posterior that `save` wrote, which further draws continue.

        Raises:
            FileNotFoundError: there is none.
            StateFileError: it is no posterior, of a later version, truncated or altered.
        """
        state, about = load_state(path, "posterior")
        tracked = state.get("tracked")
        if about["track"] != "all" and tracked is None:
            raise StateFileError(
                f"{sidecar_of(path).name} has no tracked classes: it was saved before they were chosen"
            )
        posterior = cls(
            int(state["num_rows"]),
            int(state["num_classes"]),
            bins=int(state["bins"]),
            track=tracked.long() if isinstance(tracked, Tensor) else "all",
            diagnostics=bool(state["diagnostics"]),
            traces=about["traces"],
            num_draws=about["num_draws"],
            device=device,
        )
        posterior.load_state_dict(state)
        return posterior
