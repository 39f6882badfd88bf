"""Compiling csrc/cuda: what is kept on disk, what a failure says, that every instance of the step compiles."""

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("cupy", reason="needs CuPy, which finds NVRTC (pip install 'bkd_fast[gpu]')")

from sass import CudaVariant

from bkd_fast.errors import KernelError
from bkd_fast.kernels import cuda
from bkd_fast.ops.cuda.langevin import find_instance_of, instance_of
from bkd_fast.ops.langevin import DTYPES

pytestmark = pytest.mark.usefixtures("nvrtc")

SMALL = find_instance_of(torch.float32)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    return tmp_path / "bkd_fast"


def test_a_kernel_is_compiled_once_and_kept(cache, monkeypatch):
    first = cuda.build("langevin.cu", SMALL, 90)
    (kept,) = cache.iterdir()
    monkeypatch.setattr(cuda, "_compile", lambda *_: pytest.fail("compiled again"))
    assert cuda.build("langevin.cu", SMALL, 90) == first
    assert [*cache.iterdir()] == [kept]


def test_another_architecture_source_or_option_is_another_file(cache, tmp_path, monkeypatch):
    copy = tmp_path / "copy.cu"
    text = (cuda.SOURCES / "cuda" / "langevin.cu").read_text()
    copy.write_text(text)
    cuda.build(str(copy), SMALL, 90)
    cuda.build(str(copy), SMALL, 80)
    copy.write_text(text + "// changed\n")
    cuda.build(str(copy), SMALL, 90)
    monkeypatch.setattr(cuda, "OPTIONS", (*cuda.OPTIONS, "-lineinfo"))
    cuda.build(str(copy), SMALL, 90)
    assert len([*cache.iterdir()]) == 4


def test_processes_that_compile_at_once_agree(cache):
    code = f"from bkd_fast.kernels import cuda; print(len(cuda.build('langevin.cu', {SMALL!r}, 90).image))"
    with ThreadPoolExecutor(2) as pool:
        sizes = [*pool.map(lambda _: subprocess.check_output([sys.executable, "-c", code]), range(2))]
    assert len({*sizes}) == 1
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


def test_without_a_place_to_keep_it_a_kernel_still_compiles(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))  # a directory cannot be made there
    assert cuda.build("langevin.cu", SMALL, 90).image.startswith(b"\x7fELF")


def test_a_refusal_names_kernel_architecture_and_reason(cache, tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text("template <class T> __global__ void twice(T* x) { *x = 2 * y; }\n")
    with pytest.raises(
        KernelError, match=r'twice<float> .*broken\.cu was not compiled for sm_90: (?s:.*)"y" is undefined'
    ):
        cuda.build(str(broken), "twice<float>", 90)
    with pytest.raises(KernelError, match=r"find_nonfinite<float> .* sm_12: .*gpu-architecture"):
        cuda.build("langevin.cu", SMALL, 12)
    assert not cache.exists()


def test_nvrtc_that_is_missing_is_named(cache, monkeypatch):
    def createProgram(*_):
        raise RuntimeError("libnvrtc is not here")

    monkeypatch.setattr(cuda.nvrtc, "createProgram", createProgram)
    with pytest.raises(KernelError, match="not compiled for sm_90: libnvrtc is not here"):
        cuda.build("langevin.cu", SMALL, 90)


def instances():
    for dtype, (noisy, prior, moments) in itertools.product(DTYPES, itertools.product((False, True), repeat=3)):
        yield instance_of(dtype, "nearest", noisy, prior, moments)
        if dtype.itemsize == 2:
            yield instance_of(dtype, "master", noisy, prior, moments)
            if noisy:
                yield instance_of(dtype, "stochastic", noisy, prior, moments)


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("instance", [*instances(), *map(find_instance_of, DTYPES)])
def test_every_instance_compiles_without_spills(instance, capability):
    pytest.importorskip("triton", reason="needs the disassembler of Triton's wheel (pip install 'bkd_fast[gpu]')")
    code = CudaVariant(instance, "langevin.cu", instance).compile(capability)
    assert code.spills == code.local == code.stack == 0
    sixteen_bits_and_moments = ("BFloat16" in instance or "Half" in instance) and instance.endswith("true>")
    assert code.registers <= (80 if sixteen_bits_and_moments else 64)
