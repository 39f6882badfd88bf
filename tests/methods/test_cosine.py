"""Cosine-similarity distillation: what it does not see, its temperatures, its gradients, and that students learn by it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from bkd_fast.methods.cosine import class_cosine_loss, cosine_temperatures, cosine_weighted_kl


def _pair(rows=12, classes=5):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def test_the_class_loss_compares_columns_of_probabilities():
    student, teacher = _pair()
    q, p = student.softmax(1), teacher.softmax(1)
    cosines = [float((q[:, c] * p[:, c]).sum() / (q[:, c].norm() * p[:, c].norm())) for c in range(5)]
    assert float(class_cosine_loss(student, teacher)) == pytest.approx(1 - sum(cosines) / 5, abs=1e-12)
    assert float(class_cosine_loss(teacher, teacher)) == pytest.approx(0, abs=1e-12)


def test_the_class_loss_does_not_see_a_classs_scale():
    """p_.1 of every row halved, in favour of class 2 alone: the columns of the others keep their direction."""
    _, teacher = _pair(classes=3)
    teacher[:, 2] = -torch.inf
    moved = teacher.softmax(1)
    moved[:, 2] = moved[:, 1] / 2
    moved[:, 1] /= 2
    teacher = teacher.softmax(1) + 0
    cosines = functional.cosine_similarity(moved, teacher, dim=0)
    torch.testing.assert_close(cosines[:2], torch.ones(2, dtype=torch.float64))
    loss = class_cosine_loss(moved.log(), teacher.log())
    assert float(loss) == pytest.approx(1 / 3, abs=1e-6)  # class 2 alone, which the teacher never gives


def test_temperatures_fall_from_the_highest_to_the_lowest_as_rows_agree():
    student, teacher = _pair()
    student[0] = teacher[0] + 7  # alike
    student[1], teacher[1] = torch.tensor([50.0, 0, 0, 0, 0]), torch.tensor([0, 50.0, 0, 0, 0])  # nothing in common
    temperatures = cosine_temperatures(student, teacher, 2.0, 6.0)
    assert temperatures[0].item() == pytest.approx(2, abs=1e-9) and temperatures[1].item() == pytest.approx(6, abs=1e-9)
    similarity = functional.cosine_similarity(student.softmax(1), teacher.softmax(1), dim=1)
    assert torch.equal(temperatures.argsort(), similarity.argsort(descending=True))
    assert bool(((temperatures >= 2 - 1e-12) & (temperatures <= 6 + 1e-12)).all())


def test_the_weighted_divergence_with_one_temperature_is_hintons():
    student, teacher = _pair()
    hinton = 9 * functional.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(cosine_weighted_kl(student, teacher, 3.0, 3.0), hinton)


def test_the_gradient_takes_temperatures_and_teacher_as_data():
    """T_i (softmax(z_i / T_i) - softmax(t_i / T_i)) / rows."""
    student, teacher = (z.requires_grad_() for z in _pair())
    cosine_weighted_kl(student, teacher, 2.0, 6.0).backward()
    with torch.no_grad():
        scale = cosine_temperatures(student, teacher, 2.0, 6.0).unsqueeze(1)
        expected = scale * ((student / scale).softmax(1) - (teacher / scale).softmax(1)) / len(student)
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-14)
    assert teacher.grad is None
    student = _pair()[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: class_cosine_loss(z, teacher), (student,))
    class_cosine_loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("lowest", "highest", "message"), [(0.0, 2.0, "lowest = 0.0"), (4.0, 2.0, "highest = 2.0"), (1.0, torch.inf, "inf")]
)
def test_temperatures_that_are_refused(lowest, highest, message):
    with pytest.raises(ValueError, match=message):
        cosine_weighted_kl(*_pair(), lowest, highest)


def test_shapes_that_are_refused():
    student, teacher = _pair()
    with pytest.raises(ValueError, match=r"student has shape \(12, 5\) and teacher \(12, 4\)"):
        class_cosine_loss(student, teacher[:, :4])
    with pytest.raises(ValueError, match="must be"):
        cosine_weighted_kl(student[0], teacher[0], 2.0, 6.0)


def test_a_student_of_digits_learns_from_its_teacher_alone():
    """No labels: both terms, scikit-learn's digits."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)) for width in (64, 16))

    def train(network, loss):
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for step in range(300):
            rows = torch.arange(step * 100, step * 100 + 100) % 1200
            optimizer.zero_grad()
            loss(network(x[rows]), rows).backward()
            optimizer.step()

    train(teacher, lambda logits, rows: functional.cross_entropy(logits, y[rows]))
    with torch.no_grad():
        theirs = teacher(x)
    train(
        student,
        lambda logits, rows: (
            class_cosine_loss(logits, theirs[rows]) + cosine_weighted_kl(logits, theirs[rows], 1.0, 4.0)
        ),
    )
    agreement = (student(x[1200:]).argmax(1) == theirs[1200:].argmax(1)).float().mean()
    assert float(agreement) > 0.85
