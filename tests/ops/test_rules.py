"""The rules of every sampler, and chains in one launch, against the exact reference, bit for bit."""

import itertools

import pytest
import torch
from rule_cases import OWN, assert_same_bits, compare, real_of, run_rule, tensors_of

from bkd_fast.ops.langevin import DTYPES, LangevinStep, langevin_step_
from bkd_fast.ops.rounding import noise_table
from bkd_fast.ops.rules import RULES, bytes_per_parameter


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rule_equals_the_reference(rule, dtype, isa, two_threads):
    compare(rule, dtype)
    compare(rule, dtype, decay=0.0, center=False, moments=False, check=False)
    compare(rule, dtype, decay=0.1, center=False, moments=False, sigma=0.0)
    if dtype.itemsize == 2:
        compare(rule, dtype, master=True)


CHAINS = [(3, 5), (3,), (3, 0), (3, 40, 7), (3, 40_001), (3, 1000)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chains_in_one_launch_are_the_chains_alone(rule, dtype, isa, two_threads):
    """Bit for bit, each with numbers of its own."""
    shapes, first = CHAINS, [0, 1, 0, 3, 2**34 - 1000, 2]
    real = real_of(dtype)
    numbers = [
        [0.01 * (k + 1), 0.1, 0.0 if k == 1 and rule != "sgld" else 0.02 * (k + 1), *OWN[rule]] for k in range(3)
    ]
    scalars = torch.tensor(numbers, dtype=real)
    options = {"center": False, "shapes": shapes, "master": dtype == torch.bfloat16}
    together = run_rule(rule, dtype, first_elements=first, chains=3, scalars=scalars, **options)
    alone = []
    for k in range(3):
        theta, whole = [t[k].clone() for t in tensors_of(shapes, dtype, 1)], tensors_of(shapes, dtype, 2)
        whole[3].view(-1)[5], whole[4].view(-1)[-1] = torch.nan, -torch.inf
        gradient = [t[k].clone() for t in whole]
        states = [[t[k].abs().clone() for t in tensors_of(shapes, real, 3 + n)] for n in range(RULES[rule].states)]
        mean, m2 = ([t[k].clone() for t in tensors_of(shapes, real, seed)] for seed in (6, 7))
        masters = [t[k].clone() for t in tensors_of(shapes, torch.float32, 8)] if options["master"] else []
        flags = torch.zeros(len(theta), dtype=torch.bool)
        lr, decay, sigma, *own = scalars[k].tolist()
        for step in range(2):
            langevin_step_(
                LangevinStep(
                    theta, gradient, [], mean, m2, flags, lr, decay, sigma, 2**63 + 5, 2 + k, 2**32 - 1 + step,
                    range(3, 3 + len(theta)), first, 3 + step, masters, rule=rule, first=(*states, [], [])[0],
                    second=(*states, [], [])[1], own=own,
                )
            )  # fmt: skip
        alone.append([*theta, *itertools.chain(*states), *mean, *m2, *masters])
    assert_same_bits(together[:-1], [torch.stack(parts) for parts in zip(*alone, strict=True)])
    assert together[-1].tolist() == [False, False, False, True, True, False]


def test_chains_round_stochastically_with_a_table_each(isa):
    theta = torch.ones(2, 1000, dtype=torch.bfloat16)
    sigmas = torch.tensor([1e-4, 3e-2], dtype=torch.float64)
    table = torch.stack([noise_table(float(sigma), torch.bfloat16) for sigma in sigmas])
    scalars = torch.stack([torch.full((2,), 0.1), torch.zeros(2), sigmas.float()], dim=1)
    settings = {"parameters": [0], "first_elements": [0], "draws": 0, "seed": 1, "step": 0}
    nothing = {"center": (), "mean": (), "m2": (), "nonfinite": None}

    def step(tensor, chain, **numbers):
        langevin_step_(
            LangevinStep([tensor], [torch.zeros_like(tensor)], chain=chain, **settings, **nothing, **numbers)
        )

    expected = theta.clone()
    for k in range(2):
        lr, decay, sigma = scalars[k].tolist()
        step(expected[k], k, lr=lr, decay=decay, sigma=sigma, noise_table=table[k])
    step(theta, 0, lr=0.1, decay=0.0, sigma=1.0, chains=2, scalars=scalars, noise_table=table)
    assert torch.equal(theta, expected) and not torch.equal(theta[0], theta[1])


def test_rules_and_bytes_are_those_of_the_compiled_kernels():
    """theta and states twice, the gradient once."""
    from bkd_fast import _native as native

    counted = native.rules()
    assert counted == {name: (rule.states, rule.own) for name, rule in RULES.items()}
    for name, (states, _) in counted.items():
        for dtype, size in ((torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2)):
            assert bytes_per_parameter(name, size) == 3 * dtype.itemsize + 2 * real_of(dtype).itemsize * states


STEP = {
    "lr": 0.1, "decay": 0.0, "sigma": 0.1, "seed": 0, "chain": 0, "step": 0, "parameters": [0], "first_elements": [0],
    "center": (), "mean": (), "m2": (), "nonfinite": None, "draws": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rule": "adagrad"}, ValueError, "rule = 'adagrad': must be one of"),
        ({"rule": "sghmc", "own": [0.9, 1.0]}, ValueError, "first has 0 tensors"),
        ({"rule": "sghmc", "first": [torch.zeros(4)], "own": [0.9]}, ValueError, "own has 1 numbers"),
        ({"rule": "sgld", "first": [torch.zeros(4)]}, ValueError, "first has 1 tensors"),
        ({"rule": "sghmc", "first": [torch.zeros(4).double()], "own": [0.9, 1.0]}, TypeError, r"first\[0\] has dtype"),
        ({"chains": 3}, ValueError, r"theta\[0\] has shape \(4,\).*leading\s+axis of 3 chains"),
        ({"chains": 4, "chain": 2**20 - 2}, ValueError, "chains = 4 from chain 1048574"),
        ({"chains": 4, "scalars": torch.zeros(3, 3)}, ValueError, r"scalars has shape \(3, 3\)"),
    ],
)
def test_bad_arguments_change_nothing(change, error, message):
    theta = [torch.ones(4)]
    with pytest.raises(error, match=message):
        langevin_step_(LangevinStep(theta, [torch.ones(4)], **{**STEP, **change}))
    assert torch.equal(theta[0], torch.ones(4))
