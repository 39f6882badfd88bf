"""The `cpp` backend: compiled, vectorised, threaded CPU kernels. Each module hands tensors' addresses to one kernel."""

from importlib import import_module
from typing import Any

import torch

from bkd_fast.ops.registry import Backend, add_backend

__all__ = ["native", "threads"]

native: Any = None
missing: str | None
try:
    native = import_module("bkd_fast._native")
except ImportError as error:
    missing = (
        f"{error}; reinstall with a C++17 compiler and CMake at hand (Debian: apt install g++ cmake; "
        "pip install --force-reinstall --no-deps bkd_fast) and without BKD_FAST_SKIP_CMAKE"
    )
else:
    missing = None
add_backend(Backend("cpp", ("cpu",), lambda: missing))


def threads() -> int:
    """Threads for a kernel: torch's own setting, so that one knob serves both."""
    return torch.get_num_threads()
