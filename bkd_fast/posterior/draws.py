"""Draws worth keeping: parameter snapshots in one memory-mapped safetensors file, to predict later inputs."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from bkd_fast.posterior.card import card_text, file_hash, read_card
from bkd_fast.posterior.draw_file import TYPES, DrawFile, DrawRecord, Select, replacing
from bkd_fast.posterior.evaluation import Draw, evaluating
from bkd_fast.posterior.predictive import PosteriorPredictive
from bkd_fast.posterior.streams import check_stream

PREDICT_ROWS = 256  # of a tensor, evaluated together


class KeptDraw(Draw, Protocol):
    """What `Draws.add` takes: a draw of `bkd_fast.sample`, or anything like it."""

    @property
    def step(self) -> int: ...


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
        self._file: DrawFile | None = None
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
        with replacing(self._card) as file:
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

    def _opened(self) -> DrawFile:
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
            if tensor.dtype not in TYPES:
                raise ValueError(f"the snapshot's {name!r} is {_kind(tensor)}: its dtype must be one of {list(TYPES)}")

    def _create(self, snapshot: Mapping[str, Tensor]) -> DrawFile:
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
        DrawFile.create(self.path, stored, keep=self.keep, select=self.select, seed=self.seed)
        return self._open()

    def _open(self) -> DrawFile:
        file = DrawFile(self.path)
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
