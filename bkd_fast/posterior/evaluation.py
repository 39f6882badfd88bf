"""Running buffered parameter snapshots of a model over a loader: for each batch, the logits of every snapshot."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

RowOrder = Literal["order", "last"]


class Draw(Protocol):
    """One posterior draw: where it comes from, the live model and a copy of what was sampled."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def run(self) -> int: ...
    @property
    def chain(self) -> int: ...
    @property
    def index(self) -> int: ...
    def snapshot(self) -> Mapping[str, Tensor]:
        """Detached copies by the names of named_parameters() and named_buffers(); what is missing stays as in `model`."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every submodule has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_loader(loader: Iterable[Any], rows: RowOrder, num_rows: int) -> None:
    """Refuse a loader whose batches could not be matched to rows, as far as it can be seen without reading it.

    Raises:
        ValueError: rows is neither "order" nor "last"; with "order", a DataLoader that does not read its dataset in order
            or that has not num_rows examples.
    """
    if rows not in ("order", "last"):
        raise ValueError(f"rows = {rows!r}: must be 'order' or 'last'")
    if rows == "last" or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    if (batches is not None and type(batches) is not BatchSampler) or not isinstance(sampler, SequentialSampler):
        name = type(batches if batches is not None and type(batches) is not BatchSampler else sampler).__name__
        raise ValueError(
            f"loader draws its examples by {name}, so that its order says nothing about rows: use shuffle=False, or let "
            "each batch end with its int64 row ids and pass rows='last'"
        )
    length = len(sampler)
    if batches is not None and batches.drop_last:
        length -= length % batches.batch_size
    if length != num_rows:
        raise ValueError(f"loader has {length} examples: must have num_rows = {num_rows}, or pass rows='last'")


def batches_of(loader: Iterable[Any], rows: RowOrder, num_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every batch as (inputs, int64 row ids).

    Raises:
        TypeError: a batch that is no tensor and does not begin with one.
        ValueError: with "order", more or fewer than num_rows rows; with "last", a batch without row ids.
    """
    begin = 0
    for batch in loader:
        parts = batch if isinstance(batch, Sequence) else (batch,)
        if not parts or not isinstance(parts[0], Tensor):
            raise TypeError(f"loader yields {type(batch).__name__}: must be a tensor x, or a tuple that begins with it")
        x = parts[0]
        if rows == "last":
            ids = parts[-1]
            if len(parts) < 2 or not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != x.shape[:1]:
                raise ValueError(f"loader yields a batch whose last element is not int64 row ids of shape ({len(x)},)")
            yield x, ids
        else:
            if begin + len(x) > num_rows:
                raise ValueError(f"loader yields more than num_rows = {num_rows} rows")
            yield x, torch.arange(begin, begin + len(x))
        begin += len(x)
    if rows == "order" and begin != num_rows:
        raise ValueError(f"loader yielded {begin} rows: must be num_rows = {num_rows}")


def logits_of_snapshots(model: nn.Module, snapshots: Sequence[Mapping[str, Tensor]], x: Tensor, classes: int) -> Tensor:
    """Logits (snapshots, rows, classes) of the model with each snapshot's parameters in turn.

    Raises:
        TypeError: the model returns no tensor.
        ValueError: its output is not (rows, classes).
    """
    anything = next(model.parameters(), next(model.buffers(), None))
    if anything is not None:
        x = x.to(anything.device, non_blocking=anything.device.type != "cpu")
    logits = []
    for snapshot in snapshots:
        output = functional_call(model, dict(snapshot), (x,))
        if not isinstance(output, Tensor):
            raise TypeError(f"model returns {type(output).__name__}: must be a tensor of logits (rows, {classes})")
        if output.shape != (len(x), classes):
            raise ValueError(f"model returns logits of shape {tuple(output.shape)}: must be ({len(x)}, {classes})")
        logits.append(output)
    return torch.stack(logits)
