"""Numbers on devices, where a CUDA graph may read them at any later time."""

import torch
from torch import Tensor

KEPT = 64  # a few for each group, and a temperature that anneals


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream; asks nothing of CUDA where it is not in use."""
    return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())  # type: ignore[no-untyped-call]


class DeviceConstants:
    """Numbers in float64 on devices, written once: in a graph, a fill would be one more launch of every replay."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, float], Tensor] = {}
        self._in_graphs: list[Tensor] = []  # kept as long as the sampler

    def on(self, device: torch.device, value: float | Tensor) -> Tensor:
        """`value` there: a tensor itself, if it is there in float64; a number as a 0-dim tensor that is not to be written to."""
        if isinstance(value, Tensor):
            return value.to(device, torch.float64, non_blocking=True)
        key = device, float(value)
        constant = self._kept.get(key)
        if constant is None:
            constant = torch.full((), value, dtype=torch.float64, device=device)
            if is_capturing():  # it lives in the graph's memory, and is written by every replay
                return constant
            if len(self._kept) == KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = constant
        if is_capturing():
            self._in_graphs.append(constant)
        return constant
