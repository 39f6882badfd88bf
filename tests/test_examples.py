"""The examples, run as a user runs them, and the figures that they print."""

import importlib.util
import math
import runpy
from pathlib import Path

import pytest
import stats
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def llc():
    """examples/local_learning_coefficient.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "local_learning_coefficient", EXAMPLES / "local_learning_coefficient.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _mean_and_error(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def test_three_changed_lines(capsys):
    """Accuracy on 797 digits, of some 95 %: standard error .8 %."""
    names = runpy.run_path(str(EXAMPLES / "three_changed_lines.py"))
    assert "from 300 draws" in capsys.readouterr().out
    accuracy = float((names["predicted"] == names["y"][names["test"]]).float().mean())
    assert accuracy > 0.95 - stats.SIGMAS * 0.008
    assert (names["lower"] <= names["upper"]).all()


def test_local_learning_coefficients_are_those_of_the_quadrature(llc, capsys):
    """Independent chains tell the standard error. The allowance is what a finite step adds: exact for the regular model."""
    h, chains = 4e-4, 256
    for problem, measured in llc.main(h=h, chains=chains, burn_in=800, draws=400):
        mean, error = _mean_and_error(measured)
        if problem.name.startswith("linear regression"):
            curvatures = torch.linalg.eigvalsh(problem.x.T @ problem.x / len(problem.x)).double() * llc.NBETA
            total = curvatures + llc.GAMMA
            exact = float((0.5 * curvatures / (total * (1 - h * total / 2))).sum())
            stats.assert_close_in_standard_errors(mean, exact, error, problem.name)
        else:
            assert abs(mean - problem.expected) < stats.SIGMAS * error + 0.04 * problem.expected, (problem, mean, error)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5


def test_the_quadrature_is_right(llc):
    """Over one layer or the other it is the same; and against weighted draws of the localisation."""
    problem = llc.narrow(1, 1)
    u, v = (weight.detach().double().flatten() for weight in problem.network.parameters())
    assert llc.expected_of_narrow(problem.x.double(), problem.y.double(), v, u) == pytest.approx(
        problem.expected, rel=1e-9
    )

    problem = llc.narrow(2, 4)
    u, v = (weight.detach().flatten() for weight in problem.network.parameters())
    draws = torch.randn(300_000, 6, generator=torch.Generator().manual_seed(0)) / math.sqrt(llc.GAMMA)
    predicted = ((u + draws[:, :2]) @ problem.x.T)[..., None] * (v + draws[:, 2:])[:, None]
    losses = 0.5 * (problem.y - predicted).square().sum(-1).mean(-1).double()
    gain = llc.NBETA * (losses - problem.mean_loss(problem.network).item())
    weights = torch.softmax(-gain, 0)
    mean = float(weights @ gain)
    error = float((weights * (gain - mean)).norm())
    stats.assert_close_in_standard_errors(mean, problem.expected, error, "weighted draws")
    assert error < 0.03


def test_devinterps_arguments_mean_here_what_they_mean_there(llc):
    """theta <- theta - lr / 2 (nbeta grad + localization (theta - w*) + weight_decay theta) + sqrt(lr) noise_level xi"""
    theta = torch.full((200_000,), 2.0, requires_grad=True)
    settings = {"lr": 0.01, "nbeta": 20.0, "localization": 5.0, "weight_decay": 3.0, "noise_level": 0.7}
    sampler = llc.sgld_for_devinterp([{"params": theta, "mask": None}], **settings)
    with torch.no_grad():
        theta.fill_(1.5)
    theta.grad = torch.full_like(theta, 0.3)
    sampler.step()
    expected = 1.5 - 0.005 * (20 * 0.3 + 5 * (1.5 - 2) + 3 * 1.5)
    stats.assert_mean(theta.detach(), expected, 0.1 * 0.7, "a step")
    stats.assert_variance(theta.detach(), 0.01 * 0.7**2, "a step", mean=expected)


@pytest.mark.parametrize("unknown", [{"bounding_box_size": 1.0}, {"save_metrics": True}])
def test_what_our_sampler_has_not_is_refused(llc, unknown):
    with pytest.raises(ValueError, match=f"{next(iter(unknown))} = .*: must be left out"):
        llc.sgld_for_devinterp([{"params": torch.zeros(2, requires_grad=True)}], lr=0.01, nbeta=20.0, **unknown)


def test_devinterps_chains_run_with_our_sampler(llc):
    pytest.importorskip("devinterp.slt.sampler")
    for measured in llc.main_devinterp(chains=2, burn_in=20, draws=20):
        assert torch.isfinite(measured).all() and (measured[0] != measured[1])
