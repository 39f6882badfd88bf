"""What a run on images would take, looked up and measured before it starts: paths, memory, disk and time per step."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import bkd_fast as bkd
from bkd_fast.app.config import ConfigError
from bkd_fast.app.models import count_parameters
from bkd_fast.app.scale import images, networks, upper
from bkd_fast.app.scale.config import ScaleConfig
from bkd_fast.features import BLOCK, MIXED

MEASURED_STEPS = 3
PASSED = 64  # images of a measured forward pass
FLOAT, HALF = 4, 2  # bytes
CELL = 144  # bytes of a class probability in the posterior
DIAGNOSED = 1300  # bytes of a test image and chain, for each of two classes


def examine(config: ScaleConfig) -> tuple[dict[str, str], list[str]]:
    """(what was found, problems): the first as a table, by name.

    Raises:
        DataUnavailableError, ConfigError: the images, a network or a file of weights cannot be had, or the student cannot be cut
            where the configuration says.
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
    rows = {
        "images": f"{len(train):,} for training, {len(test):,} for the test, {classes:,} classes",
        "teacher": f"{config.teacher.model}, {parameters['teacher']:,} parameters, {config.teacher.mode}",
        "student": f"{config.student.model}, {parameters['student']:,} parameters",
    }
    chain = config.sampling
    steps = chain.warm_start + chain.burn_in + chain.thin * chain.num_draws
    if chain.sampled == "all":
        disk = _of_whole_networks(config, parameters["student"], len(test), classes, rows)
        seconds = _seconds_per_step(config, models, classes, chain.batch_size, device, problems)
        of_training = seconds, chain.batch_size
    else:
        disk, seconds = _of_upper_parts(config, models, len(train), len(test), classes, device, rows)
        # whole networks are stepped by training alone
        batch = max(
            (n.training.batch_size for n in (config.teacher, config.student) if n.training is not None), default=0
        )
        of_training = _seconds_per_step(config, models, classes, batch, device, problems) if batch else None, batch
    if config.teacher.mode != "online":
        cache = config.teacher.views * len(train) * _teacher_row(config, classes)
        rows["disk for the teacher's logits"] = _size(cache)
        disk += cache
    for name, network in (("teacher", config.teacher), ("student", config.student)):
        if network.training is not None:
            _check_batch(network.training.batch_size, len(train), f"{name}.training.batch_size", problems)
            trained = network.training.epochs * (len(train) // min(network.training.batch_size, len(train)))
            measured, batch = of_training
            rows[f"training of the {name}"] = f"{trained:,} steps" + _projected(
                trained, None if measured is None else measured * network.training.batch_size / batch
            )
    _check_batch(chain.batch_size, len(train), "sampling.batch_size", problems)
    rows["chain"] = f"{steps:,} steps" + _projected(steps, seconds) + f", {chain.num_draws:,} draws"
    if seconds is not None:
        without = "the images' decoding" if chain.sampled == "all" else "reading features"
        rows["a step of the chain"] = f"{seconds:.3g} s on this {device.type}, {without} not included"
    free = shutil.disk_usage(_existing(config.output)).free
    rows["disk"] = f"{_size(disk)} in all, {_size(free)} free"
    if disk > free:
        problems.append(f"output = {config.output}: {_size(disk)} are needed and {_size(free)} are free")
    return rows, problems


def _of_whole_networks(config: ScaleConfig, parameters: int, tests: int, classes: int, rows: dict[str, str]) -> float:
    """Bytes of the checkpoints; says what chains of whole networks take."""
    # parameter, gradient, and momentum where there is one
    sampler = FLOAT * parameters * (2 + bool(config.sampling.momentum))
    posterior = tests * (classes * CELL + 2 * DIAGNOSED)
    chains = config.processes.chains
    rows["memory of student and sampler"] = f"{_size(sampler)} for each chain, over {config.processes.shards} shards"
    rows["memory of the posterior"] = f"{_size(posterior)} for each chain, over its processes"
    rows["disk for a checkpoint"] = _size(chains * (sampler + posterior))
    return chains * (sampler + posterior) * (config.checkpoints.keep + 1)


def _of_upper_parts(
    config: ScaleConfig, models: dict[str, nn.Module], trains: int, tests: int, classes: int, device: torch.device,
    rows: dict[str, str],
) -> tuple[float, float]:  # fmt: skip
    """(bytes of disk, seconds per step); says what chains of the student's upper part and its features take."""
    settings = config.sampling
    parts = upper.cut(models["student"], settings.sampled, config.data.size)
    body = networks.prepared(parts.body, config.runtime, device)
    x = torch.randn(PASSED, 3, config.data.size, config.data.size, device=device)
    with torch.no_grad():
        features = body(x)[:1]
        seconds = _median(lambda: body(x), device) / PASSED
    width, sampled, chains = features.numel(), count_parameters(parts.top), settings.chains
    sampler = FLOAT * sampled * chains * (2 + bool(settings.momentum))
    posterior = tests * (classes * CELL + 2 * DIAGNOSED * chains)
    disk = HALF * width * (trains + tests)
    rows["sampled"] = f"{parts.name} and what is above: {sampled:,} parameters, {chains} chains at once"
    rows["disk for features"] = f"{_size(disk)}, {width:,} numbers an image"
    rows["recording of features"] = (
        f"{trains + tests:,} images, {(trains + tests) * seconds / 3600:,.2g} hours at this pass's time"
    )
    rows["memory of the sampled part and sampler"] = f"{_size(sampler)} for all chains"
    rows["memory of features that are shuffled"] = _size(min(MIXED * max(BLOCK, HALF * width), HALF * width * trains))
    rows["memory of the posterior"] = _size(posterior)
    if config.teacher.mode != "clean":
        logits = trains * _teacher_row(config, classes)
        rows["disk for the teacher's logits on the features' views"] = _size(logits)
        disk += logits
    if isinstance(parts.top, nn.Linear):
        rows["disk for a checkpoint"] = "none of the chain: a killed one begins anew"
    else:
        rows["disk for a checkpoint"] = _size(sampler + posterior)
        disk += (sampler + posterior) * (config.checkpoints.keep + 1)
    return disk, _seconds_per_upper_step(config, parts.top.to(device), features, classes)


def _teacher_row(config: ScaleConfig, classes: int) -> int:
    """Bytes of a row of the teacher's cache, and its mark."""
    top_k = config.teacher.top_k
    return 1 + (HALF * classes if top_k is None else top_k * (HALF + HALF) + FLOAT)


def _check_batch(batch: int, images: int, key: str, problems: list[str]) -> None:
    if batch > images:
        problems.append(f"{key} = {batch}: must be at most {images}, the training images")


def _seconds_per_step(
    config: ScaleConfig,
    models: dict[str, nn.Module],
    classes: int,
    batch: int,
    device: torch.device,
    problems: list[str],
) -> float | None:
    """Of whole networks, on made-up images: the median of a few steps of a whole batch on one process."""
    student, teacher = (networks.prepared(models[name], config.runtime, device) for name in ("student", "teacher"))
    sampler = bkd.SGLD(student.named_parameters(), 0.0, num_data=batch)
    x = torch.randn(batch, 3, config.data.size, config.data.size, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    loss = bkd.KDLoss(config.distillation.prior_strength, config.distillation.temperature)

    def step() -> None:
        with torch.no_grad():
            logits = (
                teacher.eval()(x) if config.teacher.mode == "online" else torch.zeros(batch, classes, device=device)
            )
        sampler.zero_grad()
        loss(student.train()(x), y, logits).backward()
        sampler.step()

    try:
        return _median(step, device)
    except torch.OutOfMemoryError as error:
        key = "sampling" if config.sampling.sampled == "all" else "training"
        problems.append(
            f"{key}.batch_size = {batch}: a step does not fit into the memory of one {device.type} ({error})"
        )
        return None
    except RuntimeError as error:
        raise ConfigError(f"data.size = {config.data.size}: the networks cannot take such images ({error})") from error


def _seconds_per_upper_step(config: ScaleConfig, top: nn.Module, features: Tensor, classes: int) -> float:
    """Of all chains at once, on made-up features of the shape (1, ...) of these."""
    settings, loss = config.sampling, bkd.KDLoss(config.distillation.prior_strength, config.distillation.temperature)
    x = torch.randn(settings.batch_size, *features.shape[1:], device=features.device)
    y = torch.zeros(settings.batch_size, dtype=torch.int64, device=x.device)
    logits = torch.zeros(settings.batch_size, classes, device=x.device)
    if isinstance(top, nn.Linear):
        heads = bkd.LinearHeadSampler(
            top.in_features, classes, lr=settings.lr, num_data=len(x), chains=settings.chains, init=top.weight,
            prior_strength=loss.prior_strength, temperature=loss.temperature,
        )  # fmt: skip
        return _median(lambda: heads.step(x, y, logits), x.device)
    model = bkd.StackedModule(top, settings.chains).eval()
    sampler = bkd.SGLD(model.named_parameters(), 0.0, num_data=len(x), chains=settings.chains)

    def step() -> None:
        sampler.zero_grad()
        (settings.chains * loss(model(x), y, logits)).backward()
        sampler.step()

    return _median(step, x.device)


def _median(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of a few calls."""
    taken = []
    for _ in range(MEASURED_STEPS):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
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
