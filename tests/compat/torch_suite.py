"""PyTorch's own test/test_optim.py with the samplers, at temperature 0, in place of its optimizers.

    python tests/compat/torch_suite.py TORCH_SRC [options of unittest]

TORCH_SRC is a checkout of pytorch, of the installed torch's version or near it.
"""

import importlib.util
import sys
import unittest
from pathlib import Path

from torch.testing._internal import common_optimizers

sys.path.insert(0, str(Path(__file__).parents[1] / "samplers"))
from family import OPTIMIZERS

CLASSES = "TestOptimRenewed"  # one for each device; the file's other classes test schedulers and torch's optimizers


def _as_optimizer(member):
    """The sampler, with the constructor of the optimizer that it is."""

    def construct(self, params, lr=1e-3, **settings):
        member.make.__init__(self, params, lr=lr, **{"num_data": 1, "temperature": 0.0, **defaults, **settings})

    defaults = {name: value for name, value in member.defaults.items() if name != "lr"}
    return type(member.name, (member.make,), {"__init__": construct})


def _inputs(member, given):
    """torch's inputs of which the sampler has every argument."""

    def inputs(device, dtype=None):
        return [case for case in given(device=device) if {*case.kwargs} <= member.arguments]

    return inputs


def _errors(member, given):
    """torch's error inputs of which the sampler has every argument; about a setting it has words of its own."""

    def errors(device, dtype):
        cases = given(device, dtype)
        for error in cases:
            case = error.optimizer_error_input
            if case.params is None:  # torch looks at settings before it looks at parameters
                case.params = [cases[0].optimizer_error_input.params]
            if case.kwargs:
                error.error_regex = ""
        return [error for error in cases if {*error.optimizer_error_input.kwargs} <= member.arguments]

    return errors


def _info(member):
    theirs = next(info for info in common_optimizers.optim_db if info.optim_cls is member.optimizer)
    return common_optimizers.OptimizerInfo(
        _as_optimizer(member),
        optim_inputs_func=_inputs(member, theirs.optim_inputs_func),
        scheduler_inputs=theirs.scheduler_inputs,
        supported_impls=(),  # foreach, fused, differentiable
        not_og_supported_flags=theirs.not_og_supported_flags,
        optim_error_inputs_func=_errors(member, theirs.optim_error_inputs_func),
        supports_complex=False,
        has_capturable_arg=True,
    )


def main(source, *options):
    common_optimizers.optim_db[:] = [_info(member) for member in OPTIMIZERS]
    folder = Path(source) / "test"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("test_optim", folder / "test_optim.py")
    suite = importlib.util.module_from_spec(spec)
    sys.modules["test_optim"] = suite
    spec.loader.exec_module(suite)
    names = [name for name in vars(suite) if name.startswith(CLASSES)]
    unittest.main(suite, argv=["test_optim", *names, *options])


if __name__ == "__main__":
    main(*sys.argv[1:])
