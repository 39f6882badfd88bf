"""timm's own optimizer tests, from its source distribution, with the samplers in its registry at temperature 0.

BKD_FAST_TIMM_TESTS names the folder `tests` of that distribution; `make compat` fetches it.
"""

import importlib.util
import inspect
import os
import sys
from pathlib import Path

import pytest
import timm.optim
from timm.optim._optim_factory import OptimInfo, default_registry

sys.path.insert(0, str(Path(__file__).parents[1] / "samplers"))
from family import OPTIMIZERS

# no underscore: timm reads one as a wrapper before the name
NAMES = [f"bkd{member.name.lower()}" for member in OPTIMIZERS]
CONVERGENCE = {"SGD": 1e-3, "RMSprop": 1e-2, "Adam": 5e-2}  # the rates that timm tests torch's optimizers with


def _register():
    for name, member in zip(NAMES, OPTIMIZERS, strict=True):
        arguments = inspect.signature(member.make.__init__).parameters
        default_registry.register(
            OptimInfo(
                name=name,
                opt_class=member.make,
                description=member.name,
                has_eps="eps" in arguments,
                has_momentum="momentum" in arguments,
                has_betas="betas" in arguments,
                defaults={"lr": 1e-3, "num_data": 1, "temperature": 0.0},
            )
        )


def _suite():
    """timm's test module, collected over the samplers alone."""
    everything = timm.optim.list_optimizers
    timm.optim.list_optimizers = lambda *args, **kwargs: NAMES
    try:
        path = Path(os.environ["BKD_FAST_TIMM_TESTS"]) / "test_optim.py"
        spec = importlib.util.spec_from_file_location("timm_test_optim", path)
        suite = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(suite)
    finally:
        timm.optim.list_optimizers = everything
    return suite


def _runs_over_the_samplers(test):
    values = [value for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize" for value in mark.args[1]]
    return any(value in NAMES or (isinstance(value, tuple) and value[0] in NAMES) for value in values)


_register()
suite = _suite()
globals().update(
    {name: f for name, f in vars(suite).items() if name.startswith("test_") and _runs_over_the_samplers(f)}
)


@pytest.mark.parametrize(("name", "member"), zip(NAMES, OPTIMIZERS, strict=True), ids=NAMES)
def test_convergence(name, member, monkeypatch):
    """As timm tests the optimizer that the sampler is."""
    lr = CONVERGENCE[member.optimizer.__name__]
    monkeypatch.setitem(suite._CONVERGENCE_CFGS, name, suite._conv(lr, {"lr": lr}))
    suite.test_optimizer_convergence(name)
