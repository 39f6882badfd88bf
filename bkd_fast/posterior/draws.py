"""Draws worth keeping: evenly thinned parameter snapshots in one memory-mapped safetensors file, to predict later inputs."""

import itertools
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call

from bkd_fast.posterior.evaluation import Draw, evaluating, logits_of_snapshots
from bkd_fast.posterior.predictive import PosteriorPredictive

_RECORDS = "bkd_fast.records"  # int64 (keep, 5): run, chain, index, step, arrival + 1; a row of zeros is a free slot
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
_WINDOW = 32  # draws evaluated before the posterior's cells are updated once


class KeptDraw(Draw, Protocol):
    """What `Draws.add` takes: a draw of `bkd_fast.sample`, or anything like it."""

    @property
    def step(self) -> int: ...


class Draws:
    """At most `keep` draws, spread evenly over all that were added, on disk.

    While there is room every draw is kept; when the file is full every second one is dropped and from then on only every second
    (fourth, eighth ...) arrival is kept. Only what a draw's snapshot holds is stored (the sampled parameters); the network and
    everything that was not sampled come from `model`.

    Args:
        path: the file; an existing one is opened, and can be added to.
        model: the network that the draws belong to; a head-only file needs the same body.
        keep: how many draws the file has room for (an existing file has its own).

    Raises:
        ValueError: keep is below 2, or an existing file holds tensors that are not the model's.
    """

    def __init__(self, path: str | os.PathLike[str], model: nn.Module, keep: int = 32) -> None:
        if keep < 2:
            raise ValueError(f"keep = {keep}: must be at least 2")
        self.path, self.model, self.keep = Path(path), model, keep
        self._file: np.memmap | None = None
        if self.path.exists():
            self._open()

    def __len__(self) -> int:
        """How many draws the file holds."""
        return 0 if self._file is None else int((self._records()[:, 4] > 0).sum())

    def add(self, draw: KeptDraw) -> None:
        """Offer a draw; it is kept if its turn has come.

        Raises:
            ValueError: the snapshot's names, shapes or dtypes are not the file's.
        """
        snapshot = draw.snapshot()
        if self._file is None:
            self._create(snapshot)
        if {name: tuple(t.shape) for name, t in snapshot.items()} != {
            n: s[1:] for n, (_, s, _) in self._layout.items()
        }:
            raise ValueError(
                f"the snapshot's tensors are {sorted(snapshot)}: {self.path.name} holds {sorted(self._layout)}"
            )
        records = self._records()
        arrival = self._arrivals
        self._arrivals += 1
        if arrival % self._stride:
            return
        if (records[:, 4] > 0).all():
            self._stride *= 2
            records[(records[:, 4] - 1) % self._stride != 0] = 0
            if arrival % self._stride:
                return
        slot = int(np.flatnonzero(records[:, 4] == 0)[0])
        for name, tensor in snapshot.items():
            self._slot(name, slot)[:] = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        # the record last: a file cut short while a slot is written does not claim that slot
        records[slot] = (draw.run, draw.chain, draw.index, draw.step, arrival + 1)

    def predict(self, x: Tensor) -> PosteriorPredictive:
        """The posterior predictive of new inputs.

        Args:
            x: a batch of inputs as the network takes them, (rows, ...).

        Returns:
            PosteriorPredictive with a row for each input, on the model's device.

        Raises:
            ValueError: the file holds no draw.
        """
        if self._file is None or len(self) == 0:
            raise ValueError(f"{self.path.name} holds no draws: add() some first")
        slots = np.flatnonzero(self._records()[:, 4] > 0)
        slots = slots[np.argsort(self._records()[slots, 4])]
        self._file.flush()
        posterior: PosteriorPredictive | None = None
        with safe_open(self.path, framework="pt") as file, torch.no_grad(), evaluating(self.model):
            views = {name: file.get_slice(name) for name in self._layout}
            device = next(self.model.parameters()).device
            for first in range(0, len(slots), _WINDOW):
                window = slots[first : first + _WINDOW].tolist()
                snapshots = [{name: view[slot].to(device) for name, view in views.items()} for slot in window]
                if posterior is None:
                    classes = functional_call(self.model, snapshots[0], (x[:1].to(device),)).shape[-1]
                    posterior = PosteriorPredictive(len(x), classes, device=device)
                posterior.update_logits(logits_of_snapshots(self.model, snapshots, x, posterior.num_classes))
        assert posterior is not None
        return posterior

    # ---- the file ----

    def _create(self, snapshot: Mapping[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "bkd_fast.draws", "version": "1"}}
        offset = 0
        for name, dtype, shape, size in [
            (_RECORDS, "I64", (self.keep, 5), 40 * self.keep),
            *(
                (name, self._dtype_name(name, t), (self.keep, *t.shape), self.keep * t.nbytes)
                for name, t in snapshot.items()
            ),
        ]:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        temporary = self.path.with_name(self.path.name + ".new")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)  # zeros: every slot free
        temporary.replace(self.path)
        self._open()

    @staticmethod
    def _dtype_name(name: str, tensor: Tensor) -> str:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} of the snapshot has dtype {tensor.dtype}: must be one of {list(_DTYPES)}")
        return _DTYPES[tensor.dtype]

    def _open(self) -> None:
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        if header.get("__metadata__", {}).get("format") != "bkd_fast.draws":
            raise ValueError(f"{self.path.name} is no file of draws: its metadata is {header.get('__metadata__')}")
        header.pop("__metadata__")
        start = 8 + length
        records = header.pop(_RECORDS)
        self.keep = records["shape"][0]
        self._layout = {
            name: (
                start + entry["data_offsets"][0],
                tuple(entry["shape"]),
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
        self._records_at = start + records["data_offsets"][0]
        tensors = dict(itertools.chain(self.model.named_parameters(), self.model.named_buffers()))
        for name, (_, shape, _) in self._layout.items():
            if name not in tensors or tuple(tensors[name].shape) != shape[1:]:
                have = tuple(tensors[name].shape) if name in tensors else "missing"
                raise ValueError(f"{self.path.name} holds {name!r} of shape {shape[1:]}: the model's is {have}")
        self._file = np.memmap(self.path, mode="r+", dtype=np.uint8)
        arrivals = self._records()[:, 4]
        self._arrivals = int(arrivals.max())
        kept = np.sort(arrivals[arrivals > 0])
        self._stride = int(np.gcd.reduce(np.diff(kept))) if len(kept) > 1 else 1

    def _records(self) -> np.ndarray:
        assert self._file is not None
        return self._file[self._records_at : self._records_at + 40 * self.keep].view(np.int64).reshape(self.keep, 5)

    def _slot(self, name: str, slot: int) -> np.ndarray:
        assert self._file is not None
        start, _, size = self._layout[name]
        size //= self.keep
        return self._file[start + slot * size : start + (slot + 1) * size]
