"""`python -m benchmarks.imagenet`: what sampling costs beside plain training of the same network, on made-up images.

For each network, in turns on the same images: cross entropy and SGD with momentum; the KD energy, with a teacher's logits at
hand, and SGLD; the same with the parameters' moments every 10th step; a draw (its forward passes over the test images, and the
posterior's update). Medians, peak memory on a GPU, and the projected time of 90 epochs and 200 draws of ImageNet.

Defaults are ImageNet's on a GPU (bf16, channels_last, 256 images of 224 pixels) and small ones on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models

import bkd_fast as bkd
from bkd_fast.app.scale.config import Runtime
from bkd_fast.app.scale.networks import prepared

CLASSES, TRAIN, TEST = 1000, 1_281_167, 50_000
EPOCHS, DRAWS, MOMENTS_EVERY = 90, 200, 10
TURNS = 7


def main() -> None:
    """Measure and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    arguments.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"])
    arguments.add_argument("--batch", type=int, default=256 if cuda else 16)
    arguments.add_argument("--size", type=int, default=224 if cuda else 64)
    arguments.add_argument("--steps", type=int, default=20 if cuda else 3, help="of a turn")
    given = arguments.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; {given.batch} images of {given.size} pixels; medians of {TURNS} turns of {given.steps} steps\n")
    print("| network | contender | ms a step | of plain training | peak memory beyond it |\n|---|---|---|---|---|")
    for network in given.networks:
        measure(network, given.batch, given.size, given.steps, device)


def measure(network: str, batch: int, size: int, steps: int, device: torch.device) -> None:
    """The rows of one network."""
    x = torch.randn(batch, 3, size, size, device=device)
    y = torch.randint(CLASSES, (batch,), device=device)
    teacher = 3 * torch.randn(batch, CLASSES, device=device)
    contenders = {
        "CE and SGD(momentum=.9)": plain(network, device, x, y),
        "KDLoss and SGLD": sampled(network, device, x, y, teacher, moments=False),
        f"and moments every {MOMENTS_EVERY}th step": sampled(network, device, x, y, teacher, moments=True),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    memory = {}
    for step in contenders.values():  # state is born, kernels are compiled
        for _ in range(2):
            step()
    for _ in range(TURNS):
        for name, step in contenders.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[name].append(seconds(step, steps, device))
            memory[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    base = next(iter(medians))
    for name, median in medians.items():
        more = f"{(memory[name] - memory[base]) / 1e6:+.0f} MB" if device.type == "cuda" else ""
        print(f"| {network} | {name} | {1e3 * median:.1f} | {median / medians[base]:.3f} | {more} |")
    per_draw = draw_seconds(network, device, x)
    slowest = max(medians.values())
    epochs = EPOCHS * TRAIN / batch * slowest / 3600
    draws = DRAWS * TEST / batch * per_draw / 3600
    free = 0.05 * TRAIN / batch * medians[base] / (TEST / batch * per_draw)
    print(
        f"| {network} | a draw, per {batch} test images | {1e3 * per_draw:.1f} | | |\n"
        f"{network}: {EPOCHS} epochs of ImageNet at this rate {epochs:,.1f} h, {DRAWS} draws of its test images {draws:,.1f} h; "
        f"{free:.1f} draws an epoch cost 5 % of plain training.\n"
    )


def plain(network: str, device: torch.device, x: Tensor, y: Tensor) -> Callable[[], None]:
    model = made(network, device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def sampled(
    network: str, device: torch.device, x: Tensor, y: Tensor, teacher: Tensor, *, moments: bool
) -> Callable[[], None]:
    model, loss = made(network, device), bkd.KDLoss(1.0)
    sampler = bkd.SGLD(model.named_parameters(), 1e-3, num_data=TRAIN, prior_precision=128.0, seed=int(moments))
    if moments:
        sampler.track_moments(0, MOMENTS_EVERY)

    def step() -> None:
        sampler.zero_grad()
        loss(model(x), y, teacher).backward()
        sampler.step()

    return step


def draw_seconds(network: str, device: torch.device, x: Tensor) -> float:
    """Of one draw on a batch: the forward pass, and its share of the update of a window of 32 draws."""
    model = made(network, device).eval()
    posterior = bkd.PosteriorPredictive(len(x), CLASSES, device=device)
    window = 32
    with torch.no_grad():
        logits = torch.stack([model(x)] * window)
        posterior.update_logits(logits)
        forward = statistics.median(seconds(lambda: model(x), 2, device) for _ in range(TURNS))
        update = statistics.median(seconds(lambda: posterior.update_logits(logits), 2, device) for _ in range(TURNS))
    return forward + update / window


def made(network: str, device: torch.device) -> nn.Module:
    model: nn.Module = models.get_model(network, weights=None, num_classes=CLASSES)
    return prepared(model, Runtime(bf16=device.type == "cuda", channels_last=True), device)


def seconds(action: Callable[[], object], times: int, device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times


if __name__ == "__main__":
    main()
