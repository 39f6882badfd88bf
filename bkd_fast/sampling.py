"""The loop: warm start, burn-in, thinned draws as an iterator, with the figures that tell whether to trust them.

Everything that follows the chain (progress files, checkpoints, plots) is a callback of this one loop.
"""

import itertools
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bkd_fast.energy import BatchEnergy, BatchNorm, batch_norms, metric_of, noise_share_of, temperature_of
from bkd_fast.errors import warn
from bkd_fast.samplers.sampler import Sampler
from bkd_fast.samplers.settings import is_cold, is_zero
from bkd_fast.sharding import agreed, local, sum_of_parts, whole
from bkd_fast.stacked import StackedModule

Phase: TypeAlias = Literal["warm_start", "burn_in", "exploration", "sampling"]

HEALTH_BATCHES = 16  # minibatches whose gradients' variance is measured, at one point, when sampling begins
NOISE_SHARE_LIMIT = 0.1
CHECKED_STEPS = 1000  # steps between looks at the loss's recorded errors, which wait for the device
RECALIBRATION_BATCHES = 32  # training batches from which batch norm statistics are estimated again


@dataclass(frozen=True)
class Draw:
    """One draw of the chain.

    Attributes:
        step: steps the chain has taken, warm start and burn-in included.
        chain: the sampler's chain number.
        index: number of this draw in its chain, from 0.
        run: 64-bit number of this call of `sample`: (run, chain, index) names a draw for ever.
        model: the live network; it moves on with the chain. With chains in a `StackedModule`, one module that shows each chain in
            turn: it is this draw's until the next one.
        cycle: of the schedule, that the draw was made in; 0 without cycles. Diagnostics take each for a chain.
    """

    step: int
    chain: int
    index: int
    run: int
    model: nn.Module
    _names: tuple[str, ...] = field(repr=False)
    cycle: int = 0

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of what differs between draws: the sampled parameters (and batch norm statistics, unless frozen), by name."""
        tensors = dict(itertools.chain(self.model.named_parameters(), self.model.named_buffers()))
        return {name: tensors[name].detach().clone() for name in self._names}


@dataclass(frozen=True)
class StepRecord:
    """What a callback learns of a step: its number, the phase, and the mean energy per example (0-dim tensor, on its device).

    The phase "exploration" is that of a schedule's steps between its sampling phases. Where processes share a batch the energy is
    that of the part of this one.
    """

    step: int
    phase: Phase
    energy: Tensor


@dataclass(frozen=True)
class Health:
    """Whether the chain samples what it says, one figure per parameter group.

    lr' is the sampler's `effective_lr` (lr for SGLD, lr (1 - dampening) / (1 - momentum) for SGHMC), G its `metric` (1 for most).

    Attributes:
        noise_share: lr' N v / (2 T) with v the mean over coordinates of G times the variance of the minibatch gradient, when
            sampling begins: the chain samples at temperature T (1 + noise_share), but for SGNHT's, whose thermostats take that
            out. NaN where it was not measured: at temperature or lr 0, without gradients, and with `step_in_backward`.
        stationarity: (|theta_n|^2 - |theta_0|^2) / (2 T lr' tr(G) / N), both summed over the n sampling steps, G as it is at the
            end: 0 when the chain is stationary, 1 in free diffusion (expected along directions that the energy does not see).
            With a schedule of phases each stretch of sampling has its theta_0.
    """

    noise_share: list[float]
    stationarity: list[float]


class Callback:
    """Follows the loop. Override what you need."""

    def on_start(self, run: "Run") -> None:
        """Before the first step. `run.load_state_dict` puts the loop where it was when `run.state_dict` was called."""

    def on_step(self, record: StepRecord) -> None:
        """After every step. Reading `record.energy` waits for the device."""

    def on_draw(self, draw: Draw) -> None:
        """At every draw, before the caller of `sample` gets it."""

    def on_end(self, health: Health) -> None:
        """Once, after the last draw."""

    def on_close(self) -> None:
        """Once, however the loop ends: after the last draw, by an error, or because the caller stopped."""


def sample(
    student: nn.Module,
    sampler: Sampler,
    loss_fn: Callable[..., Tensor],
    train_loader: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    warm_start: int = 0,
    burn_in: int = 0,
    thin: int = 1,
    num_draws: int,
    batch_norm: BatchNorm = "freeze",
    schedule: LRScheduler | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Iterator[Draw]:
    """Run the chain and yield its draws.

    `warm_start` steps at temperature 0, `burn_in` steps at the sampler's temperature, then `num_draws` draws, one every `thin`
    steps. The loader is run through again and again; shuffle it. What was changed on the way (modes, the warm start's
    temperature) is put back at the end, also when the caller stops early.

    Args:
        student: the network whose parameters `sampler` holds (all of them, or a head); for a sampler with `chains`, a
            `StackedModule`, whose every chain yields `num_draws` draws. On several processes what `data_parallel` gives; a
            draw's model is then the whole network, and every process must take the draw.
        sampler: a sampler of `bkd_fast`.
        loss_fn: called as loss_fn(logits, target, teacher_logits), such as `KDLoss`; must be a mean over the batch.
        train_loader: yields (x, target), or (x, target, teacher_logits) with cached teacher logits or their `TopKLogits`;
            target may be None.
        teacher: gives the teacher's logits of x, in eval mode and without gradients, where the loader does not.
        warm_start, burn_in, thin, num_draws: counts of steps and draws.
        batch_norm: after the warm start, "freeze" keeps the running statistics fixed, so that the posterior is one of a fixed
            function; "train" uses each batch's own; "recalibrate" does too, and estimates the running statistics afresh for
            every draw from 32 training batches.
        schedule: a learning rate schedule of the sampler, stepped after every step of burn-in and sampling. The warm start does
            not step it: it runs at temperature 0 and the lr of the schedule's first step. If it has phases (`CyclicalSchedule`),
            draws are taken, and `thin` counts, in its sampling phases alone. Where it stands at the end it stays, the sampler's
            lr and temperature too, so that another call goes on.
        progress: show a progress bar, on a terminal.
        callbacks: follow the loop.

    Yields:
        Draw: its `model` is live, in training mode; `snapshot()` copies it.

    Raises:
        TypeError: counts that are no int, a schedule that is none or wants a metric.
        ValueError: counts out of range, a loss that is no mean, a sampler without parameters of the student, an empty loader,
            a batch of another form, a schedule of another optimizer.
        NonFiniteError: as the sampler's rule has it, and what `loss_fn` raises; on a GPU `loss_fn.check()`, if there is one, is
            called every 1000 steps and at the end.
    """
    check_counts(warm_start=warm_start, burn_in=burn_in, thin=thin, num_draws=num_draws)
    if batch_norm not in get_args(BatchNorm):
        raise ValueError(f"batch_norm = {batch_norm!r}: must be one of {get_args(BatchNorm)}")
    _check_schedule(schedule, sampler)
    energy = BatchEnergy(student, sampler, loss_fn, train_loader, teacher, batch_norm)
    _warn_of_other_targets(student, sampler, train_loader, batch_norm)
    run = Run(energy, schedule, callbacks)
    return run.draws(warm_start, burn_in, thin, num_draws, progress)


class Run:
    """One run of `sample`: where it is, for callbacks to see, save and put back.

    Attributes:
        student, sampler: as `sample` has them.
        steps: that the chain has taken, in all phases.
    """

    def __init__(self, energy: BatchEnergy, schedule: LRScheduler | None, callbacks: Sequence[Callback]) -> None:
        self.energy, self.schedule, self.callbacks = energy, schedule, callbacks
        self.student, self.sampler = energy.student, energy.sampler
        self.movement = _Movement(energy.sampler)
        self.warm_up = _WarmUp(energy.sampler)
        self.turned: nn.Module | None = None  # of a StackedModule, the network of the chain whose draw it is
        self.steps = 0
        self.phase_steps: dict[Phase, int] = dict.fromkeys(get_args(Phase), 0)
        self.since_draw = 0  # steps
        self.index = 0  # of the next draw
        self.cycle = 0  # of the schedule, that the last step belonged to
        self.number = agreed(secrets.randbits(63), energy.student)  # what draws call this run
        self.noise_share: list[float] | None = None  # until it was measured

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is, as JSON holds it; model, sampler and loader have states of their own."""
        return {
            **{name: getattr(self, name) for name in _COUNTERS},
            "phase_steps": dict(self.phase_steps),
            "warm_up": self.warm_up.state_dict(),
            "movement": self.movement.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; in `Callback.on_start`, after the sampler's own state was loaded.

        Raises:
            ValueError: a schedule where there was none, or none where there was one.
        """
        if (state["schedule"] is None) != (self.schedule is None):
            then, now = ("no" if none else "a" for none in (state["schedule"] is None, self.schedule is None))
            raise ValueError(f"the saved run has {then} schedule and this one {now}: must be alike")
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.phase_steps.update(state["phase_steps"])
        self.warm_up.load_state_dict(state["warm_up"])
        self.movement.load_state_dict(state["movement"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])

    def draws(self, warm_start: int, burn_in: int, thin: int, num_draws: int, progress: bool) -> Iterator[Draw]:
        with ExitStack() as stack:
            stack.enter_context(self.energy.modes_put_back())
            for callback in self.callbacks:
                stack.callback(callback.on_close)
                callback.on_start(self)
            taken = min(self.index * thin + self.since_draw, thin * num_draws)
            done = self.phase_steps["warm_start"] + self.phase_steps["burn_in"] + taken
            bar = stack.enter_context(_Progress(warm_start + burn_in + thin * num_draws, done, enabled=progress))

            self.student.train()
            with self.warm_up:
                while self.phase_steps["warm_start"] < warm_start:
                    self.step("warm_start", bar)
            self.energy.enter_sampling_mode()
            while self.phase_steps["burn_in"] < burn_in:
                self.step("burn_in", bar)
            if self.noise_share is None:
                self.explore(bar)
                self.noise_share = self.measured_noise_share()
            chain = self.sampler.param_groups[0]["chain"]
            names = _names_that_differ(self.student, self.sampler, self.energy.batch_norm)
            while self.index < num_draws:
                while self.since_draw < thin:
                    if not self.samples:
                        self.movement.end()
                        self.explore(bar)
                    self.movement.begin()
                    self.step("sampling", bar)
                if self.energy.batch_norm == "recalibrate":
                    self.recalibrate()
                with whole(self.student) as student:
                    for k, model in enumerate(self.models(student)):
                        draw = Draw(self.steps, chain + k, self.index, self.number, model, names, self.cycle)
                        for callback in self.callbacks:
                            callback.on_draw(draw)
                        yield draw
                self.index, self.since_draw = self.index + 1, 0
                self.energy.enter_sampling_mode()  # the caller may have evaluated the live model
            self.movement.end()
            self.sampler.check()
            self.energy.check_loss()
            health = Health(self.noise_share, self.movement.stationarity())
            for callback in self.callbacks:
                callback.on_end(health)

    def models(self, student: nn.Module) -> Iterator[nn.Module]:
        """The live network of each chain in turn: one module, turned from chain to chain."""
        if not isinstance(student, StackedModule):
            yield student
            return
        for k in range(self.energy.chains):
            self.turned = student.chain(k, into=self.turned)
            yield self.turned

    @property
    def samples(self) -> bool:
        """Whether the next step is one whose result may be a draw."""
        return getattr(self.schedule, "sampling", True)

    def explore(self, bar: "_Progress") -> None:
        while not self.samples:
            self.step("exploration", bar)

    def step(self, phase: Phase, bar: "_Progress") -> None:
        energy = self.energy.backward(next(self.energy.batches))
        self.sampler.step()
        self.steps += 1
        self.phase_steps[phase] += 1
        if phase == "sampling":
            self.since_draw += 1
            self.movement.count()
        if self.schedule is not None and phase != "warm_start":
            self.cycle = getattr(self.schedule, "cycle", 0)
            self.schedule.step()
            self.movement.read_rates()
        if self.steps % CHECKED_STEPS == 0:
            self.energy.check_loss()
        bar.advance(phase, energy)
        record = StepRecord(self.steps, phase, energy)
        for callback in self.callbacks:
            callback.on_step(record)

    @torch.no_grad()
    def recalibrate(self) -> None:
        """Batch norm's running statistics for the parameters as they are now: plain averages over training batches."""
        self.student.eval()
        norms = list(batch_norms(self.student))
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for _ in range(RECALIBRATION_BATCHES):
            self.student(self.energy.unpack(next(self.energy.batches))[0])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def measured_noise_share(self) -> list[float]:
        """Variance of the minibatch gradient at the present point, in units of the temperature; warns where it is large."""
        groups = self.sampler.param_groups
        still = [is_zero(group["temperature"]) or is_zero(group["lr"]) for group in groups]
        if all(still) or any(group["step_in_backward"] for group in groups):  # whose backward pass would move the chain
            return [math.nan] * len(groups)
        variances = self.energy.gradient_variance(HEALTH_BATCHES)
        shares = [
            math.nan if is_still else noise_share_of(self.sampler, group, variance)
            for is_still, group, variance in zip(still, groups, variances, strict=True)
        ]
        for index, share in enumerate(shares):
            if share > NOISE_SHARE_LIMIT and not self.sampler.takes_out_gradient_noise:
                warn(
                    f"group {index}: the minibatch gradient's own noise is {share:.2g} of the Langevin noise, so the chain "
                    f"samples at about {1 + share:.2g} times its temperature. Lower lr or use larger batches."
                )
        return shares


_COUNTERS = ("steps", "since_draw", "index", "cycle", "number", "noise_share")


class _Movement:
    """How |theta|^2 grows over stretches of sampling, and how it would in free diffusion: `Health.stationarity`."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.growth = [0.0 for _ in sampler.param_groups]
        self.diffusion = [0.0 for _ in sampler.param_groups]
        self.start: list[float] | None = None  # |theta|^2 where the stretch began, while there is one
        self.heat = [0.0 for _ in sampler.param_groups]  # T lr', summed over the steps of the stretch

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("growth", "diffusion", "start", "heat")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.read_rates()

    def begin(self) -> None:
        """Begin a stretch, unless it has begun."""
        if self.start is None:
            self.start = self._squared_norms()
            self.heat = [0.0 for _ in self.start]
            self.read_rates()

    def read_rates(self) -> None:
        """T lr' of the steps to come. Not at every step: reading a tensor waits for the device."""
        groups = self.sampler.param_groups
        self.rates = [0.0 if is_zero(g["lr"]) else temperature_of(g) * self.sampler.effective_lr(g) for g in groups]

    def count(self) -> None:
        self.heat = [heat + rate for heat, rate in zip(self.heat, self.rates, strict=True)]

    def end(self) -> None:
        """End the stretch, if there is one."""
        if self.start is None:
            return
        for index, (group, after) in enumerate(zip(self.sampler.param_groups, self._squared_norms(), strict=True)):
            trace = _total(group, lambda p: metric_of(self.sampler, p).sum(dtype=torch.float64))
            self.growth[index] += after - self.start[index]
            self.diffusion[index] += 2 * self.heat[index] * trace / group["num_data"]
        self.start = None

    def stationarity(self) -> list[float]:
        return [g / d if d > 0 else math.nan for g, d in zip(self.growth, self.diffusion, strict=True)]

    def _squared_norms(self) -> list[float]:
        return [
            _total(group, lambda p: local(p.detach()).double().square().sum()) for group in self.sampler.param_groups
        ]


def _total(group: dict[str, Any], of: Callable[[Tensor], Tensor]) -> float:
    """The sum over a group's parameters of a number that `of` takes of what is here of each."""
    return sum(float(sum_of_parts(of(parameter), parameter)) for parameter in group["params"])


class _WarmUp:
    """Holds a sampler at temperature 0."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.before: list[Any] | None = None  # the temperatures, while it is held

    def state_dict(self) -> dict[str, Any]:
        held = self.before
        return {"before": None if held is None else [t.tolist() if isinstance(t, Tensor) else t for t in held]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a run that was saved while its sampler was held: give the sampler its temperatures back."""
        if state["before"] is None:
            return
        for group, temperature in zip(self.sampler.param_groups, state["before"], strict=True):
            group["temperature"] = torch.tensor(temperature) if isinstance(temperature, list) else temperature

    def __enter__(self) -> None:
        self.before = [group["temperature"] for group in self.sampler.param_groups]
        for group in self.sampler.param_groups:
            group["temperature"] = 0.0

    def __exit__(self, *_: object) -> None:
        assert self.before is not None
        for group, temperature in zip(self.sampler.param_groups, self.before, strict=True):
            group["temperature"] = temperature
        self.before = None


class _Progress:
    """A rich progress bar that reads the energy a few times a second, not on every step: reading waits for the device."""

    def __init__(self, total: int, done: int, *, enabled: bool) -> None:
        self.total, self.done, self.enabled, self.shown = total, done, enabled, 0.0

    def __enter__(self) -> "_Progress":
        if self.enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(stderr=True)
            self.enabled = console.is_terminal
            self.bar = Progress(
                TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("energy {task.fields[energy]}"), TextColumn("{task.fields[rate]} steps/s"), TimeRemainingColumn(),
                console=console,
            )  # fmt: skip
            if self.enabled:
                self.task = self.bar.add_task("warm_start", total=self.total, energy="", rate="")
                self.bar.start()
                self.began, self.steps = time.perf_counter(), 0
        return self

    def advance(self, phase: Phase, energy: Tensor) -> None:
        if not self.enabled:
            return
        self.steps += 1
        self.done += phase != "exploration"  # whose number is not known before
        now = time.perf_counter()
        if now - self.shown > 0.25 or self.done == self.total:
            self.shown = now
            rate = self.steps / (now - self.began)
            self.bar.update(
                self.task, completed=self.done, description=phase.replace("_", " "), energy=f"{float(energy):.4f}",
                rate=f"{rate:.0f}",
            )  # fmt: skip

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self.bar.stop()


def check_counts(**counts: int) -> None:
    """What the loops count: ints, steps and draws."""
    smallest = {"warm_start": 0, "burn_in": 0, "thin": 1, "num_draws": 1}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} = {value!r}: must be an int")
        if value < smallest[name]:
            raise ValueError(f"{name} = {value}: must be at least {smallest[name]}")


def _check_schedule(schedule: LRScheduler | None, sampler: Sampler) -> None:
    if schedule is None:
        return
    if not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau):
        raise TypeError(
            f"schedule is a {type(schedule).__name__}: must be a torch.optim.lr_scheduler.LRScheduler that needs no metric"
        )
    if schedule.optimizer is not sampler:
        raise ValueError(f"schedule is one of another {type(schedule.optimizer).__name__}: must be one of sampler")


def _names_that_differ(student: nn.Module, sampler: Sampler, batch_norm: BatchNorm) -> tuple[str, ...]:
    """Names of what a snapshot copies: the sampled parameters, and the buffers that move with them."""
    sampled = {id(p) for group in sampler.param_groups for p in group["params"]}
    names = [name for name, parameter in student.named_parameters() if id(parameter) in sampled]
    if batch_norm != "freeze":
        names += [name for name, buffer in student.named_buffers() if buffer.is_floating_point()]
    for wrapper, prefix in ((nn.parallel.DistributedDataParallel, "module."), (StackedModule, "stacked.")):
        if isinstance(student, wrapper):
            names = [name.removeprefix(prefix) for name in names]
    return tuple(names)


def _warn_of_other_targets(student: nn.Module, sampler: Sampler, loader: Iterable[Any], batch_norm: BatchNorm) -> None:
    """What silently makes the chain's target another distribution than the stated posterior."""
    if all(is_cold(group) for group in sampler.param_groups):  # it optimises
        return
    reasons = []
    dropout = [name for name, m in student.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    if dropout:
        reasons.append(f"dropout ({', '.join(dropout[:3])}) makes the energy random; set its p to 0")
    if batch_norm != "freeze" and any(True for _ in batch_norms(student)):
        reasons.append(f"batch_norm={batch_norm!r} makes each example's energy depend on its batch; 'freeze' does not")
    dataset = getattr(loader, "dataset", None)
    size = len(dataset) if hasattr(dataset, "__len__") else None  # type: ignore[arg-type]
    for group in sampler.param_groups:
        if size is not None and group["num_data"] != size:
            reasons.append(f"num_data is {group['num_data']} and the loader's data set has {size} examples")
            break
    for reason in reasons:
        warn(f"the sampled posterior is not the stated one: {reason}.")
