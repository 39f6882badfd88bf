"""Builds the CPU extension `bkd_fast._native` with CMake; everything else about the package is in pyproject.toml.

The build needs CMake, pybind11 and a C++17 compiler, and neither torch nor CUDA. Without a compiler, or with
BKD_FAST_SKIP_CMAKE=1, the package still installs and runs on its reference backend; it then says so, here and at import.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake; a failure leaves a package without compiled kernels rather than no package."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.run_cmake(target)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("BKD_FAST_REQUIRE_CMAKE") == "1":
                raise
            print(
                f"WARNING: bkd_fast: the compiled CPU kernels were not built ({error}). The package is installed with "
                "the slow reference backend only. It needs CMake >= 3.22 and a C++17 compiler (Debian: apt install g++ cmake).",
                file=sys.stderr,
            )

    def run_cmake(self, target: Path) -> None:
        import pybind11

        cmake = shutil.which("cmake") or cmake_of_the_python_package()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        if not (build / "CMakeCache.txt").exists() and shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        built = next(build.glob("_native*.so"))
        target.parent.mkdir(parents=True, exist_ok=True)
        # never write over a mapped library: a running process keeps the old file
        copy = target.with_suffix(".new")
        shutil.copyfile(built, copy)
        copy.replace(target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def cmake_of_the_python_package() -> str:
    """The `cmake` wheel's binary when its script is not on PATH (as with --no-build-isolation in some environments)."""
    try:
        import cmake
    except ImportError as error:
        raise OSError("cmake was not found") from error
    return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")


skip = os.environ.get("BKD_FAST_SKIP_CMAKE") == "1"
setup(
    ext_modules=[] if skip else [Extension("bkd_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
