"""Where Triton kernels are launched: on the device of their tensors, and with errors that say which kernel was not compiled."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType

import torch
from torch import Tensor

from bkd_fast.errors import KernelError


@contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """The device of `tensor` is the current one, as Triton wants it; a CPU, in the interpreter, needs nothing.

    Raises:
        KernelError: Triton, or ptxas below it, could not compile or load a kernel that is launched here; names the kernel and the
            architecture, and quotes the compiler.
    """
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        try:
            yield
        except Exception as error:
            name = _being_compiled(error.__traceback__)
            if name is None:
                raise
            where = "sm_{}{}".format(*torch.cuda.get_device_capability(tensor.device)) if tensor.is_cuda else "a CPU"
            raise KernelError(f"the Triton kernel {name} was not compiled for {where}: {error}") from error


def _being_compiled(traceback: TracebackType | None) -> str | None:
    """The kernel that Triton was compiling or loading when an error arose; None where it was doing something else."""
    kernel = None
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_globals.get("__name__") == "triton.runtime.jit" and frame.f_code.co_name == "run":
            kernel = getattr(frame.f_locals.get("self"), "__name__", None)
        if frame.f_code.co_name in ("_do_compile", "_init_handles"):
            return kernel
        traceback = traceback.tb_next
    return None
