"""`TopKLogits`: the k largest logits of each row, and one number for all the others."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TopKLogits(NamedTuple):
    """A teacher's logits of C classes, of which k are kept and the others taken for equal.

    Attributes:
        values: (..., k), the largest logits, in falling order.
        indices: (..., k) int64, their classes.
        rest: (...) float32, `log(mean exp)` of the other C - k logits; 0 where there is no other.
    """

    values: Tensor
    indices: Tensor
    rest: Tensor

    @staticmethod
    def of(logits: Tensor, k: int) -> "TopKLogits":
        """Those of logits (..., C), 1 <= k <= C."""
        values, indices = logits.topk(k)
        others = logits.shape[-1] - k
        if not others:
            return TopKLogits(values, indices, torch.zeros(logits.shape[:-1], device=logits.device))
        rest = logits.float().scatter(-1, indices, -math.inf).logsumexp(-1) - math.log(others)
        return TopKLogits(values, indices, rest)

    def dense(self, classes: int) -> Tensor:
        """(..., classes) float32 logits: `rest` wherever no value is kept."""
        return self.rest[..., None].repeat_interleave(classes, -1).scatter(-1, self.indices, self.values.float())
