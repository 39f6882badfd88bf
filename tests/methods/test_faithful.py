"""Faithfulness between its two bounds, the loss as training step and as energy, and gaps over a posterior."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import bkd_fast as bkd
from bkd_fast.methods.bounds import Box, ball, logit_bounds, softmax_bounds
from bkd_fast.methods.faithful import (
    FaithfulLoss,
    PosteriorGap,
    attack,
    calibration_gap,
    certified_gap,
    faithfulness,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Work this small only waits for the second thread where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _pair(seed=0, classes=4, scale=3.0):
    """A student and a teacher of random weights, float64, sharper than torch's initialisation."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, classes)).double()
    teacher = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, classes)).double()
    for network in (student, teacher):
        with torch.no_grad():
            network[-1].weight.mul_(scale)
    return student, teacher.eval()


def _inputs(rows=40, features=5, seed=0):
    return torch.rand(rows, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _one_dimensional(border: float) -> nn.Module:
    """Class 1 above the border, class 0 below."""
    layer = nn.Linear(1, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-10.0], [10.0]]))
        layer.bias.copy_(torch.tensor([10.0, -10.0]) * border)
    return layer


# ---- the attack ----


def test_the_attack_climbs_to_the_best_corner_of_every_row_and_stays_in_the_box():
    x = _inputs(6)
    box = ball(x, 0.2)
    target = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(1)).double() * 9 - 4
    found = attack(lambda z: -(z - target).square().sum(1), x, box)
    corner = torch.where(target > 0, box.upper, box.lower)
    torch.testing.assert_close(found.points, corner)
    torch.testing.assert_close(found.values, -(corner - target).square().sum(1))


def test_the_attack_keeps_its_best_iterate():
    """Ascent overshoots a narrow peak at the start; what was found there is kept."""
    x = torch.full((3, 2), 0.5, dtype=torch.float64)
    found = attack(lambda z: -((z - 0.5).abs().sum(1) + 1e-9).sqrt() + 0 * z.sum(1), x, ball(x, 0.3), steps=7)
    torch.testing.assert_close(found.points, x)


def test_restarts_find_no_less_and_repeat_with_their_seed():
    student, teacher = _pair()
    x = _inputs()
    box = ball(x, 0.2)

    def gap(z):
        return calibration_gap(student(z), teacher(z))

    plain, first, again, other = (
        attack(gap, x, box, restarts=restarts, seed=seed) for restarts, seed in ((0, 0), (3, 0), (3, 0), (3, 1))
    )
    assert bool((first.values >= plain.values).all()) and bool((first.values > plain.values).any())
    assert torch.equal(first.points, again.points) and not torch.equal(first.points, other.points)
    for found in (plain, first, other):
        assert bool((found.points >= box.lower).all()) and bool((found.points <= box.upper).all())
        torch.testing.assert_close(gap(found.points), found.values, rtol=0, atol=1e-14)
    assert all(p.grad is None for network in (student, teacher) for p in network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "steps = -1"),
        ({"restarts": -2}, "restarts = -2"),
        ({"x": torch.zeros(3, 5)}, r"x has shape \(3, 5\): must be that of the box, \(2, 5\)"),
        ({"x": torch.full((2, 5), 0.9)}, "x is outside the box"),
    ],
)
def test_attacks_that_are_refused(changes, message):
    arguments = {"x": torch.full((2, 5), 0.5), "box": ball(torch.full((2, 5), 0.5), 0.1), **changes}
    with pytest.raises(ValueError, match=message):
        attack(lambda z: z.sum(1), **arguments)


# ---- the gap, from both sides ----


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eps", [0.0, 0.01, 0.05, 0.2, 1.0])
def test_what_is_found_is_never_above_what_is_certified(seed, eps):
    student, teacher = _pair(seed)
    x = _inputs(seed=seed)
    found = faithfulness(student, teacher, x, ball(x, eps), restarts=2)
    assert bool((found.gap <= found.gap_found).all())
    assert bool((found.gap_found <= found.gap_certified).all())
    assert bool((found.gap_certified <= 1).all())
    for weaker, stronger in ((found.agrees, found.agrees_found), (found.agrees_found, found.agrees_certified)):
        assert not bool((stronger & ~weaker).any())


def test_both_sides_meet_at_the_gap_as_the_ball_shrinks():
    student, teacher = _pair()
    x = _inputs()
    expected = calibration_gap(student(x), teacher(x)).detach()
    for eps, width in ((0.0, 1e-12), (1e-8, 1e-5), (1e-4, 0.1)):
        found = faithfulness(student, teacher, x, ball(x, eps))
        for side in (found.gap, found.gap_found, found.gap_certified):
            torch.testing.assert_close(side, expected, rtol=0, atol=width)


def test_a_gap_on_a_grid_lies_between_the_sides():
    """In two dimensions the true gap is had from a grid, up to its mesh, and the attack is nearly there."""
    torch.manual_seed(1)
    student, teacher = (
        nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double().requires_grad_(False) for _ in range(2)
    )
    x = _inputs(5, 2)
    box = ball(x, 0.3)
    found = faithfulness(student, teacher, x, box, restarts=5)
    axis = torch.linspace(0, 1, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for row in range(5):
        points = torch.lerp(box.lower[row], box.upper[row], grid)
        most = calibration_gap(student(points), teacher(points)).max()
        assert most - 1e-3 <= found.gap_found[row] <= most + 1e-3
        assert most <= found.gap_certified[row]


def test_the_certified_gap_is_attained_by_boxes_that_do_not_depend_on_each_other():
    first, second = (Box(torch.tensor([[a, 0.2]]), torch.tensor([[b, 0.6]])) for a, b in ((0.1, 0.3), (0.5, 0.9)))
    torch.testing.assert_close(certified_gap(first, second), torch.tensor([0.8]))
    torch.testing.assert_close(certified_gap(second, first), torch.tensor([0.8]))
    with pytest.raises(ValueError, match=r"student gives \(1, 2\) and teacher \(1, 3\)"):
        certified_gap(first, Box(torch.zeros(1, 3), torch.ones(1, 3)))


def test_agreement_near_a_border_that_is_known():
    """The student changes class at .5, the teacher at .4."""
    student, teacher = _one_dimensional(0.5), _one_dimensional(0.4)
    x = torch.tensor([[0.2], [0.35], [0.45], [0.52], [0.8]], dtype=torch.float64)
    found = faithfulness(student, teacher, x, ball(x, 0.1))
    assert found.agrees.tolist() == [True, True, False, True, True]
    assert found.agrees_found.tolist() == [True, False, False, False, True]
    assert found.agrees_certified.tolist() == [True, False, False, False, True]


def test_a_stack_of_networks_is_the_mean_of_their_probabilities():
    students = [_pair(seed)[0] for seed in range(3)]
    teacher = _pair()[1]
    x = _inputs()
    box = ball(x, 0.05)
    stack = bkd.StackedModule(students)
    found = faithfulness(stack, teacher, x, box)
    probs = torch.stack([s(x).softmax(1) for s in students]).mean(0)
    torch.testing.assert_close(found.gap, (probs - teacher(x).softmax(1)).abs().amax(1).detach(), rtol=0, atol=1e-12)
    assert bool((found.gap_found <= found.gap_certified).all())
    alone = [faithfulness(s, teacher, x, box) for s in students]
    assert bool((found.gap_certified <= torch.stack([f.gap_certified for f in alone]).mean(0) + 1e-12).all())
    same = faithfulness(bkd.StackedModule(students[:1]), teacher, x, box)
    torch.testing.assert_close(same.gap_certified, alone[0].gap_certified, rtol=0, atol=1e-12)


def test_pairs_that_are_refused():
    student, teacher = _pair()
    x = _inputs(3)
    with pytest.raises(ValueError, match=r"student gives \(3, 4\) and teacher \(3, 6\): must be alike"):
        faithfulness(student, nn.Linear(5, 6).double(), x, ball(x, 0.1))
    with pytest.raises(ValueError, match=r"teacher: layer 1 \(Dropout\) is in training mode"):
        faithfulness(student, nn.Sequential(teacher, nn.Dropout(0.1)), x, ball(x, 0.1))


# ---- the loss ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_ball_without_extent_gives_the_energy_of_bayesian_distillation(dtype):
    student, teacher = (network.to(dtype) for network in _pair())
    x, y = _inputs().to(dtype), torch.arange(40) % 4
    loss = FaithfulLoss(student, teacher, beta=3.0, eps=0.0)
    energy = loss(student(x), y, x)
    gradients = torch.autograd.grad(energy, list(student.parameters()))
    with torch.no_grad():
        answers = teacher(x)
        entropy = torch.special.entr(answers.softmax(1)).sum(1).mean()
    expected = bkd.KDLoss(3.0)(student(x), y, answers)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    torch.testing.assert_close(energy, expected - 3.0 * entropy, **tolerance)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(student.parameters())), **tolerance)


def test_the_loss_is_cross_entropy_and_the_divergence_at_the_worst_points():
    student, teacher = _pair()
    x, y = _inputs(), torch.arange(40) % 4
    loss = FaithfulLoss(student, teacher, beta=2.0, eps=0.1, steps=7)
    energy = loss(student(x), y, x)
    points = loss.worst(x)
    divergence = functional.kl_div(
        student(points).log_softmax(1), teacher(points).log_softmax(1).detach(), log_target=True, reduction="batchmean"
    )
    expected = functional.cross_entropy(student(x), y) + 2.0 * divergence
    torch.testing.assert_close(energy, expected)
    parameters = list(student.parameters())
    torch.testing.assert_close(torch.autograd.grad(energy, parameters), torch.autograd.grad(expected, parameters))
    without_labels = loss(student(x), None, x)
    torch.testing.assert_close(without_labels, 2.0 * divergence)


def test_a_ball_costs_more_than_its_centre():
    """The attack starts there."""
    student, teacher = _pair()
    x = _inputs()
    with torch.no_grad():
        centre, *balls = (
            float(FaithfulLoss(student, teacher, beta=2.0, eps=eps)(student(x), None, x)) for eps in (0, 0.02, 0.1, 0.3)
        )
    assert centre < min(balls)


def test_the_gradient_is_that_of_the_maximum():
    """Danskin: at the point found, the gradient of the loss with its search in it, by central differences."""
    student, teacher = _pair()
    x, y = _inputs(10), torch.arange(10) % 4
    loss = FaithfulLoss(student, teacher, beta=2.0, eps=0.05)
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(loss(student(x), y, x), parameters)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    values = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=h)
            values.append(float(loss(student(x), y, x)))
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=h)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_the_loss_owns_no_network_and_leaves_no_gradients():
    student, teacher = _pair()
    loss = FaithfulLoss(student, teacher, beta=1.0, eps=0.1)
    assert not list(loss.parameters())
    loss.train()
    assert not teacher.training
    x = _inputs(6)
    loss(student(x), torch.zeros(6, dtype=torch.long), x)
    assert all(p.grad is None for network in (student, teacher) for p in network.parameters())
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": -1.0}, "beta = -1.0"),
        ({"beta": math.inf}, "beta = inf"),
        ({"teacher": nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5))}, "teacher: layer 1 .Dropout. is in training mode"),
        ({"student": bkd.StackedModule(nn.Linear(5, 4), 2)}, "student is a StackedModule"),
    ],
)  # fmt: skip
def test_losses_that_are_refused(changes, message):
    arguments = {"student": nn.Linear(5, 4), "teacher": nn.Linear(5, 4), "beta": 1.0, "eps": 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        FaithfulLoss(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def test_a_batch_out_of_range_is_named():
    student, teacher = _pair()
    loss = FaithfulLoss(student, teacher, beta=1.0, eps=0.1, upper=0.5)
    x = torch.full((2, 5), 0.75, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x\[0, 0\] = 0.75: must be in the data's range \[0, 0.5\]"):
        loss(student(x), torch.zeros(2, dtype=torch.long), x)


# ---- the posterior ----


def _chain(loss, loader, teacher, student, **changes):
    sampler = bkd.SGLD(student.named_parameters(), lr=0.02, num_data=40, prior_precision=1.0, seed=5)
    settings = {"burn_in": 20, "thin": 5, "num_draws": 6, "progress": False} | changes
    return [draw.snapshot() for draw in bkd.sample(student, sampler, loss, loader, teacher=teacher, **settings)]


def test_without_a_ball_the_chain_is_that_of_bayesian_distillation():
    """The same noise, and gradients equal but for rounding: the draws of the two energies agree."""
    student, teacher = (network.float() for network in _pair())
    x, y = _inputs().float(), torch.arange(40) % 4
    other = copy.deepcopy(student)
    faithful = _chain(FaithfulLoss(student, teacher, beta=2.0, eps=0.0), [(x, y)], nn.Identity(), student)
    plain = _chain(bkd.KDLoss(2.0), [(x, y)], teacher, other)
    for ours, theirs in zip(faithful, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_gaps_of_draws_are_those_of_their_networks():
    student, teacher = (network.float() for network in _pair())
    x, y = _inputs().float(), torch.arange(40) % 4
    box = ball(x, 0.05)
    gaps = PosteriorGap(teacher, x, box, steps=5)
    loss = FaithfulLoss(student, teacher, beta=2.0, eps=0.05, steps=3)
    networks = []
    for snapshot in _chain(loss, [(x, y)], nn.Identity(), student, callbacks=[gaps]):
        network = copy.deepcopy(student)
        network.load_state_dict(snapshot)
        networks.append(network)
    found = torch.stack(
        [attack(lambda z, n=n: calibration_gap(n(z), teacher(z)), x, box, steps=5).values for n in networks]
    )
    theirs = softmax_bounds(logit_bounds(teacher, box))
    certified = torch.stack([certified_gap(softmax_bounds(logit_bounds(n, box)), theirs) for n in networks])
    for streamed, expected in ((gaps.found, found.double()), (gaps.certified, certified)):
        torch.testing.assert_close(streamed.mean, expected.mean(0), rtol=0, atol=1e-6)
        median = expected.sort(0).values[2]  # the order statistic ceil(6 / 2)
        torch.testing.assert_close(streamed.quantile(0.5).double(), median, rtol=0, atol=2.0**-15)
    mean = faithfulness(bkd.StackedModule(networks), teacher, x, box, steps=0, restarts=0)
    assert bool((mean.gap <= found.mean(0) + 1e-6).all())


def test_faithful_students_of_digits_follow_their_teacher_further():
    """scikit-learn's digits: trained on the loss, the gap on the ball is smaller than by distillation on the inputs alone."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    loader = DataLoader(
        TensorDataset(x[:1200], y[:1200]), 100, shuffle=True, generator=torch.Generator().manual_seed(0)
    )

    def train(network, loss, epochs):
        optimizer = torch.optim.Adam(network.parameters(), 5e-3)
        for _ in range(epochs):
            for inputs, target in loader:
                optimizer.zero_grad()
                loss(network(inputs), target, inputs).backward()
                optimizer.step()

    train(teacher, lambda logits, target, _: functional.cross_entropy(logits, target), 30)
    test = x[1200:1400]
    box = ball(test, 0.05)
    found = {}
    for name, eps in (("plain", 0.0), ("faithful", 0.05)):
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
        train(student, FaithfulLoss(student, teacher, beta=5.0, eps=eps, steps=3), 30)
        found[name] = faithfulness(student, teacher, test, box)
        assert float((student(test).argmax(1) == y[1200:1400]).float().mean()) > 0.8
    assert float(found["faithful"].gap_found.mean()) < 0.9 * float(found["plain"].gap_found.mean())
    assert bool((found["faithful"].gap_found <= found["faithful"].gap_certified + 1e-5).all())
