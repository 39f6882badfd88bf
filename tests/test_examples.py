"""The examples, run as a user runs them, and the figures that they print."""

import importlib.util
import math
import runpy
import sys
from pathlib import Path

import pytest
import stats
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def llc():
    """examples/local_learning_coefficient.py as a module."""
    spec = importlib.util.spec_from_file_location("local_learning_coefficient", EXAMPLES / "local_learning_coefficient.py")
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
    for problem, measured in llc.main(h=h, chains=chains, burn_in=800, draws=500):
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


def test_the_quadrature_has_converged_and_has_the_limit_of_the_theory(llc):
    """Around w* = 0 and without noise: twice as many points change nothing, and lambda-hat goes to min(inputs, outputs) / 2."""


def test_devinterp_runs_our_sampler(llc):
    pytest.importorskip("devinterp.slt.sampler")
    problem = llc.narrow(2, 4)
    for measured in llc.main_devinterp(chains=8, burn_in=1000, draws=1000):
        mean, error = _mean_and_error(measured)
        assert abs(mean - problem.expected) < stats.SIGMAS * error + 0.04 * problem.expected
