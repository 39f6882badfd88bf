"""Which draws a state holds: intervals of draw indices for every stream, so that none is counted twice."""

import torch
from torch import Tensor

Stream = tuple[int, int]  # (run, chain): run any 64-bit number, chain not negative


def check_stream(stream: Stream) -> Stream:
    """The stream itself.

    Raises:
        ValueError: run is not in [0, 2^64) or chain not in [0, 2^31).
    """
    run, chain = stream
    if not 0 <= run < 2**64:
        raise ValueError(f"stream has run = {run}: must be in [0, 2^64)")
    if not 0 <= chain < 2**31:
        raise ValueError(f"stream has chain = {chain}: must be in [0, 2^31)")
    return int(run), int(chain)


class Streams:
    """Disjoint half-open intervals of draw indices per stream."""

    def __init__(self) -> None:
        self._intervals: dict[Stream, list[tuple[int, int]]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Streams) and self._intervals == other._intervals

    __hash__ = None  # type: ignore[assignment]  # mutable

    def items(self) -> list[tuple[Stream, tuple[int, int]]]:
        """Every (stream, interval), in ascending order."""
        return [(stream, interval) for stream in sorted(self._intervals) for interval in self._intervals[stream]]

    def check_new(self, stream: Stream, start: int, end: int) -> None:
        """Refuse draws that are here already.

        Raises:
            ValueError: [start, end) of the stream meets an interval held.
        """
        for held_start, held_end in self._intervals.get(stream, []):
            if start < held_end and held_start < end:
                raise ValueError(
                    f"draws {max(start, held_start)} .. {min(end, held_end) - 1} of stream (run {stream[0]}, chain "
                    f"{stream[1]}) are already in this posterior: a draw may count once"
                )

    def add(self, stream: Stream, start: int, end: int) -> None:
        """Take draws [start, end) of a stream; neighbouring intervals join.

        Raises:
            ValueError: some of them are here already. Nothing is changed then.
        """
        if start >= end:
            return
        self.check_new(stream, start, end)
        joined: list[tuple[int, int]] = []
        for low, high in sorted([*self._intervals.get(stream, []), (start, end)]):
            if joined and joined[-1][1] == low:
                joined[-1] = (joined[-1][0], high)
            else:
                joined.append((low, high))
        self._intervals[stream] = joined

    def check_disjoint(self, other: "Streams") -> None:
        """Refuse a merge that would count a draw twice.

        Raises:
            ValueError: the two share a draw.
        """
        for stream, (start, end) in other.items():
            self.check_new(stream, start, end)

    def update(self, other: "Streams") -> None:
        """Take all of the other's draws, which must be disjoint from ours (`check_disjoint`)."""
        for stream, (start, end) in other.items():
            self.add(stream, start, end)

    def to_tensor(self) -> Tensor:
        """int64 (intervals, 4): run (as a signed number), chain, start, end."""
        rows = [[run - (run >> 63 << 64), chain, start, end] for (run, chain), (start, end) in self.items()]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)

    @classmethod
    def from_tensor(cls, rows: Tensor) -> "Streams":
        """The inverse of `to_tensor`.

        Raises:
            ValueError: intervals that overlap or are empty, or a wrong shape.
        """
        if rows.dim() != 2 or rows.shape[1] != 4:
            raise ValueError(f"streams have shape {tuple(rows.shape)}: must be (intervals, 4)")
        streams = cls()
        for run, chain, start, end in rows.tolist():
            if not 0 <= start < end:
                raise ValueError(f"streams hold the interval [{start}, {end}): must be 0 <= start < end")
            streams.add(check_stream((run % 2**64, chain)), start, end)
        return streams
