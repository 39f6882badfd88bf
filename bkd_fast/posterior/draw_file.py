"""The file of kept draws: slots in one memory-mapped safetensors file that a crash cannot leave half written.

Whatever must not be half done is one aligned store of eight bytes; everything has a checksum.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bkd_fast.posterior.card import bytes_of

Select: TypeAlias = Literal["thin", "reservoir"]

FORMAT = "bkd_fast.draws"
VERSION = 2

_COUNT = "bkd_fast.count"  # int64 (1,), the first tensor: `_guarded` number of draws offered
_RECORDS = "bkd_fast.records"  # int64 (keep, 7): what each slot holds
# `_guarded` arrival + 1 (0: the slot is free), run, chain, index, step, checksum of the tensors, of this record
_COLUMNS = 7
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class DrawRecord:
    """Where a kept draw comes from: the numbers of `bkd_fast.Draw`."""

    run: int
    chain: int
    index: int
    step: int

    def __str__(self) -> str:
        return f"draw (run {self.run}, chain {self.chain}, index {self.index})"


class Place(NamedTuple):
    """Where a tensor is in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of one slot
    start: int  # of the first slot, in bytes
    size: int  # of a slot


class DrawFile:
    """A file of slots, each for a draw's tensors, with a record of whose they are.

    Whatever must not be half done is one aligned store of eight bytes: a record's first column, and the count.

    Raises:
        ValueError: the file is truncated, altered, of another version, or no file of draws.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata, text, count = _read_header(path)
        self._checksum = zlib.crc32(text)
        if count != _guarded(count >> 32, self._checksum):
            raise ValueError(f"{path.name} was altered: its header does not fit its checksum")
        self.select, self.seed = cast(Select, metadata["select"]), int(metadata["seed"])
        dtypes = {name: dtype for dtype, name in TYPES.items()}
        header = json.loads(text)
        header.pop("__metadata__")
        self.keep: int = header[_RECORDS]["shape"][0]
        self.places: dict[str, Place] = {}
        for name, entry in header.items():
            start, end = (8 + len(text) + offset for offset in entry["data_offsets"])
            self.places[name] = Place(
                dtypes[entry["dtype"]], tuple(entry["shape"][1:]), start, (end - start) // entry["shape"][0]
            )
        self._map: np.memmap[Any, np.dtype[np.uint8]] = np.memmap(path, mode="r+", dtype=np.uint8)
        self._bytes = np.asarray(self._map)  # slices of a memmap are slow
        place = self.places.pop(_COUNT)
        self._count = self._bytes[place.start : place.start + 8].view(np.int64)
        place = self.places.pop(_RECORDS)
        records = self._bytes[place.start : place.start + self.keep * place.size]
        self._records = records.view(np.int64).reshape(self.keep, _COLUMNS)
        for slot in self.arrivals():
            if self._records[slot, -1] != self._seal(self._records[slot]):
                raise ValueError(f"{path.name} was altered: the record of slot {slot} does not fit its checksum")

    @staticmethod
    def create(
        path: Path, tensors: Mapping[str, tuple[torch.dtype, torch.Size]], *, keep: int, select: Select, seed: int
    ) -> None:
        """Make a file of free slots.

        Raises:
            OSError: there is no room for it, or it cannot be written. Nothing is left of it then.
        """
        metadata = {"format": FORMAT, "version": str(VERSION), "select": select, "seed": str(seed)}
        header: dict[str, object] = {"__metadata__": metadata}
        # wider types first, so that every tensor begins at a multiple of its item's size
        by_width = sorted(tensors.items(), key=lambda entry: -entry[1][0].itemsize)
        offset = 0
        for name, dtype, shape in [
            (_COUNT, torch.int64, (1,)),
            (_RECORDS, torch.int64, (keep, _COLUMNS)),
            *((name, dtype, (keep, *shape)) for name, (dtype, shape) in by_width),
        ]:
            end = offset + prod(shape) * dtype.itemsize
            header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        size = 8 + len(text) + offset
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path) as file:
                file.write(struct.pack("<Q", len(text)) + text + struct.pack("<q", _guarded(0, zlib.crc32(text))))
                fill_with_zeros(file, size)
        except OSError as error:
            reason = f"cannot make a file of {size} bytes for {keep} draws ({error.strerror})"
            raise OSError(error.errno, reason, str(path)) from error

    @property
    def offered(self) -> int:
        """How many draws have arrived."""
        # after a crash the last one's record may be there without its count
        return max(int(self._count[0]), int(self._records[:, 0].max())) >> 32

    @offered.setter
    def offered(self, number: int) -> None:
        self._count[0] = _guarded(number, self._checksum)

    def arrivals(self) -> dict[int, int]:
        """By slot, in the order of arrival: how many draws had arrived before the one in it."""
        column = self._records[:, 0]
        slots = np.flatnonzero(column)
        slots = slots[np.argsort(column[slots])]
        return dict(zip(slots.tolist(), ((column[slots] >> 32) - 1).tolist(), strict=True))

    def holds(self, record: DrawRecord) -> bool:
        """Whether a slot holds the draw, whatever its step."""
        same = self._records[:, 1:4] == np.array([_signed(record.run), record.chain, record.index])
        return bool((same.all(axis=1) & (self._records[:, 0] != 0)).any())

    def record(self, slot: int) -> DrawRecord:
        """Whose draw the slot holds."""
        run, chain, index, step = self._records[slot, 1:5].tolist()
        return DrawRecord(run % 2**64, chain, index, step)

    def free(self, slots: Sequence[int]) -> None:
        """Forget what is in these slots."""
        self._records[slots, 0] = 0

    def write(self, arrival: int, record: DrawRecord, tensors: Mapping[str, Tensor]) -> None:
        """Put a draw into a free slot, of which there must be one."""
        slot = int(np.flatnonzero(self._records[:, 0] == 0)[0])
        self.flush()  # the slot is free on disk, too, before its bytes change
        checksum = 0
        for name, place in self.places.items():
            data = bytes_of(tensors[name].detach().to(place.dtype))
            self._slot(place, slot)[:] = data
            checksum = zlib.crc32(data.data, checksum)
        numbers = [_signed(record.run), record.chain, record.index, record.step]
        row = np.array([_guarded(arrival + 1, self._checksum), *numbers, checksum, 0], np.int64)
        row[-1] = self._seal(row)
        self._records[slot, 1:] = row[1:]
        self.flush()  # and they are there before it is taken
        self._records[slot, 0] = row[0]

    def read(self, slot: int) -> dict[str, Tensor]:
        """Copies of a draw's tensors.

        Raises:
            ValueError: they were altered.
        """
        tensors, checksum = {}, 0
        for name, place in self.places.items():
            tensors[name] = torch.empty(place.shape, dtype=place.dtype)
            data = bytes_of(tensors[name])
            data[:] = self._slot(place, slot)
            checksum = zlib.crc32(data.data, checksum)
        if checksum != self._records[slot, -2]:
            raise ValueError(
                f"{self.path.name} was altered: the tensors of slot {slot}, {self.record(slot)}, do not fit their checksum"
            )
        return tensors

    def flush(self) -> None:
        """Wait until everything is on disk."""
        self._map.flush()

    def _slot(self, place: Place, slot: int) -> NDArray[np.uint8]:
        return self._bytes[place.start + slot * place.size : place.start + (slot + 1) * place.size]

    def _seal(self, record: NDArray[np.int64]) -> int:
        return zlib.crc32(record[:-1].tobytes(), self._checksum)


def _signed(run: int) -> int:
    """A number below 2^64 as int64 has it."""
    return run - (run >> 63 << 64)


def _guarded(count: int, checksum: int) -> int:
    """A count below 2^31 with, in the lower half of 64 bits, its checksum (on from that of the header)."""
    return count << 32 | zlib.crc32(struct.pack("<q", count), checksum)


def _read_header(path: Path) -> tuple[dict[str, str], bytes, int]:
    """Metadata, the header's text, and the number that follows it.

    Raises:
        ValueError: the file is no safetensors file as long as it says, no file of draws, or one of another version.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            metadata: dict[str, str] = tensors.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is truncated, altered or no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path.name} is no file of draws: its metadata is {metadata}")
    version = metadata.get("version", "")
    if version != str(VERSION):
        newer = version.isdecimal() and int(version) > VERSION
        advice = "it comes from a later bkd_fast" if newer else "sample again"
        raise ValueError(f"{path.name} has version {version or 'none'}: this bkd_fast reads {VERSION}; {advice}")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return metadata, file.read(length), int.from_bytes(file.read(8), "little", signed=True)


def unfinished(path: Path) -> Path:
    """Where `replacing` writes what is to take the place of a file."""
    return path.with_name(path.name + ".new")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when all is written, and vanishes if something goes wrong before."""
    temporary = unfinished(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fill_with_zeros(file: BinaryIO, size: int) -> None:
    """Lengthen a file to `size` bytes that have their room on disk, which those of a hole do not."""
    file.flush()
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for begin in range(file.tell(), size, _CHUNK):
        file.write(bytes(min(_CHUNK, size - begin)))
