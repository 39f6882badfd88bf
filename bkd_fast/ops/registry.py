"""The one dispatch point: which implementation of an operation runs for a device.

Each backend implements the operations under the same names and registers them here::

    @implements("normal_", "cpp")
    def normal_(out, stream, offset): ...

`find("normal_", device)` returns the fastest one that can run there. `use_backend("reference")` fixes the choice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from bkd_fast.errors import BackendUnavailableError, warn


@dataclass(frozen=True)
class Backend:
    """A set of implementations: the device types it serves, and what is missing when it cannot run here."""

    name: str
    devices: tuple[str, ...]
    missing: str | None = None


# fastest first, for each device type
_BACKENDS: dict[str, Backend] = {}
_IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {}
_chosen: ContextVar[str | None] = ContextVar("bkd_fast_backend", default=None)
_warned_slow = False


def add_backend(backend: Backend) -> None:
    """Announce a backend; earlier ones are preferred."""
    _BACKENDS[backend.name] = backend


def backends() -> dict[str, Backend]:
    """Every known backend by name, preferred ones first; `.missing` tells why one cannot run here."""
    return dict(_BACKENDS)


def implements(operation: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function is `operation` on `backend`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _IMPLEMENTATIONS[operation, backend] = function
        return function

    return register


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the block on the backend `name` ("cpp" or "reference").

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: it cannot run here.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend = {name!r}: must be one of {sorted(_BACKENDS)}")
    missing = _BACKENDS[name].missing
    if missing is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {missing}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def find(operation: str, device: torch.device) -> Callable[..., Any]:
    """The implementation of `operation` for tensors on `device`.

    Raises:
        BackendUnavailableError: no backend serves that device.
    """
    chosen = _chosen.get()
    for backend in _BACKENDS.values():
        wanted = backend.name == chosen if chosen is not None else backend.missing is None
        if wanted and device.type in backend.devices:
            function = _IMPLEMENTATIONS.get((operation, backend.name))
            if function is not None:
                if backend.name == "reference" and chosen is None:
                    _warn_slow()
                return function
    raise BackendUnavailableError(f"{operation} has no backend for tensors on {device}; backends: {sorted(_BACKENDS)}")


def _warn_slow() -> None:
    """Once per process: the reference is an oracle, not an engine."""
    global _warned_slow
    if not _warned_slow:
        _warned_slow = True
        warn(
            "bkd_fast runs on its reference backend, which is correct and slow: the compiled CPU kernels are missing "
            f"({_BACKENDS['cpp'].missing})."
        )
