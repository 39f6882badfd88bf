"""The `cuda` backend: csrc/cuda compiled by NVRTC through CuPy at first use, launched on torch's current stream."""

from importlib import import_module

from bkd_fast.ops.gpu import why_not
from bkd_fast.ops.registry import Backend, add_backend

OPERATIONS: tuple[str, ...] = ("langevin", "predictive", "sketch")


def _missing() -> str | None:
    missing = why_not("cupy")
    if missing is None:
        from cupy.cuda import nvrtc

        try:
            nvrtc.getVersion()
        except (ImportError, OSError, RuntimeError) as error:
            return f"NVRTC, which compiles the kernels, cannot be loaded ({error}): pip install 'nvidia-cuda-nvrtc>=13'"
    return missing


def _load() -> None:
    for operation in OPERATIONS:
        import_module(f"bkd_fast.ops.cuda.{operation}")


add_backend(Backend("cuda", ("cuda",), _missing, _load))
