"""PSGLD: SGLD preconditioned by the running mean square of the gradients, as RMSprop is."""

from types import ModuleType
from typing import Any, Unpack

import torch
from torch import Tensor

from bkd_fast.ops.noise import Tag
from bkd_fast.samplers.layout import Launch, name_of
from bkd_fast.samplers.preconditioned import PreconditionedSampler
from bkd_fast.samplers.sampler import per_chain, rates_of
from bkd_fast.samplers.settings import Params, Settings, check_number
from bkd_fast.sharding import is_sharded


class PSGLD(PreconditionedSampler):
    r"""SGLD preconditioned as RMSprop is (Li, Chen, Carlson and Carin, AAAI 2016); at T = 0 `torch.optim.RMSprop`, to rounding.

    With g = grad L + (prior_precision / N) (theta - prior_mean)::

        v     <- alpha v + (1 - alpha) g^2
        G     =  1 / (sqrt(v) + eps)
        theta <- theta - lr G g + sqrt(2 lr G T / N) xi  [+ (lr T / N) Gamma]

    While G stands still (`freeze_metric`) this is SGLD with the step size lr G at every coordinate: on a curvature l of the
    mean loss the stationary variance is T / (N l (1 - lr G l / 2)). While G follows the gradients, the paper leaves out
    Gamma = dG / dtheta = -(1 - alpha) G^2 (g / sqrt(v)) H, H the diagonal of the Hessian of the mean loss, at the price of a bias
    that does not vanish with lr.

    20 bytes per float32 parameter: theta and v read and written, the gradient read.

    Args:
        alpha: in [0, 1).
        eps: positive: G is at most 1 / eps. Gradients of the *mean* loss are small, so the paper's 1e-5 may be large.
        gamma: add the last term. The Hessian's diagonal is estimated by one Hessian-vector product with random signs
            (Hutchinson), of gradients that carry their graph: call `loss.backward(create_graph=True)`, which costs about two more
            backward passes and their memory, and the loss has to be twice differentiable, which the fused `KDLoss` is not.
            float32 and float64 parameters only.
        params, lr, settings: as every sampler has them: `Sampler`.

    Raises:
        ValueError: alpha or eps out of range; gamma with capturable, step_in_backward, track_moments or 16-bit parameters; in
            `step`, gradients without their graph.
    """

    rule = "rmsprop"
    states = ("square_avg",)
    at_rest = (1.0, 0.0, None)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        *,
        alpha: float = 0.99,
        eps: float = 1e-8,
        gamma: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        # the Hessian's diagonal, from before anything moves until it is used
        self._curvature: dict[Tensor, Tensor] = {}
        super().__init__(params, lr, {"alpha": alpha, "eps": eps, "gamma": gamma, "frozen_at": None}, settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._curvature = {}

    def _check_settings(self, group: dict[str, Any], wait: bool = False) -> None:
        super()._check_settings(group, wait)
        check_number("alpha", group["alpha"], 0, 1)
        if group["gamma"]:
            for name in ("capturable", "step_in_backward"):
                if group[name]:
                    raise ValueError(
                        f"gamma = True with {name} = True: it needs every gradient, and their graph, at once"
                    )
            if group.get("moments") is not None:
                raise ValueError("track_moments with gamma = True: they are of theta before its last term")
            for entry in group.get("params", ()):
                parameter = entry[1] if isinstance(entry, tuple) else entry
                if isinstance(parameter, Tensor) and parameter.dtype.itemsize == 2:
                    raise ValueError(f"gamma = True for a parameter of {parameter.dtype}: must be float32 or float64")

    def _numbers(
        self, group: dict[str, Any], lr: Any, temperature: Any, num_data: Any, step: Any, m: ModuleType
    ) -> tuple[Any, ...]:
        alpha = group["alpha"] if group["frozen_at"] is None else 1.0
        return lr, m.sqrt(2 * lr * temperature / num_data), alpha, 1 - alpha, group["eps"]

    def _inverse_metric(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        inverse: Tensor = self.state[parameter]["square_avg"].sqrt().add_(group["eps"])
        return inverse

    # ---- the term Gamma ----

    def _prepare(self, work: list[tuple[int, dict[str, Any], list[Launch]]]) -> None:
        """An estimate of the Hessian's diagonal at every parameter whose group asks for Gamma: z (H z), z random signs."""
        self._curvature = {}
        params, gradients, signs = [], [], []
        for _, group, group_launches in work:
            if not group["gamma"] or group["frozen_at"] is not None:
                continue
            for launch in group_launches:
                for position in launch.indices:
                    parameter = group["params"][position]
                    if is_sharded(parameter):
                        raise ValueError(
                            f"{name_of(group, position)} is a DTensor: must be an ordinary tensor with gamma = True"
                        )
                    if parameter.grad.grad_fn is None:
                        raise ValueError(
                            f"the gradient of {name_of(group, position)} has no graph: with gamma = True call "
                            "loss.backward(create_graph=True)"
                        )
                    params.append(parameter)
                    gradients.append(parameter.grad)
                    signs.append(self._noise_like(group, position, Tag.SECOND_NORMAL).sign().to(parameter.dtype))
        if params:
            products = torch.autograd.grad(gradients, params, signs, allow_unused=True)
            for parameter, sign, product in zip(params, signs, products, strict=True):
                self._curvature[parameter] = torch.zeros_like(sign) if product is None else sign * product

    def _move(self, index: int, group: dict[str, Any], launch: Launch, collects: bool) -> None:
        positions = [i for i in launch.indices if group["params"][i] in self._curvature]
        corrections = [self._without_metric(group, position) for position in positions]
        super()._move(index, group, launch, collects)
        for position, correction in zip(positions, corrections, strict=True):
            parameter = group["params"][position]
            root = self.state[parameter]["square_avg"].sqrt()
            correction = correction.to(root) / root / (root + group["eps"]).square_()
            parameter.sub_(torch.nan_to_num_(correction, 0.0, 0.0, 0.0).to(parameter))

    def _without_metric(self, group: dict[str, Any], position: int) -> Tensor:
        """-(lr T / N) Gamma but for G^2 / sqrt(v), which the step will bring up to date."""
        parameter = group["params"][position]
        decay = group["weight_decay"] or group["prior_precision"] / group["num_data"]
        decay = -decay if group["maximize"] else decay
        center = self._centers.get(group["parameter_ids"][position], 0)
        gradient = parameter.grad.detach() + decay * (parameter - center)
        lr, temperature = rates_of(group)
        scale = per_chain((1 - group["alpha"]) * lr * temperature / group["num_data"], gradient)
        weighted: Tensor = scale * gradient * (self._curvature[parameter] + decay)
        return weighted
