"""check_sampler: right samplers pass, and each of the usual mistakes is told by its own words."""

import math

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

import bkd_fast as bkd
from bkd_fast.checking import check_sampler

NUM_DATA = 1000
SMALL = ((100, 200), (50, 100), (50, 100), (3001,))
TINY = ((40, 50), (20, 50), (20, 50), (701,))


class Right(torch.optim.Optimizer):
    """SGLD on the mean loss, written out; the subclasses get one thing wrong each."""

    def __init__(self, params, lr=1e-2, *, num_data, **others):
        super().__init__(params, {"lr": lr, "num_data": num_data, **others})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.move(parameter, group)
        self.steps += 1

    def move(self, p, group):
        p.add_(p.grad, alpha=-group["lr"]).add_(self.normals(p), alpha=self.scale(group))

    def scale(self, group):
        return math.sqrt(2 * group["lr"] / group["num_data"])

    def normals(self, p):
        return torch.randn_like(p)


class RightMomentum(Right):
    """torch.optim.SGD's momentum, with noise added into the buffer."""

    def move(self, p, group):
        mu, lr = group["mu"], group["lr"]
        noise = self.normals(p) * math.sqrt(2 * (1 - mu) / (lr * group["num_data"])) if lr else 0
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.mul_(mu).add_(p.grad + noise)
        p.add_(buffer, alpha=-lr)


class RightKinetic(Right):
    """BAOAB with merged kicks: a move holds the noise of this step and of the last, so that moves are no autoregression."""

    def move(self, p, group):
        mu, h = group["mu"], math.sqrt(group["lr"] / group["num_data"])
        momentum = self.state[p].setdefault("momentum", torch.randn_like(p))
        momentum.sub_(p.grad, alpha=h * group["num_data"])
        p.add_(momentum, alpha=h / 2)
        momentum.mul_(mu).add_(self.normals(p), alpha=math.sqrt(1 - mu**2))
        p.add_(momentum, alpha=h / 2)


class OtherUnits(Right):
    """Welling and Teh's: half a step of the summed loss's gradient, noise of variance lr."""

    def move(self, p, group):
        p.add_(p.grad, alpha=-group["lr"] / 2 * group["num_data"]).add_(self.normals(p), alpha=math.sqrt(group["lr"]))


class ByItsGradients(Right):
    """Steps inversely to the gradients' running size: how far it moves depends on the curvature."""

    def move(self, p, group):
        square = (
            self.state[p].setdefault("square", torch.zeros_like(p)).mul_(0.999).addcmul_(p.grad, p.grad, value=1e-3)
        )
        size = 1 / (square.mean().sqrt() + 1e-3)
        p.sub_(size * p.grad, alpha=group["lr"]).add_(size.sqrt() * self.normals(p), alpha=self.scale(group))


class RightPreconditioned(Right):
    """A step of its own size for every element."""

    def move(self, p, group):
        size = self.state[p].setdefault("size", torch.rand_like(p) + 0.5)
        p.sub_(size * p.grad, alpha=group["lr"]).add_(size.sqrt() * self.normals(p), alpha=self.scale(group))


class ThroughData(Right):
    """Right, but autograd does not hear of it."""

    def move(self, p, group):
        p.data.add_(self.scale(group) * self.normals(p) - group["lr"] * p.grad)


class HalfVariance(Right):
    def scale(self, group):
        return math.sqrt(group["lr"] / group["num_data"])


class DeviationLr(Right):
    def scale(self, group):
        return group["lr"]


class NoiseTimesLr(Right):
    def move(self, p, group):
        p.add_(p.grad + self.scale(group) * self.normals(p), alpha=-group["lr"])


class NoNumData(Right):
    def scale(self, group):
        return math.sqrt(2 * group["lr"])


class NoiseOnePercentLarge(Right):
    def scale(self, group):
        return 1.01 * super().scale(group)


class NoNoise(Right):
    def scale(self, group):
        return 0.0


class OneNormalForATensor(Right):
    def normals(self, p):
        return torch.randn(()).expand_as(p)


class Uphill(Right):
    def move(self, p, group):
        p.add_(p.grad, alpha=group["lr"]).add_(self.normals(p), alpha=self.scale(group))


class GradientChanged(Right):
    def move(self, p, group):
        p.grad.mul_(group["lr"])
        p.sub_(p.grad).add_(self.normals(p), alpha=self.scale(group))


class GradientReplaced(Right):
    def move(self, p, group):
        p.grad = p.grad + 0.0
        super().move(p, group)


class BufferIsTheGradient(RightMomentum):
    """Right in its law; the first gradient becomes the buffer and changes at the second step."""

    def move(self, p, group):
        self.state[p].setdefault("momentum_buffer", p.grad)
        super().move(p, group)


class Rebound(Right):
    def move(self, p, group):
        p.data = p.data - group["lr"] * p.grad + self.scale(group) * self.normals(p)


class SameInTensors(Right):
    def normals(self, p):
        return torch.randn(p.shape, generator=torch.Generator().manual_seed(self.steps))


class SameEveryStep(Right):
    def normals(self, p):
        return torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


class EveryThirdStep(Right):
    """Three noises for ever."""

    def normals(self, p):
        return torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + self.steps % 3))


class MomentumSameEveryStep(RightMomentum):
    normals = SameEveryStep.normals


class HalfOfTheLastNoise(Right):
    def normals(self, p):
        new, state = torch.randn_like(p), self.state[p]
        mixed = (new + state.get("last", torch.randn_like(p))) / math.sqrt(2)
        state["last"] = new
        return mixed


class Overlapping(Right):
    """One stream of normals a step, of which tensors take windows that overlap."""

    def normals(self, p):
        stream = torch.randn(p.numel() + 5000, generator=torch.Generator().manual_seed(self.steps))
        return stream[p.shape[0] :][: p.numel()].view(p.shape)


class OneStreamForManySteps(Right):
    """The window moves on by less than its length."""

    def normals(self, p):
        generator = torch.Generator().manual_seed(1000 * (self.steps // 100) + p.shape[0])
        stream = torch.randn(p.numel() + 10_000, generator=generator)
        return stream[97 * (self.steps % 100) :][: p.numel()].view(p.shape)


class NoiseAtZeroLr(Right):
    def scale(self, group):
        return math.sqrt(2 * self.defaults["lr"] / group["num_data"])


class Diverging(Right):
    def move(self, p, group):
        p.add_(p.grad, alpha=-20 * group["lr"]).add_(self.normals(p), alpha=self.scale(group))


@pytest.mark.parametrize(
    "sampler, settings",
    [
        (Right, {}),
        (Right, {"lr": 3.0}),
        (RightMomentum, {"mu": 0.5}),
        (RightMomentum, {"mu": 0.9}),
        (RightMomentum, {"mu": 0.99}),
        (RightKinetic, {"mu": 0.7}),
        (RightPreconditioned, {}),
        (bkd.SGLD, {}),
        (bkd.SGLD, {"temperature": 0.25, "seed": 5}),
        (bkd.SGLD, {"maximize": True, "chain": 3}),
        (bkd.SGLD, {"temperature": 0.0}),
    ],
)
def test_right_samplers_pass(sampler, settings):
    found = check_sampler(sampler, num_data=NUM_DATA, shapes=SMALL, **{"lr": 1e-2, **settings})
    assert found.ok, str(found)
    assert found.problems == [] and found.in_place and found.counted
    assert found.expected == settings.get("temperature", 1.0)
    assert found.standard_error < 0.01
    assert found.remembers == ("mu" in settings)
    if "mu" not in settings:
        assert found.effective_lr == pytest.approx(settings.get("lr", 1e-2), rel=0.05)
        assert found.curvature * found.effective_lr == pytest.approx(0.2)
    assert found.copies == ("identical chains" if sampler is bkd.SGLD else "reproducible by torch.manual_seed")


@pytest.mark.parametrize("sampler, lr", [(OtherUnits, 2e-5), (OtherUnits, 2e-8), (ByItsGradients, 1e-3)])
def test_the_curvature_is_found_whatever_lr_means(sampler, lr):
    found = check_sampler(sampler, num_data=NUM_DATA, lr=lr, shapes=SMALL)
    assert found.ok, str(found)
    assert 0.15 < found.curvature * found.effective_lr < 0.25
    if sampler is OtherUnits:
        assert found.effective_lr == pytest.approx(lr * NUM_DATA / 2, rel=0.05)


@pytest.mark.parametrize(
    "sampler, words",
    [
        (HalfVariance, ["place of 1: 0.5 times it, as with noise of variance lr for 2 lr"]),
        (DeviationLr, ["place of 1: 15 times it, as with noise of standard deviation lr"]),
        (NoiseTimesLr, ["place of 1: 0.0009 times it, as with noise that is multiplied by lr"]),
        (NoNumData, ["place of 1: 1000 times it, as with noise that is not divided by sqrt(num_data)"]),
        (NoNoise, ["temperature 0 in place", "no noise is seen"]),
        (OneNormalForATensor, ["no noise is seen"]),
        (Uphill, ["downhill", "not stationary", "temperature inf"]),
        (Diverging, ["not stationary after", "temperature inf"]),
        (GradientChanged, ["the gradient is changed"]),
        (GradientReplaced, ["the gradient is changed"]),
        (BufferIsTheGradient, ["the gradient is changed"]),
        (Rebound, ["other memory"]),
        (SameInTensors, ["the noise of two tensors", "shifted"]),
        (SameEveryStep, ["temperature", "made of that of the steps before"]),
        (EveryThirdStep, ["is no figure yet", "made of that of the steps before"]),
        (MomentumSameEveryStep, ["temperature", "made of that of the steps before"]),
        (HalfOfTheLastNoise, ["temperature", "no momentum explains"]),
        (Overlapping, ["the noise of two tensors", "shifted"]),
        (OneStreamForManySteps, ["the noise of two tensors", "shifted"]),
        (NoiseAtZeroLr, ["at lr = 0"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mistakes_are_told(sampler, words):
    """Every expected complaint in its turn."""
    settings = {"mu": 0.9} if issubclass(sampler, RightMomentum) else {}
    if sampler is Diverging:
        settings["curvature"] = 20.0
    found = check_sampler(sampler, num_data=NUM_DATA, lr=0.03, shapes=SMALL, **settings)
    assert not found.ok
    assert "WRONG" in str(found)
    for expected in words:
        assert any(expected in problem for problem in found.problems), f"{expected!r} is not in\n{found}"
    if found.stationary and found.temperature == pytest.approx(1, abs=0.02):
        assert len(found.problems) == len(words), str(found)  # and nothing else


def test_one_percent_more_noise_is_seen():
    """At the default size, where the temperature's standard error is some .0015: 2 % are 13 of them."""
    found = check_sampler(NoiseOnePercentLarge, num_data=NUM_DATA)
    assert not found.ok
    assert found.temperature == pytest.approx(1.0201, abs=0.0075)
    assert [problem[:11] for problem in found.problems] == ["temperature"]


def test_plain_optimizers_have_temperature_zero():
    for optimizer, settings in ((torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9})):
        found = check_sampler(optimizer, num_data=NUM_DATA, lr=0.1, expected=0.0, shapes=SMALL, **settings)
        assert found.ok, str(found)
        assert found.temperature == 0 and math.isnan(found.fresh_noise)
        assert found.remembers == bool(settings)


def test_slow_drift_is_no_temperature():
    """Steps a thousand times smaller than the curvature is chosen for: the variance still moves at the last step."""
    found = check_sampler(NoNumData, num_data=NUM_DATA, lr=1e-5, curvature=20.0, shapes=TINY)
    assert not found.stationary
    assert any("not stationary" in problem for problem in found.problems)


def test_moves_through_data_are_noted_only():
    found = check_sampler(ThroughData, num_data=NUM_DATA, shapes=SMALL)
    assert found.ok and found.in_place and not found.counted
    assert "not told to autograd" in str(found)


@pytest.mark.parametrize("sampler, settings", [(Right, {}), (RightMomentum, {"mu": 0.8})])
def test_false_alarms_and_the_standard_error(sampler, settings):
    """No right sampler is accused, and the temperatures of independent runs scatter as their standard errors say."""
    scores = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(12):
            torch.manual_seed(seed)
            found = check_sampler(sampler, num_data=NUM_DATA, shapes=TINY, **settings)
            assert found.ok, str(found)
            scores.append((found.temperature - 1) / found.standard_error)
    low, high = scipy_stats.chi2.ppf([3e-5, 1 - 3e-5], len(scores))
    assert low < np.sum(np.square(scores)) < high, scores
    assert len(set(scores)) == len(scores)


def test_leaves_the_global_generator_and_the_threads_as_they_were(two_threads):
    before = torch.random.get_rng_state()
    first = check_sampler(Right, num_data=NUM_DATA, shapes=TINY)
    assert torch.equal(before, torch.random.get_rng_state()) and torch.get_num_threads() == 2
    assert first == check_sampler(Right, num_data=NUM_DATA, shapes=TINY)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"opt_class": torch.nn.Linear}, TypeError, "opt_class = .*Linear.*: must be a class of torch.optim.Optimizer"),
        ({"opt_class": Right([torch.zeros(1)], num_data=1)}, TypeError, "opt_class"),
        ({"num_data": 0}, ValueError, "num_data = 0: must be finite and above 0"),
        ({"num_data": math.inf}, ValueError, "num_data = inf"),
        ({"num_data": "many"}, TypeError, "num_data = 'many': must be a number"),
        ({"num_data": None}, TypeError, "num_data = None"),
        ({"curvature": -1.0}, ValueError, "curvature = -1.0: must be finite and above 0"),
        ({"curvature": "small"}, TypeError, "curvature = 'small': must be a number"),
        ({"expected": -0.5}, ValueError, "expected = -0.5: must be finite and at least 0"),
        ({"lr": 0.0}, ValueError, "lr = 0.0: must be above 0, or give a curvature"),
        ({"shapes": [(200,)]}, ValueError, "shapes = .*at least two, each of at least 100"),
        ({"shapes": [(200,), (3, 3)]}, ValueError, "shapes = .*at least two, each of at least 100"),
        ({"unheard_of": 1}, TypeError, "unheard_of"),
    ],
)
def test_bad_arguments(changes, error, words):
    class Strict(Right):
        def __init__(self, params, lr=1e-2, *, num_data):
            super().__init__(params, lr, num_data=num_data)

    with pytest.raises(error, match=words):
        check_sampler(**{"opt_class": Strict, "num_data": NUM_DATA, **changes})
