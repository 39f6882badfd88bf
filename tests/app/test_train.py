"""Training the two point estimates, and the teacher's cache."""

import pytest
import torch
from torch.nn import functional

import bkd_fast as bkd
from bkd_fast.app import config, data, train

TEACHER = config.Teacher(model=config.MLP(hidden=[32]), epochs=30, batch_size=50, lr=5e-3)


@pytest.fixture(scope="module")
def images():
    return data.load(config.Data(name="digits", train_size=300, test_size=200), seed=0)


def test_training_lowers_the_loss_that_it_reports(images, tmp_path):
    losses = []
    teacher = train.train_teacher(
        images, TEACHER, 0, tmp_path / "teacher.safetensors", lambda epoch, loss: losses.append((epoch, loss))
    )
    assert [epoch for epoch, _ in losses] == list(range(1, 31))
    assert losses[-1][1] < 0.3 < 1 < losses[0][1]
    final = functional.cross_entropy(teacher.train_logits, images.train_y)
    assert float(final) == pytest.approx(losses[-1][1], rel=0.2)
    accuracy = (teacher.test_logits.argmax(1) == images.test_y).double().mean()
    assert accuracy > 0.85
    assert teacher.parameters == 65 * 32 + 33 * 10


def test_the_cache_returns_the_same_teacher_and_notices_every_change(images, tmp_path):
    cache = tmp_path / "teacher.safetensors"
    quick = TEACHER.model_copy(update={"epochs": 2})

    def teacher(settings=quick, seed=0, of=images):
        epochs = []
        found = train.train_teacher(of, settings, seed, cache, lambda epoch, loss: epochs.append(epoch))
        assert found.reused == (not epochs)
        return found

    first, again = teacher(), teacher()
    assert not first.reused
    assert again.reused
    assert torch.equal(first.train_logits, again.train_logits)
    assert torch.equal(first.test_logits, again.test_logits)
    assert not teacher(seed=1).reused
    assert not teacher(quick.model_copy(update={"lr": 1e-2})).reused
    assert teacher(quick.model_copy(update={"lr": 1e-2})).reused
    assert not teacher(of=data.load(config.Data(name="digits", train_size=301, test_size=200), seed=0)).reused
    assert [path.name for path in tmp_path.iterdir()] == [cache.name]


def test_the_student_comes_near_the_minimum_of_the_distillation_energy(images):
    generator = torch.Generator().manual_seed(0)
    teacher_logits = 3 * functional.one_hot(images.train_y, 10) + torch.randn(300, 10, generator=generator)
    loss = bkd.KDLoss(5.0, 2.0)
    settings = config.Student(model=config.MLP(hidden=[64]), epochs=100, batch_size=50, lr=1e-2)
    student = train.distil_student(images, teacher_logits, loss, settings, 0, lambda epoch, value: None)
    with torch.no_grad():
        reached = float(loss(student(images.train_x), images.train_y, teacher_logits))
        # no student is better than one that may choose each image's logits freely
        free = teacher_logits.clone()
    free.requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=200)

    def closure():
        optimizer.zero_grad()
        energy = loss(free, images.train_y, teacher_logits)
        energy.backward()
        return energy

    optimizer.step(closure)
    best = float(closure().detach())
    untrained = float(loss(torch.zeros(300, 10), images.train_y, teacher_logits))
    assert best < reached < best + 0.1 * (untrained - best)
    assert not student.training


def test_logits_do_not_depend_on_how_many_rows_go_together(images, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    whole = train.logits(model, images.test_x)
    monkeypatch.setattr(train, "EVALUATION_BATCH", 7)
    torch.testing.assert_close(train.logits(model, images.test_x), whole)
    assert whole.shape == (200, 10)
    assert not whole.requires_grad
