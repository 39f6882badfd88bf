"""What every GPU backend asks of the machine."""

from importlib.util import find_spec

import torch

OLDEST = (8, 0)  # compute capability: Ampere


def why_not(package: str, needs_gpu: bool = True) -> str | None:
    """What is missing for kernels that need the Python package `package`, and how to get it; None for nothing."""
    if find_spec(package) is None:
        return f"the package {package} is not installed (pip install 'bkd_fast[gpu]')"
    if not needs_gpu:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (torch.cuda.is_available() is False)"
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        return f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}: needs {OLDEST[0]}.{OLDEST[1]}"
    return None
