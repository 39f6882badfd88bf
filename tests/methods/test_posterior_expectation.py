"""Students of posterior expectations: what they learn from, what they say, and a run that goes on as if it had not stopped."""

import math

import pytest
import torch
from points import Table
from torch import nn
from torch.nn import functional

import bkd_fast as bkd
from bkd_fast.app import config, data
from bkd_fast.app.experiments.common import fit, logits_of, seeded
from bkd_fast.methods.dirichlet import Dirichlet
from bkd_fast.methods.group_lasso import GroupLasso, norms_of, prune
from bkd_fast.methods.posterior_expectation import (
    ExpectedEntropy,
    PosteriorExpectation,
    Predictive,
    Quantiles,
    Uncertainty,
    Variance,
    uncertainty,
)

POINTS, FEATURES, CLASSES = 12, 5, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(POINTS, FEATURES, generator=generator(1), dtype=dtype)


def network(outputs: int = CLASSES, seed: int = 0) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, outputs)), seed)


def distil(*expectations, student=None, lr=0.1, **options) -> PosteriorExpectation:
    student = student or network(sum(head.width(CLASSES) for head in expectations))
    optimizer = torch.optim.SGD(student.parameters(), lr)
    options = {"num_classes": CLASSES, "batch_size": 4} | options
    return PosteriorExpectation(student, optimizer, inputs(), expectations, **options)


def draws(number: int) -> list[nn.Module]:
    return [network(seed=100 + s) for s in range(number)]


# ---- what is learned from ----


def test_running_means_are_plain_means_also_of_points_that_a_batch_holds_twice():
    heads = (Predictive(), ExpectedEntropy(), Variance(), Dirichlet(0.01))
    distillation = distil(*heads)
    batches = [torch.tensor(rows) for rows in ([3, 3, 0, 5], [3, 1, 3, 3], [0], [2, 2, 2, 2, 2, 1])]
    seen: dict[int, list[torch.Tensor]] = {}
    for model, rows in zip(draws(4), batches, strict=True):
        distillation.update(model, rows)
        for row in rows.tolist():
            seen.setdefault(row, []).append(model(inputs()[row][None]).detach())
    assert distillation.counts.tolist() == [len(seen.get(row, [])) for row in range(POINTS)]
    for head, means in zip(heads, distillation.means, strict=True):
        for row in range(POINTS):
            expected = head.statistic(torch.cat(seen[row]).double()).mean(0) if row in seen else torch.zeros(())
            torch.testing.assert_close(
                means[row].double(), expected.expand_as(means[row]).double(), rtol=2e-6, atol=2e-7
            )


def test_it_agrees_with_the_posterior_predictive_of_the_same_draws():
    """Mean, E H, H(E p) - E H, variance; the mean deviance is 2 E H."""
    distillation = distil(Predictive(), ExpectedEntropy(), Variance())
    posterior, rows = bkd.PosteriorPredictive(POINTS, CLASSES), torch.arange(POINTS)
    for model in draws(9):
        distillation.update(model, rows)
        posterior.update_logits(logits_of(model, inputs()))
    probs, entropy, squares = distillation.means
    found = uncertainty(probs, entropy[:, 0])
    torch.testing.assert_close(probs, posterior.mean)
    torch.testing.assert_close(2 * entropy[:, 0], posterior.mean_deviance)
    torch.testing.assert_close(found.total, posterior.predictive_entropy)
    torch.testing.assert_close(found.knowledge, posterior.mutual_information, rtol=1e-3, atol=1e-6)
    # the loss's gradient at 0 is sigmoid(0) - 4 v, v the variance with n - 1
    output = torch.zeros(POINTS, CLASSES, requires_grad=True)
    Variance().loss(squares, distillation.counts, output).sum().backward()
    torch.testing.assert_close((0.5 - output.grad) / 4, posterior.variance, rtol=1e-4, atol=1e-6)


def test_a_step_is_the_optimizers_step_on_the_stated_losses():
    heads = (Predictive(), ExpectedEntropy())
    distillation, twin = distil(*heads), network(CLASSES + 1)
    models, rows = draws(2), torch.tensor([1, 4, 4])
    distillation.update(models[0], rows)
    twin.load_state_dict(distillation.student.state_dict())
    loss = distillation.update(models[1], rows)
    x = inputs()[rows]
    with torch.no_grad():
        p = torch.stack([model(x).softmax(1) for model in models]).mean(0)
        h = torch.stack([torch.special.entr(model(x).softmax(1)).sum(1) for model in models]).mean(0)
    out = twin(x)
    expected = functional.cross_entropy(out[:, :CLASSES], p) + (h - out[:, CLASSES].exp()).abs().mean()
    torch.testing.assert_close(loss, expected.detach())
    expected.backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    for mine, theirs in zip(distillation.student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "head", [Predictive(), ExpectedEntropy(), Dirichlet(0.01)], ids=lambda head: type(head).__name__
)
def test_the_memoryless_gradient_is_unbiased(head):
    """Averaged over draws it is the gradient of the loss on the mean of g, in float64: both are linear in g."""
    logits = torch.randn(50, 3, CLASSES, generator=generator(), dtype=torch.float64)
    output = torch.randn(3, head.width(CLASSES), generator=generator(1), dtype=torch.float64).requires_grad_()

    def gradient(g: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(head.loss(g, None, output).sum(), output)[0]

    g = torch.stack([head.statistic(draw) for draw in logits])
    torch.testing.assert_close(torch.stack([gradient(draw) for draw in g]).mean(0), gradient(g.mean(0)))


def minimum(loss, width: int) -> torch.Tensor:
    """Of a function of (1, width) outputs, in float64."""
    output = torch.zeros(1, width, dtype=torch.float64, requires_grad=True)
    limits = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 1e-15}
    optimizer = torch.optim.LBFGS([output], line_search_fn="strong_wolfe", **limits)

    def closure():
        optimizer.zero_grad()
        value = loss(output)
        value.backward()
        return value

    optimizer.step(closure)
    return output.detach()


def test_memoryless_students_rest_at_the_mean_over_draws_where_the_absolute_error_rests_at_the_median():
    """Entropies of a skewed posterior: mean and median are apart."""
    logits = 3 * torch.randn(401, 1, CLASSES, generator=generator(), dtype=torch.float64) ** 2
    for head, expected in (
        (Predictive(), logits.softmax(2).mean(0)),
        (ExpectedEntropy(), torch.special.entr(logits.softmax(2)).sum(2).mean(0)),
    ):
        output = minimum(
            lambda o, head=head: torch.stack([head.loss(head.statistic(z), None, o).mean() for z in logits]).mean(),
            head.width(CLASSES),
        )
        torch.testing.assert_close(head.read(output), expected, rtol=1e-5, atol=1e-7)
    head, one = ExpectedEntropy(), torch.ones(1, dtype=torch.int32)
    g = torch.stack([head.statistic(z) for z in logits])
    median = g.median()
    assert abs(float(g.mean() - median)) > 0.05

    def absolute(value) -> float:
        return float(torch.stack([head.loss(z, one, value.log().view(1, 1)) for z in g]).mean())

    assert absolute(median) < min(absolute(g.mean()), absolute(median * 1.02), absolute(median * 0.98))


def test_the_pinball_loss_rests_at_the_quantiles_over_draws():
    """Its subgradient in the output changes sign there: the order statistics of p that PosteriorPredictive certifies."""
    head = Quantiles([0.1, 0.5, 0.9])
    logits = 2 * torch.randn(101, 1, CLASSES, generator=generator(), dtype=torch.float64)
    posterior = bkd.PosteriorPredictive(1, CLASSES, bins=128)
    posterior.update_logits(logits)
    g = torch.stack([head.statistic(z) for z in logits])
    torch.testing.assert_close(g.sigmoid(), logits.softmax(2))
    quantiles = torch.stack([g[:, 0].quantile(q, 0, interpolation="higher") for q in head.levels])

    def slope(shift: float) -> torch.Tensor:
        output = (quantiles + shift).view(1, -1).requires_grad_()
        torch.stack([head.loss(z, None, output).sum() for z in g]).mean().backward()
        return output.grad

    assert (slope(-1e-6) <= 1e-12).all() and (slope(1e-6) > 0).all()
    read = head.read(quantiles.view(1, -1))
    assert read.shape == (3, 1, CLASSES)
    for level, found in zip(head.levels, read, strict=True):
        low, high = posterior.quantile_bounds(level)
        assert ((found >= low - 1e-6) & (found <= high + 1e-6)).all()


def test_quantiles_that_cross_are_read_in_order_and_certain_draws_stay_finite():
    head = Quantiles([0.25, 0.75])
    read = head.read(torch.tensor([[2.0, -1.0, -2.0, 1.0]]))
    torch.testing.assert_close(read[:, 0].logit(), torch.tensor([[-2.0, -1.0], [2.0, 1.0]]))
    certain = head.statistic(torch.tensor([[0.0, -100.0], [0.0, -torch.inf]]))
    assert certain.tolist() == [[32.0, -32.0], [32.0, -32.0]]


def test_a_student_learns_variances_and_quantiles_of_known_draws():
    """Log odds of two classes that are normal; the 5 % quantile of 1500 draws has a standard error of 0.055 spreads."""
    centre, spread = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([1.0, 0.3, 0.6])
    levels = torch.tensor([0.05, 0.5, 0.95])
    student = Table(torch.zeros(3, 2 + 6))
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    points = torch.arange(3.0)[:, None]
    distillation = PosteriorExpectation(
        student, optimizer, points, (Variance(), Quantiles(levels.tolist())), num_classes=2, batch_size=3
    )
    normals = torch.randn(1500, 3, generator=generator())
    for draw in centre + spread * normals:
        distillation.update(Table(torch.stack([draw, torch.zeros(3)], 1)))
        decay.step()
    variance, quantiles = distillation.predict(points)
    p = (centre + spread * torch.randn(200_000, 3, generator=generator(1))).sigmoid()
    torch.testing.assert_close(variance.sqrt(), p.std(0)[:, None].expand(3, 2), rtol=0, atol=0.01)
    odds = quantiles[:, :, 0].logit()
    assert ((odds - centre - spread * torch.special.ndtri(levels)[:, None]).abs() < spread / 2).all(), odds


# ---- what it says ----


def test_total_is_knowledge_and_data():
    student = network(CLASSES + 1)
    distillation = distil(Predictive(), ExpectedEntropy(), student=student)
    probs, entropy = distillation.predict(inputs())
    torch.testing.assert_close(probs, student(inputs())[:, :CLASSES].softmax(1))
    found = uncertainty(probs, entropy)
    assert isinstance(found, Uncertainty)
    torch.testing.assert_close(found.knowledge + found.data, found.total)
    torch.testing.assert_close(found.total, -(probs * probs.log()).sum(1))
    for score in found:
        assert score.shape == (POINTS,)


# ---- the loop ----


def chain(*callbacks, chains: int = 1, **checkpoints) -> list[nn.Module]:
    """4 steps of burn-in and 5 draws, every third step's; returns copies of the draws' networks."""
    models = [network(seed=k) for k in range(chains)]
    student = models[0] if chains == 1 else bkd.StackedModule(models)
    sampler = bkd.SGLD(student.named_parameters(), 0.05, num_data=60, prior_precision=1.0, chains=chains, seed=4)
    x, y = torch.randn(60, FEATURES, generator=generator(2)), torch.randint(CLASSES, (60,), generator=generator(3))
    batches = bkd.Batches(torch.utils.data.TensorDataset(x, y), 20, seed=3)
    if checkpoints:
        callbacks = (bkd.Checkpoints(loader=batches, **checkpoints), *callbacks)
    kept = []
    for draw in bkd.sample(
        student, sampler, bkd.KDLoss(0.0), batches, burn_in=4, thin=3, num_draws=5, progress=False, callbacks=callbacks
    ):
        kept.append(network())
        kept[-1].load_state_dict(draw.model.state_dict())
    return kept


@pytest.mark.parametrize("chains", [1, 3])
def test_every_chains_draws_are_learned_from(chains):
    followed, fed = distil(Predictive(), input_noise=0.1), distil(Predictive(), input_noise=0.1)
    kept = chain(followed, chains=chains)
    assert followed.updates == 5 * chains
    for model in kept:
        fed.update(model)
    assert torch.equal(followed.means[0], fed.means[0])
    assert torch.equal(followed.student[0].weight, fed.student[0].weight)


def test_every_so_many_draws_of_a_chain():
    distillation = distil(Predictive(), every=2)
    chain(distillation, chains=2)
    assert distillation.updates == 2 * 3  # draws 0, 2 and 4


def test_it_leaves_the_chain_alone():
    alone, followed = chain(), chain(distil(Predictive()))
    for mine, theirs in zip(alone, followed, strict=True):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def test_an_epoch_meets_every_point_once_in_another_order():
    distillation = distil(Predictive(), batch_size=5)
    orders = []
    for _ in range(2):
        rows = []
        for _ in range(POINTS // 5):
            rows.append(distillation._next_rows())
            distillation.update(network())
        orders.append(torch.cat(rows).tolist())
        assert len(set(orders[-1])) == 10
    assert orders[0] != orders[1]


def test_the_inputs_noise_has_its_standard_deviation_and_is_new_at_every_step():
    distillation = distil(Predictive(), input_noise=0.5)
    x = torch.zeros(200, 50)
    first = distillation._noisy(x)
    assert torch.equal(first, distillation._noisy(x))
    distillation.updates += 1
    second = distillation._noisy(x)
    for noise in (first, second):
        assert abs(float(noise.square().mean()) / 0.25 - 1) < 5 * math.sqrt(2 / 10_000)
    assert abs(float((first * second).mean()) / 0.25) < 5 / math.sqrt(10_000)


def test_a_wide_student_is_pruned_and_goes_on_with_what_the_means_remember():
    """The search for a width: lasso, prune, fine-tune; the student without the units says what the wide one said."""
    wide = seeded(lambda: nn.Sequential(nn.Linear(FEATURES, 40), nn.ReLU(), nn.Linear(40, CLASSES)), 0)
    distillation = distil(Predictive(), student=wide)
    # 500 steps of 0.1 * 0.025 shorten a unit by 1.25 in all, more than any unit's norm: those left are fed by the loss
    assert float(norms_of(wide[0]).detach().max()) < 1
    GroupLasso(wide, 0.025).follow(distillation.optimizer)
    models = draws(4)
    for model in models:  # confident ones, of which there is something to learn
        model[2].weight.data *= 10
    for step in range(500):
        distillation.update(models[step % 4])
    said, remembered = distillation.predict(inputs())[0], distillation.means[0].clone()
    smaller = prune(wide)
    assert 0 < smaller[0].out_features < 20
    distillation.student, distillation.optimizer = smaller, torch.optim.SGD(smaller.parameters(), 0.1)
    torch.testing.assert_close(distillation.predict(inputs())[0], said)
    assert torch.equal(distillation.means[0], remembered)

    def divergence() -> float:
        return float(
            functional.kl_div(distillation.predict(inputs())[0].log(), distillation.means[0], reduction="batchmean")
        )

    shrunk = divergence()
    for step in range(200):
        distillation.update(models[step % 4])
    assert divergence() < shrunk, "what the penalty took from the units that are left comes back"


# ---- going on ----


class Stop(bkd.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record) -> None:
        if record.step == self.step:
            raise KeyboardInterrupt


def assert_same(mine: PosteriorExpectation, theirs: PosteriorExpectation) -> None:
    assert mine.updates == theirs.updates and torch.equal(mine.counts, theirs.counts)
    for a, b in zip(mine.means, theirs.means, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for a, b in zip(mine.student.parameters(), theirs.student.parameters(), strict=True):
        assert torch.equal(a, b)


def learner() -> PosteriorExpectation:
    student = network(3 * CLASSES + 1)
    return PosteriorExpectation(
        student, torch.optim.Adam(student.parameters(), 0.01), inputs(),
        (Predictive(), ExpectedEntropy(), Quantiles([0.1, 0.9])), num_classes=CLASSES, batch_size=5, input_noise=0.01,
    )  # fmt: skip


@pytest.mark.parametrize("stop", [5, 7, 8, 16])  # between draws, at a draw's step, and later
@pytest.mark.parametrize("chains", [1, 2])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, stop, chains):
    whole = learner()
    chain(whole, chains=chains)
    stopped = learner()
    with pytest.raises(KeyboardInterrupt):
        chain(stopped, Stop(stop), chains=chains, folder=tmp_path, every=1, others={"distillation": stopped})
    resumed = learner()
    chain(resumed, chains=chains, folder=tmp_path, every=100, others={"distillation": resumed})
    assert_same(resumed, whole)


def test_a_checkpoint_without_the_students_state_is_refused(tmp_path):
    chain(folder=tmp_path, every=5)
    with pytest.raises(bkd.StateFileError, match="lacks distillation"):
        chain(folder=tmp_path, every=5, others={"distillation": learner()})
    with pytest.raises(TypeError, match=r"others\['x'\] is a int"):
        bkd.Checkpoints(tmp_path, every=5, others={"x": 3})


def test_a_state_of_another_distillation_is_refused():
    state = learner().state_dict()
    for change, message in (
        ({"seed": 3}, "seed = 3"),
        ({"batch_size": 4}, "batch_size = 4"),
        ({"points": 5}, "points = 5"),
        ({"version": 2}, "version = 2"),
        ({"means": [None, None, None]}, "means have shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            learner().load_state_dict(state | change)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "online"}, "estimator = 'online'"),
        ({"num_classes": 1}, "num_classes = 1"),
        ({"every": 0}, "every = 0"),
        ({"batch_size": True}, "batch_size = True"),
        ({"batch_size": 13}, "batch_size = 13: must be at most 12"),
        ({"input_noise": -1.0}, "input_noise = -1.0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        distil(Predictive(), **options)


def test_heads_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"expectations = \(\)"):
        distil(student=network())
    with pytest.raises(ValueError, match="'memoryless' with Variance"):
        distil(Variance(), estimator="memoryless")
    for levels in ([], [0.5, 0.5], [0.0], [0.2, 1.0], [0.9, 0.1]):
        with pytest.raises(ValueError, match="levels = "):
            Quantiles(levels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.tensor([12])}, r"in \[0, 12\)"),
        ({"rows": torch.tensor([-1])}, r"in \[0, 12\)"),
        ({"rows": torch.zeros(0, dtype=torch.int64)}, "B >= 1"),
        ({"model": network(CLASSES + 1)}, r"logits have shape \(2, 5\)"),
        ({"student": network(CLASSES + 2)}, r"must be \(B, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(change, message):
    distillation = distil(Predictive(), student=change.get("student", network()))
    with pytest.raises(ValueError, match=message):
        distillation.update(change.get("model", network()), change.get("rows", torch.tensor([1, 2])))
    assert distillation.updates == 0 and not distillation.counts.any() and not distillation.means[0].any()


def test_shapes_of_an_uncertainty_must_agree():
    with pytest.raises(ValueError, match=r"\(3, 2\) and expected_entropy \(3, 1\)"):
        uncertainty(torch.full((3, 2), 0.5), torch.zeros(3, 1))


# ---- end to end ----


def test_students_of_digits_are_near_the_posterior_predictive_and_better_than_one_draws_student():
    """40 labelled digits: a wide posterior. The student sees the posterior on the same and 700 other images, without labels."""
    images = data.load(config.Data(name="digits", train_size=740, test_size=500), seed=0)
    x, test = images.train_x.flatten(1), images.test_x.flatten(1)
    labelled = data.Batches(x[:40], images.train_y[:40], batch_size=40, shuffle_seed=0)

    def build(outputs: int, seed: int) -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, outputs)), seed)

    model = build(10, 0)
    sampler = bkd.SGLD(model.parameters(), 0.05, num_data=40, prior_precision=3.0, seed=1)
    student = build(11, 1)
    distillation = PosteriorExpectation(
        student, torch.optim.Adam(student.parameters(), 2e-3), x, (Predictive(), ExpectedEntropy()), num_classes=10
    )
    posterior = bkd.PosteriorPredictive(len(test), 10)
    for draw in bkd.sample(
        model, sampler, bkd.KDLoss(0.0), labelled, burn_in=300, thin=2, num_draws=1000, progress=False,
        callbacks=[distillation],
    ):  # fmt: skip
        if draw.index % 10 == 0:
            posterior.update_logits(logits_of(draw.model, test))
    last = logits_of(model, x).softmax(1)
    of_one = fit(
        build(10, 1),
        data.Batches(x, last, batch_size=100, shuffle_seed=0),
        functional.cross_entropy,
        epochs=140,
        lr=2e-3,
    )

    def nll(probs: torch.Tensor) -> float:
        return float(functional.nll_loss(probs.log(), images.test_y))

    probs, entropy = distillation.predict(test)
    teacher, ours, theirs = nll(posterior.mean), nll(probs), nll(logits_of(of_one, test).softmax(1))
    assert abs(ours - teacher) < (theirs - teacher) / 4, (teacher, ours, theirs)
    found = uncertainty(probs, entropy)
    for mine, exact in ((entropy, posterior.expected_entropy), (found.knowledge, posterior.mutual_information)):
        assert float(torch.corrcoef(torch.stack([mine, exact]))[0, 1]) > 0.5
