"""The kernels of csrc/cuda: compiled by NVRTC at first use, kept on disk, launched through CuPy on torch's current stream.

    launch("langevin.cu", "bkd::step<float, 0>", grid, block, arguments, device)

A kernel is named by its source and its C++ name, template arguments included; each instance is compiled alone, so that a process
pays only for what it launches. Importing this module needs CuPy and no GPU; `build` needs NVRTC and no GPU.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cupy.cuda import Function, Module, driver, nvrtc

from bkd_fast.errors import KernelError

SOURCES = (
    Path(__file__).parent.parent / "csrc"
)  # beside this folder in the repository and in an installed package alike

# fmad=false: a * b + c stays two roundings unless the source says fma; the noise and the step are specified to the bit
# default-device: the tables of constants in csrc/*.h need no CUDA keyword
OPTIONS = ("-std=c++17", "--fmad=false", "-default-device")

SHARED_BY_DEFAULT = 48 * 1024  # bytes of dynamic shared memory that a kernel may use without asking


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: the cubin, and the name that the kernel has in it."""

    image: bytes
    symbol: str


def build(source: str, instance: str, capability: int) -> Binary:
    """Compile one kernel, or take it from CuPy's cache directory (CUPY_CACHE_DIR, by default ~/.cupy/kernel_cache).

    Args:
        source: file name in csrc/cuda (a test may give the path of another file).
        instance: C++ name of the kernel, with its template arguments.
        capability: compute capability of the GPU, 80 for 8.0.

    Raises:
        KernelError: NVRTC is missing or refuses; names the kernel and the architecture, and quotes the compiler.
    """
    text = (SOURCES / "cuda" / source).read_text()
    kept = _cache() / "bkd_fast" / f"{_fingerprint(text, instance, capability)}.cubin"
    with contextlib.suppress(OSError):
        symbol, image = kept.read_bytes().split(b"\0", 1)
        return Binary(image, symbol.decode())
    binary = _compile(source, text, instance, capability)
    with contextlib.suppress(OSError):  # a directory that cannot be written costs a compilation per process
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(binary.symbol.encode() + b"\0" + binary.image)
        os.replace(file.name, kept)  # at once: other processes see the whole file or none
    return binary


def _compile(source: str, text: str, instance: str, capability: int) -> Binary:
    program = None
    try:
        program = nvrtc.createProgram(text, source, [], [])
        nvrtc.addNameExpression(program, instance)
        nvrtc.compileProgram(program, [f"-arch=sm_{capability}", f"-I{SOURCES}", f"-I{SOURCES / 'cuda'}", *OPTIONS])
        # CuPy hands the image without its trailing zero bytes, which belong to its last section
        return Binary(nvrtc.getCUBIN(program) + bytes(64), nvrtc.getLoweredName(program, instance))
    except (OSError, RuntimeError) as error:  # no NVRTC, or what it says
        log = nvrtc.getProgramLog(program) if program is not None else None
        raise KernelError(
            f"the kernel {instance} of csrc/cuda/{source} was not compiled for sm_{capability}: {log or error}"
        ) from error
    finally:
        if program is not None:
            nvrtc.destroyProgram(program)


def _cache() -> Path:
    """CuPy's directory for compiled kernels; ours lie in a folder of it."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


@cache
def _headers() -> str:
    """A digest of everything a kernel may include."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *(SOURCES / "cuda").glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _fingerprint(text: str, instance: str, capability: int) -> str:
    parts = (_headers(), text, instance, str(capability), *OPTIONS, str(nvrtc.getVersion()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def _load(source: str, instance: str, device: int, shared: int) -> Function:
    """The kernel on the current device, which has the number `device`."""
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            f"the kernel {instance} of csrc/cuda/{source} is not loaded yet and a CUDA graph is being captured: "
            "run the same call once before the capture"
        )
    major, minor = torch.cuda.get_device_capability(device)
    binary = build(source, instance, 10 * major + minor)
    module = Module()
    module.load(binary.image)
    function = module.get_function(binary.symbol)
    if shared > SHARED_BY_DEFAULT:
        driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
    return function


class _Stream(NamedTuple):
    """What CuPy asks of a stream; its own wrapper of another library's is deprecated, and takes longer than a launch."""

    ptr: int


@contextmanager
def launching(device: torch.device) -> Iterator[Callable[..., None]]:
    """Gives a `launch` that needs no device, for many launches: device and current stream are looked up once.

    Args:
        device: where their tensors are.
    """
    with torch.cuda.device(device):
        number, stream = torch.cuda.current_device(), _Stream(torch.cuda.current_stream().cuda_stream)

        def launch_there(
            source: str,
            instance: str,
            grid: tuple[int, ...],
            block: tuple[int, ...],
            arguments: Sequence[Any],
            shared: int = 0,
        ) -> None:
            _load(source, instance, number, shared)(grid, block, arguments, shared_mem=shared, stream=stream)

        yield launch_there


def launch(
    source: str,
    instance: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: Sequence[Any],
    device: torch.device,
    shared: int = 0,
) -> None:
    """Run a kernel on torch's current stream of `device`. Nothing waits for it; CUDA graphs may capture it.

    Args:
        source, instance: which kernel (see `build`).
        grid, block: one to three numbers each.
        arguments: in the kernel's order: int and tensor addresses as 64 bits, NumPy scalars as what they are.
        device: where its tensors are.
        shared: bytes of dynamic shared memory.

    Raises:
        KernelError: it does not compile, or its first launch is inside a capture.
    """
    with launching(device) as launch_there:
        launch_there(source, instance, grid, block, arguments, shared)
