"""The machine code of every GPU kernel, compiled once per session in a process where Triton is not interpreted."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import file_name

HERE = Path(__file__).parent


class Compiled:
    """What compiled.py makes of the variants, an operation's at its first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reports: dict[str, list[dict]] = {}

    def reports(self, operation: str) -> list[dict]:
        """For each variant of variants_<operation>.py and each architecture: a summary, and what it breaks of its budget."""
        if operation not in self._reports:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            command = [sys.executable, str(HERE / "compiled.py"), "--json", "--sass", str(self.directory), operation]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            self._reports[operation] = [json.loads(line) for line in done.stdout.splitlines()]
        return self._reports[operation]

    def code(self, operation: str, variant: str, capability: int):
        """The MachineCode of a variant."""
        self.reports(operation)
        return pickle.loads((self.directory / f"{file_name(operation, variant, capability)}.pickle").read_bytes())


@pytest.fixture(scope="session")
def nvrtc():
    """Skips where CUDA sources cannot be compiled."""
    pytest.importorskip("cupy", reason="needs CuPy, which finds NVRTC (pip install 'bkd_fast[gpu]')")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"needs NVRTC (pip install nvidia-cuda-nvrtc): {error}")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, nvrtc):
    pytest.importorskip("triton", reason="needs Triton's compiler and its disassembler (pip install 'bkd_fast[gpu]')")
    return Compiled(tmp_path_factory.mktemp("compiled"))
