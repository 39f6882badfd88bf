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
from bkd_fast.ops.rounding import TABLE_SIZES, noise_table, spacing
from bkd_fast.samplers.layout import Launch, in_order_of, launches, name_of

Params: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
PriorMean: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor]
NonFinite: TypeAlias = Literal["raise", "skip", "record", "propagate"]
Rounding: TypeAlias = Literal["stochastic", "nearest", "master"]

NONFINITE_RULES = ("raise", "skip", "record", "propagate")
ROUNDINGS = ("stochastic", "nearest", "master")
# what `check_hyperparameters` looks at, but the step count
SETTINGS = (
    "lr", "temperature", "prior_precision", "weight_decay", "num_data", "nonfinite", "capturable", "moments", "rounding",
    "seed", "chain",
)  # fmt: skip
CHECK_EVERY = 1000  # steps between calls of check()
COARSE_DRAWS = 100  # draws from which moments tell a posterior's standard deviation to some 10 %
COARSE_SHARE = 0.01  # of the elements, that may be spaced by more than a quarter of it

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
        self._checked: dict[int, list[Any]] = {}
        self._steps = 0  # calls of step()
        # flags of what "record" found: (group, device, positions in the group) -> bool (positions,); None for other rules
        self._flags: dict[tuple[int, torch.device, tuple[int, ...]], Tensor | None] = {}
        self._clocks: dict[int, Tensor] = {}  # of capturable groups: the step, int64 () on their device
        self._check_order = False
        self._told_coarse = False
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
        check_hyperparameters(group, wait=True)
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
        if added["capturable"] and added["params"]:
            _put_lr_on_device(added)
        added["parameter_ids"] = list(range(self._next_id, self._next_id + len(added["params"])))
        check_field("parameter", self._next_id + max(len(added["params"]) - 1, 0), "the number of parameters")
        self._next_id += len(added["params"])
        for parameter, mean in zip(added["params"], means, strict=bool(means)):
            self.state[parameter]["prior_mean"] = torch.empty_like(parameter).copy_(mean).detach()
        nearest = added["rounding"] == "nearest" and added["temperature"] > 0
        if nearest and any(parameter.dtype in TABLE_SIZES for parameter in added["params"]):
            warn(
                'rounding="nearest" rounds away most of the Langevin noise of 16-bit parameters (their spacing near 0.05 is '
                '2.4e-4 in bfloat16): the posterior is wrong. Take "stochastic" or "master".'
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
            TypeError: a sparse gradient. ValueError: a negative or non-finite lr; a gradient on another device than its
                parameter.
            RuntimeError: a CUDA graph is being captured, and the sampler is not capturable or has not yet taken such a step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(index, group, launches(group)) for index, group in enumerate(self.param_groups)]
        for index, group, _ in work:
            self._check_changes(index, group)
        capturing = _is_capturing()
        if capturing:
            self._check_capture(work)
        if self._check_order:
            self._warn_of_changed_order()
        if not self._gradients_allow_a_step(work):
            self.skipped_steps += 1
            return loss
        for index, group, group_launches in work:
            if not group_launches or (not group["capturable"] and float(group["lr"]) == 0):
                continue  # no movement, no noise, no step: checkpointing code calls step() so
            if group["capturable"]:
                self._start_clock(index, group)
            collects = self._collects(group)
            for launch in group_launches:
                flags = self._flags_of(index, group, launch)
                mean, m2 = self._moments_of(group, launch) if collects else ([], [])
                self._launch(
                    group, launch, self._prior_means_of(group, launch), mean, m2, flags, self._clocks.get(index)
                )
                launch.write_back()
            if group["capturable"]:
                self._clocks[index] += group["lr"] != 0  # where lr is 0 nothing moves and no noise is used up
            else:
                group["step"] += 1
        self._steps += 1
        if self._steps % CHECK_EVERY == 0 and not capturing:
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
        clock: Tensor | None,
    ) -> None:
        """Take the step of one launch; `clock` holds the step of a capturable group, whose `lr` is a tensor on its device."""
        raise NotImplementedError

    def _check_changes(self, index: int, group: dict[str, Any]) -> None:
        """`check_hyperparameters`, once for the same settings: schedules and users may assign any at any time."""
        settings = [group[name] for name in SETTINGS]
        if settings != self._checked.get(index) or isinstance(group["lr"], Tensor):  # a tensor's value changes in place
            check_hyperparameters(group)
            self._checked[index] = settings
        check_field("step", group["step"])  # the one that changes by itself

    # ---- CUDA graphs ----

    def _start_clock(self, index: int, group: dict[str, Any]) -> None:
        _put_lr_on_device(group)  # again, where someone assigned a number
        if index not in self._clocks:
            self._clocks[index] = torch.full((), group["step"], dtype=torch.int64, device=group["lr"].device)

    def _read_clocks(self) -> None:
        for index, clock in self._clocks.items():
            self.param_groups[index]["step"] = int(clock)

    def _check_capture(self, work: list[tuple[int, dict[str, Any], list[Launch]]]) -> None:
        """Raise before a graph holds what a replay would get wrong: the noise of one step, or state that is born anew."""
        for index, group, group_launches in work:
            if not group["capturable"]:
                raise RuntimeError(
                    f"a CUDA graph is being captured and parameter group {index} has capturable = False: every replay would draw "
                    "the same noise. Construct the sampler with capturable=True."
                )
            for launch in group_launches:
                if self._key_of(index, launch) not in self._flags:
                    raise RuntimeError(
                        f"a CUDA graph is being captured and the sampler's state for {name_of(group, launch.indices[0])} does "
                        "not exist yet: take one step with the same parameters before capturing"
                    )

    @staticmethod
    def _key_of(index: int, launch: Launch) -> tuple[int, torch.device, tuple[int, ...]]:
        return index, launch.theta[0].device, tuple(launch.indices)

    # ---- non-finite gradients ----

    def _rule(self, group: dict[str, Any], launch: Launch) -> str:
        rule: str | None = group["nonfinite"]
        return rule or ("raise" if launch.theta[0].device.type == "cpu" and not group["capturable"] else "record")

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

    def _flags_of(self, index: int, group: dict[str, Any], launch: Launch) -> Tensor | None:
        """Where the kernel tells what "record" finds; the same memory at every step, read by `check` alone."""
        key = self._key_of(index, launch)
        records = self._rule(group, launch) == "record"
        flags = self._flags.setdefault(key, None)
        if records and flags is None:
            flags = self._flags[key] = torch.zeros(len(launch.indices), dtype=torch.bool, device=launch.theta[0].device)
        return flags if records else None

    def check(self) -> None:
        """Report what went wrong since the last look; every 1000th step, `state_dict` and `sample` do.

        Warns, once, if stochastic rounding is too coarse for the posterior that the moments show (docs/samplers.md).

        Raises:
            NonFiniteError: gradients had NaN or infinite elements, which kept their values; names the parameters. Raised
                once: a second call is silent unless there is something new.
        """
        found: set[tuple[int, int]] = set()  # (group, position)
        for (index, _, positions), flags in self._flags.items():
            if flags is not None and True in (bad := flags.tolist()):
                found |= {(index, position) for position, is_bad in zip(positions, bad, strict=True) if is_bad}
                flags.zero_()
        if found:
            names = [name_of(self.param_groups[index], position) for index, position in sorted(found)]
            raise NonFiniteError(f"gradients of {_listed(names)} had NaN or infinite elements; those kept their values")
        self._warn_of_coarse_parameters()

    # ---- 16-bit parameters ----

    def _noise_table_of(self, group: dict[str, Any], launch: Launch, sigma: float | Tensor) -> Tensor | None:
        """The noise of a launch that is rounded at random; None where nothing is random, and for every other rounding."""
        dtype, device = launch.theta[0].dtype, launch.theta[0].device
        still = group["temperature"] == 0 if isinstance(sigma, Tensor) else sigma == 0
        if group["rounding"] != "stochastic" or dtype not in TABLE_SIZES or still:
            return None
        return noise_table(sigma, dtype, device)

    def _masters_of(self, group: dict[str, Any], launch: Launch) -> list[Tensor]:
        """The float32 copies that hold the chain, made of the parameters at first use; empty where there are none."""
        if group["rounding"] != "master" or launch.theta[0].dtype not in TABLE_SIZES:
            return []
        return self._state_of(group, launch, "master", lambda theta: theta.detach().float())

    def _warn_of_coarse_parameters(self) -> None:
        """Once: parameters whose spacing is above a quarter of the posterior's standard deviation, where moments tell it."""
        for group in self.param_groups:
            draws = group["moments"]["draws"] if group["moments"] else 0
            random = group["rounding"] == "stochastic" and group["temperature"] > 0
            if self._told_coarse or not random or draws < COARSE_DRAWS:
                continue
            coarse: Tensor | int = 0
            total = 0
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if parameter.dtype in TABLE_SIZES and "m2" in state:
                    deviation = (state["m2"] / (draws - 1)).sqrt()
                    coarse = coarse + (spacing(state["mean"], parameter.dtype) > deviation / 4).sum().cpu()
                    total += parameter.numel()
            share = int(coarse) / max(total, 1)
            if share > COARSE_SHARE:
                self._told_coarse = True
                warn(
                    f"{share:.0%} of the 16-bit parameters are spaced by more than a quarter of their standard deviation over "
                    f"{draws} draws: stochastic rounding widens their posterior, or lets them hardly move. Take "
                    'rounding="master", or float32 parameters.'
                )

    # ---- posterior moments of the parameters ----

    def track_moments(self, start: int = 0, every: int = 1) -> None:
        """Keep each parameter's running mean and variance, updated in the pass of the step itself.

        Args:
            start: first step that counts (the sampler's own count, param_groups[i]["step"]); the end of burn-in.
            every: thinning: every so many steps from then on.

        Raises:
            ValueError: start is negative, or every is below 1; the sampler is capturable: the number of draws, by which each
                one's weight is chosen, would be that of the capture at every replay.
        """
        if start < 0:
            raise ValueError(f"start = {start}: must be at least 0")
        if every < 1:
            raise ValueError(f"every = {every}: must be at least 1")
        for group in self.param_groups:
            check_hyperparameters({**group, "moments": {}})
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

        def zeros(theta: Tensor) -> Tensor:
            return torch.zeros_like(theta, dtype=torch.float64 if theta.dtype == torch.float64 else torch.float32)

        return self._state_of(group, launch, "mean", zeros), self._state_of(group, launch, "m2", zeros)

    def _state_of(
        self, group: dict[str, Any], launch: Launch, key: str, start: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """State like the parameters in float32 (float64 for float64), from `start` at first use, in the order of their memory."""
        tensors = []
        for index, theta in zip(launch.indices, launch.theta, strict=True):
            state = self.state[group["params"][index]]
            dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
            if key not in state:
                state[key] = start(theta)
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
        """The chain's whole state: settings, step counts, parameter numbers, prior means, moments, masters.

        Raises:
            NonFiniteError: rule "record" found something since the last look.
        """
        self.check()
        self._read_clocks()
        for group in self.param_groups:
            group["strides"] = [list(parameter.stride()) for parameter in group["params"]]
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved chain: the next step draws the noise that the saved sampler would have drawn.

        Parameters are matched by name where both samplers were given names, else by position. A CUDA graph that holds a step
        has to be captured again.

        Raises:
            ValueError: groups, sizes or names that do not match; nothing was changed.
        """
        state_dict = _matched_by_name(state_dict, self.param_groups)
        before = [(group["capturable"], group["lr"]) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for index, (group, (capturable, lr)) in enumerate(zip(self.param_groups, before, strict=True)):
            group["capturable"] = capturable  # of this sampler, not of the chain
            if capturable:
                group["lr"] = lr.fill_(float(group["lr"])) if isinstance(lr, Tensor) else float(group["lr"])
                if index in self._clocks:
                    self._clocks[index].fill_(group["step"])
            elif isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
                group["lr"] = float(group["lr"])
        # torch casts floating state to the parameter's dtype: fp32 state of bf16 parameters comes back as it was
        saved = state_dict["state"]
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved_group["params"], strict=True):
                for name in ("mean", "m2", "master"):
                    if name in saved.get(key, {}):
                        self.state[parameter][name] = saved[key][name].detach().clone().to(parameter.device)
        self._next_id = 1 + max((i for group in self.param_groups for i in group["parameter_ids"]), default=-1)
        for flags in self._flags.values():
            if flags is not None:
                flags.zero_()
        self._check_order = True

    def __getstate__(self) -> dict[str, Any]:
        self._read_clocks()
        state: dict[str, Any] = super().__getstate__()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("moments", None)
            group.setdefault("capturable", False)
            group.setdefault("rounding", "nearest")  # what samplers did before there was a choice
        self.__dict__.setdefault("skipped_steps", 0)
        self.__dict__.setdefault("_steps", 0)
        self.__dict__.setdefault("_checked", {})
        self.__dict__.setdefault("_flags", {})
        self.__dict__.setdefault("_clocks", {})
        self.__dict__.setdefault("_check_order", False)
        self.__dict__.setdefault("_told_coarse", False)
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


def _put_lr_on_device(group: dict[str, Any]) -> None:
    """Make the learning rate a tensor beside the first parameter, float64 so that it is the number; one that is there stays."""
    lr, device = group["lr"], group["params"][0].device
    if not isinstance(lr, Tensor) or lr.device != device:
        group["lr"] = torch.full((), float(lr), dtype=torch.float64, device=device)


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream; asks nothing of CUDA where it is not in use."""
    return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())  # type: ignore[no-untyped-call]


def check_hyperparameters(group: dict[str, Any], wait: bool = False) -> None:
    """Raise ValueError or TypeError for a setting of a parameter group that no sampler allows.

    A learning rate on a GPU is looked at only with `wait`: reading it waits for the GPU.
    """
    for name in ("lr", "temperature", "prior_precision", "weight_decay"):
        if not wait and isinstance(group[name], Tensor) and group[name].device.type != "cpu":
            continue
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
    if group["capturable"]:
        if group["nonfinite"] in ("raise", "skip"):
            raise ValueError(
                f"nonfinite = {group['nonfinite']!r} with capturable = True: it asks the GPU at every step, which a graph "
                'cannot; must be None, "record" or "propagate"'
            )
        if group["moments"] is not None:
            raise ValueError(
                "track_moments with capturable = True: the weight of a draw depends on how many came before, and a replay would "
                "repeat that of the capture. Keep draws, or a sampler that is not capturable."
            )
    if group.get("rounding", "nearest") not in ROUNDINGS:  # a linear head has no choice of it
        raise ValueError(f"rounding = {group['rounding']!r}: must be one of {ROUNDINGS}")
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
