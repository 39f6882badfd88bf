"""torchvision beside a torch without CUDA: its compiled operators cannot be loaded then, and its import wants their names.

None of them is used by transforms, data sets or classification models.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed: pip install 'bkd_fast[images]'", allow_module_level=True)
if torch.version.cuda is None:
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    text = (folder / "_meta_registrations.py").read_text()
    for name in {
        *re.findall(r'register_fake\("torchvision::(\w+)"\)', text),
        *re.findall(r'register_meta\("(\w+)"', text),
    }:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
