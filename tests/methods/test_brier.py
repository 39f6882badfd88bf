"""The Brier loss: its value against scikit-learn, its gradient, its minimum."""

import pytest
import torch

from bkd_fast.methods.brier import brier_loss


def _case(rows=30, classes=5):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    soft = torch.randn(rows, classes, generator=generator, dtype=torch.float64).softmax(1)
    return logits, torch.arange(rows) % classes, soft


def test_it_is_the_brier_score_of_hard_labels():
    from sklearn.metrics import brier_score_loss

    logits, hard, _ = _case()
    expected = brier_score_loss(hard.numpy(), logits.softmax(1).numpy(), labels=range(5), scale_by_half=False)
    assert float(brier_loss(logits, hard)) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_gradient_is_twice_q_times_the_centred_residual(kind):
    logits, hard, soft = _case()
    target = hard if kind == "hard" else soft
    z = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(brier_loss(z, target, reduction="sum"), z)
    q = logits.detach().softmax(1)
    s = q - (torch.nn.functional.one_hot(hard, 5) if kind == "hard" else soft)
    torch.testing.assert_close(gradient, 2 * q * (s - (q * s).sum(1, keepdim=True)), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda t: brier_loss(t, target), (z,))


def test_it_is_proper():
    """Expected over labels of law p, an answer q costs |q - p|^2 more than p does."""
    logits, _, p = _case()

    def expected(answer):
        each = [brier_loss(answer, torch.full((30,), c), reduction="none") for c in range(5)]
        return (p * torch.stack(each, 1)).sum(1)

    excess = expected(logits) - expected(p.log())
    torch.testing.assert_close(excess, (logits.softmax(1) - p).square().sum(1), rtol=0, atol=1e-14)
    assert float(brier_loss(p.log(), p)) == pytest.approx(0, abs=1e-14)


def test_reductions():
    logits, hard, _ = _case()
    each = brier_loss(logits, hard, reduction="none")
    assert each.shape == (30,) and bool((each >= 0).all()) and bool((each <= 2).all())
    torch.testing.assert_close(brier_loss(logits, hard), each.mean())
    torch.testing.assert_close(brier_loss(logits, hard, reduction="sum"), each.sum())


@pytest.mark.parametrize(
    ("target", "reduction", "message"),
    [
        (torch.zeros(4, dtype=torch.long), "mean", r"target has shape \(4,\): must be \(30,\) or \(30, 5\)"),
        (torch.full((30,), 5), "mean", r"target has classes from 5 to 5: must be in \[0, 5\)"),
        (torch.zeros(30, dtype=torch.long), "median", "reduction = 'median'"),
    ],
)
def test_what_is_refused(target, reduction, message):
    with pytest.raises(ValueError, match=message):
        brier_loss(_case()[0], target, reduction=reduction)
