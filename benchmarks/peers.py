"""`python -m benchmarks.peers`: other libraries' SGLD steps beside ours; `--check`: what check_sampler says of their classes.

Every library is set up, in its own units, for the chain

    theta <- theta - lr grad L + sqrt(2 lr / N) xi          target: exp(-N L)

and is handed gradients: only its step is timed. A library that is not installed is named and left out (docs/peers.md).
"""

import argparse
import importlib.metadata
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import bkd_fast as bkd
from benchmarks.interleaved import Table
from bkd_fast.checking import check_sampler

NUM_DATA = 50_000
LR = 1e-2
MODELS = {
    "MLP of 1 M": [(768, 784), (768,), (512, 768), (512,), (10, 512), (10,)],
    "MLP of 10 k": [(100, 64), (100,), (32, 100), (32,), (10, 32), (10,)],
}


class Chain:
    """One library's SGLD: parameters that `step` moves, given a gradient of L for each."""

    def __init__(self, start: Sequence[Tensor]) -> None:
        self.parameters = [theta.clone().requires_grad_() for theta in start]

    def prepared(self, gradients: Sequence[Tensor]) -> Any:
        """Gradients as the library takes them: what training code has at hand, so not timed."""
        return gradients

    def step(self, gradients: Any) -> None:
        raise NotImplementedError

    def theta(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.parameters]


class OptimizerChain(Chain):
    """A torch optimizer."""

    def __init__(self, start: Sequence[Tensor], make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        super().__init__(start)
        self.optimizer = make(self.parameters)

    def step(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()


class Handed(torch.autograd.Function):
    """A function whose gradient is handed over as it stands."""

    @staticmethod
    def forward(gradients: Sequence[Tensor], *theta: Tensor) -> Tensor:
        return torch.zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.gradients = inputs[0]

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        return None, *ctx.gradients


class PosteriorsChain(Chain):
    """posteriors takes the mean log posterior and temperature 1/N; its update differentiates: torch.func's part is timed."""

    def __init__(self, start: Sequence[Tensor]) -> None:
        from posteriors.sgmcmc import sgld

        self.transform = sgld.build(
            lambda theta, batch: (Handed.apply(batch, *theta.values()), torch.zeros(())),
            lr=LR,
            temperature=1 / NUM_DATA,
        )
        self.state = self.transform.init({str(i): theta.clone() for i, theta in enumerate(start)})

    def prepared(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        return [-gradient for gradient in gradients]

    def step(self, gradients: list[Tensor]) -> None:
        self.state, _ = self.transform.update(self.state, gradients, inplace=True)

    def theta(self) -> list[Tensor]:
        return list(self.state.params.values())


class BlackjaxChain(Chain):
    """blackjax takes the gradient of the summed log density and step size lr / N; jitted as its documentation says."""

    def __init__(self, start: Sequence[Tensor]) -> None:
        import blackjax
        import jax

        self.jax = jax
        sgld = blackjax.sgld(lambda position, minibatch: minibatch)

        def step(key: Any, position: Any, gradients: Any) -> tuple[Any, Any]:
            key, now = jax.random.split(key)
            return key, sgld.step(now, position, gradients, LR / NUM_DATA)

        self.jitted = jax.jit(step)
        self.key = jax.random.key(0)
        self.position = self._to_jax(start)

    def _to_jax(self, tensors: Sequence[Tensor]) -> list[Any]:
        return [self.jax.numpy.array(tensor.numpy()) for tensor in tensors]

    def prepared(self, gradients: Sequence[Tensor]) -> list[Any]:
        return self._to_jax([-NUM_DATA * gradient for gradient in gradients])

    def step(self, gradients: list[Any]) -> None:
        self.key, self.position = self.jax.block_until_ready(self.jitted(self.key, self.position, gradients))

    def theta(self) -> list[Tensor]:
        return [torch.tensor(self.jax.device_get(array)) for array in self.position]


def torch_uncertainty_module(name: str) -> ModuleType:
    """A file of torch_uncertainty.optim by itself: the package imports lightning and torchvision, which no sampler needs."""
    package = importlib.util.find_spec("torch_uncertainty")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'torch_uncertainty'")
    path = Path(package.origin).parent / "optim" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"torch_uncertainty_optim_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(start: Sequence[Tensor], **settings: Any) -> Chain:
    return OptimizerChain(start, lambda p: bkd.SGLD(p, LR, num_data=NUM_DATA, **settings))


def torch_sgld_chain(start: Sequence[Tensor]) -> Chain:
    from torch_sgld import SGLD

    return OptimizerChain(start, lambda p: SGLD(p, lr=LR, temperature=1 / NUM_DATA))


def torch_uncertainty_chain(start: Sequence[Tensor]) -> Chain:
    sgld = torch_uncertainty_module("sgld").SGLD
    return OptimizerChain(start, lambda p: sgld(p, lr=LR, noise_factor=1 / math.sqrt(NUM_DATA)))


def devinterp_chain(start: Sequence[Tensor]) -> Chain:
    from devinterp.optim import SGMCMC

    return OptimizerChain(start, lambda p: SGMCMC.sgld(p, lr=2 * LR / NUM_DATA, nbeta=NUM_DATA))


# distribution -> its chain from a start; the first is what the others are compared with
CHAINS: dict[str, Callable[[Sequence[Tensor]], Chain]] = {
    "bkd_fast": ours,
    "posteriors": PosteriorsChain,
    "torch-sgld": torch_sgld_chain,
    "torch-uncertainty": torch_uncertainty_chain,
    "devinterp": devinterp_chain,
    "blackjax": BlackjaxChain,
}


def installed() -> dict[str, Callable[[Sequence[Tensor]], Chain]]:
    """The chains that can be made here, by name and version; prints why the others cannot."""
    found = {}
    for name, make in CHAINS.items():
        try:
            make([torch.zeros(2)])
        except ImportError as error:
            print(f"{name}: missing ({error})")
        else:
            found[f"{name} {version(name)}"] = make
    return found


def version(distribution: str) -> str:
    return bkd.__version__ if distribution == "bkd_fast" else importlib.metadata.version(distribution)


def time_steps(chains: dict[str, Callable[[Sequence[Tensor]], Chain]], seconds: float) -> Table:
    """Medians of a step, libraries taking turns, gradients fixed."""
    table = Table(f"one SGLD step, float32, {torch.get_num_threads()} threads of torch", "parameter")
    for case, shapes in MODELS.items():
        generator = torch.Generator().manual_seed(0)
        start, gradients = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))

        def contender(make: Callable[[Sequence[Tensor]], Chain], start: Any = start, gradients: Any = gradients) -> Any:
            chain = make(start)
            given = chain.prepared(gradients)
            return lambda _: chain.step(given)

        contenders = {name: contender(make) for name, make in chains.items()}
        table.time(case, contenders, sum(math.prod(shape) for shape in shapes), seconds=seconds, repeats=51)
    return table


def gaussian_errors(chains: dict[str, Callable[[Sequence[Tensor]], Chain]]) -> Iterator[str]:
    """Conjugate Gaussian, N observations of mean x and a prior N(0, 1): every library against SGLD's exact stationary law."""
    coordinates, steps, data_mean = 20_000, 400, 1.0
    curvature = (
        10 * (NUM_DATA + 1) / NUM_DATA
    )  # of the mean loss: observations of variance 0.1, a prior of precision 10
    centre = data_mean * NUM_DATA / (NUM_DATA + 1)
    variance = 1 / (NUM_DATA * curvature * (1 - LR * curvature / 2))
    for name, make in chains.items():
        torch.manual_seed(0)
        chain = make([torch.full((coordinates,), centre)])
        sums = torch.zeros(2, coordinates, dtype=torch.float64)
        for step in range(2 * steps):
            gradients = [curvature * (theta - centre) for theta in chain.theta()]
            chain.step(chain.prepared(gradients))
            if step >= steps:
                off = chain.theta()[0].double() - centre
                sums += torch.stack([off, off.square()])
        means = sums / steps
        ratio, error = float(means[1].mean()) / variance, float(means[1].std()) / variance / math.sqrt(coordinates)
        shift, shift_error = float(means[0].mean()), float(means[0].std()) / math.sqrt(coordinates)
        shifted = f"mean off by {shift / shift_error:+.1f} standard errors"
        yield f"  {name:26} variance {ratio:.4f} +- {error:.4f} of the exact one, {shifted}"


# ---- --check ----


def classes() -> Iterator[tuple[str, str, Callable[[], tuple[type[torch.optim.Optimizer], dict[str, Any]]]]]:
    """(distribution, how it is called, the class and check_sampler's arguments), in the units of its documentation."""

    def torch_sgld() -> Any:
        from torch_sgld import SGLD

        return SGLD

    def devinterp(name: str) -> Any:
        import devinterp.optim

        return getattr(devinterp.optim, name)

    def nose_hoover() -> Any:
        from devinterp.optim.preconditioner import NHTPreconditioning

        return NHTPreconditioning()

    n = 1000
    summed = {"num_data": 1, "lr": 1e-4}
    yield "bkd_fast", "SGLD(num_data=N)", lambda: (bkd.SGLD, {"num_data": n, "lr": LR})
    yield (
        "torch-sgld",
        "SGLD(), summed loss",
        lambda: (torch_sgld(), summed),
    )
    yield (
        "torch-sgld",
        "SGLD(temperature=1/N), mean loss",
        lambda: (torch_sgld(), {"num_data": n, "lr": LR, "temperature": 1 / n, "expected": 1.0}),
    )
    yield (
        "torch-sgld",
        "SGLD(momentum=0.1), summed loss",
        lambda: (torch_sgld(), {**summed, "momentum": 0.1}),
    )
    yield (
        "torch-sgld",
        "SGLD(weight_decay=1), summed loss",  # 1/2000 of the curvature: no figure shows the prior
        lambda: (torch_sgld(), {**summed, "weight_decay": 1.0}),
    )
    yield (
        "torch-uncertainty",
        "SGLD(), summed loss",
        lambda: (torch_uncertainty_module("sgld").SGLD, summed),
    )
    yield (
        "torch-uncertainty",
        "SGLD(noise_factor=1), summed loss",
        lambda: (torch_uncertainty_module("sgld").SGLD, {**summed, "noise_factor": 1.0}),
    )
    yield (
        "torch-uncertainty",
        "SGLD(noise_factor=1, weight_decay=1), summed loss",
        lambda: (torch_uncertainty_module("sgld").SGLD, {**summed, "noise_factor": 1.0, "weight_decay": 1.0}),
    )
    yield (
        "torch-uncertainty",
        "SGHMC(), summed loss",
        lambda: (torch_uncertainty_module("sghmc").SGHMC, {**summed, "lr": 1e-2}),
    )
    plain = {**summed, "lr": 1e-2, "noise_factor": 1.0, "burn_in_steps": 0}
    yield (
        "torch-uncertainty",
        "SGHMC(noise_factor=1, burn_in_steps=0), summed loss",
        lambda: (torch_uncertainty_module("sghmc").SGHMC, plain),
    )
    own = {"num_data": n, "lr": 2 * LR / n, "nbeta": float(n)}
    yield (
        "devinterp",
        "SGMCMC(nbeta=N)",
        lambda: (devinterp("SGMCMC"), own),
    )
    yield (
        "devinterp",
        'SGMCMC(nbeta=N, preconditioner="rmsprop")',
        lambda: (devinterp("SGMCMC"), {**own, "preconditioner": "rmsprop"}),
    )
    yield (
        "devinterp",
        "SGMCMC(nbeta=N, preconditioner=NHTPreconditioning())",
        lambda: (devinterp("SGMCMC"), {**own, "preconditioner": nose_hoover()}),
    )
    yield (
        "devinterp",
        "SGLD(nbeta=N), deprecated",
        lambda: (devinterp("SGLD"), own),
    )
    yield (
        "devinterp",
        "SGNHT(nbeta=N), deprecated",
        lambda: (devinterp("SGNHT"), {**own, "lr": LR / n}),
    )


def check_all() -> None:
    for distribution, call, prepare in classes():
        try:
            opt_class, settings = prepare()
        except ImportError as error:
            print(f"{distribution}: missing ({error})\n")
            continue
        torch.manual_seed(0)
        print(f"{distribution} {version(distribution)}: {call}\n{check_sampler(opt_class, **settings)}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="the laws of the optimizer classes, not their times")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each table row, beyond five turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; JAX has its own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for category in (DeprecationWarning, FutureWarning):  # of the libraries, at import
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", message="another live sampler", category=bkd.BKDFastWarning)
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    if options.check:
        check_all()
        return
    chains = installed()
    print(time_steps(chains, options.seconds))
    print("conjugate Gaussian:")
    for line in gaussian_errors(chains):
        print(line, flush=True)


if __name__ == "__main__":
    main()
