"""Streaming quantiles of chosen parameters, step by step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bkd_fast.sketch import QuantileSketch

WINDOW = 32  # draws that wait for each other: the first of them give each element its scale
CODES_PER_DEVIATION = 256  # of the first window; leaves room for 128 such deviations on either side
LEAST_DEVIATION = 2.0**-20  # of the magnitude of an element that does not move

# a group's settings and where in it the parameter is
Places = dict[str, tuple[dict[str, Any], int]]


def places_of(groups: list[dict[str, Any]]) -> Places:
    """Where each named parameter is."""
    return {name: (group, position) for group in groups for position, name in enumerate(group.get("param_names") or ())}


class ParameterQuantiles:
    """Sketches of some parameters of a sampler, fed after its steps.

    Args:
        names: of the parameters.
        start, every: the first step that counts, by each group's own count, and the thinning.
    """

    def __init__(self, names: list[str], start: int, every: int) -> None:
        self.names, self.start, self.every = names, start, every
        self._steps: dict[str, int] = {}  # the step after which a parameter was last looked at
        self._waiting: dict[str, list[Tensor]] = {name: [] for name in names}
        self._sketches: dict[str, QuantileSketch] = {}

    def collect(self, groups: list[dict[str, Any]]) -> None:
        """Take the draws of a step that has just been made, where it counts."""
        places = places_of(groups)
        for name in self.names:
            group, position = places[name]
            step = group["step"] - 1
            moved = step != self._steps.get(name, step - 1)
            if step >= self.start and moved and (step - self.start) % self.every == 0:
                self._steps[name] = step
                self._waiting[name].append(group["params"][position].detach().clone())
                if len(self._waiting[name]) == WINDOW:
                    self._flush(name)

    def _flush(self, name: str) -> None:
        if not self._waiting[name]:
            return
        values = torch.stack(self._waiting[name])
        self._waiting[name] = []
        if name not in self._sketches:
            wide = values.double()
            deviation = wide.std(0) if len(wide) > 1 else torch.zeros_like(wide[0])
            center = wide.mean(0)
            least = center.abs().clamp_min(LEAST_DEVIATION) * LEAST_DEVIATION
            resolution = torch.maximum(deviation, least) / CODES_PER_DEVIATION
            self._sketches[name] = QuantileSketch(values.shape[1:], resolution, center, device=values.device)
        self._sketches[name].update(values)

    def sketch(self, name: str) -> QuantileSketch:
        """The sketch of a parameter with all its draws.

        Raises:
            ValueError: it is not tracked, or has no draw yet.
        """
        if name not in self._waiting:
            raise ValueError(f"name = {name!r}: must be one of {self.names}")
        self._flush(name)
        if name not in self._sketches:
            raise ValueError(f"parameter {name} has no counted draw yet")
        return self._sketches[name]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        return {
            "names": list(self.names),
            "start": self.start,
            "every": self.every,
            "steps": dict(self._steps),
            "waiting": {name: torch.stack(draws) for name, draws in self._waiting.items() if draws},
            "sketches": {name: sketch.state_dict() for name, sketch in self._sketches.items()},
        }

    @classmethod
    def loaded(cls, state: Mapping[str, Any], groups: list[dict[str, Any]]) -> "ParameterQuantiles":
        """What `state_dict` gave, for the same parameters."""
        new = cls(list(state["names"]), state["start"], state["every"])
        new._steps = dict(state["steps"])
        places = places_of(groups)
        for name in new.names:
            group, position = places[name]
            parameter = group["params"][position]
            if name in state["waiting"]:
                new._waiting[name] = [*state["waiting"][name].to(parameter.device, copy=True)]
            if name in state["sketches"]:
                saved = state["sketches"][name]
                new._sketches[name] = QuantileSketch(parameter.shape, 1.0, bins=saved["bins"], device=parameter.device)
                new._sketches[name].load_state_dict(saved)
        return new
