"""What every chain did at a few chosen cells of each row: the draws' codes by segments of the chain, for convergence diagnostics.

Integers throughout: equal draws give equal records, whatever the batches they came in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.sketch import Tiles, empty_tiles, sketch_merge_, sketch_update_

BINS = 128  # of the histograms, twice the usual: R-hat sees what lies within them (docs/streaming.md)
SEGMENTS = 4  # of a chain whose length is not known; they grow by doubling
FIRST_SEGMENT = 16  # draws
BATCHES = 64  # sums of consecutive draws that a chain keeps, between half of them and all in use
FIRST_TRACE = 64  # draws


class Piece(NamedTuple):
    """Draws that one chain made in a row: those of stream (run, chain) in one cycle of its schedule, from draw `start` on."""

    run: int
    chain: int
    cycle: int
    start: int


@dataclass
class ChainRecord:
    """Of one piece of a chain; d cells in each of N rows. A row's draws are numbered from 0, those that do not count left out."""

    segments: list[Tiles]  # histograms; segment s holds the draws s * length .. (s + 1) * length - 1
    length: int
    batches: Tensor  # int32 (N, d, BATCHES): sums of codes of `batch` consecutive draws
    batch: int
    counts: Tensor  # int64 (N,): draws
    total: Tensor  # int64 (N, d): sum of codes
    squares: Tensor  # int64 (N, d): sum of squared codes
    trace: Tensor | None  # int16 (N, at least the draws): codes of the first cell

    @classmethod
    def empty(cls, rows: int, cells: int, num_draws: int | None, traced: bool, device: torch.device) -> "ChainRecord":
        """num_draws: how many are expected; two segments then, its halves."""
        segments, length = (SEGMENTS, FIRST_SEGMENT) if num_draws is None else (2, -(-num_draws // 2))
        integers = torch.zeros(rows, cells, dtype=torch.int64, device=device)
        return cls(
            [empty_tiles(rows, cells, BINS, device) for _ in range(segments)],
            length,
            torch.zeros(rows, cells, BATCHES, dtype=torch.int32, device=device),
            1,
            integers.new_zeros(rows),
            integers,
            integers.clone(),
            integers.new_zeros(rows, FIRST_TRACE, dtype=torch.int16) if traced else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every array, by name."""
        named = {
            f"segment{s}.{name}": tensor
            for s, tiles in enumerate(self.segments)
            for name, tensor in zip(Tiles._fields[:4], tiles[:4], strict=True)
        }
        named.update(batches=self.batches, counts=self.counts, total=self.total, squares=self.squares)
        return named if self.trace is None else {**named, "trace": self.trace}

    def add(self, codes: Tensor, valid: Tensor, rows: Tensor) -> None:
        """Take draws in their order: codes int16 (W, B, d), valid bool (W, B), rows int64 (B,), those not below N left out."""
        number = len(self.counts)
        here = rows < number
        rows, codes, valid = rows[here], codes[:, here], valid[:, here]
        if rows.numel() == 0:
            return
        position = self.counts[rows] + valid.cumsum(0) - 1
        self._make_room(int(position.max()) + 1)
        segment = torch.where(valid, position // self.length, -1)
        for s, tiles in enumerate(self.segments):
            mine = segment == s
            if bool(mine.any()):
                sketch_update_(tiles, codes, mine, rows)
        values = codes.long() * valid[..., None]
        place = (position.clamp_min(0) // self.batch)[..., None].expand_as(values)
        sums = self.batches.new_zeros(len(rows), codes.shape[2], BATCHES)
        sums.scatter_add_(2, place.permute(1, 2, 0), values.permute(1, 2, 0).int())
        self.batches.index_add_(0, rows, sums)
        self.counts.index_add_(0, rows, valid.sum(0))
        self.total.index_add_(0, rows, values.sum(0))
        self.squares.index_add_(0, rows, values.square().sum(0))
        if self.trace is not None:
            draws, places = valid.nonzero(as_tuple=True)
            self.trace[rows[places], position[draws, places]] = codes[draws, places, 0]

    def _make_room(self, draws: int) -> None:
        """Coarser segments and batches, and a longer trace, until a row may hold so many draws."""
        length, batch = self.length, self.batch
        while draws > length * len(self.segments):
            length *= 2
        while draws > batch * BATCHES:
            batch *= 2
        self.coarsen(length, batch)
        if self.trace is not None and draws > self.trace.shape[1]:
            more = max(draws, 2 * self.trace.shape[1]) - self.trace.shape[1]
            self.trace = torch.cat([self.trace, self.trace.new_zeros(len(self.trace), more)], 1)

    def coarsen(self, length: int, batch: int) -> None:
        """Bring the segments to a length, and the batches to one, that are own ones doubled some times."""
        while self.length < length:
            half = len(self.segments) // 2
            joined = []
            for first, second in zip(self.segments[::2], self.segments[1::2], strict=True):
                sketch_merge_(first, second)
                joined.append(first)
            rows, cells = len(self.counts), first.row_cells
            self.segments = joined + [empty_tiles(rows, cells, BINS, self.counts.device) for _ in range(half)]
            self.length *= 2
        while self.batch < batch:
            pairs = self.batches[..., ::2] + self.batches[..., 1::2]
            self.batches = torch.cat([pairs, torch.zeros_like(pairs)], 2)
            self.batch *= 2

    def halves(self) -> list[Tiles]:
        """Copies of the histograms of two parts of the chain, as equal in length as the segments allow."""
        most = int(self.counts.max()) if self.counts.numel() else 0
        cut = min(range(1, len(self.segments)), key=lambda s: abs(2 * s * self.length - most))
        parts = []
        for segments in (self.segments[:cut], self.segments[cut:]):
            part = copied(segments[0], segments[0].counts.device)
            for segment in segments[1:]:
                sketch_merge_(part, segment)
            parts.append(part)
        return parts

    def on(self, device: torch.device) -> "ChainRecord":
        """A copy, on `device`."""
        return ChainRecord(
            [copied(tiles, device) for tiles in self.segments],
            self.length,
            self.batches.to(device, copy=True),
            self.batch,
            self.counts.to(device, copy=True),
            self.total.to(device, copy=True),
            self.squares.to(device, copy=True),
            None if self.trace is None else self.trace.to(device, copy=True),
        )


def copied(tiles: Tiles, device: torch.device) -> Tiles:
    """A copy, on `device`."""
    counters, minimum, maximum, counts = (tensor.to(device, copy=True) for tensor in tiles[:4])
    return Tiles(counters, minimum, maximum, counts, tiles.row_cells)


def chains_to_dict(chains: Mapping[Piece, ChainRecord]) -> dict[str, Tensor]:
    """Everything as tensors: "chains", int64 (pieces, 8), and the arrays of each piece under "chain0.", "chain1." ..."""
    if not chains:
        return {}
    pieces = sorted(chains.items(), key=lambda item: item[0])
    rows = [
        (
            p.run - (p.run >> 63 << 64),
            p.chain,
            p.cycle,
            p.start,
            len(r.segments),
            r.length,
            r.batch,
            int(r.trace is not None),
        )
        for p, r in pieces
    ]
    arrays: dict[str, Tensor] = {"chains": torch.tensor(rows, dtype=torch.int64)}
    for i, (_, record) in enumerate(pieces):
        arrays.update({f"chain{i}.{name}": tensor for name, tensor in record.tensors().items()})
    return arrays


def chains_from_dict(state: Mapping[str, Tensor | int], rows: int, device: torch.device) -> dict[Piece, ChainRecord]:
    """The inverse of `chains_to_dict`, as copies on `device`.

    Raises:
        ValueError: missing tensors, or tensors of another shape or dtype.
    """
    if "chains" not in state:
        return {}
    table = check_tensor(state, "chains", torch.int64, (None, 8))
    cells = check_tensor(state, "watched", torch.int32, (rows, None)).shape[1]
    chains = {}
    for i, (run, chain, cycle, start, segments, length, batch, traced) in enumerate(table.tolist()):
        record = ChainRecord.empty(rows, cells, None, bool(traced), device)
        record.segments = [empty_tiles(rows, cells, BINS, device) for _ in range(segments)]
        record.length, record.batch = length, batch
        for name, tensor in record.tensors().items():
            key = f"chain{i}.{name}"
            if name == "trace":
                record.trace = check_tensor(state, key, tensor.dtype, (rows, None)).to(device, copy=True)
            else:
                tensor.copy_(check_tensor(state, key, tensor.dtype, tensor.shape))
        chains[Piece(run % 2**64, chain, cycle, start)] = record
    return chains


def check_tensor(
    state: Mapping[str, Tensor | int], name: str, dtype: torch.dtype, shape: Sequence[int | None]
) -> Tensor:
    """state[name]; None in the shape stands for any number.

    Raises:
        ValueError: it is missing, no tensor, or of another dtype or shape.
    """
    value = state.get(name)
    if value is None:
        raise ValueError(f"state lacks {name}")
    if (
        isinstance(value, Tensor)
        and value.dtype == dtype
        and value.dim() == len(shape)
        and all(wanted in (None, size) for wanted, size in zip(shape, value.shape, strict=True))
    ):
        return value
    kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    sizes = ", ".join("*" if size is None else str(size) for size in shape) + ("," if len(shape) == 1 else "")
    raise ValueError(f"state has {name}: {kind}: must be {dtype} ({sizes})")
