"""The one dispatch point: which implementation of an operation runs for a device.

Each backend implements the operations under the same names and registers them here::

    @implements("normal_", "cpp")
    def normal_(out, stream, offset): ...

`find("normal_", device)` returns the one to run there: the user's choice, else the measured winner, else the first that can.
A choice is `use_backend(...)` around the call, or the environment variable BKD_FAST_BACKEND; it concerns the devices that
the chosen backend serves and the operations that it has, and leaves the others as they are.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from bkd_fast.errors import BackendUnavailableError, warn


@dataclass(frozen=True)
class Backend:
    """A set of implementations.

    Attributes:
        name: what it is called in `use_backend`.
        devices: the device types that it serves.
        diagnose: what is missing here and how to get it, or None. Asked once, and only when a device of its needs it: asking
            may start CUDA.
        load: imports its implementations; called before their first use, so that `import bkd_fast` stays light.
        on_request: never taken unless it is chosen.
    """

    name: str
    devices: tuple[str, ...]
    diagnose: Callable[[], str | None] = lambda: None
    load: Callable[[], object] = lambda: None
    on_request: bool = False

    @cached_property
    def missing(self) -> str | None:
        """Why it cannot run here, and what to do; None where it can."""
        missing = self.diagnose()
        if missing is None:
            self.load()
        return missing


# Where more than one backend implements an operation for a device, the first here that can run is taken; this is the
# benchmarks' verdict (docs/performance.md), not taste. Operations that are not named take the order of `backends()`.
_SKETCH = ("update_", "sort_", "quantile", "histogram", "deviance_quantile", "merge_")
WINNERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("predictive_update_", "cuda"): ("cuda", "triton"),
    **{(f"sketch_{o}", "cuda"): ("cuda", "triton") for o in _SKETCH},
}

_BACKENDS: dict[str, Backend] = {}
_IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {}
_ENVIRONMENT = os.environ.get("BKD_FAST_BACKEND")
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


def check_backend(name: str, spelled: str = "backend") -> None:
    """Raise if there is no such backend (ValueError), or if it cannot run here (BackendUnavailableError)."""
    if name not in _BACKENDS:
        raise ValueError(f"{spelled} = {name!r}: must be one of {sorted(_BACKENDS)}")
    missing = _BACKENDS[name].missing
    if missing is not None:
        raise BackendUnavailableError(f"{spelled} = {name!r} cannot run here: {missing}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block, run operations on the backend `name` ("cpp", "triton", "cuda", "reference") on devices that it serves.

    An operation that it does not have (`cuda` has no KD energy, say) runs where it would without the choice.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: it cannot run here.
    """
    check_backend(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def find(operation: str, device: torch.device) -> Callable[..., Any]:
    """The implementation of `operation` for tensors on `device`.

    Raises:
        BackendUnavailableError: no backend serves that device.
        ValueError: BKD_FAST_BACKEND names no backend.
    """
    return _find(operation, device.type, _chosen.get())


@cache  # a step of a small model is little more than look-ups
def _find(operation: str, device: str, chosen: str | None) -> Callable[..., Any]:
    if chosen is None and _ENVIRONMENT:
        check_backend(_ENVIRONMENT, "BKD_FAST_BACKEND")
        chosen = _ENVIRONMENT
    candidates = WINNERS.get((operation, device), tuple(_BACKENDS))
    if chosen is not None and (operation, chosen) in _IMPLEMENTATIONS and device in _BACKENDS[chosen].devices:
        candidates = (chosen,)
    for name in candidates:
        backend = _BACKENDS[name]
        if backend.on_request and chosen is None:
            continue
        if device in backend.devices and backend.missing is None:
            function = _IMPLEMENTATIONS.get((operation, name))
            if function is not None:
                if name == "reference" and chosen is None:
                    _warn_slow()
                return function
    raise BackendUnavailableError(_why_not(operation, device, candidates))


def _why_not(operation: str, device: str, candidates: tuple[str, ...]) -> str:
    """What each backend lacks."""
    reasons = []
    for name in candidates:
        backend = _BACKENDS[name]
        if device not in backend.devices:
            continue
        reasons.append(f"{name}: {backend.missing or 'it does not have this operation'}")
    if not reasons:
        served = sorted({served for backend in _BACKENDS.values() for served in backend.devices})
        return f"{operation} has no backend for tensors on {device}: must be on one of {served}"
    return f"{operation} cannot run for tensors on {device}. " + "; ".join(reasons)


def _warn_slow() -> None:
    """Once per process: the reference is an oracle, not an engine."""
    global _warned_slow
    if not _warned_slow:
        _warned_slow = True
        warn(
            "bkd_fast runs on its reference backend, which is correct and slow: the compiled CPU kernels are missing "
            f"({_BACKENDS['cpp'].missing})."
        )
