"""The settings that every sampler has in common: their types, defaults and what is allowed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, Required, TypeAlias, TypedDict

import torch
from torch import Tensor

from bkd_fast.ops.noise import check_field

Params: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
PriorMean: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor]
NonFinite: TypeAlias = Literal["raise", "skip", "record", "propagate"]
Rounding: TypeAlias = Literal["stochastic", "nearest", "master"]

NONFINITE_RULES = ("raise", "skip", "record", "propagate")


class Settings(TypedDict, total=False):
    """Keyword arguments of every sampler, and keys of its parameter groups; `Sampler` documents them."""

    num_data: Required[float]
    temperature: float | Tensor
    prior_precision: float
    prior_mean: PriorMean | None
    weight_decay: float
    maximize: bool
    nonfinite: NonFinite | None
    rounding: Rounding
    capturable: bool
    step_in_backward: bool
    chains: int
    seed: int
    chain: int


DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "prior_precision": 0.0,
    "prior_mean": None,
    "weight_decay": 0.0,
    "maximize": False,
    "nonfinite": None,
    "capturable": False,
    "step_in_backward": False,
    "chains": 1,
    "seed": 0,
    "chain": 0,
}


def is_zero(value: float | Tensor) -> bool:
    """Whether a number, or every chain's, is 0. Reads a tensor."""
    return not bool(value.any()) if isinstance(value, Tensor) else value == 0


def is_cold(group: dict[str, Any]) -> bool:
    """Whether a step has no noise, as far as the host knows: temperatures on a GPU are not read for it."""
    temperature = group["temperature"]
    if isinstance(temperature, Tensor) and temperature.device.type != "cpu":
        return False
    return is_zero(temperature)


def check_settings(group: dict[str, Any], wait: bool = False) -> None:
    """Raise ValueError or TypeError for a setting of a parameter group that no sampler allows.

    A tensor on a GPU is looked at only with `wait`: reading it waits for the GPU.
    """
    for name in ("lr", "temperature"):
        _check_per_chain(name, group[name], group["chains"], wait)
    for name in ("prior_precision", "weight_decay"):
        check_number(name, group[name], 0)
    num_data = group["num_data"]
    if isinstance(num_data, bool) or not isinstance(num_data, Real):
        raise TypeError(f"num_data = {num_data!r}: must be a number, the size of the training set")
    if not (math.isfinite(float(num_data)) and float(num_data) > 0):
        raise ValueError(f"num_data = {num_data}: must be positive, the size of the training set")
    if group["prior_precision"] > 0 and group["weight_decay"] > 0:
        raise ValueError(
            f"prior_precision = {group['prior_precision']} and weight_decay = {group['weight_decay']}: give one of them; "
            "weight_decay is prior_precision / num_data"
        )
    _check_nonfinite_rule(group)
    if group["capturable"] and group["moments"] is not None:
        raise ValueError(
            "track_moments with capturable = True: the weight of a draw depends on how many came before, and a replay would "
            "repeat that of the capture. Keep draws, or a sampler that is not capturable."
        )
    for name in ("seed", "chain", "step"):
        check_field(name, group[name])
    if isinstance(group["chains"], bool) or not isinstance(group["chains"], int) or group["chains"] < 1:
        raise ValueError(f"chains = {group['chains']!r}: must be an int of at least 1")
    check_field("chain", group["chain"] + group["chains"] - 1, "the last chain")


def check_number(name: str, value: float, at_least: float, below: float = math.inf) -> None:
    """Raise ValueError unless at_least <= value < below."""
    if not at_least <= float(value) < below:
        allowed = f"in [{at_least:g}, {below:g})" if below < math.inf else f"finite and at least {at_least:g}"
        raise ValueError(f"{name} = {value}: must be {allowed}")


def _check_per_chain(name: str, value: float | Tensor, chains: int, wait: bool) -> None:
    if not isinstance(value, Tensor):
        check_number(name, value, 0)
        return
    if value.dim() and value.shape != (chains,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: must be a number or, one for each chain, ({chains},)")
    if value.device.type != "cpu" and not wait:
        return
    values = value.view(-1).tolist()
    for number in values:
        check_number(name, number, 0)
    if min(values) == 0 < max(values):
        raise ValueError(f"{name} = {values}: must be positive in every chain, or 0 in all")


def _check_nonfinite_rule(group: dict[str, Any]) -> None:
    rule = group["nonfinite"]
    if rule is not None and rule not in NONFINITE_RULES:
        raise ValueError(f"nonfinite = {rule!r}: must be None or one of {NONFINITE_RULES}")
    if rule in ("raise", "skip") and group["capturable"]:
        raise ValueError(
            f"nonfinite = {rule!r} with capturable = True: it asks the GPU at every step, which a graph cannot; must be None, "
            '"record" or "propagate"'
        )
    if rule in ("raise", "skip") and group["step_in_backward"]:
        raise ValueError(
            f"nonfinite = {rule!r} with step_in_backward = True: it looks at every gradient before anything moves, and there is "
            'only one at a time; must be None, "record" or "propagate"'
        )


def prior_means(prior_mean: PriorMean | None, group: dict[str, Any]) -> list[Tensor]:
    """The prior means of a group's parameters in their order; empty for a prior around 0.

    With chains, a mean may lack the leading axis: it is every chain's.
    """
    if prior_mean is None:
        return []
    if group["prior_precision"] == 0 and group["weight_decay"] == 0:
        raise ValueError(
            "prior_mean is given with prior_precision = 0: it needs a positive prior_precision or weight_decay"
        )
    if isinstance(prior_mean, Mapping):
        names = group.get("param_names")
        if not names:
            raise ValueError("prior_mean is a mapping: the sampler needs named parameters, model.named_parameters()")
        missing = [name for name in names if name not in prior_mean]
        if missing:
            raise ValueError(f"prior_mean lacks {listed(missing)}: must have one tensor for each parameter")
        means = [prior_mean[name] for name in names]
    else:
        means = list(prior_mean)
        if len(means) != len(group["params"]):
            raise ValueError(
                f"prior_mean has {len(means)} tensors: must have {len(group['params'])}, one per parameter"
            )
    for i, (mean, parameter) in enumerate(zip(means, group["params"], strict=True)):
        allowed = [parameter.shape] + [parameter.shape[1:]] * (group["chains"] > 1)
        if mean.shape not in allowed:
            shapes = " or ".join(str(tuple(shape)) for shape in allowed)
            raise ValueError(f"prior_mean[{i}] has shape {tuple(mean.shape)}: must be {shapes}")
    return means


def put_lr_on_device(group: dict[str, Any]) -> None:
    """Make the learning rate a tensor beside the first parameter, float64 so that it is the number; one that is there stays.
    Each chain's temperatures go there too."""
    lr, device = group["lr"], group["params"][0].device
    if not isinstance(lr, Tensor):
        group["lr"] = torch.full((), float(lr), dtype=torch.float64, device=device)
    for name in ("lr", "temperature"):
        if isinstance(group[name], Tensor) and group[name].device != device:
            group[name] = group[name].to(device, torch.float64)


def listed(names: Sequence[str]) -> str:
    """Names for a message: five, and how many more."""
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
