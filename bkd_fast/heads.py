"""Linear heads on fixed features: Bayesian knowledge distillation whose every step is one operation, K chains at a time."""

import copy
import itertools
import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bkd_fast.distill import KDLoss, TopKLogits
from bkd_fast.energy import endless
from bkd_fast.errors import NonFiniteError
from bkd_fast.ops.head import HeadStep, head_step_, logits_of
from bkd_fast.ops.noise import check_field
from bkd_fast.sampling import Callback, Draw, Health, StepRecord, check_counts

CHECK_EVERY = 1000  # steps between calls of check()
WEIGHT, BIAS = 0, 1  # their numbers as parameters, as SGLD(nn.Linear(...).parameters()) counts them


class LinearHeadSampler:
    r"""SGLD on `KDLoss` for K linear heads z = x W^T + b on cached features x (the setting of Fang et al., ICML 2024).

    What `SGLD` and `KDLoss` do to an `nn.Linear`, without autograd between them: with L the mean over the batch of
    label_weight CE(y, softmax(z)) + prior_strength CE(softmax(t / T), softmax(z / T)), N = `num_data` and
    theta = (W, b), every chain takes the step::

        theta <- theta - lr (grad L + (prior_precision / N) theta) + sqrt(2 lr posterior_temperature / N) xi

    with the noise, bit for bit, of `SGLD(nn.Linear(features, classes).parameters(), seed=seed, chain=chain + k)` and the
    rest equal within float32 rounding. On a GPU the gradient of W never reaches memory, and all chains share a launch.

    There are two temperatures. `temperature` is T above, `KDLoss`'s: it softens teacher and student inside the prior and
    changes which posterior is sampled. `posterior_temperature` is what `SGLD` calls temperature: it scales the noise; 1 samples
    the posterior, 0 optimises (a warm start), between them lies a cold posterior.

    Args:
        features, classes: sizes of the heads.
        lr: step size on the mean energy.
        num_data: size N of the training set.
        chains: K, numbered chain .. chain + K - 1 in the noise.
        prior_strength: lambda >= 0, in pseudo-observations per example.
        temperature: T > 0, of the teacher-informed prior.
        label_weight: factor of the label term, >= 0.
        ignore_index: the target that means "no label".
        posterior_temperature: >= 0.
        prior_precision: tau of a Gaussian prior N(0, 1 / tau) on W and b; without one, directions that the energy does not
            see (a constant added to all classes) diffuse for ever.
        bias: whether there is a b.
        init: where W starts, (classes, features) for all chains or (chains, classes, features); None: 0. b starts at 0;
            write into `.bias` to start it elsewhere.
        seed: in [0, 2**64).
        chain: number of the first chain; the last must be below 2**20.
        device: where the heads live; None: that of `init`, or torch's default.

    Attributes:
        weight: float32 (chains, classes, features), stepped in place. The heads are always in float32; features may be in
            16 bits.
        bias: float32 (chains, classes), or None.
        lr, posterior_temperature: may be set between steps.
        steps: how many steps the chains have taken.

    Raises:
        TypeError: a number or tensor of another kind.
        ValueError: any setting out of its range; the message names it.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        lr: float,
        num_data: int,
        chains: int = 1,
        prior_strength: float,
        temperature: float = 1.0,
        label_weight: float = 1.0,
        ignore_index: int = -100,
        posterior_temperature: float = 1.0,
        prior_precision: float = 0.0,
        bias: bool = True,
        init: Tensor | None = None,
        seed: int = 0,
        chain: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size in (("features", features), ("classes", classes), ("chains", chains)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} = {size!r}: must be an int of at least 1")
        self.loss = KDLoss(prior_strength, temperature, label_weight=label_weight, ignore_index=ignore_index)
        self.lr, self.posterior_temperature = lr, posterior_temperature
        self.num_data, self.prior_precision, self.seed, self.chain, self.steps = (
            num_data,
            prior_precision,
            seed,
            chain,
            0,
        )
        self._check()
        check_field("seed", seed)
        check_field("chain", chain)
        check_field("chain", chain + chains - 1, "the last chain")
        shape = (chains, classes, features)
        if init is None:
            self.weight = torch.zeros(shape, device=device)
        else:
            if init.shape not in (shape, shape[1:]):
                raise ValueError(f"init has shape {tuple(init.shape)}: must be {shape[1:]} or {shape}")
            start = init.detach().to(device or init.device, torch.float32).expand(shape)
            self.weight = start.clone(memory_format=torch.contiguous_format)
        self.bias = torch.zeros(shape[:2], device=self.weight.device) if bias else None
        self._nonfinite = torch.zeros(2, dtype=torch.bool, device=self.weight.device)

    def _check(self) -> None:
        """The numbers of the step, those too that may be set between steps."""
        for name in ("lr", "posterior_temperature", "prior_precision", "num_data"):
            value, positive = getattr(self, name), name == "num_data"
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} = {value!r}: must be a number")
            if not (0 <= value < math.inf) or (positive and value == 0):
                raise ValueError(f"{name} = {value}: must be finite and {'positive' if positive else 'at least 0'}")

    def __repr__(self) -> str:
        chains, classes, features = self.weight.shape
        return (
            f"{type(self).__name__}(features={features}, classes={classes}, chains={chains}, lr={self.lr:g}, "
            f"posterior_temperature={self.posterior_temperature:g}, steps={self.steps}, {self.loss.extra_repr()})"
        )

    def step(
        self, x: Tensor, target: Tensor | None = None, teacher_logits: Tensor | TopKLogits | None = None
    ) -> Tensor:
        """One step of every chain on one batch.

        Args:
            x: features (rows, features); float32, bfloat16 or float16.
            target: classes int64 (rows,); None for a batch without labels.
            teacher_logits: (rows, classes); float32, bfloat16 or float16. `TopKLogits` are written out to such float32 rows
                first: the head's kernels read no others. Not read where prior_strength is 0.

        Returns:
            The mean energy of each chain before the step, float32 (chains,), on its device.

        Raises:
            TypeError, ValueError: a tensor of another dtype, shape or device, a setting or, on CPUs, a target out of range.
            NonFiniteError: on CPUs, logits or gradients that are not finite. Nothing was changed then. On GPUs such rows take
                no part, such elements keep their values, and `check()` tells.
        """
        self._check()
        if isinstance(teacher_logits, TopKLogits):
            teacher_logits = teacher_logits.dense(self.weight.shape[1])
        energy, nonfinite = head_step_(
            HeadStep(
                weight=self.weight,
                bias=self.bias,
                x=x,
                target=target,
                teacher=teacher_logits,
                prior_strength=self.loss.prior_strength,
                temperature=self.loss.temperature,
                label_weight=self.loss.label_weight,
                ignore_index=self.loss.ignore_index,
                lr=self.lr,
                decay=self.prior_precision / self.num_data,
                sigma=math.sqrt(2 * self.lr * self.posterior_temperature / self.num_data),
                seed=self.seed,
                chain=self.chain,
                step=self.steps,
                weight_parameter=WEIGHT,
                bias_parameter=BIAS,
            )
        )
        self._nonfinite |= nonfinite
        if self.lr > 0:  # as SGLD: a step of 0 is none, and draws no noise
            self.steps += 1
            if self.steps % CHECK_EVERY == 0:
                self.check()
        return energy

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits float32 (chains, rows, classes) of features (rows, features): K draws for a posterior's `update_logits`."""
        return logits_of(x.to(self.weight.dtype), self.weight, self.bias)

    def head(self, k: int, into: nn.Linear | None = None) -> nn.Linear:
        """The head of chain k as a module, of views: it moves on with the chain.

        `model.set_submodule("fc", sampler.head(k))` makes the chain's present draw of a whole network whose last layer "fc" is.

        Args:
            k: in [0, chains).
            into: a module that an earlier call gave, to be turned to this chain; None: a new one.
        """
        chains, classes, features = self.weight.shape
        if not 0 <= k < chains:
            raise ValueError(f"k = {k}: must be in [0, {chains})")
        linear = nn.Linear(features, classes, self.bias is not None, device="meta") if into is None else into
        linear.weight = nn.Parameter(self.weight[k], requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias[k], requires_grad=False)
        return linear

    def check(self) -> None:
        """Report what steps on a GPU recorded since the last look. Waits for the device.

        Raises:
            ValueError, NonFiniteError: a row that could not be used (as `KDLoss.check` tells), or gradients with NaN or
                infinite elements, which kept their values. Raised once.
        """
        self.loss.check()
        found = self._nonfinite.tolist()
        self._nonfinite.zero_()
        names = [name for name, bad in zip(("weight", "bias"), found, strict=True) if bad]
        if names:
            raise NonFiniteError(
                f"gradients of {' and '.join(names)} had NaN or infinite elements; those kept their values"
            )

    def state_dict(self) -> dict[str, Any]:
        """The chains' whole state: heads, step count, settings of the noise and of the step.

        Raises:
            ValueError, NonFiniteError: a step on a GPU recorded something since the last look.
        """
        self.check()
        tensors = {"weight": self.weight.clone(), "bias": None if self.bias is None else self.bias.clone()}
        return {**tensors, **{name: getattr(self, name) for name in _SAVED}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue saved chains: the next step is, bit for bit, the one that they would have taken.

        Raises:
            ValueError: heads of another shape, or entries that are missing; nothing was changed.
        """
        missing = {"weight", "bias", *_SAVED} - set(state_dict)
        if missing:
            raise ValueError(f"the saved state lacks {sorted(missing)}")
        for name in ("weight", "bias"):
            saved, mine = state_dict[name], getattr(self, name)
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (saved, mine)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"the saved {name} has shape {shapes[0]}: must be {shapes[1]}")
        self.weight.copy_(state_dict["weight"])
        if self.bias is not None:
            self.bias.copy_(state_dict["bias"])
        for name in _SAVED:
            setattr(self, name, state_dict[name])
        self._nonfinite.zero_()


_SAVED = ("lr", "posterior_temperature", "num_data", "prior_precision", "seed", "chain", "steps")


def sample_heads(
    sampler: LinearHeadSampler,
    batches: Iterable[Any],
    *,
    burn_in: int = 0,
    thin: int = 1,
    num_draws: int,
    callbacks: Sequence[Callback] = (),
) -> Iterator[Draw]:
    """Run K heads and yield their draws, as `sample` does for a `StackedModule`.

    Args:
        sampler: the heads, which go on from where they are.
        batches: yields (x, target, teacher_logits) as `LinearHeadSampler.step` takes them, on any device; run through again
            and again.
        burn_in, thin, num_draws: counts of steps and, of every chain, draws.
        callbacks: follow the loop. A step's energy is the chains' mean. Health is not measured: its figures are NaN.

    Yields:
        Draw: its `model` is an nn.Linear on features, live; one module, this draw's until the next one.

    Raises:
        TypeError, ValueError: counts that are no int or out of range, no batches.
        What `LinearHeadSampler.step` and `check` raise.
    """
    check_counts(burn_in=burn_in, thin=thin, num_draws=num_draws)
    return _draws(sampler, endless(batches), burn_in, thin, num_draws, callbacks)


def _draws(
    sampler: LinearHeadSampler,
    batches: Iterator[Any],
    burn_in: int,
    thin: int,
    num_draws: int,
    callbacks: Sequence[Callback],
) -> Iterator[Draw]:
    run, head = secrets.randbits(63), sampler.head(0)
    names = tuple(name for name, _ in head.named_parameters())
    for step in range(1, burn_in + thin * num_draws + 1):
        batch: list[Any] = [
            None if part is None else part.to(sampler.weight.device, non_blocking=True) for part in next(batches)
        ]
        energy = sampler.step(*batch).mean()
        for callback in callbacks:
            callback.on_step(StepRecord(step, "burn_in" if step <= burn_in else "sampling", energy))
        index, remainder = divmod(step - burn_in, thin)
        if index < 1 or remainder:
            continue
        for k in range(len(sampler.weight)):
            draw = Draw(step, sampler.chain + k, index - 1, run, sampler.head(k, into=head), names)
            for callback in callbacks:
                callback.on_draw(draw)
            yield draw
    sampler.check()
    for callback in callbacks:
        callback.on_end(Health([math.nan], [math.nan]))


def split_head(model: nn.Module, name: str) -> tuple[nn.Module, nn.Linear]:
    """A network as (backbone, head), for features and `LinearHeadSampler(init=head.weight)`.

    Args:
        model: a network whose last operation is the head: model(x) = head(backbone(x)). It stays as it is.
        name: of the head, as `named_modules` has it.

    Returns:
        The network with the identity in the place of its head, and the head itself; both share the network's parameters.

    Raises:
        ValueError: there is no such module.
        TypeError: it is no nn.Linear.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        known = [found for found, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(f"name = {name!r}: must be a part of the model; its nn.Linear are {known}")
    head = modules[name]
    if not isinstance(head, nn.Linear):
        raise TypeError(f"name = {name!r} is a {type(head).__name__}: must be an nn.Linear")
    # what the memo of deepcopy holds is not copied but taken from there
    memo: dict[int, Any] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, {**memo, id(head): nn.Identity()}), head
