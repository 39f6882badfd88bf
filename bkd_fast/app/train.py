"""The two point estimates: the teacher, trained on labels and cached, and the student, distilled from its logits."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from bkd_fast.app import config, models
from bkd_fast.app.data import Batches, Images
from bkd_fast.distill import KDLoss

# rows per forward pass where no gradient is needed
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Teacher:
    """A trained teacher as the rest of the run needs it.

    train_logits: (N, C) float32, in the order of `Images.train_x`.
    test_logits: (M, C) float32, in the order of `Images.test_x`.
    parameters: how many numbers were trained.
    reused: whether the logits came from the cache.
    """

    train_logits: Tensor
    test_logits: Tensor
    parameters: int
    reused: bool


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Callable[..., Tensor],
    settings: config.Training,
    on_epoch: Callable[[int, float], None],
) -> None:
    """Train `model` in place with AdamW and a cosine learning rate, then leave it in eval mode.

    Args:
        batches: yields (x, *targets).
        loss: `loss(model(x), *targets)` is the mean loss of a batch.
        on_epoch: called with the number of the epoch, from 1, and its mean loss.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * len(batches))
    model.train()
    for epoch in range(1, settings.epochs + 1):
        total = torch.zeros((), dtype=torch.float64)
        for x, *targets in batches:
            optimizer.zero_grad()
            energy = loss(model(x), *targets)
            energy.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += energy.detach()
        on_epoch(epoch, float(total) / len(batches))
    model.eval()


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """(N, C) logits of a model in eval mode for the images x (N, ...)."""
    return torch.cat([model(rows) for rows in torch.split(x, EVALUATION_BATCH)])


def train_teacher(
    images: Images, settings: config.Teacher, seed: int, cache: Path, on_epoch: Callable[[int, float], None]
) -> Teacher:
    """The teacher's logits on both parts, from `cache` if it holds this very teacher, else trained and cached.

    The cache is one safetensors file with the weights, the logits and a fingerprint of the data, the settings and the
    seed; with another fingerprint it is replaced.
    """
    model = models.build(settings.model, images.shape, images.num_classes, seed)
    fingerprint = _fingerprint(images, settings, seed)
    parameters = models.count_parameters(model)
    if cache.exists():
        with safe_open(cache, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") == fingerprint:
                return Teacher(file.get_tensor("train_logits"), file.get_tensor("test_logits"), parameters, reused=True)
    batches = Batches(images.train_x, images.train_y, batch_size=settings.batch_size, shuffle_seed=seed)
    fit(model, batches, functional.cross_entropy, settings, on_epoch)
    teacher = Teacher(logits(model, images.train_x), logits(model, images.test_x), parameters, reused=False)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    unfinished = cache.with_suffix(".unfinished")
    save_file(
        {**weights, "train_logits": teacher.train_logits, "test_logits": teacher.test_logits},
        unfinished,
        metadata={"fingerprint": fingerprint},
    )
    os.replace(unfinished, cache)
    return teacher


def distil_student(
    images: Images,
    teacher_logits: Tensor,
    loss: KDLoss,
    settings: config.Student,
    seed: int,
    on_epoch: Callable[[int, float], None],
) -> nn.Sequential:
    """The student's point estimate: the minimiser of the energy whose posterior is sampled later."""
    model = models.build(settings.model, images.shape, images.num_classes, seed)
    batches = Batches(images.train_x, images.train_y, teacher_logits, batch_size=settings.batch_size, shuffle_seed=seed)
    fit(model, batches, loss, settings, on_epoch)
    return model


def _fingerprint(images: Images, settings: config.Teacher, seed: int) -> str:
    digest = hashlib.sha256(json.dumps([settings.model_dump(mode="json"), seed]).encode())
    for tensor in (images.train_x, images.train_y, images.test_x):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
