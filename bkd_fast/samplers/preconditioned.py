"""What samplers with a diagonal preconditioner share: it can be looked at, and be kept as it is."""

from typing import Any

from torch import Tensor

from bkd_fast.samplers.layout import Launch, name_of
from bkd_fast.samplers.sampler import Sampler


class PreconditionedSampler(Sampler):
    """Base of the samplers whose every coordinate has a step size of its own, lr G, with G made of past gradients.

    While G follows the gradients it depends on theta, and the stationary law has a bias that does not vanish with lr, unless the
    term Gamma = dG / dtheta is added (Ma, Chen and Fox, NIPS 2015). `freeze_metric` after burn-in ends that: a constant
    preconditioner has none.
    """

    def freeze_metric(self) -> None:
        """Keep the preconditioner as it is from the next step on; part of the saved state. A CUDA graph has to be captured again.

        Raises:
            ValueError: no step was taken yet, so there is no preconditioner.
        """
        self._read_clocks()
        for group in self.param_groups:
            if group["step"] == 0:
                raise ValueError("freeze_metric() before the first step: there is no preconditioner yet")
        for group in self.param_groups:
            group["frozen_at"] = group["frozen_at"] or group["step"]

    def _check_settings(self, group: dict[str, Any], wait: bool = False) -> None:
        super()._check_settings(group, wait)
        if not float(group["eps"]) > 0:
            raise ValueError(f"eps = {group['eps']}: must be positive")

    def _check_fit(self, group: dict[str, Any], launch: Launch) -> None:
        super()._check_fit(group, launch)
        for index in launch.indices if group["frozen_at"] is not None else ():
            if not self.state.get(group["params"][index]):
                raise ValueError(
                    f"{name_of(group, index)} has its first gradient after freeze_metric(): it has no preconditioner"
                )

    def metric(self, parameter: Tensor) -> Tensor | None:
        self._read_clocks()
        index, _ = self._place_of(parameter)
        if not self.state.get(parameter):
            return None
        return self._inverse_metric(self.param_groups[index], parameter).reciprocal_()

    def _inverse_metric(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        """1 / G after the last step, like the parameter."""
        raise NotImplementedError
