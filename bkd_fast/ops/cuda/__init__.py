"""The `cuda` backend: csrc/cuda compiled by NVRTC through CuPy at first use, launched on torch's current stream."""

from importlib import import_module

from bkd_fast.ops.gpu import why_not
from bkd_fast.ops.registry import Backend, add_backend

OPERATIONS: tuple[str, ...] = ()


def _load() -> None:
    for operation in OPERATIONS:
        import_module(f"bkd_fast.ops.cuda.{operation}")


add_backend(Backend("cuda", ("cuda",), lambda: why_not("cupy"), _load))
