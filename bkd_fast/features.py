"""Cached features: what a frozen backbone makes of a data set, recorded once in one file and streamed in shuffled batches.

A cache is `name.bin` (rows, then int64 targets, then int64 ids, little-endian) and its sidecar `name.json`, written last, which
says what the file holds and its SHA-256.
"""

import hashlib
import itertools
import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bkd_fast.errors import NonFiniteError, StateFileError
from bkd_fast.posterior.card import bytes_of
from bkd_fast.posterior.draw_file import replacing, unfinished
from bkd_fast.posterior.evaluation import evaluating
from bkd_fast.posterior.saving import check_file, description_of, sidecar_of

VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Measured (docs/scale.md): smaller blocks read more slowly, larger ones no faster and mix less
BLOCK = 1 << 18  # bytes of consecutive rows that are read together, one row at least
MIXED = 128  # blocks whose rows are shuffled together


class Teacher(Protocol):
    """Whatever has a teacher's logits by sample id."""

    def logits(self, ids: Tensor, /) -> Any:
        """What the loss takes for the samples ids, int64 (rows,)."""
        ...


class FeatureCache:
    """A recorded cache of features, to be read: nothing but what is asked for is in memory, and 16 bytes of each row.

    Args:
        path: of the sidecar; ".json" is added where it is missing.
        expect: the fingerprint that it must have; None: any.
        verify: compare the file with its SHA-256, which reads it once. Without, its length is still looked at.

    Attributes:
        shape: (N, *shape of one sample's features).
        dtype: of the features.
        targets: int64 (N,), as they were recorded.
        ids: int64 (N,), which sample each row is of.
        row_bytes: of the features of a row.
        fingerprint: names and hashes of whatever the features depend on.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: its fingerprint is another one; the message names what differs.
        StateFileError: it is unfinished, missing, truncated, altered or of a later version.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, expect: Mapping[str, str] | None = None, verify: bool = True
    ) -> None:
        sidecar = sidecar_of(path)
        self.path = sidecar.with_suffix(".bin")
        if not sidecar.exists() and (self.path.exists() or unfinished(self.path).exists()):
            raise StateFileError(f"{sidecar.name} is missing beside {self.path.name}: unfinished, record it again")
        description = description_of(sidecar, "features", VERSION)
        try:
            self.shape = tuple(int(size) for size in description["shape"])
            self.dtype = DTYPES[description["dtype"]]
            self.fingerprint: dict[str, str] = dict(description["fingerprint"])
            checksum = description["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise StateFileError(f"{sidecar.name} is incomplete: {error!r}") from error
        if expect is not None:
            _check_fingerprint(sidecar, self.fingerprint, expect)
        self.row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        end = len(self) * self.row_bytes
        check_file(self.path, sidecar, end + 16 * len(self), checksum if verify else None)
        numbers = torch.from_numpy(np.fromfile(self.path, "<i8", 2 * len(self), offset=end))
        self.targets, self.ids = numbers.view(2, -1)
        # read instead of mapped: no page faults, and a file that is cut off under us is an error instead of the end
        self._descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        """How many rows there are, N."""
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, shape={self.shape}, dtype={self.dtype})"

    def rows(self, begin: int, end: int) -> Tensor:
        """The features of rows begin .. end - 1, (end - begin, *shape[1:]), copied from the file.

        Raises:
            ValueError: rows that are not there.
            StateFileError: the file has been truncated since it was opened.
        """
        if not 0 <= begin <= end <= len(self):
            raise ValueError(f"rows {begin} .. {end}: must be within 0 .. {len(self)}")
        found = torch.empty(end - begin, *self.shape[1:], dtype=self.dtype)
        self.read(begin, found)
        return found

    def read(self, begin: int, into: Tensor) -> None:
        """Fill a contiguous CPU tensor (rows, *shape[1:]) of the features' dtype from row `begin` on."""
        memory, offset = bytes_of(into).data, begin * self.row_bytes
        while len(memory):  # a read gives 2 GB at most
            count = os.preadv(self._descriptor, [memory], offset)
            if count == 0:
                raise StateFileError(f"{self.path.name} has been truncated since it was opened")
            memory, offset = memory[count:], offset + count

    def announce(self, begin: int, end: int) -> None:
        """Let the system fetch rows begin .. end - 1 while we do something else; they take no memory of ours."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self._descriptor, begin * self.row_bytes, (end - begin) * self.row_bytes, os.POSIX_FADV_WILLNEED
            )


@torch.no_grad()
def record_features(
    backbone: nn.Module,
    loader: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    fingerprint: Mapping[str, str],
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
) -> FeatureCache:
    """Run a backbone over a data set and record what it makes of it, with the targets.

    The backbone runs in eval mode, which is undone afterwards. Rows are kept in the loader's order. Let it shuffle: a block of
    consecutive rows is then a random sample of the data, and `FeatureBatches` gives batches like those of single rows.

    Args:
        backbone: gives features (n, ...) of x; is on the device.
        loader: yields (x, target, ids), with int64 target and ids (n,); -100 is the target of a sample without a label.
        path: of the sidecar; ".json" is added where it is missing.
        fingerprint: names and hashes of whatever the features depend on: the backbone's weights, the data, the transform.
        dtype: what features are rounded to: float16, bfloat16 or float32.
        device: where x goes.

    Returns:
        The cache, opened.

    Raises:
        FileExistsError: there is a cache of that name already.
        TypeError: a fingerprint or a batch of another form.
        ValueError: dtype is none of the three, an empty loader, a batch or features of other shapes.
        NonFiniteError: features that are not finite once they are in `dtype`; the message names the sample.
        OSError: the disk is full, or fails.
        Nothing is left of it then. A run that was killed leaves what `FeatureCache` calls unfinished, and the next one replaces.
    """
    sidecar = sidecar_of(path)
    names = [name for name, known in DTYPES.items() if known == dtype]
    if not names:
        raise ValueError(f"dtype = {dtype}: must be one of {list(DTYPES.values())}")
    if not isinstance(fingerprint, Mapping) or not all(
        isinstance(text, str) for text in (*fingerprint, *fingerprint.values())
    ):
        raise TypeError(f"fingerprint = {fingerprint!r}: must be a mapping of str to str")
    if sidecar.exists():
        raise FileExistsError(f"{sidecar} exists: a cache is recorded once; delete it to record another")
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    # not a list of tensors: small ones that stay between large ones that go would keep the heap from using their room again
    all_targets, all_ids = bytearray(), bytearray()
    shape: torch.Size | None = None
    with evaluating(backbone), replacing(sidecar.with_suffix(".bin")) as file:

        def write(data: memoryview | bytearray) -> None:
            file.write(data)
            digest.update(data)

        for batch in loader:
            x, target, ids = _parts(batch)
            features = backbone(x.to(device, non_blocking=True)).to(dtype)
            shape = features.shape[1:] if shape is None else shape
            if not shape or features.shape != (len(x), *shape):
                wanted = "(rows, features ...)" if not shape else (len(x), *shape)
                raise ValueError(f"backbone gives features {tuple(features.shape)}: must be {wanted}")
            unusable = ~features.flatten(1).isfinite().all(1)
            if unusable.any():
                sample = int(ids[unusable.nonzero()[0].to(ids.device)])
                raise NonFiniteError(f"the features of sample {sample} are not finite in {dtype}")
            write(bytes_of(features).data)
            all_targets += bytes_of(target).data
            all_ids += bytes_of(ids).data
        if shape is None:
            raise ValueError("loader is empty: must yield batches")
        write(all_targets)
        write(all_ids)
    description = {
        "format": "bkd_fast.features",
        "version": VERSION,
        "shape": [len(all_ids) // 8, *shape],
        "dtype": names[0],
        "fingerprint": dict(fingerprint),
        "sha256": digest.hexdigest(),
    }
    with replacing(sidecar) as file:
        file.write(json.dumps(description, indent=2).encode() + b"\n")
    return FeatureCache(path, verify=False)


class FeatureBatches:
    """Shuffled batches of a cache, streamed: one endless iterator over all epochs, each row once in each of them.

    The file is read in blocks of 256 KB, in a new random order in every epoch, and the rows of 128 successive blocks are shuffled
    together: 32 MB, which is the memory it takes. Batches are cut from that stream of rows, across epochs, so that all have the
    same size, and batch number `step` is a pure function of (seed, step).

    Every row comes equally often, so the gradients of an epoch average to that of the whole. One batch's gradient varies as that
    of so many rows drawn at random if the file's order is random (`record_features` from a loader that shuffles) or the file
    is within 32 MB. Otherwise its variance is about 1 + rho b / 128 times that, b the batch size and rho the correlation of
    gradients within a block (near 1 where the file is sorted by class), and batches of the same 32 MB share a part of their error
    (docs/scale.md).

    An iterator begins at step 0 each time; a run that goes on takes `at(step)`, which `sample` and `sample_heads` take as well.

    Args:
        cache: of N rows.
        teacher: has the teacher's logits by sample id: a tensor or array (memory-mapped too) indexed by id, or an object with
            `logits(ids)`. None: no teacher.
        batch_size: rows of every batch.
        seed: of the order, in [0, 2**64).
        dtype: what features are given in; None: as they are stored. `LinearHeadSampler` takes any, modules their own.

    Yields:
        (x, target, teacher_logits): (batch_size, *cache.shape[1:]), int64 (batch_size,), and (batch_size, classes), what
        `logits` gave, or None.

    Raises:
        ValueError: a batch size or a seed out of range.
    """

    def __init__(
        self,
        cache: FeatureCache,
        teacher: Tensor | NDArray[Any] | Teacher | None = None,
        *,
        batch_size: int,
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value, least, end in (("batch_size", batch_size, 1, len(cache) + 1), ("seed", seed, 0, 2**64)):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < end:
                raise ValueError(f"{name} = {value!r}: must be an int in [{least}, {end})")
        self.cache, self.teacher, self.batch_size, self.seed, self.dtype = cache, teacher, batch_size, seed, dtype
        self._block = max(1, BLOCK // cache.row_bytes)  # rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Any]]:
        return self.at(0)

    def at(self, step: int) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """The batches from number `step` on, without end."""
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step = {step!r}: must be an int of at least 0")
        return self._batches(step)

    def _batches(self, step: int) -> Iterator[tuple[Tensor, Tensor, Any]]:
        parts: list[tuple[Tensor, Tensor]] = []  # of the batch to come: features and row numbers
        missing = self.batch_size
        for features, numbers, order in self._mixtures(step * self.batch_size):
            while len(order):
                taken, order = order[:missing], order[missing:]
                parts.append((features[taken], numbers[taken]))
                missing -= len(taken)
                if not missing:
                    yield self._batch(parts)
                    parts, missing = [], self.batch_size

    def _batch(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Any]:
        x, numbers = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
        ids = self.cache.ids[numbers]
        if self.teacher is None:
            logits = None
        elif isinstance(self.teacher, Tensor | np.ndarray):
            logits = torch.as_tensor(self.teacher[ids])
        else:
            logits = self.teacher.logits(ids)
        return x.to(self.dtype or x.dtype), self.cache.targets[numbers], logits

    def _mixtures(self, skip: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """From row `skip` of the stream on: mixed blocks, the number of each row, and their order."""
        cache = self.cache
        epoch, skip = divmod(skip, len(cache))
        buffer = torch.empty(min(MIXED * self._block, len(cache)), *cache.shape[1:], dtype=cache.dtype)
        for (key, blocks), (_, following) in itertools.pairwise(self._orders(epoch)):
            runs = [self._run(block) for block in blocks]
            numbers = torch.cat([torch.arange(*run) for run in runs])
            if skip >= len(numbers):
                skip -= len(numbers)
                continue
            for block in following:
                cache.announce(*self._run(block))
            place = 0
            for begin, end in runs:
                cache.read(begin, buffer[place : place + end - begin])
                place += end - begin
            order = torch.from_numpy(self._random(*key).permutation(len(numbers))[skip:])
            skip = 0
            yield buffer, numbers, order

    def _orders(self, epoch: int) -> Iterator[tuple[tuple[int, int], NDArray[np.int64]]]:
        """From an epoch on: the blocks that are mixed, and the key of their rows' order."""
        blocks = -(-len(self.cache) // self._block)
        for number in itertools.count(epoch):
            order = self._random(number, 0).permutation(blocks)
            for part, mixed in enumerate(np.array_split(order, -(-blocks // MIXED)), start=1):
                yield (number, part), mixed

    def _random(self, epoch: int, part: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(counter=[0, 0, epoch, part], key=self.seed))

    def _run(self, block: int) -> tuple[int, int]:
        """First and last row, plus one, of a block."""
        begin = self._block * int(block)
        return begin, min(begin + self._block, len(self.cache))


def _check_fingerprint(sidecar: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    differences = [
        f"{name} is {found.get(name)!r} there, {expected.get(name)!r} here"
        for name in {**found, **expected}
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise ValueError(f"{sidecar.name} is of other features: {'; '.join(differences)}")


def _parts(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of a loader.

    Raises:
        TypeError: another form.
        ValueError: other shapes.
    """
    if not isinstance(batch, Sequence) or len(batch) != 3 or not all(isinstance(part, Tensor) for part in batch):
        form = [type(part).__name__ for part in batch] if isinstance(batch, Sequence) else type(batch).__name__
        raise TypeError(f"loader yields {form}: must yield three tensors (x, target, ids)")
    x, target, ids = batch
    for name, numbers in (("target", target), ("ids", ids)):
        if numbers.dtype != torch.int64 or numbers.shape != x.shape[:1]:
            raise ValueError(
                f"loader yields {name} of {numbers.dtype} {tuple(numbers.shape)}: must be torch.int64 ({len(x)},)"
            )
    return x, target, ids
