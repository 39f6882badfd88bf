"""The published experiments, each from its configuration to a table beside the published figures: `bkd-fast reproduce`."""

from importlib import import_module
from typing import Any

from bkd_fast.app.experiments.experiment import Experiment

# what each is called on the command line, and the file that it is in
MODULES: dict[str, str] = {
    **dict.fromkeys(("cmi-few-shot", "cmi-zero-shot", "cmi-known-truth"), "cmi"),
    "gped-mnist": "gped",
    "gped-ood": "gped",
    "faithful-mnist": "faithful_mnist",
    "semiparametric-tabular": "semiparametric",
    "semiparametric-cifar": "semiparametric_cifar",
    "bkd-perturbation": "bkd_perturbation",
    "bkd-mixture": "bkd_mixture",
    "bkd-synthetic": "bkd_synthetic",
    "teachers-gaussians": "teachers",
}


def load(name: str) -> Experiment[Any]:
    """The experiment of that name, one of `MODULES`."""
    experiments: dict[str, Experiment[Any]] = {
        e.name: e for e in import_module(f"{__name__}.{MODULES[name]}").EXPERIMENTS
    }
    return experiments[name]
