"""Every radius that the noise can draw, 75.5 million, has its correctly rounded root on this GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WORDS = Path(__file__).parent.parent / "kernels" / "words.cu"
RADII = 2**24 + 7 * 2**23 + 1  # distinct |radius word| as float32


def test_every_root():
    pytest.importorskip("cupy", reason="needs CuPy (pip install 'bkd_fast[gpu]')")
    from bkd_fast.kernels.cuda import launch

    device = torch.device("cuda")
    count = torch.zeros((), dtype=torch.int32, device=device)
    first = torch.zeros(16, dtype=torch.int32, device=device)
    arguments = (np.uint32(RADII), count.data_ptr(), first.data_ptr(), np.uint32(len(first)))
    launch(str(WORDS), "bkd::roots_that_differ", (-(-RADII // 256),), (256,), arguments, device)
    found = int(count)
    assert not found, f"{found} roots differ, of the words {first[: min(found, 16)].tolist()}"
