"""Labels of a Bayesian teacher are the mean of its draws' tempered probabilities, and KDLoss reads them as they are."""

import pytest
import torch
from torch import nn

import bkd_fast as bkd
from bkd_fast.methods.bayesian_teacher import BayesianTeacher


@pytest.fixture(autouse=True)
def one_thread():
    """Work this small only waits for the second thread where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _problem(rows=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return x, y, teacher


def _draws(x, y, teacher, labels, num_draws=12):
    """The draws' logits on x, with labels following the chain."""
    sampler = bkd.SGLD(teacher.named_parameters(), lr=0.05, num_data=len(x), prior_precision=1.0, seed=3)
    settings = {"burn_in": 10, "thin": 5, "num_draws": num_draws, "progress": False, "callbacks": [labels]}
    draws = bkd.sample(teacher, sampler, bkd.KDLoss(0.0), [(x, y)], **settings)
    return torch.stack([draw.model(x).detach() for draw in draws])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_labels_are_the_mean_of_tempered_draws(temperature):
    x, y, teacher = _problem()
    labels = BayesianTeacher([x[:15], x[15:]], num_rows=40, num_classes=3, temperature=temperature)
    assert bool(labels.probs.isnan().all())
    logits = _draws(x, y, teacher, labels)
    expected = (logits.double() / temperature).softmax(2).mean(0)
    torch.testing.assert_close(labels.probs.double(), expected, rtol=0, atol=2e-6)
    assert bool((labels.posterior.counts == 12).all())
    torch.testing.assert_close((labels.logits.double() / temperature).softmax(1), expected, rtol=0, atol=2e-6)


def test_a_loss_of_the_same_temperature_sees_the_labels_as_they_are():
    """Its energy and gradient are those of a cross entropy with the mean of tempered draws, label weight and all."""
    x, y, teacher = _problem()
    labels = BayesianTeacher([x], num_rows=40, num_classes=3, temperature=2.0)
    _draws(x, y, teacher, labels)
    z = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    energy = bkd.KDLoss(4.0, temperature=2.0, label_weight=0.5)(z, y, labels.logits.double())
    cross = -(labels.probs.double() * (z / 2).log_softmax(1)).sum(1).mean()
    expected = 0.5 * nn.functional.cross_entropy(z, y) + 4.0 * cross
    torch.testing.assert_close(energy, expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(e, z)[0] for e in (energy, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_probabilities_that_vanish_stay_finite_as_logits():
    x, _, _ = _problem()
    labels = BayesianTeacher([x], num_rows=40, num_classes=3)
    sharp = nn.Linear(4, 3)
    with torch.no_grad():
        sharp.weight.zero_()
        sharp.bias.copy_(torch.tensor([0.0, -50.0, -500.0]))
    labels.on_draw(type("Draw", (), {"model": sharp}))
    assert bool(labels.logits.isfinite().all())
    assert float(bkd.KDLoss(3.0)(torch.zeros(40, 3), None, labels.logits)) == pytest.approx(3 * torch.tensor(3.0).log())


def test_modes_are_put_back_and_dropout_is_off():
    x, _, _ = _problem()
    network = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3)).train()
    labels = BayesianTeacher([x], num_rows=40, num_classes=3)
    labels.on_draw(type("Draw", (), {"model": network}))
    assert network.training and network[0].training
    torch.testing.assert_close(labels.probs, network[1](x).softmax(1).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, torch.inf])
def test_temperatures_that_are_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature = {temperature}"):
        BayesianTeacher([], num_rows=4, num_classes=3, temperature=temperature)


def test_inputs_that_do_not_fit_are_refused():
    x, _, teacher = _problem()
    labels = BayesianTeacher([x[:30]], num_rows=40, num_classes=3)
    with pytest.raises(ValueError, match="loader yielded 30 rows: must be num_rows = 40"):
        labels.on_draw(type("Draw", (), {"model": teacher}))


def test_a_posterior_teaches_digits_to_a_smaller_posterior():
    """Both ends sampled, scikit-learn's digits, in seconds."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16 - 0.3, torch.from_numpy(targets)
    train, test = slice(0, 1200), slice(1200, 1797)

    def chain(width, loss, batches, callbacks):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        sampler = bkd.SGHMC(network.named_parameters(), lr=0.01, num_data=1200, prior_precision=1.0, seed=1)
        settings = {"warm_start": 400, "burn_in": 100, "thin": 10, "num_draws": 20, "progress": False}
        predictive = bkd.PosteriorPredictive(597, 10)
        for draw in bkd.sample(network, sampler, loss, batches, callbacks=callbacks, **settings):
            predictive.update(draw, [x[test]])
        return float((predictive.mean.argmax(1) == y[test]).float().mean())

    labels = BayesianTeacher([x[train]], num_rows=1200, num_classes=10)
    teacher = chain(48, bkd.KDLoss(0.0), [(x[train], y[train])], [labels])
    student = chain(16, bkd.KDLoss(5.0, label_weight=0.0), [(x[train], None, labels.logits)], [])
    assert teacher > 0.85 and student > 0.85
