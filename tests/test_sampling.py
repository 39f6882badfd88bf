"""The loop: what it counts, what it yields, what it puts back, and what it warns of."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bkd_fast as bkd


class Recorder(bkd.Callback):
    def __init__(self):
        self.steps, self.draws, self.health = [], [], None

    def on_step(self, record):
        self.steps.append((record.step, record.phase, record.energy.item()))

    def on_draw(self, draw):
        self.draws.append(draw.index)

    def on_end(self, health):
        self.health = health


def _problem(layers=(), num_data=64, seed=0, batch=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_data, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, 3))
    teacher = nn.Linear(4, 3)
    loader = DataLoader(TensorDataset(x, y), batch, shuffle=True, generator=torch.Generator().manual_seed(1))
    return student, teacher, loader, x


def _sampler(student, **settings):
    return bkd.SGLD(student.named_parameters(), **{"lr": 0.02, "num_data": 64, "prior_precision": 1.0, **settings})


def test_phases_counts_and_draws():
    student, teacher, loader, _ = _problem()
    sampler, recorder = _sampler(student), Recorder()
    draws = bkd.sample(
        student, sampler, bkd.KDLoss(2.0), loader, teacher=teacher, warm_start=5, burn_in=7, thin=3, num_draws=4,
        progress=False, callbacks=[recorder],
    )  # fmt: skip
    seen = [(draw.step, draw.chain, draw.index) for draw in draws]
    assert seen == [(15, 0, 0), (18, 0, 1), (21, 0, 2), (24, 0, 3)]
    assert [s for s, _, _ in recorder.steps] == list(range(1, 25))
    phases = [phase for _, phase, _ in recorder.steps]
    assert phases == ["warm_start"] * 5 + ["burn_in"] * 7 + ["sampling"] * 12
    assert recorder.draws == [0, 1, 2, 3]
    assert len(recorder.health.noise_share) == 1 and math.isfinite(recorder.health.stationarity[0])
    assert sampler.param_groups[0]["step"] == 24


def test_warm_start_is_sgd_and_the_temperature_comes_back():
    student, teacher, loader, _ = _problem()
    sampler = _sampler(student, temperature=0.5)
    other, _, _, _ = _problem()
    sgd = torch.optim.SGD(other.parameters(), 0.02, weight_decay=1 / 64, foreach=False)
    loss = bkd.KDLoss(2.0)
    next(
        bkd.sample(
            student, sampler, loss, [next(iter(loader))], teacher=teacher, warm_start=20, num_draws=1, progress=False
        )
    )
    assert sampler.param_groups[0]["temperature"] == 0.5
    loader = _problem()[2]
    x, y = next(iter(loader))
    for _ in range(20):
        sgd.zero_grad()
        loss(other(x), y, teacher(x).detach()).backward()
        sgd.step()
    # after the warm start came one noisy step
    for ours, theirs in zip(student.parameters(), other.parameters(), strict=True):
        scale = math.sqrt(2 * 0.02 * 0.5 / 64)
        assert 0 < float((ours - theirs).detach().abs().max()) < 8 * scale


def test_warm_start_ends_exactly_where_sgd_ends():
    student, teacher, loader, _ = _problem()
    batch = next(iter(loader))
    at_end = []

    class AtEnd(bkd.Callback):
        def on_step(self, record):
            if record.phase == "warm_start" and record.step == 20:
                at_end.extend(p.detach().clone() for p in student.parameters())

    list(
        bkd.sample(
            student,
            _sampler(student),
            bkd.KDLoss(2.0),
            [batch],
            teacher=teacher,
            warm_start=20,
            num_draws=1,
            progress=False,
            callbacks=[AtEnd()],
        )
    )
    other = _problem()[0]
    sgd = torch.optim.SGD(other.parameters(), 0.02, weight_decay=1 / 64, foreach=False)
    for _ in range(20):
        sgd.zero_grad()
        bkd.KDLoss(2.0)(other(batch[0]), batch[1], teacher(batch[0]).detach()).backward()
        sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(at_end, other.parameters(), strict=True))


def test_snapshots_are_copies_and_the_model_is_live():
    student, teacher, loader, _ = _problem()
    snapshots = []
    for draw in bkd.sample(
        student, _sampler(student), bkd.KDLoss(1.0), loader, teacher=teacher, num_draws=3, progress=False
    ):
        assert draw.model is student
        snapshots.append(draw.snapshot())
        assert all(torch.equal(snapshots[-1][name], p) for name, p in student.named_parameters())
    assert not torch.equal(snapshots[0]["0.weight"], snapshots[1]["0.weight"])
    assert set(snapshots[0]) == {name for name, _ in student.named_parameters()}


def test_cached_teacher_logits_equal_the_online_teacher():
    chains = []
    for cached in (False, True):
        student, teacher, _, x = _problem()
        y = (x[:, 0] > 0).long()
        data = TensorDataset(x, y, teacher(x).detach()) if cached else TensorDataset(x, y)
        loader = DataLoader(data, 16)
        for _ in bkd.sample(
            student, _sampler(student), bkd.KDLoss(2.0, 2.0), loader, teacher=None if cached else teacher, num_draws=5,
            progress=False,
        ):  # fmt: skip
            pass
        chains.append(student[0].weight.detach())
    torch.testing.assert_close(*chains)


def test_a_head_alone_is_sampled():
    student, teacher, loader, _ = _problem()
    before = student[0].weight.detach().clone()
    sampler = bkd.SGLD(student[-1].named_parameters(), 0.02, num_data=64)
    for draw in bkd.sample(student, sampler, bkd.KDLoss(1.0), loader, teacher=teacher, num_draws=2, progress=False):
        assert set(draw.snapshot()) == {"2.weight", "2.bias"}
    assert torch.equal(student[0].weight, before)


def test_modes_are_put_back_also_when_the_caller_stops_early():
    student, teacher, loader, _ = _problem([nn.BatchNorm1d(8)])
    teacher = nn.Sequential(teacher, nn.Dropout(0.5))
    student.eval()
    student[0].train()
    before = [m.training for m in student.modules()]
    draws = bkd.sample(
        student, _sampler(student), bkd.KDLoss(1.0), loader, teacher=teacher, num_draws=9, progress=False
    )
    draw = next(draws)
    assert draw.model.training and not student[1].training and not teacher.training
    draw.model.eval()  # the caller evaluates
    next(draws)
    assert student.training and not student[1].training
    draws.close()
    assert [m.training for m in student.modules()] == before and teacher.training


def test_frozen_batch_norm_does_not_move_and_is_not_copied():
    student, teacher, loader, _ = _problem([nn.BatchNorm1d(8)])
    recorded = []
    for draw in bkd.sample(
        student, _sampler(student), bkd.KDLoss(1.0), loader, teacher=teacher, warm_start=5, num_draws=3, progress=False
    ):
        recorded.append(student[1].running_mean.clone())
        assert "1.running_mean" not in draw.snapshot()
    assert recorded[0].any() and torch.equal(recorded[0], recorded[-1])


@pytest.mark.parametrize("mode", ["train", "recalibrate"])
def test_moving_batch_norm_warns_and_is_copied(mode):
    student, teacher, loader, x = _problem([nn.BatchNorm1d(8)], batch=64)
    loss = bkd.KDLoss(1.0)
    with pytest.warns(bkd.BKDFastWarning, match="batch_norm"):
        draws = bkd.sample(
            student, _sampler(student), loss, loader, teacher=teacher, num_draws=2, batch_norm=mode, progress=False
        )
    for draw in draws:
        copied = draw.snapshot()
        assert "1.running_mean" in copied and "1.num_batches_tracked" not in copied
        if mode == "recalibrate":
            exact = student[0](x).detach()  # every batch is the whole data set
            torch.testing.assert_close(copied["1.running_mean"], exact.mean(0), rtol=1e-4, atol=1e-5)
    assert student[1].momentum == 0.1


def test_health_of_a_full_batch_chain():
    """No minibatch noise at all; and a posterior that is only a Gaussian prior starts far too narrow, so |theta|^2 grows."""
    student, teacher, _, x = _problem()
    batch = (x, (x[:, 0] > 0).long())
    recorder = Recorder()
    for _ in bkd.sample(
        student, _sampler(student), bkd.KDLoss(1.0), [batch], teacher=teacher, num_draws=20, progress=False,
        callbacks=[recorder],
    ):  # fmt: skip
        pass
    assert recorder.health.noise_share[0] == pytest.approx(0.0, abs=1e-6)
    assert 0.2 < recorder.health.stationarity[0] < 1.5


def test_noise_share_is_the_gradient_variance_in_units_of_temperature():
    """A linear loss has a gradient that is exactly the batch mean of its data: known variance per coordinate."""
    torch.manual_seed(0)
    student = nn.Linear(4, 1, bias=False)
    x = torch.randn(1024, 4)
    loader = DataLoader(TensorDataset(x, x[:, 0]), 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    sampler = bkd.SGLD(student.parameters(), 0.004, num_data=1024, prior_precision=1.0)
    recorder = Recorder()
    with pytest.warns(bkd.BKDFastWarning, match="own noise is"):
        list(
            bkd.sample(
                student, sampler, lambda z, y, t: z.mean(), loader, num_draws=1, progress=False, callbacks=[recorder]
            )
        )
    variance = float(x.var(0).mean()) / 8 * (1 - 8 / 1024)
    expected = 0.004 * 1024 * variance / 2
    # 16 batches x 4 coordinates: relative standard error sqrt(2 / 60)
    assert recorder.health.noise_share[0] == pytest.approx(expected, rel=5 * math.sqrt(2 / 60))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_draws": 0}, ValueError, "num_draws = 0: must be at least 1"),
        ({"thin": 0}, ValueError, "thin = 0"),
        ({"burn_in": -1}, ValueError, "burn_in = -1"),
        ({"warm_start": 1.5}, TypeError, r"warm_start = 1\.5"),
        ({"batch_norm": "thaw"}, ValueError, "batch_norm = 'thaw'"),
        ({"loss_fn": bkd.KDLoss(1.0, reduction="sum")}, ValueError, "reduction = 'sum'"),
    ],
)
def test_bad_arguments(change, error, message):
    student, teacher, loader, _ = _problem()
    arguments = {"loss_fn": bkd.KDLoss(1.0), "teacher": teacher, "num_draws": 1, "progress": False, **change}
    with pytest.raises(error, match=message):
        bkd.sample(student, _sampler(student), arguments.pop("loss_fn"), loader, **arguments)


def test_foreign_parameters_empty_loaders_and_odd_batches():
    student, _, loader, x = _problem()
    with pytest.raises(ValueError, match="must hold only its own"):
        bkd.sample(student, _sampler(nn.Linear(2, 2)), bkd.KDLoss(1.0), loader, num_draws=1)
    with pytest.raises(ValueError, match="train_loader is empty"):
        next(bkd.sample(student, _sampler(student), bkd.KDLoss(1.0), [], num_draws=1, progress=False))
    with pytest.raises(ValueError, match="must yield"):
        next(bkd.sample(student, _sampler(student), bkd.KDLoss(1.0), [x], num_draws=1, progress=False))
    assert student.training


def test_what_changes_the_target_is_said():
    student, teacher, loader, _ = _problem([nn.Dropout(0.2)])
    with pytest.warns(bkd.BKDFastWarning, match="dropout"):
        bkd.sample(student, _sampler(student), bkd.KDLoss(1.0), loader, teacher=teacher, num_draws=1)
    student, teacher, loader, _ = _problem()
    with pytest.warns(bkd.BKDFastWarning, match="num_data is 63 and the loader's data set has 64"):
        bkd.sample(student, _sampler(student, num_data=63), bkd.KDLoss(1.0), loader, teacher=teacher, num_draws=1)


def test_three_changed_lines_in_a_plain_loop():
    """The other way to use the engine: replace the loss, replace the optimizer, update the posterior."""
    student, teacher, loader, x = _problem()
    loss_fn = bkd.KDLoss(prior_strength=2.0)
    optimizer = bkd.SGLD(student.named_parameters(), lr=0.02, num_data=64, prior_precision=1.0)
    posterior = bkd.PosteriorPredictive(num_rows=64, num_classes=3)
    for _ in range(5):
        for inputs, y in loader:
            optimizer.zero_grad()
            loss_fn(student(inputs), y, teacher(inputs).detach()).backward()
            optimizer.step()
        with torch.no_grad():
            posterior.update_logits(student(x))
    assert posterior.counts.tolist() == [5] * 64
    torch.testing.assert_close(posterior.mean.sum(-1), torch.ones(64))


def test_what_the_loss_has_recorded_is_asked_for_now_and_then_and_at_the_end(monkeypatch):
    monkeypatch.setattr("bkd_fast.sampling.CHECKED_STEPS", 4)
    student, teacher, loader, _ = _problem()
    sampler, loss, checked = _sampler(student), bkd.KDLoss(2.0), []
    monkeypatch.setattr(loss, "check", lambda: checked.append(sampler.param_groups[0]["step"]))
    for _ in bkd.sample(
        student, sampler, loss, loader, teacher=teacher, warm_start=2, thin=2, num_draws=4, progress=False
    ):
        pass
    assert checked == [4, 8, 10]
    bkd.KDLoss(2.0).check()  # on a CPU there is nothing to tell
