"""Every rule of the Langevin step in Triton, and chains, bit for bit the reference's. Interpreted where there is no GPU."""

import pytest
import torch
from rule_cases import OWN, compare, real_of

from bkd_fast.ops import backends
from bkd_fast.ops.langevin import DTYPES
from bkd_fast.ops.rules import RULES

missing = backends()["triton"].missing
if missing is not None:
    pytest.skip(f"triton: {missing}", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "shapes": [(), (3,), (0,), (7, 5), (1030,), (2, 3, 4, 5)],
    "first_elements": [0, 1, 0, 3, 2**34 - 1000, 0],
    "steps": 1,
}
RULES_WITH_STATE = [rule for rule in RULES if rule != "sgld"]  # whose cases are in test_kernels_langevin.py


@pytest.mark.parametrize("rule", RULES_WITH_STATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rule_equals_the_reference(rule, dtype):
    compare(rule, dtype, "triton", DEVICE, master=dtype.itemsize == 2, **SMALL)
    compare(rule, dtype, "triton", DEVICE, decay=0.0, center=False, moments=False, check=False, sigma=0.0, **SMALL)


CHAINS = {
    "shapes": [(3, 5), (3,), (3, 0), (3, 4, 7), (3, 1033), (3, 100)],
    "first_elements": [0, 1, 0, 3, 2**34 - 1000, 2],
    "steps": 1,
    "center": False,
    "chains": 3,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chains_with_numbers_of_each_equal_the_reference(rule, dtype):
    rows = [[0.01 * (k + 1), 0.1, 0.02 * (k + 1), *OWN[rule]] for k in range(3)]
    scalars = {device: torch.tensor(rows, dtype=real_of(dtype), device=device) for device in {DEVICE, "cpu"}}
    compare(rule, dtype, "triton", DEVICE, master=dtype == torch.bfloat16, scalars=scalars[DEVICE], **CHAINS)
