"""States on disk: a safetensors file and a JSON sidecar that names it, its checksum and what it is. No pickle.

`name.json` is the state: it is replaced in one step, after the tensors are safe on disk under a name of their own
(`name-<checksum>.safetensors`). Whatever fails on the way, an earlier state stays readable.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bkd_fast.errors import StateFileError

VERSION = 1


def save_state(
    path: str | os.PathLike[str], kind: str, state: Mapping[str, Tensor | int], about: Mapping[str, Any]
) -> Path:
    """Write a state; gives the sidecar's path.

    Args:
        path: of the sidecar; ".json" is added where it is missing.
        kind: what the state is of.
        state: tensors and plain integers.
        about: whatever a reader or a loader should know besides, as JSON.

    Raises:
        StateFileError: it cannot be written; an earlier state is intact then.
    """
    sidecar = sidecar_of(path)
    before = _tensor_file(sidecar)
    tensors = {name: value.contiguous().cpu() for name, value in state.items() if isinstance(value, Tensor)}
    unfinished = [sidecar.with_suffix(f".{suffix}.unfinished") for suffix in ("safetensors", "json")]
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished[0])
        checksum = checksum_of(unfinished[0])
        named = sidecar.with_name(f"{sidecar.stem}-{checksum[:16]}.safetensors")
        description = {
            "format": f"bkd_fast.{kind}",
            "version": VERSION,
            "tensors": named.name,
            "bytes": unfinished[0].stat().st_size,
            "sha256": checksum,
            "numbers": {name: value for name, value in state.items() if not isinstance(value, Tensor)},
            **about,
        }
        unfinished[1].write_text(json.dumps(description, indent=2) + "\n")
        for file in unfinished:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        unfinished[0].replace(named)
        unfinished[1].replace(sidecar)
    except (OSError, SafetensorError) as error:
        for file in unfinished:
            if file.exists():
                file.unlink()
        raise StateFileError(f"{sidecar.name} could not be saved: {error}; an earlier state is intact") from error
    if before is not None and before != named:
        before.unlink(missing_ok=True)
    return sidecar


def load_state(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor | int], dict[str, Any]]:
    """(state, sidecar) of what `save_state` wrote; the tensors are mapped from the file, not read.

    Raises:
        FileNotFoundError: there is no sidecar.
        StateFileError: it is of another kind, of a later version, or its tensors are missing, truncated or altered.
    """
    sidecar = sidecar_of(path)
    description = description_of(sidecar, kind, VERSION)
    try:
        name, size, checksum = (description[key] for key in ("tensors", "bytes", "sha256"))
        numbers = {str(key): int(value) for key, value in description["numbers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateFileError(f"{sidecar.name} is incomplete: {error!r}") from error
    file = sidecar.with_name(Path(str(name)).name)
    check_file(file, sidecar, size, checksum)
    return {**load_file(file), **numbers}, description


def description_of(sidecar: Path, kind: str, version: int) -> dict[str, Any]:
    """What a sidecar says.

    Raises:
        FileNotFoundError: there is none.
        StateFileError: it is no JSON, of another kind or another version.
    """
    try:
        description = json.loads(sidecar.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StateFileError(f"{sidecar.name} is no JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != f"bkd_fast.{kind}":
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise StateFileError(f"{sidecar.name} has format {found!r}: must be 'bkd_fast.{kind}'")
    found = description.get("version")
    if found != version:
        later = isinstance(found, int) and found > version
        hint = "; it was written by a later bkd_fast" if later else ""
        raise StateFileError(f"{sidecar.name} has version {found}: must be {version}{hint}")
    return description


def check_file(file: Path, sidecar: Path, size: int, checksum: str | None) -> None:
    """Hold a file against its sidecar: its bytes, and its SHA-256 unless that is None.

    Raises:
        StateFileError: it is missing, truncated or altered.
    """
    if not file.is_file():
        raise StateFileError(f"{sidecar.name} names {file.name}, which is missing")
    if file.stat().st_size != size:
        raise StateFileError(
            f"{file.name} has {file.stat().st_size} bytes: must have {size}; it is truncated or altered"
        )
    if checksum is not None and checksum_of(file) != checksum:
        raise StateFileError(f"{file.name} is altered: its checksum is not the one in {sidecar.name}")


def sidecar_of(path: str | os.PathLike[str]) -> Path:
    """The path, with ".json" where that is missing."""
    path = Path(path)
    return path if path.suffix == ".json" else path.with_name(path.name + ".json")


def checksum_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _tensor_file(sidecar: Path) -> Path | None:
    """What an earlier sidecar names, if there is one."""
    try:
        return sidecar.with_name(Path(json.loads(sidecar.read_text())["tensors"]).name)
    except (OSError, ValueError, KeyError, TypeError):
        return None
