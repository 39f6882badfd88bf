"""LinearHeadSampler: SGLD on KDLoss of an nn.Linear, K chains at a time; resumed, fed to a posterior, and with a known answer."""

import math

import pytest
import stats
import torch
from torch import nn

import bkd_fast as bkd

FEATURES, CLASSES, ROWS, NUM_DATA = 37, 10, 24, 500


def _batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        x = torch.randn(ROWS, FEATURES, generator=generator).to(dtype)
        yield x, torch.randint(CLASSES, (ROWS,), generator=generator), torch.randn(ROWS, CLASSES, generator=generator)


def _sampler(chains=1, **settings):
    fixed = {
        "lr": 0.05,
        "num_data": NUM_DATA,
        "prior_strength": 2.0,
        "temperature": 3.0,
        "prior_precision": 1.5,
        "seed": 9,
    }
    return bkd.LinearHeadSampler(FEATURES, CLASSES, chains=chains, **{**fixed, **settings})


@pytest.mark.parametrize("posterior_temperature", [0.0, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_is_sgld_on_the_loss_of_a_linear_layer(posterior_temperature, bias):
    head = nn.Linear(FEATURES, CLASSES, bias=bias)
    if bias:
        nn.init.zeros_(head.bias)
    ours = _sampler(init=head.weight, bias=bias, posterior_temperature=posterior_temperature, label_weight=0.7, chain=4)
    sgld = bkd.SGLD(
        head.parameters(),
        0.05,
        num_data=NUM_DATA,
        prior_precision=1.5,
        temperature=posterior_temperature,
        seed=9,
        chain=4,
    )
    loss_fn = bkd.KDLoss(2.0, 3.0, label_weight=0.7)
    for x, y, t in _batches(20):
        sgld.zero_grad()
        loss = loss_fn(head(x), y, t)
        loss.backward()
        sgld.step()
        energy = ours.step(x, y, t)
        assert energy.shape == (1,)
        torch.testing.assert_close(energy[0], loss.detach(), rtol=1e-5, atol=0)
    # rounding alone: 20 steps of some 2^-24 of numbers below 1
    torch.testing.assert_close(ours.weight[0], head.weight.detach(), rtol=0, atol=2e-6)
    if bias:
        torch.testing.assert_close(ours.bias[0], head.bias.detach(), rtol=0, atol=2e-6)
    assert ours.steps == 20
    assert (ours.bias is None) != bias


def test_chains_are_those_of_separate_samplers():
    together = _sampler(chains=3, chain=2)
    alone = [_sampler(chain=2 + k) for k in range(3)]
    for batch in _batches(5):
        energies = together.step(*batch)
        separate = torch.cat([one.step(*batch) for one in alone])
        torch.testing.assert_close(energies, separate, rtol=1e-5, atol=0)
    torch.testing.assert_close(together.weight, torch.cat([one.weight for one in alone]), rtol=0, atol=1e-6)
    assert not torch.allclose(together.weight[0], together.weight[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_16_bits_are_as_their_values_in_float32(dtype):
    short, long = _sampler(), _sampler()
    for x, y, t in _batches(3, dtype):
        short.step(x, y, t)
        long.step(x.float(), y, t)
    torch.testing.assert_close(short.weight, long.weight, rtol=0, atol=1e-6)


def test_top_k_teachers_are_the_rows_that_they_stand_for():
    ours, dense = _sampler(), _sampler()
    for x, y, t in _batches(3):
        top = bkd.TopKLogits.of(t, 3)
        assert torch.equal(ours.step(x, y, top), dense.step(x, y, top.dense(CLASSES)))
    assert torch.equal(ours.weight, dense.weight)
    top.indices[4, 1] = CLASSES
    with pytest.raises(ValueError, match=r"teacher_logits.indices holds 10: must be classes in \[0, 10\)"):
        ours.step(x, y, top)
    assert torch.equal(ours.weight, dense.weight) and ours.steps == 3


def test_resumes_bit_for_bit():
    batches = list(_batches(6))
    through, first = _sampler(chains=2, chain=1), _sampler(chains=2, chain=1)
    for batch in batches:
        through.step(*batch)
    for batch in batches[:3]:
        first.step(*batch)
    saved = first.state_dict()
    first.step(*batches[5])  # what was saved does not move on
    second = _sampler(chains=2, lr=0.3, seed=0, posterior_temperature=0.5)
    second.load_state_dict(saved)
    for batch in batches[3:]:
        second.step(*batch)
    assert torch.equal(second.weight, through.weight) and torch.equal(second.bias, through.bias)
    assert second.steps == through.steps == 6


def test_a_state_of_another_shape_is_refused_and_changes_nothing():
    sampler = _sampler(chains=2)
    before = sampler.weight.clone()
    for other, message in (
        (_sampler(chains=3).state_dict(), r"weight has shape \(3, 10, 37\): must be \(2, 10, 37\)"),
        (_sampler(chains=2, bias=False).state_dict(), r"bias has shape None: must be \(2, 10\)"),
        ({"weight": before}, "lacks"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.load_state_dict(other)
        assert torch.equal(sampler.weight, before)


def test_feeds_the_posterior_predictive():
    sampler = _sampler(chains=4)
    posterior = bkd.PosteriorPredictive(num_rows=ROWS, num_classes=CLASSES)
    x = next(_batches(1))[0]
    drawn = []
    for batch in _batches(4):
        sampler.step(*batch)
        logits = sampler.logits(x)
        assert logits.shape == (4, ROWS, CLASSES)
        for k in range(4):
            torch.testing.assert_close(logits[k], x @ sampler.weight[k].T + sampler.bias[k], rtol=1e-5, atol=1e-6)
        posterior.update_logits(logits)
        drawn.append(torch.softmax(logits, -1))
    torch.testing.assert_close(posterior.mean, torch.cat(drawn).mean(0), rtol=1e-5, atol=1e-6)


def test_a_step_of_lr_0_is_none():
    sampler, other = _sampler(), _sampler()
    batch = next(_batches(1))
    sampler.lr = 0.0
    sampler.step(*batch)
    assert sampler.steps == 0 and not sampler.weight.any()
    sampler.lr = 0.05
    sampler.step(*batch)
    other.step(*batch)
    assert torch.equal(sampler.weight, other.weight)


def test_init_for_each_chain():
    init = torch.randn(2, CLASSES, FEATURES)
    assert torch.equal(_sampler(chains=2, init=init).weight, init)
    sampler = _sampler(chains=2, init=init[0])
    assert torch.equal(sampler.weight[1], init[0])
    sampler.step(*next(_batches(1)))
    assert not torch.equal(sampler.weight[0], sampler.weight[1])  # memory of its own for each chain
    assert torch.equal(_sampler(chains=2, init=init).weight, init)  # init itself did not move


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr = -1\.0"),
        ({"lr": math.nan}, ValueError, "lr = nan"),
        ({"num_data": 0}, ValueError, "num_data = 0: must be finite and positive"),
        ({"num_data": "all"}, TypeError, "num_data = 'all'"),
        ({"posterior_temperature": -0.1}, ValueError, r"posterior_temperature = -0\.1"),
        ({"temperature": 0.0}, ValueError, r"temperature = 0\.0"),
        ({"prior_strength": -2.0}, ValueError, r"prior_strength = -2\.0"),
        ({"prior_precision": math.inf}, ValueError, "prior_precision = inf"),
        ({"chains": 0}, ValueError, "chains = 0"),
        ({"chain": 2**20}, ValueError, "chain = 1048576"),
        ({"chain": 2**20 - 1, "chains": 2}, ValueError, "the last chain = 1048576"),
        ({"seed": -1}, ValueError, "seed = -1"),
        ({"init": torch.zeros(3, 3)}, ValueError, r"init has shape \(3, 3\): must be \(10, 37\) or \(1, 10, 37\)"),
    ],
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        _sampler(**change)


def test_bad_batches_change_nothing():
    sampler = _sampler()
    x, y, t = next(_batches(1))
    for batch, error in (
        ((x[:, 1:], y, t), ValueError),
        ((x, y), ValueError),
        ((x * torch.nan, y, t), bkd.NonFiniteError),
    ):
        with pytest.raises(error):
            sampler.step(*batch)
    sampler.lr = -1.0
    with pytest.raises(ValueError, match="lr"):
        sampler.step(x, y, t)
    assert sampler.steps == 0 and not sampler.weight.any()


def test_a_head_is_of_views_and_can_be_turned():
    sampler = _sampler(chains=2, bias=True)
    x = torch.randn(4, FEATURES)
    one = sampler.head(1)
    for batch in _batches(2):
        sampler.step(*batch)
        torch.testing.assert_close(one(x), sampler.logits(x)[1])
    assert not torch.allclose(one(x), sampler.logits(x)[0])
    assert sampler.head(0, into=one) is one
    torch.testing.assert_close(one(x), sampler.logits(x)[0])
    assert _sampler(bias=False).head(0).bias is None
    for k in (-1, 2):
        with pytest.raises(ValueError, match=rf"k = {k}: must be in \[0, 2\)"):
            sampler.head(k)


class _Recorder(bkd.Callback):
    def __init__(self):
        self.steps, self.draws, self.health = [], [], None

    def on_step(self, record):
        self.steps.append((record.step, record.phase, float(record.energy)))

    def on_draw(self, draw):
        self.draws.append((draw.step, draw.chain, draw.index))

    def on_end(self, health):
        self.health = health


def test_the_loop_yields_the_draws_of_every_chain():
    batches, recorder = list(_batches(3)), _Recorder()
    sampler, other = _sampler(chains=2, chain=5), _sampler(chains=2, chain=5)
    posterior = bkd.PosteriorPredictive(num_rows=ROWS, num_classes=CLASSES)
    test = [batches[0][0]]
    draws, expected, energies = [], [], []
    for draw in bkd.sample_heads(sampler, batches, burn_in=3, thin=2, num_draws=3, callbacks=[recorder]):
        posterior.update(draw, test)
        draws.append((draw.step, draw.chain, draw.index, draw.snapshot()))
    for step in range(1, 10):
        energies.append(float(other.step(*batches[(step - 1) % 3]).mean()))
        if step in (5, 7, 9):
            expected += [(step, 5 + k, (step - 5) // 2, other.weight[k].clone(), other.bias[k].clone()) for k in (0, 1)]
    for (*place, snapshot), (*theirs, weight, bias) in zip(draws, expected, strict=True):
        assert place == theirs
        assert torch.equal(snapshot["weight"], weight) and torch.equal(snapshot["bias"], bias)
    phases = ["burn_in"] * 3 + ["sampling"] * 6
    assert recorder.steps == [(i + 1, phase, energies[i]) for i, phase in enumerate(phases)]
    assert recorder.draws == [place[:3] for place in draws]
    assert math.isnan(recorder.health.noise_share[0]) and math.isnan(recorder.health.stationarity[0])
    probabilities = [(test[0] @ w.T + b).softmax(-1) for *_, w, b in expected]
    torch.testing.assert_close(posterior.mean, torch.stack(probabilities).mean(0), rtol=1e-5, atol=1e-6)
    assert [chain for (_, chain), _ in posterior.streams] == [5, 6]


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ({"num_draws": 0}, ValueError, "num_draws = 0"),
        ({"num_draws": 1, "thin": 0}, ValueError, "thin = 0"),
        ({"num_draws": 1, "burn_in": 1.0}, TypeError, r"burn_in = 1\.0"),
    ],
)
def test_bad_counts_come_before_the_first_step(counts, error, message):
    sampler = _sampler()
    with pytest.raises(error, match=message):
        bkd.sample_heads(sampler, _batches(1), **counts)
    assert sampler.steps == 0


class _Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, FEATURES), nn.BatchNorm1d(FEATURES), nn.Tanh())
        self.top = nn.ModuleDict({"fc": nn.Linear(FEATURES, CLASSES)})

    def forward(self, x):
        return self.top["fc"](self.body(x))


def test_a_network_is_split_and_a_draw_put_back():
    network = _Network().eval()
    x = torch.randn(ROWS, 6)
    before = network(x).detach()
    backbone, head = bkd.split_head(network, "top.fc")
    assert head is network.top["fc"] and torch.equal(network(x), before)
    features = backbone(x).detach()
    assert features.shape == (ROWS, FEATURES) and torch.equal(head(features), before)
    shared = {id(parameter) for parameter in network.parameters()}
    assert {id(parameter) for parameter in backbone.parameters()} == shared - {id(p) for p in head.parameters()}
    assert backbone.body[1].running_mean is network.body[1].running_mean
    sampler = _sampler(chains=2, init=head.weight)
    network.set_submodule("top.fc", sampler.head(1))
    sampler.step(features, torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, CLASSES))
    torch.testing.assert_close(network(x), sampler.logits(features)[1])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fc", ValueError, r"name = 'fc': must be a part of the model; its nn\.Linear are \['body\.0', 'top\.fc'\]"),
        ("", ValueError, "name = ''"),
        ("body.2", TypeError, r"name = 'body\.2' is a Tanh: must be an nn\.Linear"),
    ],
)
def test_what_is_no_head(name, error, message):
    with pytest.raises(error, match=message):
        bkd.split_head(_Network(), name)


def test_known_posterior():
    """One feature, always 1: W is the logits, and the posterior of q is Dir(a) with a = N lambda p_T, so that E q = a / sum a
    at any step size (E grad = 0 in the stationary state). T softens the teacher, not the answer's form."""
    chains, temperature, strength, num_data = 64, 2.0, 2.0, 12
    teacher = torch.tensor([[1.2, 0.0, -0.8, 0.4]])
    sampler = bkd.LinearHeadSampler(
        1,
        4,
        lr=0.1,
        num_data=num_data,
        chains=chains,
        prior_strength=strength,
        temperature=temperature,
        bias=False,
        seed=11,
    )
    x, draws = torch.ones(1, 1), []
    for step in range(1400):
        sampler.step(x, None, teacher)
        if step >= 400 and step % 4 == 0:  # q_T: the prior is on the softened student
            draws.append(torch.softmax(sampler.logits(x)[:, 0].double() / temperature, -1))
    q = torch.stack(draws, 1)  # (chains, draws, classes)
    expected = torch.softmax(teacher[0] / temperature, -1)
    for k in range(4):
        stats.assert_ergodic_mean(q[..., k], float(expected[k]), f"E q_{k}")
    # and its spread is that of the Dirichlet, not of another temperature: variance p (1 - p) / (sum a + 1), up to the step
    total = num_data * strength
    for k in range(4):
        p = float(expected[k])
        variances = (q[..., k] - p).square()
        stats.assert_ergodic_mean(
            variances, p * (1 - p) / (total + 1), f"var q_{k}", allowance=0.1 * p * (1 - p) / total
        )
