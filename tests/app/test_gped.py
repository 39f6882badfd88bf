"""The masks of the posterior expectation experiments: their size, their place, and what they leave."""

import pytest
import stats
import torch

from bkd_fast.app.experiments.gped import FULL, QUICK, SIDES, masked


@pytest.mark.parametrize("side", SIDES)
def test_a_mask_is_one_square_of_its_share_of_the_image(side):
    images = torch.ones(200, 1, 28, 28)
    found = masked(images, side, torch.Generator().manual_seed(0))
    holes = found[:, 0] == 0
    assert (holes.sum((1, 2)) == side**2).all()
    assert float(f"{side**2 / 28**2:.2f}") == float(SIDES[side])
    for extent in (holes.any(1), holes.any(2)):  # rows and columns without a gap
        assert (extent.sum(1) == side).all() and (extent.diff(dim=1).sum(1) <= 2).all()
    assert images.all()


def test_masks_are_anywhere_with_equal_probability():
    holes = masked(torch.ones(4000, 1, 28, 28), 15, torch.Generator().manual_seed(0))[:, 0] == 0
    for covered in (holes.any(1), holes.any(2)):
        first = covered.int().argmax(1).double()
        assert set(first.tolist()) == set(range(14))
        stats.assert_mean(first.numpy(), 6.5, ((14**2 - 1) / 12) ** 0.5, "first row or column")


def test_students_learn_at_draws_of_the_chain():
    for settings in (FULL, QUICK):
        assert settings.predictive_thin % settings.entropy_thin == 0
        assert (settings.steps - settings.burn_in) // settings.entropy_thin > settings.evaluate
