"""The `triton` backend: GPU kernels that need no compiler. Each module hands tensors to the launchers of `bkd_fast.kernels`.

Under Triton's interpreter (TRITON_INTERPRET=1) the same kernels run on CPU tensors, for tests.
"""

import os
from importlib import import_module

from bkd_fast.ops.gpu import why_not
from bkd_fast.ops.registry import Backend, add_backend

OPERATIONS: tuple[str, ...] = ("noise", "langevin", "kd", "head", "predictive", "sketch")

interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def _missing() -> str | None:
    return why_not("triton", needs_gpu=not interpreted)


def _load() -> None:
    for operation in OPERATIONS:
        import_module(f"bkd_fast.ops.triton.{operation}")


add_backend(Backend("triton", ("cpu",) if interpreted else ("cuda",), _missing, _load, on_request=interpreted))
