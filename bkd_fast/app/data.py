"""The images: scikit-learn's digits, which come with it, and MNIST from the folder $BKD_FAST_DATA."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bkd_fast.app import config

DATA_VARIABLE = "BKD_FAST_DATA"


class DataUnavailableError(RuntimeError):
    """The data set that was asked for is not on this machine; the message says where it is looked for."""


@dataclass(frozen=True)
class Images:
    """A classification problem in memory.

    train_x, test_x: (N, 1, H, W) float32 grey levels minus `mean`.
    train_y, test_y: (N,) int64 in [0, num_classes).
    mean: (1, H, W), the mean training image with grey levels in [0, 1] from background to ink. Without it the energy is
        six times more curved along the common part of all images, and the chain's step size as much smaller.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    def test_picture(self, row: int) -> Tensor:
        """(H, W) grey levels of a test image, in [0, 1] from background to ink."""
        return (self.test_x[row] + self.mean)[0]


class Batches:
    """Mini-batches of tensors that live in memory: one indexing per batch instead of one Python call per example.

    Each pass over a shuffled one draws a new order from its own generator and leaves the incomplete last batch out,
    so that every step sees `batch_size` rows; an unshuffled one keeps the rows' order and yields all of them.
    """

    def __init__(self, *tensors: Tensor, batch_size: int, shuffle_seed: int | None = None) -> None:
        rows = {len(tensor) for tensor in tensors}
        if len(rows) != 1:
            raise ValueError(f"tensors have {sorted(rows)} rows: all must have the same number")
        self.tensors = tensors
        self.batch_size = min(batch_size, rows.pop())
        self.generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)

    def __len__(self) -> int:
        rows = len(self.tensors[0])
        return -(-rows // self.batch_size) if self.generator is None else rows // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.generator is None:
            yield from zip(*(torch.split(tensor, self.batch_size) for tensor in self.tensors), strict=True)
            return
        order = torch.randperm(len(self.tensors[0]), generator=self.generator)
        for rows in torch.split(order, self.batch_size)[: len(self)]:
            yield tuple(tensor[rows] for tensor in self.tensors)


def load(which: config.Data, seed: int) -> Images:
    """The data set of a configuration; `seed` chooses the training images (and, for digits, the split).

    Raises:
        DataUnavailableError: the variable or the file is missing, or the file is not the data set.
        ConfigError: more images are asked for than there are.
    """
    if which.name == "digits":
        return _digits(which, seed)
    return _mnist(which, seed)


def _digits(which: config.Data, seed: int) -> Images:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = torch.from_numpy(pixels[order].astype(np.float32) / 16).view(-1, 1, 8, 8)
    classes = torch.from_numpy(labels[order].astype(np.int64))
    # the split is ours, so the training part without a size of its own is the customary two thirds
    train = len(labels) * 2 // 3 if which.train_size is None else which.train_size
    _check_size("data.train_size", train, len(labels) - 1)
    test = _test_size(which, len(labels) - train)
    return _centred(
        "scikit-learn digits",
        images[:train],
        classes[:train],
        images[train : train + test],
        classes[train : train + test],
    )


def _mnist(which: config.Data, seed: int) -> Images:
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise DataUnavailableError(
            f"MNIST is read from ${DATA_VARIABLE}/mnist.npz, and the variable {DATA_VARIABLE} is not set. Set it to "
            "the folder that holds mnist.npz, or use the digits that come with scikit-learn: --set data.name=digits"
        )
    path = Path(folder) / "mnist.npz"
    if not path.is_file():
        raise DataUnavailableError(f"${DATA_VARIABLE}/mnist.npz: there is no such file ({DATA_VARIABLE} = {folder!r})")
    try:
        with np.load(path) as arrays:
            train_x, train_y = arrays["x_train"], arrays["y_train"]
            test_x, test_y = arrays["x_test"], arrays["y_test"]
    except (KeyError, OSError, ValueError) as error:
        raise DataUnavailableError(
            f"{path}: is not MNIST as an .npz file with x_train, y_train, x_test and y_test ({error})"
        ) from error
    train = len(train_y) if which.train_size is None else which.train_size
    _check_size("data.train_size", train, len(train_y))
    test = _test_size(which, len(test_y))
    order = np.random.default_rng(seed).permutation(len(train_y))[:train]
    return _centred(
        "MNIST",
        _grey_levels(train_x[order]),
        torch.from_numpy(train_y[order].astype(np.int64)),
        _grey_levels(test_x[:test]),
        torch.from_numpy(test_y[:test].astype(np.int64)),
    )


def _grey_levels(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255).unsqueeze(1)


def _centred(name: str, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Images:
    mean = train_x.mean(dim=0)
    return Images(name, train_x - mean, train_y, test_x - mean, test_y, mean, class_names=tuple("0123456789"))


def _test_size(which: config.Data, available: int) -> int:
    test = available if which.test_size is None else which.test_size
    _check_size("data.test_size", test, available)
    return test


def _check_size(key: str, wanted: int, available: int) -> None:
    if wanted > available:
        raise config.ConfigError(f"{key} = {wanted}: must be at most {available}, the images that there are")
