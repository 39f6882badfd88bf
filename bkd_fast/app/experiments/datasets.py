"""What the experiments learn from: pictures under $BKD_FAST_DATA, and ten Gaussians whose class probabilities are known."""

import gzip
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bkd_fast.app.data import DATA_VARIABLE, DataUnavailableError

OTHERS = ("notmnist", "kmnist")


def folder() -> Path:
    """$BKD_FAST_DATA.

    Raises:
        DataUnavailableError: the variable is not set.
    """
    name = os.environ.get(DATA_VARIABLE)
    if not name:
        raise DataUnavailableError(
            f"the variable {DATA_VARIABLE} is not set: it must name the folder with the data sets"
        )
    return Path(name)


def unlike_mnist(rows: int) -> dict[str, Tensor]:
    """(rows, 1, 28, 28) grey levels in [0, 1], not centred, of the letters of notMNIST and the characters of KMNIST."""
    with gzip.open(folder() / "notmnist-t10k-images-idx3-ubyte.gz") as file:
        letters = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with np.load(folder() / "kmnist-test-imgs.npz") as arrays:
        kana = arrays["arr_0"]
    pixels = dict(zip(OTHERS, (letters, kana), strict=True))
    return {name: torch.from_numpy(x[:rows].astype(np.float32) / 255).unsqueeze(1) for name, x in pixels.items()}


def cifar10(train: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first images of both parts of CIFAR-10, which is JPEG here (some 30 dB), and their classes.

    Returns:
        train_x (N, 3, 32, 32) float32, train_y (N,) int64, test_x, test_y; channels centred and scaled as the training part's.
    """
    pixels, train_y = _decoded("train", train)
    test_pixels, test_y = _decoded("test", test)
    mean, scale = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    x, test_x = (
        torch.from_numpy(((part - mean) / scale).astype(np.float32)).permute(0, 3, 1, 2).contiguous()
        for part in (pixels, test_pixels)
    )
    return x, train_y, test_x, test_y


def _decoded(part: str, rows: int) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], Tensor]:
    """uint8 (rows, 32, 32, 3) and int64 (rows,)."""
    from PIL import Image

    with np.load(folder() / f"cifar10_{part}_jpeg.npz") as arrays:
        header, blob, offsets, labels = (arrays[name] for name in ("header", "blob", "offsets", "labels"))
    files = (header.tobytes() + blob[offsets[i] : offsets[i + 1]].tobytes() for i in range(rows))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return pixels, torch.from_numpy(labels[:rows].astype(np.int64))


class Gaussians:
    """Ten Gaussians in 30 dimensions, means in {-1, 0, 1}^30, variance 6; everything drawn from `seed`.

    Bayes' rule gives every class probability, and the log odds are linear in x.
    """

    classes, dimensions, variance = 10, 30, 6.0

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.means = torch.randint(-1, 2, (self.classes, self.dimensions), generator=self.generator).float()

    def draw(self, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs (rows, 30) and their classes (rows,)."""
        y = torch.randint(self.classes, (rows,), generator=self.generator)
        noise = torch.randn(rows, self.dimensions, generator=self.generator)
        return self.means[y] + self.variance**0.5 * noise, y

    def log_probs(self, x: Tensor) -> Tensor:
        """(rows, 10) the true log p(y given x), by Bayes' rule with equal covariances: linear in x up to the normaliser."""
        return (x @ self.means.T / self.variance - self.means.square().sum(1) / (2 * self.variance)).log_softmax(1)
