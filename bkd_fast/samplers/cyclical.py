"""CyclicalSchedule: a learning rate that restarts, exploring at temperature 0 before each cycle's samples."""

import math

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from bkd_fast.samplers.sampler import Sampler


class CyclicalSchedule(LRScheduler):
    r"""The cyclical schedule of Zhang et al. (ICLR 2020, "Cyclical stochastic gradient MCMC", equation 1) for any sampler.

    With K = `cycle_length`, k the steps taken, from 0, and r = (k mod K) / K::

        lr = lr0 / 2 (cos(pi r) + 1)          temperature = 0 where r < exploration, else the sampler's

    The large steps of a cycle's beginning leave one mode for another, its small ones sample the mode found. lr is never 0. Call
    `step()` after every step of the sampler, or hand the schedule to `sample`, which takes draws in the sampling phases alone.

    Momenta are drawn anew (`Sampler.draw_momentum`) when sampling begins and at the restart.

    lr0 and the temperature are each group's own, those at construction. They are kept in the group as `initial_lr` and
    `initial_temperature`, part of the sampler's saved state, and later schedules take them from there, as torch's do.
    A CUDA graph follows lr but not the temperature: capture one for each phase.

    Args:
        sampler: a sampler of `bkd_fast`.
        cycle_length: K, in steps, at least 1.
        exploration: the share of a cycle at temperature 0, in [0, 1); a cycle must have a step left to sample.
        last_epoch: the last k of a schedule that goes on, whose sampler's state is loaded; -1 begins.

    Raises:
        TypeError: sampler is another optimizer; cycle_length is no int.
        ValueError: an argument out of range; a learning rate for each chain, which schedules of torch cannot fill; last_epoch
            for a sampler that had no such schedule.
    """

    def __init__(self, sampler: Sampler, cycle_length: int, exploration: float = 0.8, last_epoch: int = -1) -> None:
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler is a {type(sampler).__name__}: must be a sampler of bkd_fast")
        if isinstance(cycle_length, bool) or not isinstance(cycle_length, int):
            raise TypeError(f"cycle_length = {cycle_length!r}: must be an int")
        if cycle_length < 1:
            raise ValueError(f"cycle_length = {cycle_length}: must be at least 1")
        if not 0 <= exploration < 1:
            raise ValueError(f"exploration = {exploration}: must be in [0, 1)")
        if (cycle_length - 1) / cycle_length < exploration:
            raise ValueError(
                f"exploration = {exploration} with cycle_length = {cycle_length}: must be at most "
                f"{(cycle_length - 1) / cycle_length:.6g}, which leaves one step to sample"
            )
        for index, group in enumerate(sampler.param_groups):
            if isinstance(group["lr"], Tensor) and group["lr"].dim():
                raise ValueError(
                    f"lr of parameter group {index} has shape {tuple(group['lr'].shape)}: must be a number or 0-dim, since "
                    "schedules of torch fill it with one number"
                )
            if last_epoch >= 0 and "initial_temperature" not in group:
                raise ValueError(
                    f"last_epoch = {last_epoch}: must be -1 for a sampler whose state had no CyclicalSchedule; "
                    f"parameter group {index} has no initial_temperature"
                )
        self.cycle_length, self.exploration = cycle_length, exploration
        for group in sampler.param_groups:
            group.setdefault("initial_temperature", group["temperature"])
        super().__init__(sampler, last_epoch)

    @property
    def cycle(self) -> int:
        """Number of the cycle that the sampler's next step is in, from 0."""
        return self.last_epoch // self.cycle_length

    @property
    def sampling(self) -> bool:
        """Whether the sampler's next step is one of a sampling phase."""
        return self._samples(self.last_epoch % self.cycle_length)

    def _samples(self, position: int) -> bool:
        return position / self.cycle_length >= self.exploration

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of the sampler's next step, for each group."""
        factor = (math.cos(math.pi * (self.last_epoch % self.cycle_length) / self.cycle_length) + 1) / 2
        return [lr * factor for lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Go on to the sampler's next step: its learning rate, its temperature, and new momenta where a phase begins."""
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["temperature"] = group["initial_temperature"] if self.sampling else 0.0
        # The law of a momentum follows from lr and temperature, which jump twice a cycle. Where sampling begins, the momentum is
        # that of a descent and too cold. At the restart it is that of the smallest lr, with a variance ~ T / lr, and the largest
        # lr times such a momentum would throw the chain far away: at temperature 0 the draw puts it to rest. Between the jumps
        # lr changes slowly, and the momentum follows by itself in some 1 / (1 - mu) steps.
        position = self.last_epoch % self.cycle_length
        begins = position == 0 or (self.sampling and not self._samples(position - 1))
        if begins and not self._is_initial:
            assert isinstance(self.optimizer, Sampler)
            self.optimizer.draw_momentum()
