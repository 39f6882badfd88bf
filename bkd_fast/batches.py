"""Batches in an order that is a function of (seed, epoch): a run goes on from any step, on any number of processes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from bkd_fast.errors import StateFileError
from bkd_fast.ops.noise import Tag, check_field, normal_
from bkd_fast.teacher_cache import TeacherCache


class Batches:
    """Shuffled mini-batches for `sample`, the incomplete last one left out: (x, target) or, with a teacher, (x, target, logits).

    Epoch e goes through a permutation that only `seed` and e determine, and each step's batch is the same rows however many
    processes share it. What it holds of a run is one number, `position`, so that a run goes on in the middle of an epoch and on
    another number of processes: `Checkpoints` saves it.

    Args:
        dataset: map-style, of (x, target). Where `views` is not None it is asked for dataset[i, v] instead of dataset[i]: a view
            of sample i that only i and v determine, such as an augmentation seeded by both.
        batch_size: rows of a step, over all processes that share it.
        seed: of the order.
        shard: this process's number among those that share each batch, and how many these are (`data_rank`). Each gets an equal
            part.
        views: how many views of a sample there are: epoch e takes view e mod views. None: the data set has none.
        teacher: cached logits of the same samples and views.
        options: for torch's DataLoader: num_workers, pin_memory, collate_fn ...

    Raises:
        ValueError: a batch larger than the data set or that its processes cannot share evenly, a teacher of other samples or
            views.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        views: int | None = None,
        teacher: TeacherCache | None = None,
        **options: Any,
    ) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        rank, count = shard
        check_field("seed", seed)
        if not 0 < batch_size <= size:
            raise ValueError(
                f"batch_size = {batch_size}: must be at least 1 and at most {size}, the size of the data set"
            )
        if not 0 <= rank < count or batch_size % count:
            raise ValueError(
                f"shard = {shard} with batch_size = {batch_size}: must be a part of equal parts, (rank, count)"
            )
        if teacher is not None:
            for name, value in (("num_samples", size), ("views", views or 1)):
                found = getattr(teacher.about, name)
                if found != value:
                    raise ValueError(f"teacher has {name} = {found}: must be {value}, as the data set")
        self.dataset, self.batch_size, self.seed, self.shard = dataset, batch_size, seed, shard
        self.views, self.teacher = views, teacher
        self.position = 0  # batches given since the beginning
        self._loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=_Keys(self), **options)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.dataset) // self.batch_size  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """The rest of the epoch."""
        view, parts = self._view(), self._parts()
        for ids, batch in zip(parts, self._loader, strict=True):
            self.position += 1
            yield batch if self.teacher is None else (*batch, self.teacher.logits(torch.tensor(ids), view))

    def keys(self) -> Iterator[Any]:
        """What the data set is asked for in each batch of the rest of the epoch."""
        view = self._view()
        for ids in self._parts():
            yield ids if self.views is None else [(i, view) for i in ids]

    def _view(self) -> int:
        return self.position // len(self) % (self.views or 1)

    def _parts(self) -> list[list[int]]:
        """The rows of this process in every batch of the rest of the epoch."""
        epoch, begun = divmod(self.position, len(self))
        rank, count = self.shard
        noise = torch.empty(len(self.dataset))  # type: ignore[arg-type]
        order = normal_(noise, seed=self.seed, step=epoch, tag=Tag.DATA_ORDER).argsort(stable=True)
        batches = order[: len(self) * self.batch_size].view(len(self), count, -1)
        parts: list[list[int]] = batches[begun:, rank].tolist()
        return parts

    def state_dict(self) -> dict[str, int]:
        """Where it is, and what determines the order."""
        return {"position": self.position, **self._order()}

    def _order(self) -> dict[str, int]:
        return {"seed": self.seed, "batch_size": self.batch_size, "rows": len(self.dataset)}  # type: ignore[arg-type]

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there, on any number of processes.

        Raises:
            StateFileError: another seed, batch size or data set's size; nothing is changed then.
        """
        for name, value in self._order().items():
            if state[name] != value:
                raise StateFileError(f"the saved batches have {name} = {state[name]}: must be {value}, as now")
        self.position = state["position"]


class _Keys:
    """What torch's DataLoader asks for the keys of each batch, at every pass anew."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self.batches.keys()
