"""The local learning coefficient of networks whose answer is known, from hundreds of SGLD chains in one launch.

Lau et al. (2023), "The local learning coefficient: a singularity-aware complexity measure", estimate it around trained
weights w* by

    lambda-hat = n beta (E[L_n(w)] - L_n(w*)),  beta = 1 / log n,  w ~ exp(-n beta L_n(w) - gamma / 2 |w - w*|^2)

That is SGLD at temperature 1 with `num_data = n beta`, `prior_precision = gamma` and `prior_mean = w*`. As n grows it tends to
half the number of parameters d for a regular model, and to less for a singular one. At any n, E[L_n] of the linear networks
below is an integral over one or two numbers, so that the sampler is held to the figure that it should give, not to the limit.

Where devinterp 2.0.1 is installed, its chains then run with its SGLD and with ours. Run it with
`python examples/local_learning_coefficient.py`; it takes half a minute, and two more with devinterp.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bkd_fast as bkd

GAMMA = 5.0
NUM_DATA = 1000
NBETA = NUM_DATA / math.log(NUM_DATA)


class Problem(NamedTuple):
    """A trained network, its data and what is known of it."""

    name: str
    network: nn.Module
    x: Tensor  # (rows, inputs)
    y: Tensor  # (rows, outputs)
    limit: float  # of the learning coefficient as n grows
    expected: float  # lambda-hat at this n, exactly

    def mean_loss(self, network: nn.Module) -> Tensor:
        """Minus the mean log likelihood of unit noise: (), or (chains,) of a `StackedModule`."""
        return 0.5 * ((self.y - network(self.x)) ** 2).sum(-1).mean(-1)


def regular(inputs: int) -> Problem:
    """Linear regression: lambda-hat = 1/2 sum n beta h / (n beta h + gamma) over the curvatures h of L_n."""
    x, y = data(inputs, 1)
    network = trained(nn.Linear(inputs, 1, bias=False), x, y)
    h = torch.linalg.eigvalsh(x.T @ x / len(x)).double()
    expected = 0.5 * (NBETA * h / (NBETA * h + GAMMA)).sum()
    return Problem(f"linear regression, d = {inputs}", network, x, y, inputs / 2, float(expected))


def narrow(inputs: int, outputs: int) -> Problem:
    """Two linear layers u and v, one unit between them, and nothing to learn: singular, the energy is |u|^2 |v|^2 up to noise.

    The limit is min(inputs, outputs) / 2 (Aoyagi and Watanabe, 2005, for one unit and rank 0); where both are equal, its
    multiplicity 2 lets lambda-hat come near no faster than 1 / log n.
    """
    x, y = data(inputs, outputs)
    network = trained(nn.Sequential(nn.Linear(inputs, 1, bias=False), nn.Linear(1, outputs, bias=False)), x, y)
    u, v = (weight.detach().double().flatten() for weight in network.parameters())
    name = f"{inputs} - 1 - {outputs} linear network, d = {inputs + outputs}"
    return Problem(name, network, x, y, min(inputs, outputs) / 2, expected_of_narrow(x.double(), y.double(), u, v))


def expected_of_narrow(x: Tensor, y: Tensor, u0: Tensor, v0: Tensor) -> float:
    """lambda-hat by quadrature over the first layer u; given u, the second layer v is Gaussian and integrated exactly."""
    points = 4000 if len(u0) == 1 else 800  # an axis, over 9 standard deviations of the localisation to either side
    axis = torch.linspace(-9, 9, points, dtype=torch.float64) / math.sqrt(GAMMA)
    u = u0 + torch.cartesian_prod(*[axis] * len(u0)).view(-1, len(u0))
    curvature = ((u @ (x.T @ x / len(x))) * u).sum(-1)  # of L_n in each v
    pull = u @ (x.T @ y / len(x))
    precision = (NBETA * curvature + GAMMA)[:, None]
    mean = (NBETA * pull + GAMMA * v0) / precision
    log_weight = 0.5 * (precision * mean**2 - precision.log()).sum(-1) - GAMMA / 2 * ((u - u0) ** 2).sum(-1)
    gain = (0.5 * curvature[:, None] * (mean**2 + 1 / precision) - pull * mean).sum(-1)  # E[L_n | u] - L_n(0)
    trained_gain = 0.5 * ((y - (x @ u0)[:, None] * v0) ** 2 - y**2).sum(-1).mean()
    return NBETA * float(torch.softmax(log_weight, 0) @ gain - trained_gain)


def data(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Standard normal x and y, as inputs + outputs rows on which a linear model has the mean loss that it has on all."""
    both = torch.randn(NUM_DATA, inputs + outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.linalg.qr(both).R * math.sqrt((inputs + outputs) / NUM_DATA)
    return rows[:, :inputs].float(), rows[:, inputs:].float()


def trained(network: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """The network near a minimum of its loss. (The figures hold around any weights.)"""
    for i, weight in enumerate(network.parameters()):
        nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(i))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.9)
    for _ in range(1000):
        optimizer.zero_grad()
        (0.5 * ((y - network(x)) ** 2).sum(-1).mean()).backward()
        optimizer.step()
    return network


def local_learning_coefficient(
    network: nn.Module,
    mean_loss: Callable[[nn.Module], Tensor],
    nbeta: float,
    gamma: float,
    *,
    lr: float,
    chains: int,
    burn_in: int,
    draws: int,
) -> Tensor:
    """lambda-hat of each chain, (chains,). `mean_loss` gives the loss of a network, and of each network of a stack."""
    stack = bkd.StackedModule(network, chains)
    center = [weight.detach() for weight in network.parameters()]
    sampler = bkd.SGLD(
        stack.named_parameters(), lr, num_data=nbeta, prior_precision=gamma, prior_mean=center, chains=chains
    )
    total = torch.zeros(chains, dtype=torch.float64)
    for step in range(burn_in + draws):
        sampler.zero_grad()
        losses = mean_loss(stack)
        losses.sum().backward()  # the sum over the chains: each moves as if it were alone
        sampler.step()
        if step >= burn_in:
            total += losses.detach()
    return nbeta * (total / draws - mean_loss(network).item())


def sgld_for_devinterp(
    params: list[dict[str, Any]],
    lr: float,
    nbeta: float,
    localization: float = 0.0,
    noise_level: float = 1.0,
    weight_decay: float = 0.0,
    bounding_box_size: float | None = None,
    save_metrics: bool = False,
) -> bkd.SGLD:
    """Our SGLD for the arguments of devinterp's: its step on n beta L_n is lr / 2; torch's seed tells its chains apart."""
    masks = [group["mask"] for group in params if group.get("mask") is not None]
    for name, value in (("mask", masks), ("bounding_box_size", bounding_box_size), ("save_metrics", save_metrics)):
        if value:
            raise ValueError(f"{name} = {value!r}: must be left out, bkd_fast.SGLD has none")
    precision = localization + weight_decay
    groups = [{"params": group["params"]} for group in params]
    if localization:
        share = localization / precision  # the product of both Gaussians is centred at share times w*
        groups = [{**group, "prior_mean": [share * group["params"].detach()]} for group in groups]
    return bkd.SGLD(
        groups,
        lr * nbeta / 2,
        num_data=nbeta,
        temperature=noise_level**2,
        prior_precision=precision,
        seed=torch.initial_seed(),
    )


def by_devinterp(problem: Problem, sampling_method: Any, *, lr: float, chains: int, burn_in: int, draws: int) -> Tensor:
    """lambda-hat of each of devinterp's chains, (chains,), every step on all rows.

    `devinterp.slt.llc.llc` and `sample` know sampling methods by two fixed names; `sample_single_chain`, which they call for
    each chain, takes any.
    """
    from devinterp.slt.sampler import sample_single_chain

    rows = [{"input_ids": x, "y": y} for x, y in zip(problem.x, problem.y, strict=True)]
    losses = torch.zeros(chains, draws, dtype=torch.float64)

    def evaluate(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return 0.5 * ((batch["y"] - network(batch["input_ids"])) ** 2).sum(-1), {}

    def on_draw(*, loss: Tensor, draw: int, chain: int, **_: Any) -> None:
        losses[chain, draw] = loss.mean()

    for chain in range(chains):
        sample_single_chain(
            problem.network,
            rows,
            evaluate,
            {name: None for name, _ in problem.network.named_parameters()},  # no masks
            num_draws=draws,
            num_burnin_steps=burn_in,
            sampling_method=sampling_method,
            sampling_method_kwargs={"lr": lr, "nbeta": NBETA, "localization": GAMMA},
            chain=chain,
            seed=chain,
            callbacks=[on_draw],
            batch_size=len(rows),
            shuffle=False,
        )
    return NBETA * (losses.mean(1) - problem.mean_loss(problem.network).item())


def with_error(values: Tensor) -> str:
    """Mean of independent chains and its standard error."""
    return f"{values.mean():.3f} +- {values.std() / math.sqrt(len(values)):.3f}"


def main(h: float = 2e-4, chains: int = 256, burn_in: int = 3000, draws: int = 3000) -> list[tuple[Problem, Tensor]]:
    """Print, and return, what each problem gives. `h`: the step on n beta L_n, which adds a share of h (n beta + gamma) / 2."""
    print(f"n = {NUM_DATA}, n beta = {NBETA:.1f}, gamma = {GAMMA:g}, {chains} chains of {draws} draws")
    print(f"{'':34} {'d / 2':>6} {'limit':>6} {'expected':>9}   measured")
    results = []
    for problem in (regular(10), narrow(1, 1), narrow(2, 4)):
        measured = local_learning_coefficient(
            problem.network, problem.mean_loss, NBETA, GAMMA, lr=NBETA * h, chains=chains, burn_in=burn_in, draws=draws
        )
        half = sum(weight.numel() for weight in problem.network.parameters()) / 2
        print(
            f"{problem.name:34} {half:6.1f} {problem.limit:6.1f} {problem.expected:9.3f}   {with_error(measured)}",
            flush=True,
        )
        results.append((problem, measured))
    return results


def main_devinterp(h: float = 2e-4, chains: int = 8, burn_in: int = 2000, draws: int = 4000) -> list[Tensor]:
    """Print, and return, what devinterp's chains give with its SGLD and with ours."""
    from devinterp.optim import SGMCMC

    problem = narrow(2, 4)
    print(f"{chains} chains of devinterp, {problem.name}, expected {problem.expected:.3f}:")
    results = []
    for name, method in (("its SGLD", SGMCMC.sgld), ("ours", sgld_for_devinterp)):
        measured = by_devinterp(problem, method, lr=2 * h, chains=chains, burn_in=burn_in, draws=draws)
        print(f"  with {name:9} {with_error(measured)}", flush=True)
        results.append(measured)
    return results


if __name__ == "__main__":
    main()
    if importlib.util.find_spec("devinterp") is None:
        print("devinterp is not installed: its chains are left out")
    else:
        main_devinterp()
