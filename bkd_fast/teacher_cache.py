"""Cached teachers: logits by sample id in one memory-mapped file, written once, that says whose they are and is checked.

A cache is a folder. `rows.bin` holds the rows (views, samples), little-endian, and after them a byte for each, 1 as soon as the
row is on disk. A row is float16 (classes,), or, with `top_k`, float32 rest, indices (k,) in the smallest unsigned type and
float16 values (k,). `cache.json` says what the rows are and, when all are there, their SHA-256.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bkd_fast.collectives import gather, rank
from bkd_fast.errors import NonFiniteError, StateFileError
from bkd_fast.ops.topk import TopKLogits
from bkd_fast.posterior.card import data_hash, file_hash
from bkd_fast.posterior.draw_file import fill_with_zeros, replacing
from bkd_fast.posterior.evaluation import batches_of, evaluating

FORMAT = "bkd_fast.teacher_cache"
VERSION = 1
_ABOUT, _ROWS = "cache.json", "rows.bin"


@dataclass(frozen=True)
class About:
    """What a cache is of: the content of `cache.json`.

    Attributes:
        num_samples: ids are in [0, num_samples).
        classes: logits of a row.
        views: rows of each sample.
        top_k: how many logits of a row are kept; None: all.
        fingerprint: names and hashes of whatever the logits depend on.
        sha256: of `rows.bin`; None as long as rows are missing.
    """

    num_samples: int
    classes: int
    views: int
    top_k: int | None
    fingerprint: dict[str, str]
    sha256: str | None = None

    @staticmethod
    def read(folder: Path) -> "About":
        """The one of a folder.

        Raises:
            FileNotFoundError: there is none.
            StateFileError: it is altered or truncated, of a later version, or something else.
        """
        file = folder / _ABOUT
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise StateFileError(f"{file} is no JSON: {error}") from error
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise StateFileError(f"{file} is no teacher cache: its format must be {FORMAT!r}")
        version = found.pop("version", None)
        if version != VERSION:
            later = isinstance(version, int) and version > VERSION
            hint = "; it was written by a later bkd_fast" if later else ""
            raise StateFileError(f"{file} has version {version!r}: must be {VERSION}{hint}")
        if found.pop("seal", None) != _seal(found):
            raise StateFileError(f"{file} was altered: it does not fit its seal")
        return About(**found)

    def save(self, folder: Path) -> None:
        """Put it in the place of the folder's old one, in one step."""
        content = asdict(self)
        text = json.dumps({"format": FORMAT, "version": VERSION, **content, "seal": _seal(content)}, indent=2)
        with replacing(folder / _ABOUT) as file:
            file.write(text.encode() + b"\n")

    @property
    def row(self) -> np.dtype[Any]:
        """The type of a row."""
        if self.top_k is None:
            return np.dtype((np.float16, (self.classes,)))
        index = np.min_scalar_type(self.classes - 1)
        return np.dtype(
            [("rest", np.float32), ("indices", index, (self.top_k,)), ("values", np.float16, (self.top_k,))]
        )

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.views * self.num_samples

    @property
    def size(self) -> int:
        """The length of `rows.bin` in bytes."""
        return self.rows * (self.row.itemsize + 1)

    def refuse_other(self, wanted: "About", folder: Path) -> None:
        """Raise a ValueError that names what differs from the wanted one, but for the SHA-256."""
        ours, theirs = (
            {**asdict(about), **{f"fingerprint[{name!r}]": text for name, text in about.fingerprint.items()}}
            for about in (wanted, self)
        )
        differences = [
            f"{name} is {theirs.get(name)!r} there, {ours.get(name)!r} here"
            for name in {**theirs, **ours}
            if name not in ("fingerprint", "sha256") and theirs.get(name) != ours.get(name)
        ]
        if differences:
            raise ValueError(f"{folder} is another cache: {'; '.join(differences)}")

    def map(self, folder: Path) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """The rows and their marks, mapped from the file.

        Raises:
            StateFileError: the file is missing or not as long as it must be.
        """
        file = folder / _ROWS
        size = file.stat().st_size if file.is_file() else 0
        if size != self.size:
            raise StateFileError(f"{file} has {size} bytes: must have {self.size}; it is missing, truncated or altered")
        marks = self.rows * self.row.itemsize
        # as plain arrays, since slices of a memmap are slow
        return (
            np.asarray(np.memmap(file, self.row, "r", shape=(self.rows,))),
            np.asarray(np.memmap(file, np.uint8, "r", marks, (self.rows,))),
        )

    def places(self, ids: Tensor, view: int) -> NDArray[np.int64]:
        """Where the rows are, in the order of the ids.

        Raises:
            TypeError: ids that are no int64 tensor.
            ValueError: an id or a view out of range.
        """
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"ids are of {found}: must be an int64 tensor")
        if not 0 <= view < self.views:
            raise ValueError(f"view = {view}: must be in [0, {self.views})")
        flat: NDArray[np.int64] = ids.flatten().numpy(force=True)
        outside = (flat < 0) | (flat >= self.num_samples)
        if outside.any():
            raise ValueError(f"ids hold {flat[outside][0]}: must be in [0, {self.num_samples})")
        return view * self.num_samples + flat


class TeacherCache:
    """A finished cache, to be read: rows are gathered from the mapped file, which is never loaded as a whole.

    It can be pickled, so that workers of a DataLoader may hold it; each maps the file when it first reads.

    Args:
        path: of the folder.
        expect: the fingerprint that it must have; None: any.
        verify: compare the rows with their SHA-256, which reads them all once. Without, damage to `cache.json` and to the
            length of `rows.bin` is still seen.

    Attributes:
        about: what it is of.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: its fingerprint is another one; the message names what differs.
        StateFileError: it is unfinished, altered, truncated or of a later version.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, expect: Mapping[str, str] | None = None, verify: bool = True
    ) -> None:
        self._folder = Path(path).absolute()
        self.about = About.read(self._folder)
        if expect is not None:
            self.about.refuse_other(replace(self.about, fingerprint=dict(expect)), self._folder)
        _, marks = self.about.map(self._folder)
        if self.about.sha256 is None:
            raise StateFileError(f"{self._folder} is unfinished: {_how_many_are_missing(marks)}")
        if verify and file_hash(self._folder / _ROWS) != self.about.sha256:
            raise StateFileError(f"{self._folder / _ROWS} was altered: its SHA-256 is not that in {_ABOUT}")

    @staticmethod
    def create(
        path: str | os.PathLike[str],
        *,
        num_samples: int,
        classes: int,
        views: int = 1,
        top_k: int | None = None,
        fingerprint: Mapping[str, str],
    ) -> "TeacherCacheWriter":
        """Begin a cache, or go on with one of the same arguments.

        Collective: every process of a torch.distributed run calls it, with a folder that all of them see.

        Args:
            path: of the folder.
            num_samples: ids are in [0, num_samples).
            classes: of the teacher.
            views: rows for each sample, such as of so many augmentations of it.
            top_k: how many logits of a row to keep, with one number for the rest; None: all of them.
            fingerprint: names and hashes of whatever the logits depend on: `fingerprint_of(teacher)`, the data's
                `data_hash`, the version of the transform.

        Raises:
            TypeError, ValueError: an argument of another type or out of range.
            ValueError: there is a cache with other arguments, which stays as it is; the message names what differs.
            StateFileError: there is one that is altered, truncated or of a later version.
            OSError: there is no room, or the folder cannot be written. No part of a cache is left then.
        """
        counts = {"num_samples": num_samples, "classes": classes, "views": views}
        if top_k is not None:
            counts["top_k"] = top_k
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} = {value!r}: must be an int")
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if top_k is not None and top_k > classes:
            raise ValueError(f"top_k = {top_k}: must be at most classes = {classes}")
        if not isinstance(fingerprint, Mapping) or not all(
            isinstance(text, str) for text in (*fingerprint, *fingerprint.values())
        ):
            raise TypeError(f"fingerprint = {fingerprint!r}: must be a mapping of str to str")
        folder = Path(path).absolute()
        about = About(num_samples, classes, views, top_k, dict(fingerprint))
        _on_the_first_rank(partial(_make, folder, about))
        About.read(folder).refuse_other(about, folder)
        return TeacherCacheWriter(folder)

    def logits(self, ids: Tensor | int, view: int = 0) -> Tensor | TopKLogits:
        """The teacher's logits of samples, copied from the file.

        Args:
            ids: int64 of any shape; an int, as of a Dataset's `__getitem__`, is one of shape ().
            view: of the samples.

        Returns:
            float16 (*ids.shape, classes); with top_k, TopKLogits of float16, int32 and float32.

        Raises:
            TypeError: ids of another type.
            ValueError: an id or a view out of range; the message names the first.
        """
        if isinstance(ids, int):
            ids = torch.tensor(ids)
        rows = self._rows[self.about.places(ids, view)]
        if self.about.top_k is None:
            return torch.from_numpy(rows).view(*ids.shape, self.about.classes)
        return TopKLogits(
            torch.from_numpy(rows["values"].copy()).view(*ids.shape, self.about.top_k),
            torch.from_numpy(rows["indices"].astype(np.int32)).view(*ids.shape, self.about.top_k),
            torch.from_numpy(rows["rest"].copy()).view(ids.shape),
        )

    @cached_property
    def _rows(self) -> NDArray[Any]:
        return self.about.map(self._folder)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}


class TeacherCacheWriter:
    """A cache that is being written, by `TeacherCache.create`: a run that was killed, at whatever instant, goes on.

    Any number of processes may write, each its own rows: on one machine, or over a file system that keeps parts of a page
    that are written by different machines apart (Lustre does, NFS does not).

    Attributes:
        about: what it is of.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.about = About.read(folder)
        self._marks = self.about.map(folder)[1]

    def has(self, ids: Tensor, view: int = 0) -> Tensor:
        """Which of these samples (n,) int64 are written: bool (n,)."""
        return torch.from_numpy(self._marks[self.about.places(ids, view)] != 0)

    def missing(self, view: int = 0) -> Tensor:
        """The ids that are still to be written by anybody, int64, ascending.

        Others write in the meantime: `ids[ids * ranks // num_samples == rank]` are each rank's own at any moment.
        """
        return (~self.has(torch.arange(self.about.num_samples), view)).nonzero().flatten()

    def write(self, ids: Tensor, logits: Tensor, view: int = 0) -> None:
        """Write rows, and wait until they are on disk. Rows that are there already stay as they are.

        It is fastest for consecutive ids.

        Args:
            ids: (n,) int64, each once.
            logits: (n, classes) of a floating dtype, on any device; rounded to float16. -inf masks a class.
            view: of the samples.

        Raises:
            TypeError: ids or logits of another type.
            ValueError: an id or a view out of range, an id twice, shapes that disagree, a logit beyond float16's range.
            NonFiniteError: a row that holds NaN or +inf, or nothing but -inf.
            OSError: the disk is full, or fails.
            Nothing counts as written then.
        """
        places = self.about.places(ids, view)
        self._check(ids, logits)
        order = np.argsort(places)
        order = order[self._marks[places[order]] == 0]
        if not len(order):
            return
        places, rows = places[order], self._encoded(logits)[order]
        with (self._folder / _ROWS).open("r+b") as file:
            _put(file, rows, places, begin=0)
            os.fsync(file.fileno())  # a mark on disk means a row on disk; a row without its mark is only made again
            _put(file, np.ones(len(places), np.uint8), places, begin=self.about.rows * self.about.row.itemsize)

    def finish(self) -> TeacherCache:
        """Seal the cache, once every row is written, and give it to be read; to do it again is harmless.

        Collective, as `TeacherCache.create` is. Reads the file once.

        Raises:
            StateFileError: rows are missing; the message tells how many.
            OSError: it cannot be read or written.
        """
        gather(None)  # everybody's rows are there
        _on_the_first_rank(self._finish)
        return TeacherCache(self._folder, verify=False)

    def _finish(self) -> None:
        about = About.read(self._folder)
        if about.sha256 is not None:
            return
        if not self._marks.all():
            raise StateFileError(f"{self._folder} cannot be finished: {_how_many_are_missing(self._marks)}")
        with (self._folder / _ROWS).open("rb") as file:
            os.fsync(file.fileno())
        replace(about, sha256=file_hash(self._folder / _ROWS)).save(self._folder)

    def _check(self, ids: Tensor, logits: Tensor) -> None:
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"logits are of {found}: must be a floating-point tensor")
        if ids.dim() != 1 or logits.shape != (len(ids), self.about.classes):
            raise ValueError(
                f"ids {tuple(ids.shape)} and logits {tuple(logits.shape)}: must be (n,) and (n, {self.about.classes})"
            )
        ascending = ids.sort().values
        again = ascending[1:][ascending[1:] == ascending[:-1]]
        if len(again):
            raise ValueError(f"ids hold {int(again[0])} more than once: must be different")
        unusable = ~logits.amax(1).isfinite()
        if unusable.any():
            sample = int(ids[unusable.nonzero()[0].to(ids.device)])
            raise NonFiniteError(f"the logits of sample {sample} hold NaN or +inf, or nothing but -inf")
        large = logits.to(torch.float16).isinf() & logits.isfinite()
        if large.any():
            row, label = large.nonzero()[0].tolist()
            raise ValueError(
                f"logits[{row}, {label}] = {float(logits[row, label]):g}: must be below 65520 in size, where "
                "float16 ends; subtract each row's maximum"
            )

    def _encoded(self, logits: Tensor) -> NDArray[Any]:
        """As rows of the file."""
        logits = logits.detach()
        if self.about.top_k is None:
            return logits.to(torch.float16).numpy(force=True)
        top = TopKLogits.of(logits, self.about.top_k)
        rows = np.empty(len(logits), self.about.row)
        rows["rest"] = top.rest.numpy(force=True)
        rows["indices"] = top.indices.numpy(force=True)
        rows["values"] = top.values.to(torch.float16).numpy(force=True)
        return rows


@torch.no_grad()
def record_teacher(
    teacher: nn.Module,
    loader: Iterable[Any],
    cache: TeacherCacheWriter,
    *,
    device: torch.device | str,
    view: int = 0,
) -> None:
    """Write a teacher's logits of whatever samples of a loader are not yet written.

    The teacher runs in eval mode, which is undone afterwards, and not at all for batches that are written.

    Args:
        teacher: gives logits (n, classes) of x; is on the device.
        loader: yields (x, ids), or (x, ..., ids), with int64 ids (n,), in any order.
        cache: to write into.
        device: where x goes.
        view: that the loader shows.

    Raises:
        What `TeacherCacheWriter.write` raises; TypeError, ValueError: a batch of another form. What was written before stays.
    """
    with evaluating(teacher):
        for x, ids in batches_of(loader, "last", cache.about.num_samples):
            if not cache.has(ids, view).all():
                cache.write(ids, teacher(x.to(device, non_blocking=True)), view)


def fingerprint_of(module: nn.Module) -> str:
    """SHA-256 of a network's state: names, dtypes, shapes and bytes of its `state_dict`, in the order of the names.

    What no tensor holds (activations, input size) is not in it, and wrappers (DDP, `torch.compile`) change the names.

    Raises:
        TypeError: the state holds something that is no tensor.
    """
    state = sorted(module.state_dict().items())
    for name, tensor in state:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict()[{name!r}] is a {type(tensor).__name__}: must be a tensor")
    return hashlib.sha256(json.dumps([(name, data_hash(tensor)) for name, tensor in state]).encode()).hexdigest()


def _make(folder: Path, about: About) -> None:
    """An empty cache, where there is none."""
    if (folder / _ABOUT).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(folder / _ROWS) as file:
            fill_with_zeros(file, about.size)
        about.save(folder)
    except OSError as error:
        (folder / _ROWS).unlink(missing_ok=True)
        reason = f"cannot make a cache of {about.size} bytes ({error.strerror})"
        raise OSError(error.errno, reason, str(folder)) from error


def _put(file: BinaryIO, rows: NDArray[Any], places: NDArray[np.int64], begin: int) -> None:
    """Write rows at ascending places of the file, each run of consecutive ones at once."""
    size = rows.nbytes // len(rows)
    starts = np.flatnonzero(np.diff(places, prepend=-2) > 1)
    for place, run in zip(places[starts], np.split(rows, starts[1:]), strict=True):
        file.seek(begin + int(place) * size)
        file.write(run.tobytes())
    file.flush()


def _on_the_first_rank(action: Callable[[], None]) -> None:
    """Rank 0 acts while the others wait; what goes wrong there is raised by all."""
    failure: Exception | None = None
    if rank() == 0:
        try:
            action()
        except (OSError, StateFileError) as error:
            failure = error
    failure = gather(failure)[0]
    if failure is not None:
        raise failure


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _how_many_are_missing(marks: NDArray[np.uint8]) -> str:
    return f"{int((marks == 0).sum())} of {len(marks)} rows are missing; TeacherCache.create goes on, finish() ends it"
