"""Every rule of the Langevin step on a GPU, and chains with numbers of each: bits equal to the CPU's, by both backends."""

import pytest
import torch
from rule_cases import OWN, assert_same_bits, real_of, run_rule

from bkd_fast.ops import use_backend
from bkd_fast.ops.langevin import DTYPES
from bkd_fast.ops.rules import RULES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CHAINS = {
    "shapes": [(3, 5), (3,), (3, 0), (3, 40, 7), (3, 70_001), (3, 1000)],
    "first_elements": [0, 1, 0, 3, 2**34 - 1000, 2],
    "center": False,
    "chains": 3,
}


def _compare(rule, dtype, scalars=None, **options):
    given = {} if scalars is None else {"scalars": scalars}
    expected = run_rule(rule, dtype, **options, **given)
    if scalars is not None:
        given = {"scalars": scalars.cuda()}
    for backend in ("cuda", "triton"):
        with use_backend(backend):
            assert_same_bits(run_rule(rule, dtype, device="cuda", **options, **given), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rule_gives_the_bits_of_the_cpu(rule, dtype):
    _compare(rule, dtype, master=dtype.itemsize == 2)
    _compare(rule, dtype, center=False, moments=False, check=False, sigma=0.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chains_give_the_bits_of_the_cpu(rule, dtype):
    rows = [[0.01 * (k + 1), 0.1, 0.02 * (k + 1), *OWN[rule]] for k in range(3)]
    _compare(rule, dtype, torch.tensor(rows, dtype=real_of(dtype)), master=dtype == torch.bfloat16, **CHAINS)
