"""torchvision beside a torch without CUDA: its compiled operators cannot be loaded then, and its import wants their names.

None of them is used by transforms, data sets or classification models.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch


def make_importable() -> None:
    """So that `import torchvision` works from here on; skips the importing test file where there is none."""
    found = importlib.util.find_spec("torchvision")
    if found is None:
        pytest.skip("torchvision is not installed: pip install 'bkd_fast[images]'", allow_module_level=True)
    if torch.version.cuda is not None:
        return
    text = (Path(found.origin).parent / "_meta_registrations.py").read_text()
    patterns = (r'register_fake\("torchvision::(\w+)"\)', r'register_meta\("(\w+)"')
    fakes, metas = (re.findall(pattern, text) for pattern in patterns)
    for name in {*fakes, *metas}:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
