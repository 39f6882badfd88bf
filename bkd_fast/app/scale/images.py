"""Labelled images on disk, decoded one at a time: folders, tar files, JPEG archives, and views that their numbers determine."""

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from bkd_fast.app.config import ConfigError
from bkd_fast.app.data import DataUnavailableError
from bkd_fast.app.scale.config import ImageFiles
from bkd_fast.errors import warn

MEAN, DEVIATION = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of ImageNet, which torchvision's and timm's weights expect
NAMED = 5  # images in a message
FRESH = 2**31  # views of each image: no epoch sees one again


class UndecodableImageError(RuntimeError):
    """An image cannot be decoded; the message names it."""


class Source(Protocol):
    """Images by number, with their labels."""

    labels: Tensor  # int64 (N,)
    class_names: tuple[str, ...]

    def name(self, index: int) -> str: ...

    def open(self, index: int) -> Image.Image:
        """Decoded, RGB."""
        ...


class ImageFolder:
    """A folder with one folder of images a class; classes in the order of their names.

    Raises:
        DataUnavailableError: there is no such folder, or it holds no images in folders.
    """

    def __init__(self, folder: Path) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

        try:
            names, numbers = find_classes(str(folder))
            self._samples = make_dataset(str(folder), numbers, IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise DataUnavailableError(f"{folder}: {error}") from error
        self.class_names = tuple(names)
        self.labels = torch.tensor([label for _, label in self._samples])

    def name(self, index: int) -> str:
        return str(self._samples[index][0])

    def open(self, index: int) -> Image.Image:
        with Image.open(self._samples[index][0]) as image:
            return image.convert("RGB")


class JPEGArchive:
    """An .npz file with JPEGs one after the other: blob uint8, offsets, labels, and a header that all begin with, if any.

    Raises:
        DataUnavailableError: there is no such file, or it holds something else.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            with np.load(file) as arrays:
                self._offsets = arrays["offsets"].astype(np.int64)
                self.labels = torch.from_numpy(arrays["labels"].astype(np.int64))
                self._header = arrays["header"].tobytes() if "header" in arrays else b""
        except (OSError, KeyError, ValueError) as error:
            raise DataUnavailableError(f"{file}: is no .npz file with blob, offsets and labels ({error})") from error
        words = file.with_name("".join([*file.stem.split("_train")[0].split("_val")[0], "_words.txt"]))
        count = int(self.labels.max()) + 1
        lines = words.read_text().splitlines() if words.is_file() else []
        self.class_names = tuple(lines[:count] if len(lines) >= count else map(str, range(count)))

    @cached_property
    def _blob(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        with np.load(self._file) as arrays:
            return np.asarray(arrays["blob"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_blob"}

    def name(self, index: int) -> str:
        return f"{self._file.name}[{index}]"

    def open(self, index: int) -> Image.Image:
        begin, end = self._offsets[index : index + 2]
        with Image.open(io.BytesIO(self._header + self._blob[begin:end].tobytes())) as image:
            return image.convert("RGB")


class TarFiles:
    """Tar files of webdataset's form: members KEY.jpg (or .jpeg, .png) and KEY.cls, a class number as text.

    Only their tables of contents are read at first, and images at random then, so that order, views and resuming do not depend on
    how the images are spread over files.

    Raises:
        DataUnavailableError: a file is missing or no uncompressed tar file, or a key lacks its image or its class number.
    """

    def __init__(self, path: Path) -> None:
        self._files = _tar_files(path)
        places, labels = [], []
        for number, file in enumerate(self._files):
            for place, label in _contents(file):
                places.append((number, *place))
                labels.append(label)
        if not labels:
            raise DataUnavailableError(f"{path}: holds no images; must have KEY.jpg and KEY.cls")
        self._places = np.array(places, dtype=np.int64)  # file, offset, bytes
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.class_names = tuple(map(str, range(max(labels) + 1)))

    def name(self, index: int) -> str:
        file, offset, _ = self._places[index]
        return f"{self._files[file]} at byte {offset}"

    def open(self, index: int) -> Image.Image:
        file, offset, size = self._places[index]
        with self._files[file].open("rb") as tar:
            tar.seek(offset)
            data = tar.read(size)
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")


def _tar_files(path: Path) -> list[Path]:
    """One file, those of a folder in the order of their names, or NAME-{first..last}.tar, which all have to be there."""
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path.name)
    if found:
        before, first, last, after = found.groups()
        numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
        files = [path.with_name(f"{before}{number}{after}") for number in numbers]
    else:
        files = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise DataUnavailableError(f"{path}: there is no file {missing[0] if missing else '*.tar'}")
    return files


def _contents(file: Path) -> Iterator[tuple[tuple[int, int], int]]:
    """Of every key, in the file's order: where its image's bytes begin and how many there are, and its class."""
    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:  # not compressed, for bytes are read where they lie
            for member in filter(tarfile.TarInfo.isreg, tar):
                folder, slash, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                key, kind = folder + slash + key, kind.lower()  # as webdataset reads them
                if kind in ("jpg", "jpeg", "png"):
                    if key in images:
                        raise DataUnavailableError(f"{file}: {key} has two images; must have one")
                    images[key] = member.offset_data, member.size
                elif kind == "cls":
                    text = tar.extractfile(member).read().strip()  # type: ignore[union-attr]
                    if not text.isdigit():
                        raise DataUnavailableError(f"{file}: {key}.cls is {text[:20]!r}: must be a class number")
                    classes[key] = int(text)
    except (tarfile.TarError, OSError) as error:
        raise DataUnavailableError(f"{file}: is no uncompressed tar file ({error})") from error
    for lacking, keys in (("a .cls", images.keys() - classes.keys()), ("an image", classes.keys() - images.keys())):
        if keys:
            raise DataUnavailableError(f"{file}: {min(keys)} lacks {lacking}; must have KEY.jpg and KEY.cls")
    return ((place, classes[key]) for key, place in images.items())


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images as networks take them: (x, label), x float32 (3, size, size).

    Asked for `[i]` it gives the middle of image i; for `[i, v]` the view v of it, a random crop and flip that only the seed, i
    and v determine.

    Args:
        source: of the images.
        size, resize: pixels, as the configuration has them.
        seed: of the views.
        ids: numbers in the source; None: all.
    """

    def __init__(self, source: Source, size: int, resize: int, seed: int, ids: Tensor | None = None) -> None:
        self.source, self.seed = source, seed
        self.ids = torch.arange(len(source.labels)) if ids is None else ids
        self.labels = source.labels[self.ids]
        self._middle, self._random = _transforms(size, resize)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, view = key if isinstance(key, tuple) else (key, None)
        image = self.decoded(index)
        label = int(self.labels[index])
        if view is None:
            return self._middle(image), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, int(self.ids[index]), view)))
            return self._random(image), label

    def decoded(self, index: int) -> Image.Image:
        """The image as it is on disk.

        Raises:
            UndecodableImageError: it cannot be decoded.
        """
        number = int(self.ids[index])
        try:
            return self.source.open(number)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise UndecodableImageError(
                f"{self.source.name(number)} cannot be decoded ({error}); data.undecodable=exclude leaves such images out"
            ) from error


@dataclass(frozen=True)
class Pictures:
    """What the report shows of the images."""

    name: str
    train_y: Tensor
    test_y: Tensor
    class_names: tuple[str, ...]
    test: LabelledImages

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def test_picture(self, row: int) -> Tensor:
        """(H, W, 3) in [0, 1]."""
        return torch.from_numpy(np.asarray(self.test.decoded(row)).astype("float32") / 255)


def load(files: ImageFiles, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images.

    Raises:
        DataUnavailableError: a folder or file is missing or another thing, or their classes differ.
        ConfigError: more images are asked for than there are.
    """
    train, test = (_source(path) for path in (files.train, files.test))
    if len(train.class_names) != len(test.class_names):
        raise DataUnavailableError(
            f"{files.train} has {len(train.class_names)} classes and {files.test} {len(test.class_names)}: must be the same"
        )
    parts = []
    for name, source, count in (("train", train, files.train_size), ("test", test, files.test_size)):
        images = LabelledImages(source, files.size, files.resize, seed)
        if files.undecodable == "exclude":
            images = _without_undecodable(images, files, seed)
        parts.append(_first(images, count, f"data.{name}_size", files, seed))
    return parts[0], parts[1]


def _source(path: Path) -> Source:
    if path.suffix == ".npz":
        return JPEGArchive(path)
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return TarFiles(path)
    return ImageFolder(path)


def _first(images: LabelledImages, count: int | None, key: str, files: ImageFiles, seed: int) -> LabelledImages:
    if count is None:
        return images
    if count > len(images):
        raise ConfigError(f"{key} = {count}: must be at most {len(images)}, the images that there are")
    return LabelledImages(images.source, files.size, files.resize, seed, images.ids[:count])


def _without_undecodable(images: LabelledImages, files: ImageFiles, seed: int) -> LabelledImages:
    def sound(index: int) -> bool:
        try:
            images.decoded(index)
        except UndecodableImageError:
            return False
        return True

    with ThreadPoolExecutor(max(1, files.workers)) as pool:
        good = torch.tensor(list(pool.map(sound, range(len(images)))))
    if bool(good.all()):
        return images
    bad = [images.source.name(int(i)) for i in images.ids[~good]]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    warn(f"{len(bad)} images cannot be decoded and are left out: {', '.join(bad[:NAMED])}{more}.")
    return LabelledImages(images.source, files.size, files.resize, seed, images.ids[good])


def _transforms(size: int, resize: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    from torchvision.transforms import v2

    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
    middle = v2.Compose([v2.Resize(resize), v2.CenterCrop(size), *finish])
    return middle, v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *finish])
