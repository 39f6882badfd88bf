"""The loop: what it counts, what it yields, what it puts back, and what it warns of."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import bkd_fast as bkd
from bkd_fast.samplers.cyclical import CyclicalSchedule


@pytest.fixture(autouse=True)
def one_thread():
    """Work this small only waits for the second thread where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_cached_top_k_logits_equal_the_rows_that_they_stand_for():
    chains = []
    for dense in (False, True):
        student, teacher, _, x = _problem()
        y = (x[:, 0] > 0).long()
        top = bkd.TopKLogits.of(teacher(x), 2)
        rows = top.dense(3) if dense else [bkd.TopKLogits(*row) for row in zip(*top, strict=True)]
        loader = DataLoader(list(zip(x, y, rows, strict=True)), 16)
        for _ in bkd.sample(student, _sampler(student), bkd.KDLoss(2.0, 2.0), loader, num_draws=5, progress=False):
            pass
        chains.append(student[0].weight.detach())
    assert torch.equal(*chains)


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


SIZE = 256


def _known_variance(deviations=1.0):
    """A linear loss, whose gradient is exactly the batch mean of its data: known variance per coordinate."""
    generator = torch.Generator().manual_seed(0)
    student = nn.Linear(SIZE, 1, bias=False)
    x = torch.randn(1024, SIZE, generator=generator) * deviations
    loader = DataLoader(TensorDataset(x, x[:, 0]), 8, shuffle=True, generator=generator)
    return student, loader, x.var(0) / 8 * (1 - 8 / 1024)


def _health(student, sampler, loss_fn, loader, **counts):
    recorder = Recorder()
    for _ in bkd.sample(
        student, sampler, loss_fn, loader, **{"num_draws": 1, "progress": False, "callbacks": [recorder], **counts}
    ):
        pass
    return recorder.health


def _linear(z, y, t):
    return z.mean()


def test_noise_share_is_the_gradient_variance_in_units_of_temperature():
    student, loader, variance = _known_variance()
    sampler = bkd.SGLD(student.parameters(), 0.004, num_data=1024, prior_precision=1.0)
    with pytest.warns(bkd.BKDFastWarning, match="own noise is"):
        health = _health(student, sampler, _linear, loader)
    expected = 0.004 * 1024 * float(variance.mean()) / 2
    # 16 batches: the relative standard error is sqrt(2 / (15 SIZE))
    assert health.noise_share[0] == pytest.approx(expected, rel=5 * math.sqrt(2 / (15 * SIZE)))


@pytest.mark.parametrize(
    ("sampler", "settings", "effective"),
    [
        (bkd.SGHMC, {"momentum": 0.8, "dampening": 0.25}, 0.75 / 0.2),
        (bkd.SGNHT, {"momentum": 0.5}, 2.0),
        (bkd.BAOAB, {"friction": 200.0}, (1 + math.exp(-200 / 1024)) / (1 - math.exp(-200 / 1024)) / 2),
    ],
)
def test_noise_share_with_momentum(sampler, settings, effective):
    student, loader, variance = _known_variance()
    lr = 0.001 if sampler is not bkd.BAOAB else 1 / 1024  # h = 1 / 1024
    chain = sampler(student.parameters(), lr, num_data=1024, temperature=4.0, **settings)
    share = _health(student, chain, _linear, loader).noise_share[0]
    expected = effective * lr * 1024 * float(variance.mean()) / (2 * 4.0)
    assert share == pytest.approx(expected, rel=5 * math.sqrt(2 / (15 * SIZE)))


def test_noise_share_weighs_the_variance_by_the_metric():
    student, loader, variance = _known_variance(torch.logspace(-1, 0, SIZE))
    sampler = bkd.PSGLD(student.parameters(), 1e-4, num_data=1024)
    student.weight.grad = torch.logspace(2, 0, SIZE)[None]
    sampler.step()
    sampler.freeze_metric()
    weighted = sampler.metric(student.weight) * variance
    share = _health(student, sampler, _linear, loader).noise_share[0]
    expected = 1e-4 * 1024 * float(weighted.mean()) / 2
    deviation = math.sqrt(2 / 15 * float(weighted.square().sum())) / float(weighted.sum())
    assert share == pytest.approx(expected, rel=5 * deviation)


def test_thermostats_take_the_minibatch_noise_out():
    """SGNHT reports its share and warns of nothing; others warn."""
    student, loader, _ = _known_variance()
    sampler = bkd.SGNHT(student.parameters(), 0.01, num_data=1024)
    assert _health(student, sampler, _linear, loader).noise_share[0] > 1


def test_a_sampler_that_steps_in_backward_is_not_measured():
    """A measurement would move it: the chain is that of the sampler that does not."""
    chains, shares = [], []
    for in_backward in (False, True):
        student, teacher, loader, _ = _problem()
        batches = [next(iter(loader))]  # the measurement takes some
        sampler = _sampler(student, step_in_backward=in_backward)
        health = _health(student, sampler, bkd.KDLoss(1.0), batches, teacher=teacher, num_draws=3)
        chains.append(student[0].weight.detach())
        shares.append(health.noise_share[0])
    assert torch.equal(*chains) and not math.isnan(shares[0]) and math.isnan(shares[1])


class _Still(nn.Module):
    """Parameters that the energy does not see."""

    def __init__(self, size):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return 0 * self.theta.sum() + x


FLAT = [(torch.zeros(1), None)]


def test_stationarity_is_1_in_free_diffusion():
    """With a changing lr, a metric, momenta and phases too. theta begins at 0, so a figure is a mean of chi-squares."""
    size = 20_000
    student = _Still(size)
    sampler = bkd.SGLD(student.parameters(), 0.1, num_data=100, temperature=2.0)
    health = _health(student, sampler, _linear, FLAT, num_draws=30, schedule=ExponentialLR(sampler, 0.9))
    assert health.stationarity[0] == pytest.approx(1, abs=5 * math.sqrt(2 / size))

    student, recorder = _Still(size), Recorder()
    sampler = bkd.SGLD(student.parameters(), 0.1, num_data=100)

    class MovesWhileExploring(bkd.Callback):
        def on_step(self, record):
            if record.phase == "exploration":
                student.theta.data.zero_()

    schedule = CyclicalSchedule(sampler, 20, 0.5)
    callbacks = [MovesWhileExploring(), recorder]
    _health(student, sampler, _linear, FLAT, num_draws=30, schedule=schedule, callbacks=callbacks)
    assert recorder.health.stationarity[0] == pytest.approx(1, abs=5 * math.sqrt(2 / size))

    student = _Still(size)
    sampler = bkd.PSGLD(student.parameters(), 0.1, num_data=100)
    student.theta.grad = torch.rand(size, generator=torch.Generator().manual_seed(0)) + 0.1
    sampler.step()
    sampler.freeze_metric()
    student.theta.data.zero_()
    metric = sampler.metric(student.theta)
    health = _health(student, sampler, _linear, FLAT, num_draws=30)
    deviation = math.sqrt(2 * float(metric.square().sum())) / float(metric.sum())
    assert health.stationarity[0] == pytest.approx(1, abs=5 * deviation)

    student = _Still(size)
    sampler = bkd.SGHMC(student.parameters(), 0.1, num_data=100, momentum=0.5)
    health = _health(student, sampler, _linear, FLAT, num_draws=300)
    # momenta that start at rest miss less than the variance of 2 / (1 - mu) steps
    assert health.stationarity[0] == pytest.approx(1, abs=5 * math.sqrt(2 / size) + 4 / 300)


def test_draws_tell_the_cycle_that_they_were_made_in():
    """Ten steps a cycle, the last five of each sample: the draw after a cycle's last step is still that cycle's."""
    student = _Still(3)
    sampler = bkd.SGLD(student.parameters(), 0.1, num_data=100)
    schedule = CyclicalSchedule(sampler, 10, 0.5)
    draws = bkd.sample(student, sampler, _linear, FLAT, num_draws=12, schedule=schedule, progress=False)
    assert [draw.cycle for draw in draws] == [0] * 5 + [1] * 5 + [2] * 2
    plain = bkd.sample(
        student, bkd.SGLD(student.parameters(), 0.1, num_data=100), _linear, FLAT, num_draws=2, progress=False
    )
    assert [draw.cycle for draw in plain] == [0, 0]


class Settings(bkd.Callback):
    """The sampler's settings after every step, that is for the next one."""

    def __init__(self, sampler):
        self.group, self.seen = sampler.param_groups[0], []

    def on_step(self, record):
        self.seen.append((record.phase, self.group["lr"], self.group["temperature"]))


def test_a_schedule_is_stepped_in_burn_in_and_sampling():
    student, teacher, loader, _ = _problem()
    sampler = _sampler(student)
    settings, schedule = Settings(sampler), LambdaLR(sampler, lambda k: 0.5**k)
    for _ in bkd.sample(
        student, sampler, bkd.KDLoss(1.0), loader, teacher=teacher, warm_start=3, burn_in=2, thin=2, num_draws=2,
        schedule=schedule, progress=False, callbacks=[settings],
    ):  # fmt: skip
        pass
    assert [(phase, temperature) for phase, _, temperature in settings.seen] == [("warm_start", 0.0)] * 3 + [
        ("burn_in", 1.0)
    ] * 2 + [("sampling", 1.0)] * 4
    assert [lr for _, lr, _ in settings.seen] == [0.02] * 3 + [0.02 * 0.5**k for k in range(1, 7)]
    assert sampler.param_groups[0]["lr"] == 0.02 / 64 and schedule.last_epoch == 6  # where it stands it stays


def test_draws_are_taken_in_sampling_phases_alone():
    """Cycles of 10 steps whose last 4 sample, after 2 of warm start and 3 of burn-in; a draw every third of those."""
    student, teacher, loader, _ = _problem()
    sampler = _sampler(student, temperature=0.5)
    settings, schedule = Settings(sampler), CyclicalSchedule(sampler, 10, 0.6)
    arguments = {"teacher": teacher, "thin": 3, "schedule": schedule, "progress": False, "callbacks": [settings]}
    draws = bkd.sample(student, sampler, bkd.KDLoss(1.0), loader, warm_start=2, burn_in=3, num_draws=4, **arguments)
    sampling = [2 + 10 * cycle + k for cycle in range(3) for k in (7, 8, 9, 10)]
    assert [draw.step for draw in draws] == sampling[2::3]
    phases = ["warm_start"] * 2 + ["burn_in"] * 3 + ["exploration"] * 3 + ["sampling"] * 4
    phases += 2 * (["exploration"] * 6 + ["sampling"] * 4)
    assert [phase for phase, _, _ in settings.seen] == phases
    # a phase's settings are set by the step before
    for (_, _, temperature), (phase, _, _) in zip(settings.seen, settings.seen[1:], strict=False):
        assert temperature == (0.5 if phase == "sampling" else 0)
    assert schedule.last_epoch == 30 and schedule.cycle == 3
    more = bkd.sample(student, sampler, bkd.KDLoss(1.0), loader, num_draws=1, **arguments)
    assert [draw.step for draw in more] == [9] and schedule.last_epoch == 39


def test_the_warm_start_is_cold_and_health_is_that_of_the_first_sampling_step():
    student, teacher, loader, _ = _problem()
    sampler = _sampler(student, lr=1e-4)
    settings, recorder = Settings(sampler), Recorder()
    for exploration, warm_start in ((0.0, 4), (0.5, 0)):
        schedule = CyclicalSchedule(sampler, 8, exploration)
        for _ in bkd.sample(
            student, sampler, bkd.KDLoss(1.0), loader, teacher=teacher, warm_start=warm_start, num_draws=2,
            schedule=schedule, progress=False, callbacks=[settings, recorder],
        ):  # fmt: skip
            pass
        assert recorder.health.noise_share[0] > 0
    assert [(phase, temperature) for phase, _, temperature in settings.seen[:6]] == [("warm_start", 0.0)] * 4 + [
        ("sampling", 1.0)
    ] * 2


def test_schedules_that_do_not_fit():
    student, teacher, loader, _ = _problem()
    sampler, other = _sampler(student), _sampler(student)
    arguments = {"teacher": teacher, "num_draws": 3, "progress": False}
    for schedule, error, message in (
        (ExponentialLR(other, 0.9), ValueError, "schedule is one of another SGLD: must be one of sampler"),
        (ReduceLROnPlateau(sampler), TypeError, "schedule is a ReduceLROnPlateau: must be"),
        (0.9, TypeError, "schedule is a float: must be"),
    ):
        with pytest.raises(error, match=message):
            bkd.sample(student, sampler, bkd.KDLoss(1.0), loader, schedule=schedule, **arguments)
    schedule = LambdaLR(sampler, lambda k: 1 - k)
    with pytest.raises(ValueError, match=r"lr = -0\.02: must be"):
        list(bkd.sample(student, sampler, bkd.KDLoss(1.0), loader, schedule=schedule, **arguments))


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
