"""What a run on images would take, looked up and measured before it starts: paths, memory, disk and time per step."""

import shutil
import time
from pathlib import Path

import torch
from torch import nn

import bkd_fast as bkd
from bkd_fast.app.config import ConfigError
from bkd_fast.app.models import count_parameters
from bkd_fast.app.scale import images, networks, upper
from bkd_fast.app.scale.config import ScaleConfig

MEASURED_STEPS = 3
FLOAT, HALF = 4, 2  # bytes
CELL = 144  # bytes of a class probability in the posterior
DIAGNOSED = 1300  # bytes of a test image and chain, for each of two classes


def examine(config: ScaleConfig) -> tuple[dict[str, str], list[str]]:
    """(what was found, problems): the first as a table, by name.

    Raises:
        DataUnavailableError, ConfigError: the images, a network or a file of weights cannot be had.
    """
    train, test = images.load(config.data, config.seed)
    classes = len(train.source.class_names)
    problems: list[str] = []
    device = networks.device_of(config.runtime, 0)
    models = {}
    for name, network in (("teacher", config.teacher), ("student", config.student)):
        models[name] = networks.build(network.model, classes, config.seed)
        if network.weights is not None:
            networks.load_weights(models[name], network.weights)
    parameters = {name: count_parameters(model) for name, model in models.items()}
    # parameter, gradient, and momentum where there is one
    sampler = FLOAT * parameters["student"] * (2 + bool(config.sampling.momentum))
    chains = config.processes.chains
    posterior = len(test) * (classes * CELL + 2 * DIAGNOSED)
    seconds = _seconds_per_step(config, models, classes, device, problems)
    rows = {
        "images": f"{len(train):,} for training, {len(test):,} for the test, {classes:,} classes",
        "teacher": f"{config.teacher.model}, {parameters['teacher']:,} parameters, {config.teacher.mode}",
        "student": f"{config.student.model}, {parameters['student']:,} parameters",
        "memory of student and sampler": f"{_size(sampler)} for each chain, over {config.processes.shards} shards",
        "memory of the posterior": f"{_size(posterior)} for each chain, over its processes",
        "disk for a checkpoint": _size(chains * (sampler + posterior)),
    }
    disk = chains * (sampler + posterior) * (config.checkpoints.keep + 1)
    if config.teacher.mode != "online":
        width = HALF * classes if config.teacher.top_k is None else config.teacher.top_k * (HALF + HALF) + FLOAT
        cache = config.teacher.views * len(train) * (width + 1)
        rows["disk for the teacher's logits"] = _size(cache)
        disk += cache
    if config.sampling.sampled != "all":
        plain = networks.build(config.student.model, classes, config.seed)
        parts = upper.cut(plain, config.sampling.sampled, config.data.size)
        with torch.no_grad():
            width = parts.body(torch.zeros(1, 3, config.data.size, config.data.size)).numel()
        features = HALF * width * (len(train) + len(test))
        sampled = count_parameters(parts.top)
        rows["sampled"] = (
            f"{parts.name} and what is above: {sampled:,} parameters, {config.sampling.chains} chains at once"
        )
        rows["disk for features"] = f"{_size(features)}, {width:,} numbers an image"
        disk += features
    for name, network in (("teacher", config.teacher), ("student", config.student)):
        if network.training is not None:
            _check_batch(network.training.batch_size, len(train), f"{name}.training.batch_size", problems)
            steps = network.training.epochs * (len(train) // min(network.training.batch_size, len(train)))
            ratio = network.training.batch_size / config.sampling.batch_size
            rows[f"training of the {name}"] = f"{steps:,} steps" + _projected(
                steps, None if seconds is None else seconds * ratio
            )
    chain = config.sampling
    _check_batch(chain.batch_size, len(train), "sampling.batch_size", problems)
    steps = chain.warm_start + chain.burn_in + chain.thin * chain.num_draws
    rows["chain"] = f"{steps:,} steps" + _projected(steps, seconds) + f", {chain.num_draws:,} draws"
    if seconds is not None:
        rows["a step of the chain"] = f"{seconds:.3g} s on this {device.type}, the images' decoding not included"
    free = shutil.disk_usage(_existing(config.output)).free
    rows["disk"] = f"{_size(disk)} in all, {_size(free)} free"
    if disk > free:
        problems.append(f"output = {config.output}: {_size(disk)} are needed and {_size(free)} are free")
    return rows, problems


def _check_batch(batch: int, images: int, key: str, problems: list[str]) -> None:
    if batch > images:
        problems.append(f"{key} = {batch}: must be at most {images}, the training images")


def _seconds_per_step(
    config: ScaleConfig, models: dict[str, nn.Module], classes: int, device: torch.device, problems: list[str]
) -> float | None:
    """Of the chain, on made-up images: the median of a few steps of a whole batch on one process."""
    student, teacher = (networks.prepared(models[name], config.runtime, device) for name in ("student", "teacher"))
    batch = config.sampling.batch_size
    sampler = bkd.SGLD(student.named_parameters(), 0.0, num_data=batch)
    x = torch.randn(batch, 3, config.data.size, config.data.size, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    loss = bkd.KDLoss(config.distillation.prior_strength, config.distillation.temperature)
    taken = []
    try:
        for _ in range(MEASURED_STEPS):
            begin = time.perf_counter()
            with torch.no_grad():
                logits = (
                    teacher.eval()(x) if config.teacher.mode == "online" else torch.zeros(batch, classes, device=device)
                )
            sampler.zero_grad()
            loss(student(x), y, logits).backward()
            sampler.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
    except torch.OutOfMemoryError as error:
        problems.append(
            f"sampling.batch_size = {batch}: a step does not fit into the memory of one {device.type} ({error})"
        )
        return None
    except RuntimeError as error:
        raise ConfigError(f"data.size = {config.data.size}: the networks cannot take such images ({error})") from error
    return sorted(taken)[len(taken) // 2]


def _projected(steps: int, seconds: float | None) -> str:
    return "" if seconds is None else f", {steps * seconds / 3600:,.2g} hours on one process at this step's time"


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
