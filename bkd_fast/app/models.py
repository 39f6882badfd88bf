"""The networks by name: multilayer perceptrons and small convolutional networks, built from their configuration."""

from itertools import pairwise

import torch
from torch import nn

from bkd_fast.app import config


def build(which: config.Model, shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Sequential:
    """A network from images (N, C, H, W) to logits (N, num_classes), initialised from `seed` as torch does it.

    Args:
        which: architecture and widths.
        shape: channels, height and width of the images, in pixels.
        num_classes: width of the last layer.
        seed: of the initial parameters; torch's global generator is left as it was.

    Raises:
        ConfigError: the images are too small for that many pooling blocks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(which, config.CNN):
            return nn.Sequential(*_convolutions(which, shape), *_dense(_features(which, shape), which, num_classes))
        channels, height, width = shape
        return nn.Sequential(nn.Flatten(), *_dense(channels * height * width, which, num_classes))


def describe(which: config.Model, shape: tuple[int, int, int], num_classes: int) -> str:
    """The architecture as papers write it, e.g. `784-256-10` or `conv10-conv20-80-10`."""
    if isinstance(which, config.CNN):
        parts = [f"conv{channels}" for channels in which.channels] + [str(width) for width in which.hidden]
    else:
        channels, height, width = shape
        parts = [str(channels * height * width)] + [str(units) for units in which.hidden]
    return "-".join([*parts, str(num_classes)])


def count_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def _dense(inputs: int, which: config.MLP | config.CNN, num_classes: int) -> list[nn.Module]:
    widths = [inputs, *which.hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return [*layers, nn.Linear(widths[-1], num_classes)]


def _convolutions(which: config.CNN, shape: tuple[int, int, int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise([shape[0], *which.channels]):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return [*layers, nn.Flatten()]


def _features(which: config.CNN, shape: tuple[int, int, int]) -> int:
    blocks = len(which.channels)
    _, height, width = shape
    if min(height, width) >> blocks == 0:
        raise config.ConfigError(
            f"model.channels = {which.channels}: images of {height}x{width} pixels can be halved "
            f"{min(height, width).bit_length() - 1} times, one block of channels each"
        )
    return which.channels[-1] * (height >> blocks) * (width >> blocks)
