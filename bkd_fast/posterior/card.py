"""The model card beside kept draws: which draws they are and how they were made, as one JSON file that can be checked."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FORMAT = "bkd_fast.card"
VERSION = 1
_LISTED = 1024  # elements of a tensor among the settings (one for each chain) that are written out


def data_hash(*tensors: Tensor) -> str:
    """SHA-256, in hexadecimal digits, of tensors' dtypes, shapes and bytes (row-major), in their order.

    Args:
        tensors: such as the inputs and the labels of a training set; on any device, of any dtype.

    Raises:
        TypeError: something that is no tensor.
        ValueError: no tensors.
    """
    if not tensors:
        raise ValueError("tensors = (): must be at least one")
    digest = hashlib.sha256()
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{i}] is a {type(tensor).__name__}: must be a tensor")
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(bytes_of(tensor).data)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes in row-major order, without a copy if it lies so on the CPU."""
    flat: Tensor = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def card_text(
    facts: Mapping[str, Any],
    *,
    data_hash: str | None,
    sampler: torch.optim.Optimizer | None,
    health: object | None,
    notes: Mapping[str, str],
) -> str:
    """The card: what the file says of itself (`facts`), and what the user says of it (as `Draws.write_card` documents).

    Raises:
        TypeError: an argument of another type.
    """
    if data_hash is not None and not isinstance(data_hash, str):
        raise TypeError(f"data_hash is a {type(data_hash).__name__}: must be a str, such as data_hash(inputs, labels)")
    if sampler is not None and not isinstance(sampler, torch.optim.Optimizer):
        raise TypeError(f"sampler is a {type(sampler).__name__}: must be a torch.optim.Optimizer")
    if dataclasses.is_dataclass(health) and not isinstance(health, type):
        health = dataclasses.asdict(health)
    if health is not None and not isinstance(health, Mapping):
        raise TypeError(f"health is a {type(health).__name__}: must be a Health or a mapping")
    if not isinstance(notes, Mapping) or not all(isinstance(text, str) for text in (*notes, *notes.values())):
        raise TypeError(f"notes = {notes!r}: must be a mapping of str to str")
    card = {
        "format": FORMAT,
        "version": VERSION,
        "bkd_fast": version("bkd_fast"),
        "torch": torch.__version__,
        **facts,
        "data_hash": data_hash,
        "sampler": None if sampler is None else _settings(sampler),
        "health": _plain(health),
        "notes": dict(notes),
    }
    return json.dumps(card, indent=2, allow_nan=False) + "\n"


def read_card(path: Path) -> dict[str, Any]:
    """The card in a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no card, or one of another version.
    """
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is truncated, altered or no card: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError(f"{path.name} is no card of draws: its format must be {FORMAT!r}")
    if card.get("version") != VERSION:
        raise ValueError(f"{path.name} is a card of version {card.get('version')!r}: this bkd_fast reads {VERSION}")
    return card


def _settings(sampler: torch.optim.Optimizer) -> dict[str, Any]:
    groups = [{name: value for name, value in group.items() if name != "params"} for group in sampler.param_groups]
    return {"name": type(sampler).__name__, "groups": _plain(groups)}


def _plain(value: Any) -> Any:
    """What JSON has for a value: null for NaN and infinity, lists for tensors and arrays, a description of the rest."""
    if isinstance(value, Tensor):
        if value.numel() > _LISTED:
            return f"{value.dtype} {tuple(value.shape)}, SHA-256 {data_hash(value)}"
        return _plain(value.tolist())
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
