"""What every sampler shares: a torch optimizer that owns its noise coordinates, its non-finite rule and parameter moments.

A sampler file states one equation and its numbers; the contract with existing training code (closures, hooks, parameter groups,
state) is kept here.
"""

import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bkd_fast.errors import NonFiniteError, warn
from bkd_fast.ops.langevin import DTYPES, LangevinStep, find_nonfinite, is_dense, unchecked_langevin_step_
from bkd_fast.ops.noise import Tag, check_field, normal_
from bkd_fast.ops.registry import find
from bkd_fast.ops.rounding import TABLE_SIZES, noise_table, spacing
from bkd_fast.samplers.constants import DeviceConstants, is_capturing
from bkd_fast.samplers.layout import Launch, Layout, in_order_of, launches, name_of
from bkd_fast.samplers.quantiles import ParameterQuantiles, places_of
from bkd_fast.samplers.settings import (
    DEFAULTS,
    Params,
    Settings,
    check_settings,
    is_cold,
    is_zero,
    listed,
    prior_means,
    put_lr_on_device,
)
from bkd_fast.sharding import first_element, is_sharded, like, local, on_any, part_of
from bkd_fast.sketch import QuantileSketch

CHECK_EVERY = 1000  # steps between calls of check()
COARSE_DRAWS = 100  # draws from which moments tell a posterior's standard deviation to some 10 %
COARSE_SHARE = 0.01  # of the elements, that may be spaced by more than a quarter of it
# keys of a group that `_check_settings` does not look at
NOT_SETTINGS = {
    "params", "param_names", "parameter_ids", "strides", "step", "prior_mean", "thermostat", "centered",
}  # fmt: skip

_live: "weakref.WeakSet[Sampler]" = weakref.WeakSet()


class ParameterMoments(NamedTuple):
    """Posterior mean and variance (n - 1) of one parameter, float32 (float64 for float64), and the draws they hold."""

    mean: Tensor
    variance: Tensor
    draws: int


class Sampler(torch.optim.Optimizer):
    """Base of the samplers: their common settings, and everything that a user calls.

    Args:
        params: parameters, `model.named_parameters()` (recommended: messages and resuming use the names), or groups.
        lr: step size on the mean loss, at least 0; a number or a tensor, 0-dim or one for each chain. 0 moves nothing.
        num_data: size N of the training set; the loss must be the *mean* over the batch.
        temperature: T; 1 is the posterior, 0 optimises, between them a cold posterior. A number, or a tensor (chains,).
        prior_precision: tau of the Gaussian prior; without one, directions that the loss does not see diffuse for ever.
        prior_mean: mu of the prior: tensors in the order of the parameters, or by name; None for 0. Copied. The trained weights
            localise the chain around them, as for a local learning coefficient.
        weight_decay: the other spelling of prior_precision / num_data; giving both is an error.
        maximize: the loss is a mean log posterior, to be maximised.
        nonfinite: what a NaN or infinite gradient does. "raise": an error before anything moves (default on CPUs).
            "skip": the whole step is left out, its noise too. "record": such elements keep their value and state, `check()`
            tells (default on GPUs and with `step_in_backward`). "propagate": no check.
        rounding: how bfloat16 and float16 parameters keep a chain that moves by less than their spacing (docs/samplers.md §6);
            parameters of other dtypes ignore it. "master": float32 copies in the sampler's state hold the chain and theta is
            their nearest. The copies are made of theta at the first step and are the truth from then on: what something else
            writes to theta (`model.load_state_dict`) is overwritten, so make a new sampler then. "stochastic" (SGLD only, and
            its default; the others' is "master"): theta is rounded to a neighbour at random, and the noise made smaller, so
            that both together have the variance wanted; right where the spacing is below a quarter of the posterior's standard
            deviation (with `track_moments` the sampler warns if it is not; without, nothing tells). "nearest": rounds most of
            the noise away, and warns. At temperature 0 all but "master" round to nearest.
        capturable: keep the step, lr and the noise scale on the device, so that a CUDA graph that holds the step draws fresh
            noise at every replay, the noise of steps k, k + 1, ...: take one step before capturing. lr becomes a tensor
            there (one of your own on that device stays): schedulers fill it in place, and a graph follows. The other settings
            are those of the capture. A learning rate of 0 is not known to the host then, but moves nothing and uses up no noise
            (SGNHT's momentum takes up the gradient). Not with `track_moments`. On CPUs it works too, for nothing.
        step_in_backward: take each parameter's step as soon as `backward` has its gradient, and free the gradient; `step()` only
            ends the step. The same chain, without the memory of the gradients. One backward pass a step: no gradient
            accumulation, scaling or clipping.
        chains: K: every parameter has a leading axis of K chains, numbered chain .. chain + K - 1 in the noise: each moves as
            if it were alone, all in one launch. Call backward on the *sum* over the chains of each one's mean loss
            (`StackedModule` helps).
        seed: in [0, 2**64).
        chain: in [0, 2**20): chains of one seed are independent.

    Raises:
        TypeError: a parameter's dtype is not float32, float64, bfloat16 or float16; num_data is missing or no number; an
            argument that the sampler does not have.
        ValueError: any setting out of its range; the message names it.

    A subclass names its rule (csrc/langevin.h) and the state that the rule keeps, and says which numbers a step has: `_numbers`.
    """

    rule: ClassVar[str]
    states: ClassVar[tuple[str, ...]] = ()  # their names in `state`, in the order of the rule
    roundings: ClassVar[tuple[str, ...]] = ("master", "nearest")  # the default first
    # own numbers that keep the state as it is where only the device knows that lr is 0; None: as ever
    at_rest: ClassVar[tuple[float | None, ...]] = ()
    momentum: ClassVar[str | None] = None  # which of the states `draw_momentum` draws
    takes_out_gradient_noise: ClassVar[bool] = False
    noise_over_lr: ClassVar[bool] = False  # sigma has lr below the line: infinite where there is no step
    noise_in_gradient: ClassVar[bool] = False  # added to what theta descends, so that maximising turns it round

    def __init_subclass__(cls) -> None:
        """Show in `help` and `inspect.signature` the common settings that `**settings` stands for."""
        super().__init_subclass__()
        given = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if not any(p.kind == p.VAR_KEYWORD for p in given):
            return
        own = [p for p in given if p.kind != p.VAR_KEYWORD]
        common = {"num_data": inspect.Parameter.empty, **DEFAULTS, "rounding": cls.roundings[0]}
        rest = [name for name in common if name not in {p.name for p in own}]
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            own + [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=common[name]) for name in rest]
        )

    def __init__(self, params: Params, lr: float | Tensor, own: dict[str, Any], settings: Settings) -> None:
        unknown = {name: value for name, value in settings.items() if name not in (*DEFAULTS, "num_data", "rounding")}
        if unknown:
            raise TypeError(f"{type(self).__name__} has no argument {listed(sorted(unknown))}")
        if "num_data" not in settings:
            raise TypeError(f"{type(self).__name__} needs num_data, the size of the training set")
        self.skipped_steps = 0
        self._names: dict[int, itemgetter[Any]] = {}  # what `_checked` holds of a group
        self._checked: dict[int, tuple[Any, ...]] = {}
        self._steps = 0  # calls of step()
        self._layouts: dict[int, Layout] = {}  # of groups, by their numbers
        # flags of what "record" found: (group, device, positions in the group) -> bool (positions,); None for other rules
        self._flags: dict[tuple[int, torch.device, tuple[int, ...]], Tensor | None] = {}
        self._clocks: dict[int, Tensor] = {}  # of capturable groups: the step, int64 () on their device
        self._constants = DeviceConstants()
        self._begun: dict[int, _Begun] = {}  # of groups that step in backward: what the running step has done
        self._centers: dict[int, Tensor] = {}  # prior means by the parameter's number, which survives its replacement
        # the state being loaded, as it was saved, and the prior means before
        self._loaded: tuple[dict[str, Any], list[list[Tensor | None]]] | None = None
        self._check_order = False
        self._told_coarse = False
        self._quantiles: ParameterQuantiles | None = None
        self._next_id = 0
        defaults = {"lr": lr, **own, **DEFAULTS, "rounding": self.roundings[0], **settings}
        super().__init__(params, {**defaults, "step": 0, "moments": None})
        self._warn_of_shared_noise()
        _live.add(self)

    # ---- construction ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; what is not given is the constructor's.

        Raises:
            ValueError, TypeError: as the constructor; nothing was added then.
        """
        if isinstance(param_group.get("params"), Iterator):
            param_group = {**param_group, "params": list(param_group["params"])}  # looked at more than once
        group = {**self.defaults, **param_group}
        self._check_settings(group, wait=True)
        prior_mean = group.pop("prior_mean", None)
        param_group = {key: value for key, value in param_group.items() if key != "prior_mean"}
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            for parameter in added["params"]:
                if parameter.dtype not in DTYPES:
                    raise TypeError(f"a parameter has dtype {parameter.dtype}: must be one of {DTYPES}")
                if added["chains"] > 1 and (not parameter.dim() or parameter.shape[0] != added["chains"]):
                    raise ValueError(
                        f"a parameter has shape {tuple(parameter.shape)}: must have a leading axis of {added['chains']} chains"
                    )
            means = prior_means(prior_mean, added)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        added.pop("prior_mean", None)
        if added["capturable"] and added["params"]:
            put_lr_on_device(added)
        added["parameter_ids"] = list(range(self._next_id, self._next_id + len(added["params"])))
        check_field("parameter", self._next_id + max(len(added["params"]) - 1, 0), "the number of parameters")
        self._next_id += len(added["params"])
        for number, parameter, mean in zip(added["parameter_ids"], added["params"], means, strict=bool(means)):
            center = torch.empty_like(local(parameter)).copy_(part_of(mean, parameter))
            self._centers[number] = like(center, parameter).detach()
        if added["step_in_backward"]:
            self._step_in_backward(added["params"])
        nearest = added["rounding"] == "nearest" and not is_cold(added)
        if nearest and any(parameter.dtype in TABLE_SIZES for parameter in added["params"]):
            warn(
                'rounding="nearest" rounds away most of the Langevin noise of 16-bit parameters (their spacing near 0.05 is '
                '2.4e-4 in bfloat16): the posterior is wrong. Take "stochastic" or "master".'
            )

    def _warn_of_shared_noise(self) -> None:
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        for other in _live:
            for group in other.param_groups:
                if any(_share_noise(group, g) for g in self.param_groups) and not mine & {
                    id(p) for p in group["params"]
                }:
                    warn(
                        f"another live sampler has seed = {group['seed']} and chain = {group['chain']} too: both draw the same "
                        "noise for their parameters. Give each its own chain=."
                    )
                    return

    # ---- the step ----

    # its launches are no graph of operations, and tracing would turn lr into a tensor and read it back
    @torch._disable_dynamo  # type: ignore[attr-defined]
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
        entries = dict(zip(map(id, self.state), self.state.values(), strict=True))  # a tensor's hash is slow
        work = [(index, group, self._launches(index, group, entries)) for index, group in enumerate(self.param_groups)]
        for index, group, group_launches in work:
            self._check_changes(index, group)
            for launch in group_launches:
                find("langevin_step_", launch.theta[0].device)  # or there is no backend, and nothing moves
                launch.check_memory(group)
                self._check_fit(group, launch)
        capturing = is_capturing()
        if capturing:
            self._check_capture(work)
        if self._check_order:
            self._warn_of_changed_order()
        if not self._gradients_allow_a_step(work):
            self.skipped_steps += 1
            return loss
        self._prepare(work)
        for index, group, group_launches in work:
            begun = self._begun.pop(index, None)
            if not group_launches and begun is None:
                continue
            collects = self._begin(index, group) if begun is None else begun.collects
            for launch in group_launches:
                self._move(index, group, launch, collects)
            self._finish(group)
            if group["capturable"]:
                moves = group["lr"] != 0  # where lr is 0 nothing moves and no noise is used up
                self._clocks[index] += moves.any() if moves.dim() else moves
            elif not is_zero(group["lr"]):
                group["step"] += 1
        if self._quantiles is not None:
            self._quantiles.collect(self.param_groups)
        self._steps += 1
        if self._steps % CHECK_EVERY == 0 and not capturing:
            self.check()
        return loss

    def _launches(self, index: int, group: dict[str, Any], entries: dict[int, dict[str, Any]]) -> list[Launch]:
        layout = self._layouts.get(index)
        if layout is None:
            layout = self._layouts[index] = Layout()
        found = layout.launches(group)
        for launch in found:
            if launch.seen is not None:
                launch.states = launch.seen.found(entries)
        return found

    def _begin(self, index: int, group: dict[str, Any]) -> bool:
        """What comes once for a group in a step, before its first launch. Tells whether the step's result is a counted draw."""
        if group["capturable"]:
            self._start_clock(index, group)
            return False
        return not is_zero(group["lr"]) and self._collects(group)

    def _move(self, index: int, group: dict[str, Any], launch: Launch, collects: bool) -> None:
        """Move the parameters of one launch. At lr = 0 state is born, and nothing moves: checkpointing code calls step() so."""
        states = [self._state_of(group, launch, name, self._start_of(name, group)) for name in self._states_of(group)]
        if not group["capturable"] and is_zero(group["lr"]):
            self._masters_of(group, launch)
            if group["moments"]:
                self._moments_of(group, launch)
            return
        mean, m2 = self._moments_of(group, launch) if collects else ([], [])
        flags = self._flags_of(index, group, launch)
        self._launch(group, launch, states, mean, m2, flags, self._clocks.get(index))
        launch.write_back()

    def _prepare(self, work: list[tuple[int, dict[str, Any], list[Launch]]]) -> None:
        """What a sampler needs of all gradients before anything moves."""

    def _numbers(
        self, group: dict[str, Any], lr: Any, temperature: Any, num_data: Any, step: Any, m: ModuleType
    ) -> tuple[Any, ...]:
        """(lr, sigma, *own) of the rule: for numbers and `m` = math, or for float64 tensors and `m` = torch."""
        raise NotImplementedError

    def _start_of(self, name: str, group: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """How a state begins: like its parameter, in the type of the arithmetic."""
        # -0: the first momentum is the gradient, to the sign of a zero
        return lambda theta: torch.full_like(theta, -0.0, dtype=real_of(theta), requires_grad=False)

    def _launch(
        self,
        group: dict[str, Any],
        launch: Launch,
        states: list[list[Tensor]],
        mean: list[Tensor],
        m2: list[Tensor],
        nonfinite: Tensor | None,
        clock: Tensor | None,
    ) -> None:
        """Take the step of one launch; `clock` holds the step of a capturable group, whose `lr` is a tensor on its device."""
        cold = is_cold(group)
        decay = group["weight_decay"] or group["prior_precision"] / group["num_data"]
        # negating lr and decay rounds exactly as negating the gradient; what the noise is added to is then negative too
        sign = -1.0 if group["maximize"] else 1.0
        noise_sign = sign if self.noise_in_gradient else 1.0
        scalars = None
        if clock is None and not self._numbers_are_tensors(group):
            lr, temperature = float(group["lr"]), float(group["temperature"])
            lr, sigma, *own = self._numbers(group, lr, temperature, float(group["num_data"]), group["step"], math)
            table = self._noise_table_of(group, launch, sigma, cold)
        else:
            scalars, sigma_there = self._scalars(group, launch.theta[0], sign, noise_sign, decay, clock)
            table = self._noise_table_of(group, launch, sigma_there, cold)
            lr, sigma, own = math.nan, 0.0 if cold else math.nan, [math.nan] * (scalars.shape[-1] - 3)
        first, second = (*states, [], [])[:2]
        known = dict(launch.addresses)
        if launch.seen is not None:
            for argument, name in zip(("first", "second"), self._states_of(group), strict=False):
                known[argument] = launch.seen.addresses[name]
        unchecked_langevin_step_(
            LangevinStep(
                theta=launch.theta,
                gradient=launch.gradient,
                center=self._prior_means_of(group, launch),
                mean=mean,
                m2=m2,
                nonfinite=nonfinite,
                lr=sign * lr,
                decay=sign * decay,
                sigma=noise_sign * sigma + 0.0,  # never -0
                seed=group["seed"],
                chain=group["chain"],
                step=group["step"],
                parameters=launch.parameters,
                first_elements=launch.first_elements,
                draws=group["moments"]["draws"] if mean else 0,
                master=self._masters_of(group, launch),
                noise_table=table,
                scalars=scalars,
                clock=None if clock is None else clock.to(launch.theta[0].device),
                rule=self._rule_of(group),
                first=first,
                second=second,
                own=own,
                chains=group["chains"],
                identity=launch.identity,
                known=known,
            )
        )

    def _rule_of(self, group: dict[str, Any]) -> str:
        return self.rule

    def _states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.states

    def _numbers_are_tensors(self, group: dict[str, Any]) -> bool:
        """Whether a step's numbers are each chain's own, or live on the device."""
        return any(isinstance(group[name], Tensor) and group[name].dim() for name in ("lr", "temperature"))

    def _finish(self, group: dict[str, Any]) -> None:
        """What comes once for a group in a step that moved it, after its last launch."""

    def _scalars(
        self, group: dict[str, Any], theta: Tensor, sign: float, noise_sign: float, decay: float, clock: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The numbers as a launch takes them from the device, and sigma in float64: the host's formulas, arithmetic and order.

        Where lr is 0 there is no noise: a momentum's would be infinite.
        """
        device = theta.device
        lr, temperature, num_data = (
            self._constants.on(device, group[name]) for name in ("lr", "temperature", "num_data")
        )
        step = group["step"] if clock is None else clock.to(device)
        rate, sigma, *own = self._numbers(group, lr, temperature, num_data, step, torch)
        if self.noise_over_lr or self.at_rest:
            still = lr == 0
            numbers = [
                (sigma, 0.0 if self.noise_over_lr else None),
                *zip(own, self.at_rest or [None] * len(own), strict=True),
            ]
            sigma, *own = (
                number
                if resting is None
                else torch.where(still, self._constants.on(device, resting), self._constants.on(device, number))
                for number, resting in numbers
            )
        # what multiplies by 1 is left out: under a graph each operation is a launch
        columns = [rate if sign > 0 else -rate, sign * decay, sigma if noise_sign > 0 else 0.0 - sigma, *own]
        rows = torch.broadcast_tensors(*(self._constants.on(device, x) for x in columns))  # type: ignore[no-untyped-call]
        return torch.stack(rows, dim=-1).to(real_of(theta)), sigma

    def _check_changes(self, index: int, group: dict[str, Any]) -> None:
        """`_check_settings`, once for the same settings: schedules and users may assign any at any time."""
        names = self._names.get(index)
        if names is None:
            names = self._names[index] = itemgetter(*(name for name in group if name not in NOT_SETTINGS))
        settings = names(group)
        if Tensor in set(map(type, settings)) or settings != self._checked.get(index):  # a tensor changes in place
            self._check_settings(group)
            self._checked[index] = () if Tensor in set(map(type, settings)) else settings
        check_field("step", group["step"])  # the one that changes by itself

    def _check_fit(self, group: dict[str, Any], launch: Launch) -> None:
        """Raise where a parameter is not what its state was made for: kernels trust shapes and devices."""
        if not self.state and not self._centers:
            return
        if launch.seen is not None and launch.seen.fits:
            return
        for index in launch.indices:
            parameter = group["params"][index]
            shape, device = parameter.shape, parameter.device
            for name, tensor in self.state.get(parameter, {}).items():
                parted = is_sharded(tensor) and tensor.placements != getattr(parameter, "placements", None)
                if tensor.shape != shape or tensor.device != device or parted:
                    self._refuse(group, index, name, tensor)
            center = self._centers.get(group["parameter_ids"][index])
            if center is not None and center.shape != shape:
                self._refuse(group, index, "prior mean", center)
        if launch.seen is not None:
            launch.seen.fits = True

    @staticmethod
    def _refuse(group: dict[str, Any], index: int, name: str, tensor: Tensor) -> None:
        parameter = group["params"][index]
        raise ValueError(
            f"{name_of(group, index)} has shape {tuple(parameter.shape)} on {parameter.device} and its {name} "
            f"{tuple(tensor.shape)} on {tensor.device}: a parameter must keep its shape, device and placements"
        )

    def _check_settings(self, group: dict[str, Any], wait: bool = False) -> None:
        """Raise for a setting that is not allowed; a subclass adds its own."""
        check_settings({"step": 0, "moments": None, **group}, wait)
        if group["rounding"] not in self.roundings:
            raise ValueError(
                f"rounding = {group['rounding']!r}: must be one of {self.roundings} for {type(self).__name__}"
            )

    # ---- the step inside the backward pass ----

    def _step_in_backward(self, params: Sequence[Tensor]) -> None:
        sampler = weakref.ref(self)

        def step(parameter: Tensor) -> None:
            alive = sampler()
            if alive is not None:
                alive._step_of(parameter)

        for parameter in params:
            parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _step_of(self, parameter: Tensor) -> None:
        """The step of one parameter, whose gradient has just been accumulated."""
        index, position = self._place_of(parameter)
        group = self.param_groups[index]
        begun = self._begun.get(index)
        if begun is not None and position in begun.positions:
            raise RuntimeError(
                f"{name_of(group, position)} has a second gradient before step() was called: step_in_backward = True takes a "
                "step at every backward pass"
            )
        group_launches = launches(group, [position])
        if is_capturing():
            self._check_capture([(index, group, group_launches)])
        if begun is None:
            self._check_changes(index, group)
        for launch in group_launches:
            launch.check_memory(group)
            self._check_fit(group, launch)
        if begun is None:
            begun = self._begun[index] = _Begun(self._begin(index, group), set())
        begun.positions.add(position)
        for launch in group_launches:
            self._move(index, group, launch, begun.collects)
        parameter.grad = None

    def _place_of(self, parameter: Tensor) -> tuple[int, int]:
        """The group of a parameter, and its position there."""
        for index, group in enumerate(self.param_groups):
            for position, mine in enumerate(group["params"]):
                if mine is parameter:
                    return index, position
        raise ValueError(f"parameter of shape {tuple(parameter.shape)} is not one of this sampler's")

    # ---- CUDA graphs ----

    def _start_clock(self, index: int, group: dict[str, Any]) -> None:
        put_lr_on_device(group)  # again, where someone assigned a number
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
        may_ask = launch.theta[0].device.type == "cpu" and not group["capturable"] and not group["step_in_backward"]
        return rule or ("raise" if may_ask else "record")

    def _gradients_allow_a_step(self, work: list[tuple[int, dict[str, Any], list[Launch]]]) -> bool:
        """The pre-pass of "raise" and "skip", over every group before anything moves."""
        allowed = True
        for _, group, group_launches in work:
            for launch in group_launches:
                rule = self._rule(group, launch)
                if rule not in ("raise", "skip"):
                    continue
                found = on_any(find_nonfinite(launch.gradient), group["params"][launch.indices[0]])
                if True in found.tolist():
                    if rule == "raise":
                        names = [name_of(group, launch.indices[i]) for i in found.nonzero().flatten().tolist()]
                        raise NonFiniteError(
                            f"the gradient of {listed(names)} has a NaN or an infinity; nothing was changed. "
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
            if flags is None:
                continue
            parameter = self.param_groups[index]["params"][positions[0]]
            if True in (bad := on_any(flags, parameter).tolist()):
                found |= {(index, position) for position, is_bad in zip(positions, bad, strict=True) if is_bad}
                flags.zero_()
        if found:
            names = [name_of(self.param_groups[index], position) for index, position in sorted(found)]
            raise NonFiniteError(f"gradients of {listed(names)} had NaN or infinite elements; those kept their values")
        self._warn_of_coarse_parameters()

    # ---- 16-bit parameters ----

    def _noise_table_of(
        self, group: dict[str, Any], launch: Launch, sigma: float | Tensor, cold: bool
    ) -> Tensor | None:
        """The noise of a launch that is rounded at random; None where nothing is random, and for every other rounding."""
        dtype, device = launch.theta[0].dtype, launch.theta[0].device
        if group["rounding"] != "stochastic" or dtype not in TABLE_SIZES or cold:
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
            random = group["rounding"] == "stochastic" and not is_cold(group)
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

    # ---- what a loop around the sampler asks ----

    def effective_lr(self, group: dict[str, Any]) -> float:
        """The lr of the SGLD that diffuses as fast: what noise_share and stationarity are measured with (docs/samplers.md §4)."""
        return float(rates_of(group)[0].mean())

    def metric(self, parameter: Tensor) -> Tensor | None:
        """The preconditioner that multiplies `effective_lr` at each coordinate, like `parameter`; None for 1."""
        return None

    @torch.no_grad()
    def draw_momentum(self) -> None:
        """Draw the momenta anew from their stationary law, where the sampler has momenta: after a jump of lr or temperature.

        The noise is a function of (seed, chain, step, parameter, element) with a tag of its own. Nothing is drawn at lr = 0.
        """
        if self.momentum is None:
            return
        self._read_clocks()
        for group in self.param_groups:
            if is_zero(group["lr"]):
                continue
            for position, parameter in enumerate(group["params"]):
                momentum = self.state[parameter].get(self.momentum)
                if momentum is not None:
                    mine = local(momentum)
                    mine.copy_(self._noise_like(group, position, Tag.INITIAL_MOMENTUM))
                    mine.mul_(per_chain(local(self._momentum_deviation(group, parameter)), mine))

    def _momentum_deviation(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        """The standard deviation of a momentum in equilibrium: float64 (), (chains,) or like the parameter."""
        raise NotImplementedError

    def _noise_like(self, group: dict[str, Any], position: int, tag: Tag) -> Tensor:
        """Standard normals for every element of a parameter that is here, float32, in the order of its memory."""
        parameter, chains = local(group["params"][position]), group["chains"]
        flat = torch.empty(chains, parameter.numel() // chains, dtype=torch.float32, device=parameter.device)
        for k in range(chains):
            normal_(
                flat[k], seed=group["seed"], chain=group["chain"] + k, step=group["step"],
                parameter=group["parameter_ids"][position], tag=tag,
                first_element=first_element(group["params"][position]),
            )  # fmt: skip
        like = parameter if is_dense(parameter) else parameter.contiguous()
        return flat.view(-1).as_strided(parameter.shape, like.stride())

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
        check_counting(start, every)
        for group in self.param_groups:
            self._check_settings({**group, "moments": {}})
        for group in self.param_groups:
            group["moments"] = {"start": start, "every": every, "draws": 0}
            for parameter in group["params"]:
                for key in ("mean", "m2"):
                    self.state.get(parameter, {}).pop(key, None)

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

    def track_quantiles(self, names: Sequence[str], start: int = 0, every: int = 1) -> None:
        """Keep streaming quantiles of some parameters: 152 bytes an element, and 32 draws that wait for each other.

        They are read by `quantiles`, and saved with the sampler. Each element's scale comes from its first 32 draws.

        Args:
            names: as the sampler was given them, with `model.named_parameters()`.
            start, every: as for `track_moments`.

        Raises:
            ValueError: start or every out of range; names that are not the sampler's; a sampler that is capturable or steps in
                backward.
        """
        check_counting(start, every)
        places = places_of(self.param_groups)
        if not names or {*names} - {*places}:
            raise ValueError(
                f"names = {list(names)!r}: must be some of the sampler's parameter names, {listed([*places])}"
            )
        for name in dict.fromkeys(names):
            group, position = places[name]
            if is_sharded(group["params"][position]):
                raise ValueError(f"parameter {name} is a DTensor: must be an ordinary tensor with track_quantiles")
            for setting in ("capturable", "step_in_backward"):
                if places[name][0][setting]:
                    raise ValueError(f"{setting} = True in the group of {name}: must be False with track_quantiles")
        self._quantiles = ParameterQuantiles(list(dict.fromkeys(names)), start, every)

    def quantiles(self, name: str) -> QuantileSketch:
        """The sketch of a parameter over the draws that `track_quantiles` counted: `.quantile(q)`, `.interval(level)` ...

        Raises:
            ValueError: the parameter is not tracked, or has no counted draw yet.
        """
        if self._quantiles is None:
            raise ValueError(f"name = {name!r}: needs track_quantiles() first")
        return self._quantiles.sketch(name)

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
            return torch.zeros_like(theta, dtype=real_of(theta))

        return self._state_of(group, launch, "mean", zeros), self._state_of(group, launch, "m2", zeros)

    def _state_of(
        self, group: dict[str, Any], launch: Launch, key: str, start: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """State like the parameters in float32 (float64 for float64), from `start` at first use, in the order of their memory."""
        if key in launch.states:
            return launch.states[key]
        tensors = []
        for index, theta in zip(launch.indices, launch.theta, strict=True):
            parameter = group["params"][index]
            state = self.state[parameter]
            if key not in state:
                state[key] = like(start(theta), parameter)
            # the kernel trusts the dtype, and others may have cast it
            mine = part_of(state[key], parameter)
            tensor = in_order_of(mine.to(real_of(theta)), theta)
            if tensor is not mine or (is_sharded(parameter) and not is_sharded(state[key])):
                state[key] = like(tensor, parameter)
            tensors.append(tensor)
        if launch.seen is not None:
            launch.seen.keep(key, tensors)
        return tensors

    def _prior_means_of(self, group: dict[str, Any], launch: Launch) -> list[Tensor]:
        if launch.seen is not None and launch.seen.prior_means is not None:
            return launch.seen.prior_means
        numbers = launch.parameters
        if numbers[0] not in self._centers:  # a group has all of them or none
            return []
        parameters = [group["params"][index] for index in launch.indices]
        parts = [part_of(self._centers[n], p) for n, p in zip(numbers, parameters, strict=True)]
        means = [in_order_of(part.to(theta), theta) for part, theta in zip(parts, launch.theta, strict=True)]
        self._centers.update((n, like(mean, p)) for n, mean, p in zip(numbers, means, parameters, strict=True))
        if launch.seen is not None:
            launch.seen.prior_means = means
        return means

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
            group["centered"] = any(number in self._centers for number in group["parameter_ids"])
        saved: dict[str, Any] = super().state_dict()
        # a prior mean is part of the chain's state, but not of what a step brings into being
        states = dict(saved["state"])
        for group in saved["param_groups"]:
            for key, number in zip(group["params"], group["parameter_ids"], strict=True):
                if number in self._centers:
                    states[key] = {**states.get(key, {}), "prior_mean": self._centers[number]}
        saved = {**saved, "state": states}
        return saved if self._quantiles is None else {**saved, "quantiles": self._quantiles.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved chain: the next step draws the noise that the saved sampler would have drawn.

        Parameters are matched by name where both samplers were given names, else by position. A CUDA graph that holds a step
        has to be captured again.

        Raises:
            ValueError: the state of another optimizer; groups, sizes or names that do not match; nothing was changed.
        """

        def match(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            matched = _matched_by_name(given, self.param_groups)
            tracked = {*matched.get("quantiles", {}).get("names", ())}
            if foreign := sorted(tracked - {*places_of(self.param_groups)}):
                raise ValueError(
                    f"the state has quantiles of {listed(foreign)}: must be parameter names of this sampler"
                )
            self._loaded = matched, [[self._centers.get(n) for n in g["parameter_ids"]] for g in self.param_groups]
            return matched

        for kept in (self._names, self._checked, self._begun, self._layouts):
            kept.clear()
        hook = self.register_load_state_dict_pre_hook(match)  # after those of others, which may replace the state
        before = [(g["capturable"], g["step_in_backward"], g["lr"]) for g in self.param_groups]
        try:
            super().load_state_dict(state_dict)
            assert self._loaded is not None
            quantiles = self._loaded[0].get("quantiles")
        finally:
            hook.remove()
            self._loaded = None
        self._quantiles = None if quantiles is None else ParameterQuantiles.loaded(quantiles, self.param_groups)
        for index, (group, (capturable, in_backward, lr)) in enumerate(zip(self.param_groups, before, strict=True)):
            # of this sampler, not of the chain
            group["capturable"], group["step_in_backward"] = capturable, in_backward
            if isinstance(group["lr"], Tensor) or capturable:
                saved = torch.as_tensor(group["lr"], dtype=torch.float64)
                if capturable and isinstance(lr, Tensor) and lr.shape == saved.shape:
                    group["lr"] = lr.copy_(saved)  # a graph reads it there
                elif capturable or saved.device.type != "cpu":
                    group["lr"] = saved.cpu() if saved.dim() else float(saved)
            if index in self._clocks:
                self._clocks[index].fill_(group["step"])
        self._next_id = 1 + max((i for group in self.param_groups for i in group["parameter_ids"]), default=-1)
        for flags in self._flags.values():
            if flags is not None:
                flags.zero_()
        self._check_order = True

    def __getstate__(self) -> dict[str, Any]:
        self._read_clocks()
        return {**super().__getstate__(), "_centers": self._centers, "skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # what samplers did before there was a choice
            for name, default in {**self.defaults, **DEFAULTS, "rounding": "nearest", "moments": None}.items():
                if name not in ("prior_mean", "differentiable"):  # kept apart; torch's own
                    group.setdefault(name, default)
        empty = {
            "skipped_steps": 0, "_steps": 0, "_names": {}, "_checked": {}, "_flags": {}, "_clocks": {}, "_begun": {},
            "_layouts": {}, "_constants": DeviceConstants(),
            "_centers": {}, "_loaded": None, "_quantiles": None, "_check_order": False, "_told_coarse": False,
            "_next_id": sum(len(group["params"]) for group in self.param_groups),
        }  # fmt: skip
        for name, value in empty.items():
            self.__dict__.setdefault(name, value)
        if self._loaded is not None:
            self._restore(*self._loaded)

    def _restore(self, saved: dict[str, Any], before: list[list[Tensor | None]]) -> None:
        """Float32 state of 16-bit parameters as it was saved: torch has cast it to the parameter's dtype. And the prior means.

        A flattened distributed checkpoint has none of those: the sampler's own stay, unless the saved chain's prior was around 0.
        """
        self._centers = {}
        for group, saved_group, own in zip(self.param_groups, saved["param_groups"], before, strict=True):
            places = zip(group["params"], saved_group["params"], saved_group["parameter_ids"], own, strict=True)
            for parameter, key, number, mine in places:
                tensors = saved["state"].get(key, {})
                for name in ("mean", "m2", "master", *self.states):
                    if name in tensors:
                        self.state[parameter][name] = tensors[name].detach().clone().to(parameter.device)
                if "prior_mean" in tensors:
                    self._centers[number] = tensors["prior_mean"].detach().clone().to(parameter)
                elif mine is not None and saved_group.get("centered", True):
                    self._centers[number] = mine
                self.state.get(parameter, {}).pop("prior_mean", None)
                if parameter in self.state and not self.state[parameter]:
                    del self.state[parameter]

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


class _Begun(NamedTuple):
    """What the running step of a group that steps in backward has done."""

    collects: bool
    positions: set[int]  # of the parameters that have moved


def check_counting(start: int, every: int) -> None:
    """Raise ValueError unless steps can be counted so."""
    if start < 0:
        raise ValueError(f"start = {start}: must be at least 0")
    if every < 1:
        raise ValueError(f"every = {every}: must be at least 1")


def _share_noise(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two groups of different samplers have chains in common, and noise."""
    apart = a["chain"] >= b["chain"] + b["chains"] or b["chain"] >= a["chain"] + a["chains"]
    return a["seed"] == b["seed"] and not apart and not is_cold(a) and not is_cold(b)


def real_of(theta: Tensor) -> torch.dtype:
    """The type of the arithmetic for a parameter."""
    return torch.float64 if theta.dtype == torch.float64 else torch.float32


def rates_of(group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """lr and temperature of a group in float64: () or, where they are each chain's own, (chains,)."""
    lr, temperature = (torch.as_tensor(group[name], dtype=torch.float64) for name in ("lr", "temperature"))
    return lr, temperature.to(lr.device)


def per_chain(value: Tensor, like: Tensor) -> Tensor:
    """A value of each chain, shaped to multiply a tensor with a leading axis of chains; others as they are."""
    return value.view(-1, *[1] * (like.dim() - 1)).to(like) if value.dim() == 1 and like.dim() > 1 else value.to(like)


def _matched_by_name(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved groups with their parameters in the order of ours, where both know names."""
    saved_groups = state_dict["param_groups"]
    missing = sorted({"parameter_ids", "step", "seed", "chain"} - set.intersection(*map(set, saved_groups)))
    if missing:
        raise ValueError(f"the saved state lacks {listed(missing)}: must be a sampler's")
    if len(saved_groups) != len(groups):
        raise ValueError(f"the saved state has {len(saved_groups)} parameter groups: this sampler has {len(groups)}")
    matched = []
    for number, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if saved.get("chains", 1) != group["chains"]:
            raise ValueError(
                f"parameter group {number} of the saved state has chains = {saved.get('chains', 1)}: this sampler has "
                f"{group['chains']}"
            )
        names, saved_names = (_unwrapped(entries.get("param_names")) for entries in (group, saved))
        if names and saved_names and names != saved_names:
            if set(names) != set(saved_names):
                different = sorted(set(names) ^ set(saved_names))
                raise ValueError(
                    f"parameter group {number} of the saved state differs in the names {listed(different)}"
                )
            order = [saved_names.index(name) for name in names]
            per_parameter = ("params", "param_names", "parameter_ids", "strides")
            saved = {
                key: [value[i] for i in order] if key in per_parameter and value is not None else value
                for key, value in saved.items()
            }
        matched.append(saved)
    return {**state_dict, "param_groups": matched}


def _unwrapped(names: Sequence[str] | None) -> list[str]:
    """The names of parameters without what DistributedDataParallel and torch.compile put before them."""
    return [name.replace("_orig_mod.", "").removeprefix("module.") for name in names or ()]
