"""The head step's Triton kernels in the interpreter: against the reference, noise bit for bit, faults, no stale memory read."""

from dataclasses import replace

import head_cases
import pytest
import torch

from bkd_fast.errors import NonFiniteError
from bkd_fast.ops import use_backend
from bkd_fast.ops.faults import check_faults
from bkd_fast.ops.head import head_step_

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs these kernels on a GPU", allow_module_level=True)

from bkd_fast.kernels import head


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that torch.empty hands out is NaN, so that what is read before it is written shows; faults are told."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)
    check_faults()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that small heads have several of them, and a row of logits too."""
    monkeypatch.setattr(head, "TILES", ((float("inf"), (16, 32, 4)),))
    monkeypatch.setattr(head, "BLOCK_R", 16)
    monkeypatch.setattr(head, "STATISTICS_TILE", 64)


@pytest.mark.parametrize("changed", head_cases.TERMS, ids=str)
def test_every_term_equals_the_reference(changed):
    head_cases.assert_step_equals_reference(head_cases.case(1, 20, 7, 36, **changed), head_step_)


@pytest.mark.parametrize(
    "chains, rows, classes, features",
    [(1, 1, 2, 1), (2, 17, 17, 36), (1, 33, 33, 37), (1, 16, 16, 32), (1, 5, 65, 33)],
)
def test_every_size_equals_the_reference(chains, rows, classes, features, small_tiles):
    head_cases.assert_step_equals_reference(head_cases.case(chains, rows, classes, features), head_step_)


@pytest.mark.parametrize("classes, features", [(20, 132), (40, 129), (130, 65)])
def test_the_tiles_that_are_launched_equal_the_reference(classes, features):
    head_cases.assert_step_equals_reference(head_cases.case(1, 40, classes, features), head_step_)


@pytest.mark.parametrize("features", [36, 37, 38, 39])
def test_noise_is_that_of_the_langevin_step_bit_for_bit(features, small_tiles):
    """Also where the elements of a class do not begin with a block of the noise."""
    head_cases.assert_noise_is_exact(head_cases.case(2, 5, 7, features), head_step_)


def test_noise_at_the_limits_of_its_coordinates():
    step = head_cases.case(
        2,
        4,
        5,
        6,
        step=2**44 - 1,
        chain=2**20 - 2,
        weight_parameter=2**24 - 1,
        bias_parameter=2**24 - 2,
        seed=2**64 - 1,
    )
    head_cases.assert_noise_is_exact(step, head_step_)


def test_chains_do_not_see_each_other():
    """Bit for bit: a chain's bits do not depend on which others share its launch."""
    together = head_cases.case(3, 18, 10, 20)
    alone = [head_cases.chain_of(together, k) for k in range(3)]
    energy, _ = head_step_(together)
    for k, one in enumerate(alone):
        energy_alone, _ = head_step_(one)
        torch.testing.assert_close(energy[k], energy_alone[0], rtol=1e-6, atol=0)  # the logits are torch's product
        torch.testing.assert_close(together.weight[k], one.weight[0], rtol=0, atol=3e-7)
        torch.testing.assert_close(together.bias[k], one.bias[0], rtol=0, atol=3e-7)


def test_masked_classes_get_no_gradient():
    step = head_cases.case(2, 20, 10, 36, sigma=0.0, decay=0.0)
    step.bias[:, 2] = -torch.inf
    step.teacher[:, 2] = -torch.inf
    step.target[step.target == 2] = 3
    before = step.weight.clone()
    head_cases.assert_step_equals_reference(step, head_step_)
    assert torch.equal(step.weight[:, 2], before[:, 2])


FAULTS = {
    "target": (lambda s: s.target[5:6].fill_(10), ValueError, r"target\[5\] = 10: must be a class"),
    "teacher": (lambda s: s.teacher[5, 3:4].fill_(torch.nan), NonFiniteError, r"teacher_logits\[5\] = \["),
    "no teacher": (lambda s: s.teacher[5].fill_(-torch.inf), NonFiniteError, "at least one class"),
    "infinite teacher": (lambda s: s.teacher[5, 1:2].fill_(torch.inf), NonFiniteError, r"teacher_logits\[5\] = \["),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_row_that_cannot_be_used_takes_no_part_and_is_told(name):
    spoil, error, message = FAULTS[name]
    step = head_cases.case(2, 20, 10, 36, sigma=0.0, decay=0.0)
    others = [i for i in range(20) if i != 5]
    expected = replace(
        head_cases.copy(step),
        x=step.x[others],
        target=step.target[others],
        teacher=step.teacher[others],
        lr=0.1 * 19 / 20,
    )
    spoil(step)
    energy, nonfinite = head_step_(step)
    assert energy.isnan().all() and not nonfinite.any()
    with use_backend("reference"):
        head_step_(expected)
    torch.testing.assert_close(step.weight, expected.weight, rtol=0, atol=3e-7)
    torch.testing.assert_close(step.bias, expected.bias, rtol=0, atol=3e-7)
    with pytest.raises(error, match=message):
        check_faults()
    check_faults()  # told once


def test_masked_classes_that_are_asked_for_are_told():
    for spoil, message in (
        (lambda s: None, "teacher_logits.* must give no probability to a class"),
        (lambda s: s.teacher[:, 2].fill_(-torch.inf), r"target\[.*must not be on a class"),
    ):
        step = head_cases.case(1, 12, 10, 8)
        step.bias[:, 2] = -torch.inf
        step.target.fill_(2)
        spoil(step)
        energy, _ = head_step_(step)
        assert energy.isnan().all()
        with pytest.raises(ValueError, match=message):
            check_faults()


def test_a_feature_that_is_not_finite_leaves_its_weights_where_they_are():
    """Its row has no logits; the gradient of that feature's weights is 0 times NaN: they keep their values, the rest moves."""
    step = head_cases.case(2, 20, 10, 36)
    step.x[4, 7] = torch.nan
    before = step.weight.clone()
    _, nonfinite = head_step_(step)
    assert nonfinite.tolist() == [True, False]
    moved = step.weight != before
    assert not moved[..., 7].any() and moved[..., :7].all() and moved[..., 8:].all()
    with pytest.raises(NonFiniteError, match=r"logits\[4\]: must be finite"):
        check_faults()


def test_gradients_that_overflow_leave_their_weights_where_they_are():
    step = head_cases.case(1, 20, 10, 36, label_weight=300.0, target=torch.zeros(20, dtype=torch.int64))
    step.x[:, 7] = 3e38
    step.weight[:, :, 7] = 0.0
    before = step.weight.clone()
    _, nonfinite = head_step_(step)
    assert nonfinite.tolist() == [True, False]
    kept = step.weight == before
    assert kept[0, 0, 7] and not kept[..., :7].any() and step.weight.isfinite().all()


@pytest.mark.parametrize("capability", [80, 90])
def test_weights_move_16_bytes_at_a_time(compiled, capability):
    """The budget of variants_head.py is the loop's; this is the end of the kernel, where the weights are stepped."""
    for variant in ("step, 1000 classes", "step, 1024 classes, bf16"):
        code = compiled.code("head", variant, capability)
        stores = code.whole.widths("STG")  # the weights; a bias, two flags
        assert code.whole.widths("LDG")[16] >= 8 and set(code.whole.widths("LDG")) == {16}, variant
        assert stores[16] == 8 and stores[4] + stores[1] == 3, (variant, stores)
