"""Draws worth keeping: parameter snapshots in one memory-mapped safetensors file, to predict later inputs."""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, TypeAlias, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.func import functional_call

from bkd_fast.posterior.card import bytes_of, card_text, file_hash, read_card
from bkd_fast.posterior.evaluation import Draw, evaluating
from bkd_fast.posterior.predictive import PosteriorPredictive
from bkd_fast.posterior.streams import check_stream

Select: TypeAlias = Literal["thin", "reservoir"]

FORMAT = "bkd_fast.draws"
VERSION = 2
PREDICT_ROWS = 256  # of a tensor, evaluated together

_COUNT = "bkd_fast.count"  # int64 (1,), the first tensor: `_guarded` number of draws offered
_RECORDS = "bkd_fast.records"  # int64 (keep, 7): what each slot holds
_COLUMNS = (
    7  # `_guarded` arrival + 1 (0: the slot is free), run, chain, index, step, checksum of the tensors, of this record
)
_TYPES = {
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


class KeptDraw(Draw, Protocol):
    """What `Draws.add` takes: a draw of `bkd_fast.sample`, or anything like it."""

    @property
    def step(self) -> int: ...


@dataclass(frozen=True)
class DrawRecord:
    """Where a kept draw comes from: the numbers of `bkd_fast.Draw`."""

    run: int
    chain: int
    index: int
    step: int

    def __str__(self) -> str:
        return f"draw (run {self.run}, chain {self.chain}, index {self.index})"


class Draws:
    """At most `keep` draws of all that were added, on disk.

    Only what a draw's snapshot holds is stored (the sampled parameters, and buffers that move with them); the network and
    everything else come from `model`. The file is made, with room for `keep` draws, when the first one is added. An existing file
    goes on as if it had never been closed, with its own keep, select, dtype and seed.

    A crash costs no draw but the one being written and the one it replaces: a slot is void on disk while it is written. Checksums
    of the header and the records are looked at when the file is opened, those of the tensors when they are read. One process may
    write at a time.

    Args:
        path: the file; its card (`write_card`) lies beside it, with the suffix .json.
        model: the network that the draws belong to; a head-only file needs the same body.
        keep: how many draws there is room for, at least 2.
        select: "thin": spread evenly over all draws added, the first among them: every one while there is room, then every
            second, fourth, eighth ..., so that more than half of the room stays in use. "reservoir": a uniformly random subset of
            all draws added (Vitter, ACM TOMS 11, 1985, algorithm R); all of the room is used. Both depend on nothing but the
            number of draws added, and on the seed.
        dtype: what floating-point tensors are rounded to (to nearest); None: nothing. bfloat16 halves a float32 file, for a
            relative error of up to 2^-9 in each parameter. In MLPs for 8 x 8 digits that moved a draw's probabilities by 1 to 2 %
            of their posterior standard deviation (rms) and their mean by 0.1 % of it; at T = 0.001, where the posterior is 15 to
            30 times as narrow, by 7 to 14 % and below 1 %.
        seed: of the reservoir, in [0, 2^64).

    Raises:
        ValueError: an argument that is not allowed; an existing file that is truncated, altered, of another version, or no file
            of draws, or whose tensors are not the model's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        keep: int = 32,
        *,
        select: Select = "thin",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 2:
            raise ValueError(f"keep = {keep!r}: must be an int of at least 2")
        if select not in get_args(Select):
            raise ValueError(f"select = {select!r}: must be one of {get_args(Select)}")
        if dtype not in (None, torch.bfloat16, torch.float32):
            raise ValueError(f"dtype = {dtype}: must be None, torch.bfloat16 or torch.float32")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed = {seed!r}: must be an int in [0, 2^64)")
        self.path, self.model, self.keep, self.select, self.seed = Path(path), model, keep, select, seed
        self._dtype, self._card = dtype, self.path.with_suffix(".json")
        if self._card == self.path:
            raise ValueError(f"path = {str(path)!r}: must not end with .json, the suffix of the card")
        self._file: _File | None = None
        if self.path.exists():
            self._open()

    def __len__(self) -> int:
        """How many draws the file holds."""
        return len(self.records)

    @property
    def offered(self) -> int:
        """How many draws were added, kept or not."""
        return 0 if self._file is None else self._file.offered

    @property
    def records(self) -> list[DrawRecord]:
        """Where the draws held come from, in the order in which they were added."""
        return [] if self._file is None else [self._file.record(slot) for slot in self._file.arrivals()]

    def add(self, draw: KeptDraw) -> None:
        """Offer a draw; whether it is kept is up to `select`.

        Raises:
            ValueError: a draw that is held already; the snapshot of one to be kept, if its names, shapes or dtypes are not the
                model's and the file's. Nothing is changed then.
            OSError: the file cannot be made, as for want of room. Nothing is left of it then.
        """
        record = DrawRecord(*check_stream((draw.run, draw.chain)), draw.index, draw.step)
        if self._file is not None and self._file.holds(record):
            raise ValueError(f"{record} is in {self.path.name} already: a draw may count once")
        arrival = self.offered
        kept, ended = self._selection(arrival)
        snapshot = draw.snapshot() if kept else {}
        if kept:
            self._check_snapshot(snapshot)
        file = self._create(snapshot) if self._file is None else self._file
        file.free(ended)
        if kept:
            file.write(arrival, record, snapshot)
        file.offered = arrival + 1

    def _selection(self, arrival: int) -> tuple[bool, list[int]]:
        """Whether an arrival is kept, and the slots of the draws that it puts an end to."""
        held = {} if self._file is None else self._file.arrivals()
        if self.select == "reservoir":
            slot = reservoir_slot(arrival, self.keep, self.seed)
            return slot is not None, [slot] if slot in held else []
        stride = thinning_stride(arrival, self.keep)
        return arrival % stride == 0, [slot for slot, number in held.items() if number % stride]

    def snapshots(self) -> Iterator[tuple[DrawRecord, dict[str, Tensor]]]:
        """The draws held, one at a time, in the order in which they were added.

        Yields:
            (record, tensors by name): copies on the model's device and in its dtypes, as `torch.func.functional_call` takes them.

        Raises:
            ValueError: a draw whose tensors were altered; the message names it.
        """
        if self._file is None:
            return
        for slot in self._file.arrivals():
            tensors, own = self._file.read(slot), _tensors_of(self.model)
            yield self._file.record(slot), {name: tensor.to(own[name]) for name, tensor in tensors.items()}

    def predict(self, x: Tensor | Iterable[Any]) -> PosteriorPredictive:
        """The posterior predictive of new inputs.

        Args:
            x: a tensor of inputs as the network takes them, (rows, ...), evaluated 256 rows at a time. Or batches in order, such
                as a DataLoader or a list: tensors, or tuples that begin with one. They are gone through once to count rows, and
                once for every 32 draws.

        Returns:
            PosteriorPredictive with a row for each input, on the model's device. Its streams are those of the draws.

        Raises:
            TypeError: batches that can be gone through only once, or of another form.
            ValueError: no draw, or an altered one; no batch, or a loader that shuffles.
        """
        self._opened()
        if isinstance(x, Iterator):
            raise TypeError(
                f"x is a {type(x).__name__}, which can be gone through only once: must be a tensor, a list or a loader"
            )
        batches = torch.split(x, PREDICT_ROWS) if isinstance(x, Tensor) else x
        rows, example = _rows_of(batches)
        posterior: PosteriorPredictive | None = None
        for record, snapshot in self.snapshots():
            if posterior is None:
                device = next(iter(snapshot.values())).device
                posterior = PosteriorPredictive(rows, self._classes(snapshot, example.to(device)), device=device)
            posterior.update(_Replayed(self.model, record.run, record.chain, record.index, snapshot), batches)
        assert posterior is not None
        posterior.flush()
        return posterior

    def write_card(
        self,
        *,
        data_hash: str | None = None,
        sampler: torch.optim.Optimizer | None = None,
        health: object | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the model card beside the file, in place of an older one: which draws these are and how they were made.

        It describes the file as it is now, so write it after the last draw. It is JSON, with format and version; the versions of
        bkd_fast and torch; the file's SHA-256; draws kept and offered; run, chain, index and step of each; every
        tensor's shape and dtype; and the arguments.

        Args:
            data_hash: of the training data, such as `data_hash(inputs, labels)` gives.
            sampler: its name and the settings of its parameter groups as they are now, tensors of them as lists.
            health: what `Callback.on_end` gets, or a mapping; NaN becomes null.
            notes: whatever else is worth knowing.

        Returns:
            The card's path.

        Raises:
            ValueError: there is no draw. TypeError: an argument of another type. OSError: the card cannot be written. An older
            card is as it was then.
        """
        text = card_text(self._facts(), data_hash=data_hash, sampler=sampler, health=health, notes=notes or {})
        with _replacing(self._card) as file:
            file.write(text.encode())
        return self._card

    def check_card(self) -> dict[str, Any]:
        """The card, if it is one of the file as it is now.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no card, of another version, or says something else than the file; the message tells what.
        """
        card = read_card(self._card)
        for name, fact in self._facts().items():
            if card.get(name) != fact:
                said = f"{name} is {short_repr(card.get(name))} in the card and {short_repr(fact)} in the file"
                raise ValueError(f"{self._card.name} is no card of {self.path.name} as it is now: {said}")
        return card

    def _facts(self) -> dict[str, Any]:
        """What the card repeats of the file."""
        file = self._opened()
        file.flush()
        return {
            "select": self.select,
            "seed": self.seed,
            "keep": self.keep,
            "kept": len(self),
            "offered": self.offered,
            "draws": [asdict(record) for record in self.records],
            "parameters": sum(prod(place.shape) for place in file.places.values()),
            "tensors": {
                name: {"shape": list(place.shape), "dtype": str(place.dtype).removeprefix("torch.")}
                for name, place in file.places.items()
            },
            "sha256": file_hash(self.path),
        }

    def _opened(self) -> "_File":
        """The file, if it holds a draw."""
        if self._file is None or not self._file.arrivals():
            raise ValueError(f"{self.path.name} holds no draws: add() some first")
        return self._file

    def _classes(self, snapshot: Mapping[str, Tensor], x: Tensor) -> int:
        with torch.no_grad(), evaluating(self.model):
            logits = functional_call(self.model, dict(snapshot), (x,))
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
            raise ValueError(f"model returns something of {found}: must be logits (rows, classes)")
        return logits.shape[1]

    def _check_snapshot(self, snapshot: Mapping[str, Tensor]) -> None:
        names = None if self._file is None else self._file.places.keys()
        if not snapshot or (names is not None and snapshot.keys() != names):
            allowed = "some of the model's" if names is None else f"{sorted(names)}, as in {self.path.name}"
            raise ValueError(f"the snapshot's tensors are {sorted(snapshot)}: must be {allowed}")
        own = _tensors_of(self.model)
        for name, tensor in snapshot.items():
            if name not in own or (tensor.dtype, tensor.shape) != (own[name].dtype, own[name].shape):
                raise ValueError(f"the snapshot's {name!r} is {_kind(tensor)}: the model's is {_kind(own.get(name))}")
            if tensor.dtype not in _TYPES:
                raise ValueError(f"the snapshot's {name!r} is {_kind(tensor)}: its dtype must be one of {list(_TYPES)}")

    def _create(self, snapshot: Mapping[str, Tensor]) -> "_File":
        if self.path.exists():
            raise FileExistsError(
                f"{self.path} has come into being since it was looked for: make a new Draws to go on with it"
            )
        stored = {
            name: (
                self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype,
                tensor.shape,
            )
            for name, tensor in snapshot.items()
        }
        _File.create(self.path, stored, keep=self.keep, select=self.select, seed=self.seed)
        return self._open()

    def _open(self) -> "_File":
        file = _File(self.path)
        own = _tensors_of(self.model)
        for name, place in file.places.items():
            have = own.get(name)
            if have is None or have.shape != place.shape or not _casts(place.dtype, have.dtype):
                kept = f"{place.dtype} {place.shape}"
                raise ValueError(f"{self.path.name} holds {name!r}, {kept}: the model's is {_kind(have)}")
        self._file, self.keep, self.select, self.seed = file, file.keep, file.select, file.seed
        return file


def thinning_stride(arrival: int, keep: int) -> int:
    """Of the arrivals 0 .. arrival, the multiples of this power of two are kept: the smallest that leaves at most `keep`."""
    stride = 1
    while arrival // stride >= keep:
        stride *= 2
    return stride


def reservoir_slot(arrival: int, keep: int, seed: int) -> int | None:
    """The slot that an arrival takes from its holder, if any: Vitter's algorithm R with a random word for each arrival.

    A pure function, so that a file which is opened again goes on as it would have.
    """
    if arrival < keep:
        return arrival
    word = int(np.random.Philox(key=np.array([seed, arrival], np.uint64)).random_raw())
    slot = word * (arrival + 1) >> 64  # uniform over 0 .. arrival, to arrival / 2^64
    return slot if slot < keep else None


@dataclass(frozen=True)
class _Replayed:
    """A kept draw in the form that `PosteriorPredictive.update` takes."""

    model: nn.Module
    run: int
    chain: int
    index: int
    tensors: Mapping[str, Tensor]

    def snapshot(self) -> Mapping[str, Tensor]:
        return self.tensors


def _rows_of(batches: Iterable[Any]) -> tuple[int, Tensor]:
    """How many rows there are, and one of them (none if there is none)."""
    rows, example = 0, None
    for batch in batches:
        x = batch[0] if isinstance(batch, Sequence) and batch else batch
        if not isinstance(x, Tensor):
            raise TypeError(f"x yields a {type(batch).__name__}: must yield tensors, or tuples that begin with one")
        rows += len(x)
        example = x[:1] if example is None else example
    if example is None:
        raise ValueError("x has no batches: must have at least one")
    return rows, example


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _casts(stored: torch.dtype, own: torch.dtype) -> bool:
    return stored == own or (stored.is_floating_point and own.is_floating_point)


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


# ---- the file ----


class _Place(NamedTuple):
    """Where a tensor is in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of one slot
    start: int  # of the first slot, in bytes
    size: int  # of a slot


class _File:
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
        dtypes = {name: dtype for dtype, name in _TYPES.items()}
        header = json.loads(text)
        header.pop("__metadata__")
        self.keep: int = header[_RECORDS]["shape"][0]
        self.places: dict[str, _Place] = {}
        for name, entry in header.items():
            start, end = (8 + len(text) + offset for offset in entry["data_offsets"])
            self.places[name] = _Place(
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
            header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        size = 8 + len(text) + offset
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _replacing(path) as file:
                file.write(struct.pack("<Q", len(text)) + text + struct.pack("<q", _guarded(0, zlib.crc32(text))))
                _fill_with_zeros(file, size)
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

    def _slot(self, place: _Place, slot: int) -> NDArray[np.uint8]:
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


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when all is written, and vanishes if something goes wrong before."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _fill_with_zeros(file: BinaryIO, size: int) -> None:
    """Lengthen a file to `size` bytes that have their room on disk, which those of a hole do not."""
    file.flush()
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for begin in range(file.tell(), size, _CHUNK):
        file.write(bytes(min(_CHUNK, size - begin)))
