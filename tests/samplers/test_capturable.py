"""capturable=True: step, learning rate and noise scale on the device. On CPU tensors the whole path runs but the graph itself."""

import copy
import pickle

import pytest
import torch
from family import every_sampler
from torch.utils._python_dispatch import TorchDispatchMode

import bkd_fast as bkd

BACKENDS = ["cpp", "reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    missing = bkd.backends()[request.param].missing
    if missing is not None or "cpu" not in bkd.backends()[request.param].devices:
        pytest.skip(f"{request.param}: {missing or 'there is a GPU: tests/gpu has these tests'}")
    with bkd.use_backend(request.param):
        yield request.param


def _model(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in (7, 300)]


def _train(sampler, parameters, steps, lrs=None):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if lrs is not None:
            for group in sampler.param_groups:
                group["lr"] = group["lr"].fill_(lrs[step]) if isinstance(group["lr"], torch.Tensor) else lrs[step]
        sampler.step()


def _pretend_to_capture(patch):
    for name in ("is_initialized", "is_current_stream_capturing"):
        patch.setattr(torch.cuda, name, lambda: True)


SETTINGS = {"num_data": 37, "temperature": 0.7, "prior_precision": 0.3, "seed": 2**63 + 11, "nonfinite": "record"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_equal_those_of_a_plain_sampler(dtype, maximize, backend):
    """Bit for bit, under a schedule whose rates are no round numbers."""
    lrs = [0.013, 0.0071, 0.0]
    runs = []
    for capturable in (False, True):
        parameters = _model(dtype)
        sampler = bkd.SGLD(parameters, 0.1, capturable=capturable, maximize=maximize, **SETTINGS)
        _train(sampler, parameters, range(3), lrs)
        runs.append(([p.detach() for p in parameters], sampler.state_dict()["param_groups"][0]["step"]))
    assert runs[0][1] == runs[1][1] == 2  # lr = 0 uses up no noise
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))


@pytest.mark.parametrize("rounding", ["master", "nearest"])
def test_the_other_roundings_too(rounding, backend, recwarn):
    runs = []
    for capturable in (False, True):
        parameters = _model(torch.bfloat16)
        sampler = bkd.SGLD(
            parameters, 0.1, capturable=capturable, rounding=rounding, **{**SETTINGS, "temperature": 0.0}
        )
        _train(sampler, parameters, range(2))
        runs.append([p.detach() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# of a step beside its own launch: numbers that follow lr and the step, brought together, and the clock
SMALL_OPERATIONS = {"SGLD": 8, "SGHMC": 12, "PSGLD": 11, "AdamSGHMC": 23, "SGNHT": 17, "BAOAB": 15}


class _Count(TorchDispatchMode):
    """Operations that a CUDA graph would hold as launches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in function._schema.arguments)
        if not is_view and function.namespace == "aten":
            self.names.append(str(function))
        return function(*arguments, **(options or {}))


@every_sampler
def test_a_step_of_a_graph_carries_few_small_launches(member):
    """No constant is written anew: only what a replay may find changed is computed."""
    parameters = _model()
    sampler = member.chain(parameters, capturable=True)
    _train(sampler, parameters, range(2))
    with _Count() as count:
        sampler.step()
    assert len(count.names) <= SMALL_OPERATIONS[member.name], count.names


def test_a_graph_keeps_the_constants_that_it_reads(monkeypatch):
    """Replays read them wherever a schedule of the temperature has gone since, and a new one is not kept from a capture."""
    parameters = _model()
    sampler = bkd.SGHMC(parameters, 0.1, capturable=True, **SETTINGS)
    _train(sampler, parameters, range(2))
    group = sampler.param_groups[0]
    with monkeypatch.context() as patch:
        _pretend_to_capture(patch)
        sampler.step()
        group["temperature"] = 0.123  # written by the graph itself, into memory of its own
        sampler.step()
    held = {float(constant): constant for constant in sampler._constants._in_graphs}
    assert {0.7, 37.0} <= {*held} and 0.123 not in held
    memory = held[0.7].data_ptr()
    for step in range(100):
        group["temperature"] = 1 + step / 100
        _train(sampler, parameters, [step])
    assert len(sampler._constants._kept) <= 64 and held[0.7].data_ptr() == memory and float(held[0.7]) == 0.7


def test_schedulers_fill_the_learning_rate_in_place():
    runs = []
    for capturable in (False, True):
        parameters = _model(torch.float64)
        sampler = bkd.SGLD(parameters, 0.1, capturable=capturable, **SETTINGS)
        lr = sampler.param_groups[0]["lr"]
        schedule = torch.optim.lr_scheduler.ExponentialLR(sampler, 0.7)
        for step in range(4):
            _train(sampler, parameters, [step])
            schedule.step()
        assert not capturable or sampler.param_groups[0]["lr"] is lr
        runs.append([p.detach() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_tensor_of_ones_own_stays_the_learning_rate():
    lr = torch.tensor(0.25)
    sampler = bkd.SGLD(_model(), lr, capturable=True, **SETTINGS)
    assert sampler.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("saved_by, loaded_by", [(True, True), (True, False), (False, True)])
def test_the_saved_step_is_a_number_and_the_chain_goes_on(saved_by, loaded_by, tmp_path):
    whole = _model()
    _train(bkd.SGLD(whole, 0.1, **SETTINGS), whole, range(6))
    part = _model()
    first = bkd.SGLD(part, 0.1, capturable=saved_by, **SETTINGS)
    _train(first, part, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["param_groups"][0]["step"] == 3 and type(state["param_groups"][0]["step"]) is int
    second = bkd.SGLD(part, 0.9, capturable=loaded_by, **SETTINGS)
    if loaded_by:  # it has taken steps of its own: its clock and rate are there, and are filled
        backup = [p.detach().clone() for p in part]
        _train(second, part, range(2))
        with torch.no_grad():
            for p, value in zip(part, backup, strict=True):
                p.copy_(value)
    lr = second.param_groups[0]["lr"]
    second.load_state_dict(state)
    assert second.param_groups[0]["capturable"] is loaded_by
    assert not loaded_by or second.param_groups[0]["lr"] is lr
    _train(second, part, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


def test_deepcopy_and_pickle_continue_the_chain():
    parameters = _model()
    sampler = bkd.SGLD(parameters, 0.1, capturable=True, **SETTINGS)
    _train(sampler, parameters, range(2))
    copies = [copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
    _train(sampler, parameters, [2])
    for other in copies:
        mine = other.param_groups[0]["params"]
        _train(other, mine, [2])
        assert all(torch.equal(a, b) for a, b in zip(mine, parameters, strict=True))


def test_groups_keep_clocks_of_their_own():
    parameters = _model()
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.0}]
    sampler = bkd.SGLD(groups, 0.1, capturable=True, **SETTINGS)
    _train(sampler, parameters, range(3))
    assert [group["step"] for group in sampler.state_dict()["param_groups"]] == [3, 0]


def test_recorded_gradients_are_told_by_name_and_once(backend):
    parameters = _model()
    settings = {**SETTINGS, "nonfinite": None}  # on a device the default is to record
    sampler = bkd.SGLD([("small", parameters[0]), ("large", parameters[1])], 0.1, capturable=True, **settings)
    _train(sampler, parameters, [0])
    before = parameters[1].detach().clone()
    parameters[1].grad[41] = torch.inf
    sampler.step()
    assert (parameters[1] == before).nonzero().flatten().tolist() == [41]
    with pytest.raises(bkd.NonFiniteError, match=r"'large' had"):
        sampler.check()
    sampler.check()
    parameters[1].grad[41] = torch.nan
    sampler.step()
    with pytest.raises(bkd.NonFiniteError, match=r"'large' had"):
        sampler.state_dict()


@pytest.mark.parametrize("rule", ["raise", "skip"])
def test_rules_that_ask_the_device_are_refused(rule):
    with pytest.raises(ValueError, match=f"nonfinite = '{rule}' with capturable = True"):
        bkd.SGLD(_model(), 0.1, num_data=10, capturable=True, nonfinite=rule)


def test_moments_are_refused_and_nothing_changes():
    parameters = _model()
    sampler = bkd.SGLD([{"params": parameters[:1], "capturable": False}, {"params": parameters[1:]}], 0.1, capturable=True,
                       **SETTINGS)  # fmt: skip
    with pytest.raises(ValueError, match="track_moments with capturable = True"):
        sampler.track_moments()
    assert all(group["moments"] is None for group in sampler.param_groups)
    plain = bkd.SGLD(_model(), 0.1, chain=1, **SETTINGS)
    plain.track_moments()
    capturable = bkd.SGLD(_model(), 0.1, chain=2, capturable=True, **SETTINGS)
    capturable.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="track_moments with capturable = True"):
        capturable.step()


def test_a_gradient_on_another_device_is_refused_before_anything_moves():
    parameters = _model()
    sampler = bkd.SGLD(parameters, 0.1, **SETTINGS)
    _train(sampler, parameters, [0])
    before = parameters[0].detach().clone()

    class Moved(torch.nn.Parameter):
        """A parameter that went to the CPU without its gradient, as assigning `.data` does it between a CPU and a GPU."""

        grad = property(lambda self: torch.zeros(300, device="meta"))

    sampler.param_groups[0]["params"][1] = Moved(torch.zeros(300))
    with pytest.raises(ValueError, match=r"the gradient of parameter 1 of shape \(300,\) is on meta: must be on cpu"):
        sampler.step()
    assert torch.equal(before, parameters[0])


@pytest.fixture
def capturing(monkeypatch):
    """As if a CUDA graph were being captured."""
    _pretend_to_capture(monkeypatch)


def test_a_capture_needs_a_capturable_sampler(capturing):
    parameters = _model()
    sampler = bkd.SGLD(parameters, 0.1, **SETTINGS)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match="capturable = False: every replay would draw the same noise"):
        _train(sampler, parameters, [0])
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_a_capture_needs_a_step_with_the_same_parameters_before(monkeypatch):
    parameters = _model()
    sampler = bkd.SGLD(parameters, 0.1, capturable=True, **SETTINGS)
    parameters[0].grad = torch.ones(7)
    sampler.step()
    _pretend_to_capture(monkeypatch)
    sampler.step()  # the same parameters
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match="take one step with the same parameters before capturing"):
        _train(sampler, parameters, [0])
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
