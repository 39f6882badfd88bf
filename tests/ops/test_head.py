"""The head step against its float64 reference: terms, dtypes, sizes, chains, noise bit for bit, and what bad arguments change."""

from dataclasses import replace

import head_cases
import pytest
import torch

from bkd_fast.errors import NonFiniteError
from bkd_fast.ops import use_backend
from bkd_fast.ops.head import HeadStep, head_step_


@pytest.mark.parametrize("changed", head_cases.TERMS, ids=str)
def test_every_term_equals_the_reference(changed, isa):
    case = head_cases.case(**changed)
    head_cases.assert_step_equals_reference(case, head_step_)


@pytest.mark.parametrize(
    "chains, rows, classes, features", [(1, 1, 2, 1), (3, 33, 10, 64), (2, 70, 100, 37), (5, 8, 1000, 130)]
)
def test_every_size_equals_the_reference(chains, rows, classes, features, isa, two_threads):
    case = head_cases.case(chains, rows, classes, features)
    head_cases.assert_step_equals_reference(case, head_step_)


@pytest.mark.parametrize("features", [36, 37, 38, 39])
def test_noise_is_that_of_the_langevin_step_bit_for_bit(features, isa):
    head_cases.assert_noise_is_exact(head_cases.case(3, 20, 7, features), head_step_)


def test_chains_do_not_see_each_other(isa):
    """K chains in one step against K steps of one: the noise is equal, and so is the rest within rounding."""
    together = head_cases.case(4, 30, 10, 20)
    alone = [head_cases.chain_of(together, k) for k in range(4)]
    energy, _ = head_step_(together)
    for k, one in enumerate(alone):
        energy_alone, _ = head_step_(one)
        torch.testing.assert_close(energy[k : k + 1], energy_alone)
        torch.testing.assert_close(together.weight[k], one.weight[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(together.bias[k], one.bias[0], rtol=0, atol=1e-6)


def test_rows_without_a_label_keep_their_teacher():
    """All labels ignored is as no labels at all; one that is not ignored moves the step."""
    none, ignored, one = (head_cases.case(sigma=0.0) for _ in range(3))
    ignored.target.fill_(ignored.ignore_index)
    one.target[1:] = one.ignore_index
    head_step_(replace(none, target=None))
    head_step_(ignored)
    head_step_(one)
    assert torch.equal(none.weight, ignored.weight)
    assert not torch.equal(none.weight, one.weight)


def test_masked_classes_get_no_gradient():
    """A bias of -inf masks a class: its weights see the decay alone."""
    case = head_cases.case(sigma=0.0)
    case.bias[:, 2] = -torch.inf
    case.teacher[:, 2] = -torch.inf
    case.target[case.target == 2] = 3
    case = replace(case, decay=0.0)
    before = case.weight.clone()
    head_cases.assert_step_equals_reference(case, head_step_)
    assert torch.equal(case.weight[:, 2], before[:, 2]) and not torch.equal(case.weight[:, 3], before[:, 3])


BAD = [
    ({"weight": lambda c: c.weight.double()}, TypeError, r"weight has dtype torch\.float64"),
    (
        {"weight": lambda c: c.weight[0]},
        ValueError,
        r"weight has shape \(10, 36\): must be \(chains, classes, features\)",
    ),
    ({"weight": lambda c: c.weight.mT.contiguous().mT}, ValueError, "weight has strides"),
    ({"bias": lambda c: c.bias[:, 1:]}, ValueError, r"bias has shape \(3, 9\): must be \(3, 10\)"),
    ({"bias": lambda c: c.bias.half()}, TypeError, r"bias has dtype torch\.float16"),
    ({"x": lambda c: c.x[:, 1:]}, ValueError, r"x has shape \(50, 35\): must be \(rows, 36\)"),
    ({"x": lambda c: c.x[:0]}, ValueError, "at least one row"),
    ({"x": lambda c: c.x.double()}, TypeError, r"x has dtype torch\.float64"),
    ({"x": lambda c: c.x.to("meta")}, ValueError, "x is on meta: must be on cpu"),
    ({"target": lambda c: c.target[1:]}, ValueError, r"target has shape \(49,\): must be \(50,\)"),
    ({"target": lambda c: c.target.int()}, TypeError, r"target has dtype torch\.int32"),
    ({"teacher": lambda c: None}, ValueError, r"teacher = None: prior_strength = 2\.0"),
    ({"teacher": lambda c: c.teacher[:, 1:]}, ValueError, r"teacher has shape \(50, 9\): must be \(50, 10\)"),
    ({"prior_strength": lambda c: -1.0}, ValueError, r"prior_strength = -1\.0"),
    ({"label_weight": lambda c: float("nan")}, ValueError, "label_weight = nan"),
    ({"temperature": lambda c: 0.0}, ValueError, r"temperature = 0\.0"),
    ({"lr": lambda c: float("inf")}, ValueError, "lr = inf"),
    ({"chain": lambda c: 2**20 - 2}, ValueError, r"the last chain = 1048576: must be in \[0, 2\*\*20\)"),
    ({"step": lambda c: 2**44}, ValueError, r"step = 17592186044416"),
    ({"bias_parameter": lambda c: 2**24}, ValueError, "bias_parameter = 16777216"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments_change_nothing(changes, error, message):
    case = head_cases.case()
    before = case.weight.clone(), case.bias.clone()
    with pytest.raises(error, match=message):
        head_step_(replace(case, **{name: change(case) for name, change in changes.items()}))
    assert torch.equal(case.weight, before[0]) and torch.equal(case.bias, before[1])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda c: c.x[3].fill_(torch.nan), NonFiniteError, r"logits\[0, 3\]"),
        (lambda c: c.teacher[4].fill_(torch.inf), NonFiniteError, r"teacher_logits\[4\]"),
        (lambda c: c.target[5:].fill_(10), ValueError, r"target\[5\] = 10: must be a class in \[0, 10\) or ignore_index = -100"),
        # finite logits of finite features whose gradient overflows
        (lambda c: (c.x[:, 7].fill_(3e38), c.weight[:, :, 7].zero_(), c.target.fill_(0)), NonFiniteError, r"gradient of weight"),
    ],
)  # fmt: skip
def test_bad_values_raise_before_anything_moves(spoil, error, message, backend, isa):
    case = replace(head_cases.case(), label_weight=300.0)
    spoil(case)
    before = case.weight.clone(), case.bias.clone()
    with use_backend(backend), pytest.raises(error, match=message):
        head_step_(case)
    assert torch.equal(case.weight, before[0]) and torch.equal(case.bias, before[1])


def test_opcheck_and_compile():
    torch.library.opcheck(torch.ops.bkd_fast.head_step_, head_cases.arguments(head_cases.case()))
    eager, compiled = head_cases.case(), head_cases.case()
    step = torch.compile(lambda s: torch.ops.bkd_fast.head_step_(*s), fullgraph=True, backend="aot_eager")
    energy, _ = step(head_cases.arguments(compiled))
    expected, _ = head_step_(eager)
    assert torch.equal(energy, expected) and torch.equal(compiled.weight, eager.weight)


def test_arguments_are_in_the_order_of_the_schema():
    names = [argument.name for argument in torch.ops.bkd_fast.head_step_.default._schema.arguments]
    assert names == list(HeadStep.__dataclass_fields__)
