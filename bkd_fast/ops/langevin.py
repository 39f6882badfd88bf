"""Operation A, the Langevin step: every tensor of one dtype and one group, of all its chains, in place, in one call.

    g = gradient + decay (theta - center), then the sampler's rule; of SGLD    theta <- theta - lr g + sigma xi

with xi the noise of csrc/noise.h; optionally the running mean and squared deviation of theta in the same pass.
The arithmetic, in this order, is the contract (csrc/langevin.h): one fp32 step is bit-equal on every backend.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from bkd_fast.ops.noise import LIMITS, signed
from bkd_fast.ops.registry import find
from bkd_fast.ops.rounding import TABLE_SIZES
from bkd_fast.ops.rules import RULES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LangevinStep:
    """One step of tensors of one dtype and device: the operation's arguments, in the order of its schema.

    Attributes:
        theta: parameters of any shape, dense in memory (`is_dense`); float32, float64, bfloat16 or float16.
        gradient: gradients of the mean loss, with the shapes, strides and dtype of `theta`.
        center: the prior's mean, like `theta`; empty for 0.
        mean, m2: running mean and sum of squared deviations of theta, like `theta` in float32 (float64 for float64);
            empty for none. Updated with the new theta.
        nonfinite: bool (len(theta),): entry i is set where gradient i holds a NaN or an infinity; such elements keep their
            value. None: no check.
        lr: step size on the mean loss (or what the rule has in its place: csrc/langevin.h).
        decay: prior precision over the number of data. (To maximise, negate lr and decay: that rounds as negating the gradient.)
        sigma: standard deviation of the noise added (before a rule's own scaling).
        seed, chain, step: coordinates of the noise, the same for all tensors; `chain` is the first of `chains`.
        parameters: number of each parameter, a coordinate of the noise.
        first_elements: index of each tensor's first element in its whole parameter (0 unless it is a shard).
        draws: how many draws `mean` and `m2` hold after this one.
        master: float32 copies that hold the chain of 16-bit theta, like `theta`: read, stepped, and written to both; empty:
            theta holds it.
        noise_table: float32 (256,) for bfloat16 or (32,) for float16, for stochastic rounding of 16-bit theta: the noise's
            standard deviation by the exponent field that theta has before the noise, instead of sigma (csrc/langevin.h;
            `rounding.noise_table` makes it). None: theta is rounded to nearest. Not with a master.
        scalars: (3 + own,) or, for numbers of each chain, (chains, 3 + own) on theta's device, (lr, decay, sigma, *own) in the
            type of the arithmetic (float64 for float64 theta, else float32): taken instead of the numbers, so that a CUDA
            graph that holds the step follows a schedule. The numbers still say by being 0 that there is no prior (decay) or
            no noise (sigma). None: the numbers.
        clock: int64 () on theta's device: taken instead of `step`. None: the number.
        rule: a name of `RULES`.
        first, second: the rule's state, like `mean`; empty where it has none. An element whose gradient is not finite keeps it.
        own: the rule's own numbers.
        chains: K, the number of equal parts of every tensor (contiguous then) that are parameters of chains chain ..
            chain + K - 1: elements count from `first_elements` in each. noise_table is then (256,) or (32,) for all, or with
            `scalars` of each chain (K, 256) or (K, 32).
        identity: an object of the caller's that stands for theta, its memory and everything that is said of it (parameters,
            first_elements, chains), all ordinary tensors: what a backend keeps for theta it may keep under this. None: nothing.
        known: addresses of lists above, by their names, that the caller has looked up.
    """

    theta: Sequence[Tensor]
    gradient: Sequence[Tensor]
    center: Sequence[Tensor]
    mean: Sequence[Tensor]
    m2: Sequence[Tensor]
    nonfinite: Tensor | None
    lr: float
    decay: float
    sigma: float
    seed: int
    chain: int
    step: int
    parameters: Sequence[int]
    first_elements: Sequence[int]
    draws: int
    master: Sequence[Tensor] = ()
    noise_table: Tensor | None = None
    scalars: Tensor | None = None
    clock: Tensor | None = None
    rule: str = "sgld"
    first: Sequence[Tensor] = ()
    second: Sequence[Tensor] = ()
    own: Sequence[float] = ()
    chains: int = 1
    identity: object | None = None
    known: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def addresses(self, name: str) -> tuple[int, ...]:
        """Of the tensors in the list of that name."""
        return self.known[name] if name in self.known else tuple(map(Tensor.data_ptr, getattr(self, name)))

    def numbers(self) -> list[list[float]]:
        """(lr, decay, sigma, *own) of each chain, or of all in one row; for backends whose tensors the host reads at no cost."""
        if self.scalars is None:
            return [[self.lr, self.decay, self.sigma, *self.own]]
        rows: list[list[float]] = self.scalars.view(-1, self.scalars.shape[-1]).tolist()
        return [
            [lr, decay if self.decay != 0 else 0.0, sigma if self.sigma != 0 else 0.0, *own]
            for lr, decay, sigma, *own in rows
        ]

    def in_table(self) -> dict[str, Any]:
        """What a launch table is made of: the arguments of `kernels.table.table_of`."""
        names = (
            "theta",
            "gradient",
            "center",
            "mean",
            "m2",
            "master",
            "first",
            "second",
            "parameters",
            "first_elements",
            "chains",
            "identity",
            "known",
        )
        return {name: getattr(self, name) for name in names}

    def step_number(self) -> int:
        """The step's coordinate of the noise, read from the clock where there is one."""
        return self.step if self.clock is None else int(self.clock)


_LIBRARY = torch.library.Library("bkd_fast", "FRAGMENT")
_LIBRARY.define(
    "langevin_step_(Tensor(a!)[] theta, Tensor[] gradient, Tensor[] center, Tensor(b!)[] mean, Tensor(c!)[] m2, "
    "Tensor(d!)? nonfinite, float lr, float decay, float sigma, int seed, int chain, int step, int[] parameters, "
    "int[] first_elements, int draws, Tensor(e!)[] master, Tensor? noise_table, Tensor? scalars, Tensor? clock, "
    "str rule, Tensor(f!)[] first, Tensor(g!)[] second, float[] own, int chains) -> ()"
)
_LIBRARY.define("find_nonfinite(Tensor[] tensors) -> Tensor")
PLAIN = {Tensor, torch.nn.Parameter}  # types that nothing in torch's dispatcher looks behind
_SEED = [field.name for field in fields(LangevinStep)].index("seed")


@torch.library.impl(_LIBRARY, "langevin_step_", "CompositeExplicitAutograd")
def _step(*arguments: Any) -> None:
    values = list(arguments)
    values[_SEED] %= 2**64  # a schema's integers are signed
    s = LangevinStep(*values)
    find("langevin_step_", s.theta[0].device)(s)


@torch.library.register_fake("bkd_fast::langevin_step_", lib=_LIBRARY)
def _step_fake(*arguments: Any) -> None:
    return None


@torch.library.impl(_LIBRARY, "find_nonfinite", "CompositeExplicitAutograd")
def _find_nonfinite(tensors: list[Tensor]) -> Tensor:
    found: Tensor = find("find_nonfinite", tensors[0].device)(tensors)
    return found


@torch.library.register_fake("bkd_fast::find_nonfinite", lib=_LIBRARY)
def _find_nonfinite_fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.bool)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in any order of dimensions."""
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def langevin_step_(s: LangevinStep) -> None:
    """Check a step and take it, in place.

    Raises:
        TypeError: a dtype that is not supported, or that differs from theta's.
        ValueError: lengths, shapes, strides or devices that disagree, a tensor that is not dense, a coordinate out of range.
    """
    if s.theta:
        _check(s)
        unchecked_langevin_step_(s)


def unchecked_langevin_step_(s: LangevinStep) -> None:
    """Take a step whose caller has seen to everything that is checked (a sampler's layout, on every step)."""
    if _is_eager() and (s.identity is not None or _are_plain([*s.theta, *s.gradient])):
        find("langevin_step_", s.theta[0].device)(s)
        return
    torch.ops.bkd_fast.langevin_step_(
        s.theta, s.gradient, s.center, s.mean, s.m2, s.nonfinite, s.lr, s.decay, s.sigma, signed(s.seed), s.chain, s.step,
        s.parameters, s.first_elements, s.draws, s.master, s.noise_table, s.scalars, s.clock,
        s.rule, s.first, s.second, s.own, s.chains,
    )  # fmt: skip


def _is_eager() -> bool:
    """Whether nothing in torch's dispatcher would see an operation on ordinary tensors: going past it spares the conversion of
    hundreds of them, which costs more than their launch."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    return set(map(type, tensors)) <= PLAIN


def _check(s: LangevinStep) -> None:
    dtype, device = s.theta[0].dtype, s.theta[0].device
    if dtype not in DTYPES:
        raise TypeError(f"theta has dtype {dtype}: must be one of {DTYPES}")
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    _check_like("gradient", s.gradient, s.theta, dtype)
    if s.center:
        _check_like("center", s.center, s.theta, dtype)
    if s.mean or s.m2:
        _check_like("mean", s.mean, s.theta, accumulator)
        _check_like("m2", s.m2, s.theta, accumulator)
        if s.draws < 1:
            raise ValueError(f"draws = {s.draws}: must be at least 1, the draw being added included")
    _check_rule(s, accumulator)
    _check_rounding(s, dtype, device)
    numbers = 3 + RULES[s.rule].own
    for name, tensor, shapes, wanted in (
        ("nonfinite", s.nonfinite, [(len(s.theta),)], torch.bool),
        ("scalars", s.scalars, [(numbers,), (s.chains, numbers)], accumulator),
        ("clock", s.clock, [()], torch.int64),
    ):
        if tensor is not None and (tensor.dtype != wanted or tensor.device != device):
            raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}: must be {wanted} on {device}")
        if tensor is not None and (tensor.shape not in shapes or not tensor.is_contiguous()):
            allowed = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {allowed} and contiguous")
    if len(s.parameters) != len(s.theta) or len(s.first_elements) != len(s.theta):
        raise ValueError(
            f"parameters and first_elements have {len(s.parameters)} and {len(s.first_elements)} entries: "
            f"must have {len(s.theta)}, one for each tensor of theta"
        )
    for i, (tensor, first) in enumerate(zip(s.theta, s.first_elements, strict=True)):
        if tensor.dtype != dtype or tensor.device != device:
            raise TypeError(f"theta[{i}] is {tensor.dtype} on {tensor.device}: theta[0] is {dtype} on {device}")
        if not is_dense(tensor):
            raise ValueError(f"theta[{i}] has strides {tensor.stride()} for shape {tuple(tensor.shape)}: must be dense")
        if first + tensor.numel() // s.chains > LIMITS["element"]:
            raise ValueError(f"theta[{i}] ends at element {first + tensor.numel() // s.chains}: the limit is 2**38")
        if s.chains > 1 and (tensor.dim() == 0 or tensor.shape[0] != s.chains or not tensor.is_contiguous()):
            raise ValueError(
                f"theta[{i}] has shape {tuple(tensor.shape)} and strides {tensor.stride()}: must be contiguous with a leading "
                f"axis of {s.chains} chains"
            )


def _check_rule(s: LangevinStep, accumulator: torch.dtype) -> None:
    if s.rule not in RULES:
        raise ValueError(f"rule = {s.rule!r}: must be one of {sorted(RULES)}")
    rule = RULES[s.rule]
    for number, (name, state) in enumerate((("first", s.first), ("second", s.second))):
        if number < rule.states:
            _check_like(name, state, s.theta, accumulator)
        elif state:
            raise ValueError(
                f"{name} has {len(state)} tensors: the rule {s.rule!r} keeps {rule.states} arrays of state"
            )
    if len(s.own) != rule.own:
        raise ValueError(f"own has {len(s.own)} numbers: the rule {s.rule!r} has {rule.own}")
    if s.chains < 1 or s.chain + s.chains > LIMITS["chain"]:
        raise ValueError(f"chains = {s.chains} from chain {s.chain}: must be at least 1, and the last below 2**20")


def _check_rounding(s: LangevinStep, dtype: torch.dtype, device: torch.device) -> None:
    for name, given in (("master", bool(s.master)), ("noise_table", s.noise_table is not None)):
        if given and dtype not in TABLE_SIZES:
            raise TypeError(f"{name} is given for theta of {dtype}: it is for {tuple(TABLE_SIZES)} only")
    if s.master:
        _check_like("master", s.master, s.theta, torch.float32)
        if s.noise_table is not None:
            raise ValueError("master and noise_table are both given: a master's rounding is to nearest")
    if s.noise_table is not None:
        if s.rule != "sgld":
            raise ValueError(
                f"noise_table is given for the rule {s.rule!r}: it is for 'sgld' only, others need a master"
            )
        table = s.noise_table
        per_chain = s.scalars is not None and s.scalars.dim() == 2
        shape = (s.chains, TABLE_SIZES[dtype]) if per_chain else (TABLE_SIZES[dtype],)
        if table.dtype != torch.float32 or table.device != device:
            raise TypeError(f"noise_table is {table.dtype} on {table.device}: must be torch.float32 on {device}")
        if table.shape != shape or not table.is_contiguous():
            raise ValueError(
                f"noise_table has shape {tuple(table.shape)} and strides {table.stride()}: must be contiguous {shape}, an "
                f"entry for each exponent field of {dtype}"
            )


def _check_like(name: str, tensors: Sequence[Tensor], theta: Sequence[Tensor], dtype: torch.dtype) -> None:
    if len(tensors) != len(theta):
        raise ValueError(f"{name} has {len(tensors)} tensors: theta has {len(theta)}")
    for i, (tensor, like) in enumerate(zip(tensors, theta, strict=True)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}: must be {dtype}")
        if tensor.device != like.device:
            raise ValueError(f"{name}[{i}] is on {tensor.device}: must be on {like.device}, as theta[{i}]")
        if tensor.shape != like.shape or not same_order(tensor, like):
            raise ValueError(
                f"{name}[{i}] has shape {tuple(tensor.shape)} and strides {tensor.stride()}: "
                f"must be those of theta[{i}], {tuple(like.shape)} and {like.stride()}"
            )


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape keep their elements in the same order in memory."""
    return (a.is_contiguous() and b.is_contiguous()) or a.stride() == b.stride()


def find_nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """For each tensor (dense, one dtype and device): whether it holds a NaN or an infinity. Returns bool (len(tensors),)."""
    found: Tensor
    if _is_eager() and _are_plain(tensors):
        found = find("find_nonfinite", tensors[0].device)(tensors)
    else:
        found = torch.ops.bkd_fast.find_nonfinite(tensors)
    return found
