"""What every sampler shares: a torch optimizer that owns its noise coordinates, its non-finite rule and parameter moments.

A sampler file states one equation and hands one launch at a time to one fused operation; the contract with existing training
code (closures, hooks, parameter groups, state) is kept here.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bkd_fast.errors import NonFiniteError, warn
from bkd_fast.ops.langevin import DTYPES, find_nonfinite
from bkd_fast.ops.noise import check_field
from bkd_fast.samplers.layout import Launch, in_order_of, launches, name_of

Params: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
PriorMean: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor]
NonFinite: TypeAlias = Literal["raise", "skip", "record", "propagate"]

NONFINITE_RULES = ("raise", "skip", "record", "propagate")
RECORD_EVERY = 1000  # steps between looks at what "record" found

_live: "weakref.WeakSet[Sampler]" = weakref.WeakSet()


class ParameterMoments(NamedTuple):
    """Posterior mean and variance (n - 1) of one parameter, float32 (float64 for float64), and the draws they hold."""

    mean: Tensor
    variance: Tensor
    draws: int


class Sampler(torch.optim.Optimizer):
    """Base of the samplers. A subclass implements `_launch`; everything a user calls is documented there."""

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self.skipped_steps = 0
        self._found: dict[tuple[int, torch.device], Tensor] = {}
        self._check_order = False
        self._next_id = 0
        super().__init__(params, {**defaults, "step": 0, "moments": None})
        self._warn_of_shared_noise()
        _live.add(self)

    # ---- construction ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; what is not given is the constructor's.

        Raises:
            ValueError, TypeError: as the constructor; nothing was added then.
        """
        group = {**self.defaults, **param_group}
        check_hyperparameters(group)
        prior_mean = group.pop("prior_mean", None)
        param_group = {key: value for key, value in param_group.items() if key != "prior_mean"}
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            for parameter in added["params"]:
                if parameter.dtype not in DTYPES:
                    raise TypeError(f"a parameter has dtype {parameter.dtype}: must be one of {DTYPES}")
            means = _prior_means(prior_mean, added)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        added.pop("prior_mean", None)
        added["parameter_ids"] = list(range(self._next_id, self._next_id + len(added["params"])))
        check_field("parameter", self._next_id + max(len(added["params"]) - 1, 0), "the number of parameters")
        self._next_id += len(added["params"])
        for parameter, mean in zip(added["params"], means, strict=bool(means)):
            self.state[parameter]["prior_mean"] = torch.empty_like(parameter).copy_(mean).detach()
        if added["temperature"] > 0 and any(p.dtype in (torch.bfloat16, torch.float16) for p in added["params"]):
            warn(
                "sampling 16-bit parameters rounds away most of the Langevin noise (their spacing near 0.05 is 2.4e-4 in "
                "bfloat16): the posterior is wrong. Keep the parameters in float32 (autocast may compute in bfloat16)."
            )

    def _warn_of_shared_noise(self) -> None:
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        keys = {(group["seed"], group["chain"]) for group in self.param_groups if group["temperature"] > 0}
        for other in _live:
            for group in other.param_groups:
                same = (group["seed"], group["chain"]) in keys and group["temperature"] > 0
                if same and not mine & {id(p) for p in group["params"]}:
                    warn(
                        f"another live sampler has seed = {group['seed']} and chain = {group['chain']} too: both draw the same "
                        "noise for their parameters. Give each its own chain=."
                    )
                    return

    # ---- the step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the chain.

        Args:
            closure: computes the loss and its gradients again; called once, with gradients enabled.

        Returns:
            what the closure returned, or None.

        Raises:
            NonFiniteError: a gradient is NaN or infinite (rule "raise", or what "record" found); with "raise" nothing moved.
            TypeError: a sparse gradient. ValueError: a negative or non-finite lr.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(index, group, launches(group)) for index, group in enumerate(self.param_groups)]
        for _, group, _ in work:
            check_hyperparameters(group)
        if self._check_order:
            self._warn_of_changed_order()
        if not self._gradients_allow_a_step(work):
            self.skipped_steps += 1
            return loss
        for index, group, group_launches in work:
            if float(group["lr"]) == 0 or not group_launches:
                continue  # no movement, no noise, no step: checkpointing code calls step() so
            collects = self._collects(group)
            for launch in group_launches:
                flags = None
                if self._rule(group, launch) == "record":
                    flags = torch.zeros(len(launch.theta), dtype=torch.bool, device=launch.theta[0].device)
                mean, m2 = self._moments_of(group, launch) if collects else ([], [])
                self._launch(group, launch, self._prior_means_of(group, launch), mean, m2, flags)
                launch.write_back()
                if flags is not None:
                    self._remember(index, group, launch, flags)
            group["step"] += 1
        if any(group["step"] % RECORD_EVERY == 0 for group in self.param_groups) and self._found:
            self.check()
        return loss

    def _launch(
        self,
        group: dict[str, Any],
        launch: Launch,
        center: list[Tensor],
        mean: list[Tensor],
        m2: list[Tensor],
        nonfinite: Tensor | None,
    ) -> None:
        raise NotImplementedError

    # ---- non-finite gradients ----

    def _rule(self, group: dict[str, Any], launch: Launch) -> str:
        rule: str | None = group["nonfinite"]
        return rule or ("raise" if launch.theta[0].device.type == "cpu" else "record")

    def _gradients_allow_a_step(self, work: list[tuple[int, dict[str, Any], list[Launch]]]) -> bool:
        """The pre-pass of "raise" and "skip", over every group before anything moves."""
        allowed = True
        for _, group, group_launches in work:
            for launch in group_launches:
                rule = self._rule(group, launch)
                if rule not in ("raise", "skip"):
                    continue
                found = find_nonfinite(launch.gradient)
                if bool(found.any()):
                    if rule == "raise":
                        names = [name_of(group, launch.indices[i]) for i in found.nonzero().flatten().tolist()]
                        raise NonFiniteError(
                            f"the gradient of {_listed(names)} has a NaN or an infinity; nothing was changed. "
                            'nonfinite="skip" leaves such steps out, "record" such elements.'
                        )
                    allowed = False
        return allowed

    def _remember(self, index: int, group: dict[str, Any], launch: Launch, flags: Tensor) -> None:
        key = (index, flags.device)
        if key not in self._found:
            self._found[key] = torch.zeros(len(group["params"]), dtype=torch.bool, device=flags.device)
        where = torch.tensor(launch.indices, device=flags.device)
        self._found[key][where] |= flags

    def check(self) -> None:
        """Report what the rule "record" found since the last look.

        Raises:
            NonFiniteError: gradients had NaN or infinite elements, which kept their values; names the parameters. Raised
                once: a second call is silent unless there is something new.
        """
        found, self._found = self._found, {}
        names = [
            name_of(self.param_groups[index], position)
            for (index, _), flags in found.items()
            for position in flags.nonzero().flatten().tolist()
        ]
        if names:
            raise NonFiniteError(f"gradients of {_listed(names)} had NaN or infinite elements; those kept their values")

    # ---- posterior moments of the parameters ----

    def track_moments(self, start: int = 0, every: int = 1) -> None:
        """Keep each parameter's running mean and variance, updated in the pass of the step itself.

        Args:
            start: first step that counts (the sampler's own count, param_groups[i]["step"]); the end of burn-in.
            every: thinning: every so many steps from then on.

        Raises:
            ValueError: start is negative, or every is below 1.
        """
        if start < 0:
            raise ValueError(f"start = {start}: must be at least 0")
        if every < 1:
            raise ValueError(f"every = {every}: must be at least 1")
        for group in self.param_groups:
            group["moments"] = {"start": start, "every": every, "draws": 0}
            for parameter in group["params"]:
                for key in ("mean", "m2"):
                    self.state[parameter].pop(key, None)

    def moments(self, parameter: Tensor) -> ParameterMoments:
        """Mean and variance of `parameter` over the draws that `track_moments` counted.

        Raises:
            ValueError: it is not one of this sampler's, or fewer than two draws were counted.
        """
        for group in self.param_groups:
            for mine in group["params"]:
                if mine is parameter:
                    draws = group["moments"]["draws"] if group["moments"] else 0
                    state = self.state[parameter]
                    if draws < 2 or "mean" not in state:
                        raise ValueError(
                            f"parameter has {draws} counted draws: needs track_moments() and at least 2 draws"
                        )
                    return ParameterMoments(state["mean"].clone(), state["m2"] / (draws - 1), draws)
        raise ValueError(f"parameter of shape {tuple(parameter.shape)} is not one of this sampler's")

    def _collects(self, group: dict[str, Any]) -> bool:
        tracking = group["moments"]
        if tracking is None or group["step"] < tracking["start"]:
            return False
        if (group["step"] - tracking["start"]) % tracking["every"]:
            return False
        group["moments"] = {**tracking, "draws": tracking["draws"] + 1}  # a new one: saved states keep the old
        return True

    def _moments_of(self, group: dict[str, Any], launch: Launch) -> tuple[list[Tensor], list[Tensor]]:
        return self._state_of(group, launch, "mean"), self._state_of(group, launch, "m2")

    def _state_of(self, group: dict[str, Any], launch: Launch, key: str) -> list[Tensor]:
        """Accumulators like the parameters, made at first use, in the order of the parameters' memory."""
        tensors = []
        for index, theta in zip(launch.indices, launch.theta, strict=True):
            state = self.state[group["params"][index]]
            dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
            if key not in state:
                state[key] = torch.zeros_like(theta, dtype=dtype)
            # the kernel trusts the dtype, and others may have cast it
            state[key] = in_order_of(state[key].to(dtype), theta)
            tensors.append(state[key])
        return tensors

    def _prior_means_of(self, group: dict[str, Any], launch: Launch) -> list[Tensor]:
        params = group["params"]
        if "prior_mean" not in self.state.get(params[launch.indices[0]], ()):  # a group has all of them or none
            return []
        means = (self.state[params[index]]["prior_mean"] for index in launch.indices)
        return [in_order_of(mean.to(theta.dtype), theta) for mean, theta in zip(means, launch.theta, strict=True)]

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """The chain's whole state: settings, step counts, parameter numbers, prior means, moments.

        Raises:
            NonFiniteError: rule "record" found something since the last look.
        """
        self.check()
        for group in self.param_groups:
            group["strides"] = [list(parameter.stride()) for parameter in group["params"]]
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved chain: the next step draws the noise that the saved sampler would have drawn.

        Parameters are matched by name where both samplers were given names, else by position.

        Raises:
            ValueError: groups, sizes or names that do not match; nothing was changed.
        """
        state_dict = _matched_by_name(state_dict, self.param_groups)
        super().load_state_dict(state_dict)
        # torch casts floating state to the parameter's dtype: fp32 accumulators of bf16 parameters come back as they were
        saved = state_dict["state"]
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved_group["params"], strict=True):
                for name in ("mean", "m2"):
                    if name in saved.get(key, {}):
                        self.state[parameter][name] = saved[key][name].detach().clone().to(parameter.device)
        self._next_id = 1 + max((i for group in self.param_groups for i in group["parameter_ids"]), default=-1)
        self._found = {}
        self._check_order = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("moments", None)
        self.__dict__.setdefault("skipped_steps", 0)
        self.__dict__.setdefault("_found", {})
        self.__dict__.setdefault("_check_order", False)
        self.__dict__.setdefault("_next_id", sum(len(group["params"]) for group in self.param_groups))

    def _warn_of_changed_order(self) -> None:
        """Once after loading: a parameter whose memory format changed draws its noise in another order."""
        self._check_order = False
        for group in self.param_groups:
            for index, strides in enumerate(group.get("strides") or ()):
                parameter = group["params"][index]
                if parameter.dim() > 1 and list(parameter.stride()) != strides:
                    warn(
                        f"{name_of(group, index)} had strides {tuple(strides)} when the chain was saved and has "
                        f"{tuple(parameter.stride())} now: its noise is drawn in another order, and the chain goes on as "
                        "another, equally valid, one."
                    )


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError for a setting of a parameter group that no sampler allows."""
    for name in ("lr", "temperature", "prior_precision", "weight_decay"):
        value = float(group[name])
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} = {value}: must be finite and at least 0")
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
    if group["nonfinite"] is not None and group["nonfinite"] not in NONFINITE_RULES:
        raise ValueError(f"nonfinite = {group['nonfinite']!r}: must be None or one of {NONFINITE_RULES}")
    for name in ("seed", "chain", "step"):
        check_field(name, group[name])


def _prior_means(prior_mean: PriorMean | None, group: dict[str, Any]) -> list[Tensor]:
    """The prior means of a group's parameters in their order; empty for a prior around 0."""
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
            raise ValueError(f"prior_mean lacks {_listed(missing)}: must have one tensor for each parameter")
        means = [prior_mean[name] for name in names]
    else:
        means = list(prior_mean)
        if len(means) != len(group["params"]):
            raise ValueError(
                f"prior_mean has {len(means)} tensors: must have {len(group['params'])}, one per parameter"
            )
    for i, (mean, parameter) in enumerate(zip(means, group["params"], strict=True)):
        if mean.shape != parameter.shape:
            raise ValueError(f"prior_mean[{i}] has shape {tuple(mean.shape)}: must be {tuple(parameter.shape)}")
    return means


def _matched_by_name(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved groups with their parameters in the order of ours, where both know names."""
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(f"the saved state has {len(saved_groups)} parameter groups: this sampler has {len(groups)}")
    matched = []
    for number, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        names, saved_names = group.get("param_names"), saved.get("param_names")
        if names and saved_names and list(names) != list(saved_names):
            if set(names) != set(saved_names):
                different = sorted(set(names) ^ set(saved_names))
                raise ValueError(
                    f"parameter group {number} of the saved state differs in the names {_listed(different)}"
                )
            order = [saved_names.index(name) for name in names]
            per_parameter = ("params", "param_names", "parameter_ids", "strides")
            saved = {
                key: [value[i] for i in order] if key in per_parameter and value is not None else value
                for key, value in saved.items()
            }
        matched.append(saved)
    return {**state_dict, "param_groups": matched}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
