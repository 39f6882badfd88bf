"""The launch table: what one launch over many tensors reads on the device, built when something moved and kept otherwise.

Layout, shared by every kernel that works on lists of tensors::

    rows        int64 (tensors * chains, 10): addresses of theta, gradient, center, mean, m2, master, first and second (0 where
                there is none), the number of elements, the first element's index in its whole parameter; a row for each
                chain of each tensor
    labels      int32 (tensors * chains, 4): of each row, the parameter's number, a coordinate of the noise; its chain, from
                0; its tensor; nothing
    chunks      int32 (chunks, 2): (row, number of the chunk in it); one program or thread block each

Chunks count from the start of the *noise block* that holds the row's first element: with `phase = first_element & 3`, chunk
k holds the elements k * size - phase <= i < (k + 1) * size - phase that exist, so that four neighbours that share a Philox
call share a thread whatever the shard. `size` is a power of two, `SMALLEST_CHUNK` to `LARGEST_CHUNK`.

The host's work per call is to collect the addresses and look for a kept table that has them: frameworks replace parameters,
and gradients move when `zero_grad` frees them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COLUMNS = ("theta", "gradient", "center", "mean", "m2", "master", "first", "second")  # of addresses
ROW = len(COLUMNS) + 2  # int64 entries of a row
LABEL = 4  # int32 entries of a row's label
SMALLEST_CHUNK, LARGEST_CHUNK = 4096, 65536
CHUNKS_WANTED = 1024  # at least, where the tensors are large enough: several for each of a GPU's 100 to 150 processors
KEPT = 32  # tables: a sampler's launches, times the few places between which an allocator moves gradients
ARENA = 2**17  # int64 entries, 1 MiB


@dataclass(frozen=True, eq=False)
class Table:
    """A table in the memory of its device.

    Attributes:
        rows, labels, chunks: see the head of this file.
        size: elements of a chunk.
        memory: what the three are views of.
        uploaded: the stream that uploaded it and an event that follows the upload; None on a CPU or inside a capture.
    """

    rows: Tensor
    labels: Tensor
    chunks: Tensor
    size: int
    memory: Tensor
    uploaded: tuple[torch.cuda.Stream, torch.cuda.Event] | None


@dataclass(eq=False)
class _Arena:
    """Pinned memory and as much on a device, laid by for tables that are built while a CUDA graph is being captured: memory
    cannot be pinned then. The graph reads both on every replay, so nothing of it is ever used twice."""

    host: Tensor
    memory: Tensor
    used: int = 0


_tables: dict[tuple[object, ...], Table] = {}  # by addresses and coordinates; the least recently used first
_arenas: dict[torch.device, _Arena] = {}
_in_graphs: list[Table | _Arena] = []  # what graphs may read at any later time: kept for good


def table_of(
    theta: Sequence[Tensor],
    gradient: Sequence[Tensor] = (),
    center: Sequence[Tensor] = (),
    mean: Sequence[Tensor] = (),
    m2: Sequence[Tensor] = (),
    master: Sequence[Tensor] = (),
    parameters: Sequence[int] = (),
    first_elements: Sequence[int] = (),
    first: Sequence[Tensor] = (),
    second: Sequence[Tensor] = (),
    chains: int = 1,
    identity: object | None = None,
    known: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Table:
    """The table of a launch on the current stream of theta's device.

    Args:
        theta: at least one tensor; all on one device.
        gradient, center, mean, m2, master, first, second: like theta, or empty.
        parameters, first_elements: one for each tensor, or empty for zeros.
        chains: equal parts of each tensor, one behind the other, that have rows of their own.
        identity: stands for theta, its addresses and sizes, parameters, first_elements and chains; None: those are compared.
        known: addresses of tensors above, by the name of their list, that the caller has looked up.

    Raises:
        RuntimeError: a CUDA graph is being captured and nothing is laid by for its table; one eager call lays it by.
        torch.OutOfMemoryError: no memory; everything kept is as it was.
    """
    device = theta[0].device
    columns = dict(zip(COLUMNS, (theta, gradient, center, mean, m2, master, first, second), strict=True))

    def addresses_of(name: str) -> tuple[int, ...]:
        return known[name] if name in known else tuple(map(Tensor.data_ptr, columns[name]))

    others = [addresses_of(name) for name in COLUMNS[1:]]
    sizes = [tensors[0].itemsize if tensors else 0 for tensors in columns.values()]

    def in_full() -> tuple[object, ...]:
        counts = tuple(map(Tensor.numel, theta))
        return device, addresses_of("theta"), counts, tuple(parameters), tuple(first_elements), chains

    key = (identity or in_full(), *others, *sizes)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _tables.pop(key, None)
    if table is None and identity is not None:  # a caller's first call had no identity yet
        table = _tables.get((in_full(), *others, *sizes))
    if table is None:
        counts = tuple(map(Tensor.numel, theta))
        packed, size = _pack([addresses_of("theta"), *others], counts, parameters, first_elements, sizes, chains)
        if capturing:
            return _built_in_a_capture(packed, size, len(theta), device, chains)
        table = _upload(packed, size, len(theta), device, chains)
    _tables[key] = table
    if capturing:
        _in_graphs.append(table)  # uploaded long ago: a capture begins with a synchronised device
    elif table.uploaded is not None:
        _follow_upload(table, torch.cuda.current_stream(device))
        _lay_by(4 * table.memory.numel(), device)
    if len(_tables) > KEPT:
        del _tables[next(iter(_tables))]
    return table


def chain_stride(tensor: Tensor | None) -> int:
    """Elements from one chain's row of numbers to the next's; 0 where one serves all."""
    return tensor.stride(0) if tensor is not None and tensor.dim() == 2 else 0


def _pack(
    addresses: Sequence[tuple[int, ...]],
    counts: tuple[int, ...],
    parameters: Sequence[int],
    first_elements: Sequence[int],
    sizes: Sequence[int],
    chains: int,
) -> tuple[NDArray[np.int64], int]:
    """The three arrays one behind the other, and the size of a chunk. `sizes`: bytes of an element of each column's arrays."""
    tensors = len(counts)
    whole = np.zeros((tensors, ROW), np.int64)
    for column, values in enumerate((*addresses, counts, first_elements)):
        if values:
            whole[:, column] = np.array(values, np.uint64).view(np.int64)
    whole[:, ROW - 2] //= chains
    rows = np.repeat(whole, chains, axis=0)
    before = rows[:, ROW - 2] * np.tile(np.arange(chains), tensors)  # elements of the chains before
    for column, size_of in enumerate(sizes):
        rows[:, column] += np.where(rows[:, column] != 0, before * size_of, 0)
    count, phase = rows[:, ROW - 2], rows[:, ROW - 1] & 3
    wanted = int(count.sum()) // CHUNKS_WANTED
    size = min(max(1 << wanted.bit_length() >> 1, SMALLEST_CHUNK), LARGEST_CHUNK)
    chunks_of = np.where(count > 0, -(-(count + phase) // size), 0)
    first_chunk = np.cumsum(chunks_of) - chunks_of
    row = np.repeat(np.arange(tensors * chains), chunks_of)
    chunk = np.arange(row.size) - first_chunk[row]
    labels = np.zeros((tensors, chains, LABEL), np.int32)
    labels[:, :, 0] = np.array(parameters or 0, np.int32).reshape(-1, 1)
    labels[:, :, 1] = np.arange(chains)
    labels[:, :, 2] = np.arange(tensors)[:, None]
    pairs = np.stack([row, chunk], axis=1).astype(np.int32)
    return np.concatenate([rows.reshape(-1), labels.reshape(-1).view(np.int64), pairs.reshape(-1).view(np.int64)]), size


def _table_in(
    memory: Tensor, size: int, tensors: int, chains: int, uploaded: tuple[torch.cuda.Stream, torch.cuda.Event] | None
) -> Table:
    """The packed arrays' views."""
    labels = ROW * tensors * chains
    pairs = labels + LABEL // 2 * tensors * chains
    return Table(
        rows=memory[:labels].view(tensors * chains, ROW),
        labels=memory[labels:pairs].view(torch.int32).view(-1, LABEL),
        chunks=memory[pairs:].view(torch.int32).view(-1, 2),
        size=size,
        memory=memory,
        uploaded=uploaded,
    )


def _upload(packed: NDArray[np.int64], size: int, tensors: int, device: torch.device, chains: int) -> Table:
    host = torch.from_numpy(packed)
    if device.type != "cuda":
        return _table_in(host, size, tensors, chains, None)
    pinned = host.pin_memory()  # torch frees it when the copy is done
    memory = torch.empty_like(host, device=device).copy_(pinned, non_blocking=True)
    stream = torch.cuda.current_stream(device)
    return _table_in(memory, size, tensors, chains, (stream, stream.record_event()))


def _built_in_a_capture(packed: NDArray[np.int64], size: int, tensors: int, device: torch.device, chains: int) -> Table:
    """A table whose upload is a node of the graph, so that nobody else may count on it."""
    arena = _arenas.get(device)
    if arena is None or arena.host.numel() - arena.used < packed.size:
        raise RuntimeError(
            f"a CUDA graph is being captured and its step moves {tensors} tensors whose addresses are not on the device: "
            "take one such step before capturing, which lays memory by for them"
        )
    place = slice(arena.used, arena.used + packed.size)
    arena.used += packed.size + packed.size % 2  # 16 bytes apart, as far as anybody's loads are wide
    _in_graphs.append(arena)
    arena.host[place].numpy()[:] = packed
    memory = arena.memory[place].copy_(arena.host[place], non_blocking=True)
    return _table_in(memory, size, tensors, chains, None)


def _follow_upload(table: Table, stream: torch.cuda.Stream) -> None:
    """Make `stream` wait for the upload, where another stream did it, and the memory wait for `stream`."""
    assert table.uploaded is not None
    uploader, event = table.uploaded
    if stream != uploader:
        stream.wait_event(event)
        table.memory.record_stream(stream)


def _lay_by(entries: int, device: torch.device) -> None:
    """See that a capture finds memory for tables of so many entries."""
    arena = _arenas.get(device)
    if arena is None or arena.host.numel() - arena.used < entries:
        entries = max(entries, ARENA)
        _arenas[device] = _Arena(
            torch.empty(entries, dtype=torch.int64, device="cpu", pin_memory=True),  # whatever the default device is
            torch.empty(entries, dtype=torch.int64, device=device),
        )
