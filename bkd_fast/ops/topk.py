"""`TopKLogits`: teacher logits by the k largest of each row, and one number for all its others."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)


class TopKLogits(NamedTuple):
    """Teacher logits of which each row keeps its k largest; every other class has the logit `rest` of its row.

    `KDLoss` takes them in the place of dense logits and reads them as they are. With rest = log(mean(exp(t))) over the other
    classes, as `of` computes it, the teacher's probabilities of the k at temperature 1 are what they were, and the others share
    theirs evenly; that logit then holds at every temperature. At C = 1000 and k = 32 a cached row takes 194 or 196 bytes in
    float16 with int32 indices, a dense one 2000.

    A tuple of tensors, which a DataLoader collates (samples are then one row's: (k,), (k,) and ()) and pins.

    Attributes:
        values: logits (rows, k), 1 <= k <= classes; float32, bfloat16 or float16. None is below its row's `rest`.
        indices: their classes (rows, k), int32 or int64, distinct in a row.
        rest: logit (rows,) of each other class; float32, bfloat16 or float16. Not read where k = classes.
    """

    values: Tensor
    indices: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> "TopKLogits":
        """The top k of dense logits (rows, classes).

        Returns:
            `values` in the dtype of `logits` (float64 as float32), `indices` in int32, `rest` in float32; -inf where no other
            class has any probability.

        Raises:
            TypeError: logits that are not floating.
            ValueError: k out of [1, classes].
        """
        if logits.dtype not in (*DTYPES, torch.float64):
            raise TypeError(f"logits has dtype {logits.dtype}: must be one of {(*DTYPES, torch.float64)}")
        classes = logits.shape[-1]
        if not 1 <= k <= classes:
            raise ValueError(f"k = {k}: must be in [1, {classes}] for logits of shape {tuple(logits.shape)}")
        values, indices = logits.detach().topk(k)
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        others = wide.scatter(-1, indices, -math.inf)
        rest = torch.logsumexp(others, -1) - math.log(max(classes - k, 1))
        stored = torch.float32 if logits.dtype == torch.float64 else logits.dtype
        return cls(values.to(stored), indices.to(torch.int32), rest.to(torch.float32))

    def dense(self, classes: int) -> Tensor:
        """The rows that these stand for: float32 (rows, classes).

        Raises:
            TypeError, ValueError: fields that are no top k of so many classes. On CUDA, where looking at indices would wait for
                the device, a row with one out of range is NaN instead.
        """
        check_fields(self, classes)
        outside = (self.indices < 0) | (self.indices >= classes)
        if not outside.is_cuda and bool(outside.any()):
            value = self.indices[outside][0].item()
            raise ValueError(f"teacher_logits.indices holds {value}: must be classes in [0, {classes})")
        values = self.values.float().masked_fill(outside.any(-1, keepdim=True), math.nan)
        rest = self.rest.float().unsqueeze(-1).repeat(*[1] * self.rest.dim(), classes)
        return rest.scatter_(-1, self.indices.long().clamp(0, classes - 1), values)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TopKLogits":
        """The same on a device."""
        return TopKLogits(*(field.to(device, non_blocking=non_blocking) for field in self))


def check_fields(top: TopKLogits, classes: int) -> None:
    """Shapes, dtypes and devices of the fields, as `KDLoss` calls them.

    Raises:
        TypeError, ValueError: the message names the field.
    """
    for name, field, dtypes in (
        ("values", top.values, DTYPES),
        ("indices", top.indices, INDEX_DTYPES),
        ("rest", top.rest, DTYPES),
    ):
        if field.dtype not in dtypes:
            raise TypeError(f"teacher_logits.{name} has dtype {field.dtype}: must be one of {dtypes}")
        if field.device != top.values.device:
            raise ValueError(
                f"teacher_logits.{name} is on {field.device}: must be on {top.values.device}, as its values"
            )
    shape = top.values.shape
    if not shape or not 1 <= shape[-1] <= classes:
        raise ValueError(f"teacher_logits.values has shape {tuple(shape)}: must be (rows, k), k in [1, {classes}]")
    for name, field, wanted in (("indices", top.indices, shape), ("rest", top.rest, shape[:-1])):
        if field.shape != wanted:
            raise ValueError(
                f"teacher_logits.{name} has shape {tuple(field.shape)}: must be {tuple(wanted)} for values of shape "
                f"{tuple(shape)}"
            )
