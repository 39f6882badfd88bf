"""The samplers that the tests of the common contract run over; a new sampler is one more line here."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import bkd_fast as bkd


@dataclass(frozen=True)
class Member:
    """One sampler, and what its contract is held against."""

    name: str
    make: type[torch.optim.Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)  # beside `SETTINGS`, of a chain in motion
    optimizer: type[torch.optim.Optimizer] | None = None  # what it is at temperature 0
    bit_equal: bool = True  # or to rounding

    @property
    def arguments(self) -> set[str]:
        return {*inspect.signature(self.make).parameters}

    @property
    def defaults(self) -> dict[str, Any]:
        """Its optimizer's arguments that it has too, as they are by default there."""
        assert self.optimizer is not None
        theirs = inspect.signature(self.optimizer).parameters.values()
        return {p.name: p.default for p in theirs if p.default is not p.empty and p.name in self.arguments}

    def chain(self, params: Any, **change: Any) -> Any:
        """The sampler of `params` at temperature 0.7, a prior around 0 included."""
        return self.make(params, **{**SETTINGS, **self.settings, **change})

    def cold(self, params: Any, **arguments: Any) -> Any:
        """The sampler as an optimizer of torch: `arguments` mean what they mean there, those not given are its defaults."""
        return self.make(params, **{"num_data": 1, "temperature": 0.0, **self.defaults, **arguments})


SETTINGS = {"lr": 0.01, "num_data": 50, "temperature": 0.7, "prior_precision": 2.0, "seed": 3}

FAMILY = [
    Member("SGLD", bkd.SGLD, optimizer=torch.optim.SGD),
    Member("SGHMC", bkd.SGHMC, {"dampening": 0.1}, optimizer=torch.optim.SGD),
    Member("PSGLD", bkd.PSGLD, {"eps": 1e-3}, optimizer=torch.optim.RMSprop, bit_equal=False),
    Member("AdamSGHMC", bkd.AdamSGHMC, {"eps": 1e-3}, optimizer=torch.optim.Adam, bit_equal=False),
    Member("SGNHT", bkd.SGNHT),
    Member("BAOAB", bkd.BAOAB, {"friction": 5.0}),
]

OPTIMIZERS = [member for member in FAMILY if member.optimizer is not None]

every_sampler = pytest.mark.parametrize("member", FAMILY, ids=lambda member: member.name)
every_optimizer = pytest.mark.parametrize("member", OPTIMIZERS, ids=lambda member: member.name)
