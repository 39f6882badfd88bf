"""Call the Triton kernels through the public API, with a driver that launches nothing: all of a launch but the launch.

A program, not a module of tests: it must run where TRITON_INTERPRET is not set. The interpreter and `triton.compile` know nothing
of what Triton asks of a *launch*: arguments that it can specialise, globals that are what they were, one kernel after another in
one process. Prints the names of the kernels that it launched.
"""

import dataclasses
import warnings

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import bkd_fast as bkd
import bkd_fast.kernels.kd as kd_kernels
import bkd_fast.kernels.predictive as predictive_kernels
from bkd_fast.errors import KernelError
from bkd_fast.kernels.launching import on_device_of
from bkd_fast.ops import registry

launched: dict[str, int] = {}


class _Utilities:
    def load_binary(self, name, kernel, shared, device):
        """(module, function, registers, spills, threads at most)"""
        return 0, 0, 64, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    def __init__(self, source, metadata):
        self.name = source.name

    def __call__(self, *arguments):
        launched[self.name] = launched.get(self.name, 0) + 1


class _Driver:
    """A Hopper GPU, as far as Triton looks before it launches."""

    utils = _Utilities()
    launcher_cls = _Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def _compilations(kernel):
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


def noise():
    for size in (1, 1023, 4096):
        bkd.noise.normal((size,), seed=2**64 - 1, step=2**40, device="cpu")


def langevin():
    for sampler, dtype in ((bkd.SGLD, torch.float32), (bkd.SGLD, torch.bfloat16), (bkd.SGHMC, torch.float32)):
        for capturable in (False, True):
            theta = [torch.zeros(n, dtype=dtype, requires_grad=True) for n in (1, 4096)]
            chain = sampler(theta, 0.1, num_data=10, seed=2**64 - 1, nonfinite="skip" if not capturable else "record",
                            capturable=capturable)  # fmt: skip
            for p in theta:
                p.grad = torch.zeros_like(p)
            for _ in range(2):
                chain.step()


def kd():
    """Each kind of kernel after each other kind: they share functions and constants."""
    for _ in range(2):
        for classes, prior in (
            (10, "dirichlet"),
            (1000, "dirichlet"),
            (20_000, "dirichlet"),
            (10, "mixture"),
            (10, "reverse_kl"),
        ):
            z = torch.zeros(3, classes, requires_grad=True)
            t = torch.zeros((2, 3, classes) if prior == "mixture" else (3, classes))
            bkd.KDLoss(0.5, 2.0, prior=prior)(z, torch.tensor([0, 1, 2]), t).backward()
        z = torch.zeros(3, 1000, requires_grad=True)
        top = bkd.TopKLogits(torch.zeros(3, 4), torch.arange(4).repeat(3, 1), torch.zeros(3))
        bkd.KDLoss(0.5, 2.0)(z, torch.tensor([0, 1, 2]), top).backward()
    before = _compilations(kd_kernels.on_chip)
    for rows in (1, 2, 16, 1000):
        z = torch.zeros(rows, 10, requires_grad=True)
        bkd.KDLoss(0.3, 2.0)(z, torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 10)).backward()
    assert _compilations(kd_kernels.on_chip) == before, "another number of rows, or strength, is no reason to compile"


def predictive():
    for track in ("all", "topk:2"):
        posterior = bkd.PosteriorPredictive(5, 10, track=track)
        if track != "all":
            posterior.choose_classes_by(torch.zeros(5, 10))
        for draws, rows in ((1, [0, 1]), (33, [0, 1, 2, 3, 4])):
            posterior.update_logits(torch.zeros(draws, len(rows), 10), rows=torch.tensor(rows))
    assert _compilations(predictive_kernels.update_tiles) == 2, "with a histogram and without, for any rows and draws"


def head():
    sampler = bkd.LinearHeadSampler(64, 10, lr=0.01, num_data=100, chains=3, prior_strength=2.0)
    for rows in (1, 37):
        sampler.step(torch.zeros(rows, 64), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 10))


@triton.jit
def _broken(x):
    tl.store(x, no_such_name)  # noqa: F821


@triton.jit
def _asserting(x):
    tl.static_assert(False, "not today")


def refused():
    """A kernel that Triton does not compile is named, and the error says what Triton says; other errors stay what they are."""
    x = torch.zeros(1)
    for kernel, message in ((_broken, "no_such_name is not defined"), (_asserting, "not today")):
        name = kernel.__name__
        with (
            pytest.raises(KernelError, match=rf"the Triton kernel {name} was not compiled for a CPU: (?s:.*){message}"),
            on_device_of(x),
        ):
            kernel[(1,)](x)
    with pytest.raises(TypeError, match="missing 1 required"), on_device_of(x):
        _broken[(1,)]()


if __name__ == "__main__":
    warnings.simplefilter(
        "ignore", bkd.BKDFastWarning
    )  # nothing is computed: samplers share their noise, outputs are garbage
    driver.set_active(_Driver())
    backend = dataclasses.replace(registry._BACKENDS["triton"], devices=("cpu",), diagnose=lambda: None)
    registry.add_backend(backend)
    torch.set_grad_enabled(True)
    with bkd.use_backend("triton"):
        for run in (noise, langevin, kd, predictive, head, refused):
            run()
    print(*sorted(launched))
