"""Runs every GPU kernel once on small and odd sizes, through the public API:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tests/gpu/sanitize.py

(torch's cache would hand out parts of large blocks, past whose ends the checker sees nothing wrong).

A program, not a test: what it checks is what the memory checker says. `python tests/gpu/sanitize.py cpu` tries the program.
"""

import contextlib
import itertools
import sys
import warnings

import torch
from torch import nn

import bkd_fast as bkd
from bkd_fast.methods.cmi import CMILoss

CLASSES = (2, 3, 10, 33, 100, 130, 1000, 4099, 40_000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def noise(device: str) -> None:
    for size in (1, 5, 1023, 4099):
        bkd.noise.normal((size,), seed=1, step=2, device=device)


def langevin(device: str) -> None:
    for dtype, rounding, moments, centred in itertools.product(
        (*DTYPES, torch.float64), ("stochastic", "master", "nearest"), (False, True), (False, True)
    ):
        if rounding != "stochastic" and dtype not in (torch.bfloat16, torch.float16):
            continue
        model = nn.Sequential(nn.Linear(33, 65), nn.Linear(65, 7)).to(device, dtype)
        prior_mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()} if centred else None
        sampler = bkd.SGLD(
            model.named_parameters(),
            lr=0.01,
            num_data=100,
            prior_precision=1.0,
            prior_mean=prior_mean,
            rounding=rounding,
            nonfinite="skip" if moments else None,
        )
        if moments:
            sampler.track_moments()
        bucket = torch.randn(1 + sum(p.numel() for p in model.parameters()), dtype=dtype, device=device)
        at = 1  # at odd addresses
        for p in model.parameters():
            p.grad = bucket[at : at + p.numel()].view_as(p)
            at += p.numel()
        sampler.step()
        sampler.step()


def kd(device: str) -> None:
    priors = ("dirichlet", "continuous_categorical", "reverse_kl", "mixture")
    for number, (classes, prior) in enumerate(itertools.product(CLASSES, priors)):
        dtype = DTYPES[number % 3]  # in turn: each is a kernel to compile
        rows = 37 if classes < 200 else 3
        z = torch.randn(rows, classes, device=device).to(dtype).requires_grad_()
        shape = (2, rows, classes) if prior == "mixture" else (rows, classes)
        target = torch.randint(classes, (rows,), device=device)
        loss = bkd.KDLoss(2.0, 2.0, prior=prior, label_smoothing=0.1)
        loss(z, target, torch.randn(shape, device=device).to(dtype)).backward()
    for number, classes in enumerate(CLASSES[:-1]):  # a table of teachers, and labels far outside it
        dtype = DTYPES[number % 3]
        z = torch.randn(5, classes, device=device).to(dtype).requires_grad_()
        loss = CMILoss(0.2, classes).to(device)
        loss.centroid_logits.normal_()
        loss(z, torch.tensor([0, classes - 1, -100, 1, 0], device=device)).backward()
        if z.is_cuda:  # where they are recorded
            loss(z, torch.tensor([0, classes, -1, 2**60, -(2**63)], device=device)).backward()
            with contextlib.suppress(ValueError):
                bkd.KDLoss(1.0).check()


def head(device: str) -> None:
    for number, (classes, features) in enumerate(itertools.product((3, 10, 101), (5, 64, 130))):
        dtype = DTYPES[(number + number // 3) % 3]
        sampler = bkd.LinearHeadSampler(
            features, classes, lr=0.01, num_data=100, chains=3, prior_strength=2.0, device=device
        )
        x = torch.randn(37, features, device=device).to(dtype)
        target = torch.randint(classes, (37,), device=device)
        sampler.step(x, target, torch.randn(37, classes, device=device))


def predictive(device: str) -> None:
    for classes, bins in itertools.product((2, 10, 65, 130, 1000), (64, 128)):
        posterior = bkd.PosteriorPredictive(37, classes, bins=bins, device=device)
        other = bkd.PosteriorPredictive(37, classes, bins=bins, device=device)
        for dtype in DTYPES:
            posterior.update_logits(torch.randn(33, 37, classes, device=device).to(dtype))
            rows = torch.randperm(37, device=device)[:11]
            other.update_logits(3 * torch.randn(5, 11, classes, device=device).to(dtype), rows=rows)
        posterior.merge_(other)
        posterior.interval(0.9)
        posterior.highest_density_interval(0.9)
        posterior.deviance_upper(0.9)
        chosen = bkd.PosteriorPredictive(37, classes, bins=bins, track="topk:1", diagnostics=True, device=device)
        chosen.choose_classes_by(torch.randn(37, classes, device=device))
        chosen.update_logits(torch.randn(70, 37, classes, device=device))
        chosen.interval(0.9)


RUNS = {
    noise: ("triton",),
    langevin: ("triton", "cuda"),
    kd: ("triton",),
    head: ("triton",),
    predictive: ("triton", "cuda"),
}


def main(device: str) -> None:
    warnings.simplefilter("ignore", bkd.BKDFastWarning)  # about samplers that share their noise
    for run, backends in RUNS.items():
        for backend in backends if device == "cuda" else ("cpp",):
            with bkd.use_backend(backend):
                run(device)
                if device == "cuda":
                    torch.cuda.synchronize()
            print(f"{run.__name__} on {backend}: done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
