"""What a step keeps for the next: whatever happens in between, the chain is that of a sampler that kept nothing."""

import weakref

import pytest
import torch
from family import every_sampler

from bkd_fast.samplers.layout import Layout

SHAPES = [(8, 3, 5, 5), (8,), (6, 6), (4, 1), (300,)]


def _normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _parameters():
    return [torch.nn.Parameter(_normal(shape, i)) for i, shape in enumerate(SHAPES)]


def _set_gradients(parameters, step, without=()):
    for i, p in enumerate(parameters):
        gradient = torch.empty_like(p).copy_(_normal(p.shape, 100 * step + i))  # in the parameter's order
        p.grad = None if i in without else gradient


def _new_memory(sampler, parameters):
    for p in parameters:
        p.data = p.detach().clone()


def _shorter_in_place(sampler, parameters):
    """As a pruned parameter: its state has to be cut by whoever cuts it."""
    p = parameters[4]
    p.data = p.detach()[:120]
    for key, value in sampler.state.get(p, {}).items():
        sampler.state[p][key] = value[:120].clone()


def _turned_in_place(sampler, parameters):
    p = parameters[2]
    p.data = p.detach().t()
    for key, value in sampler.state.get(p, {}).items():
        sampler.state[p][key] = value.t()


def _another_order(sampler, parameters):
    parameters[0].data = parameters[0].detach().to(memory_format=torch.channels_last)


def _replaced_parameter(sampler, parameters):
    new = torch.nn.Parameter(parameters[1].detach().clone())
    if parameters[1] in sampler.state:
        sampler.state[new] = sampler.state.pop(parameters[1])
    sampler.param_groups[0]["params"][1] = parameters[1] = new


def _cast_entries(sampler, parameters):
    """As loops do that move a state to another device or type: the entries are new tensors."""
    for state in sampler.state.values():
        for key, value in state.items():
            state[key] = value.double()


def _cast_in_place(sampler, parameters):
    for state in sampler.state.values():
        for value in state.values():
            value.data = value.double()


def _replaced_entries(sampler, parameters):
    for p in parameters:
        if p in sampler.state:
            sampler.state[p] = {key: 2 * value for key, value in sampler.state[p].items()}


def _lost_entries(sampler, parameters):
    for state in sampler.state.values():
        state.clear()


def _lost_state(sampler, parameters):
    sampler.state.clear()


def _swapped_entries(sampler, parameters):
    """The dictionaries stay, what they hold does not."""
    for state in sampler.state.values():
        for key, value in state.items():
            state[key] = value + 1


CHANGES = [
    _new_memory, _shorter_in_place, _turned_in_place, _another_order, _replaced_parameter, _cast_entries, _cast_in_place,
    _replaced_entries, _lost_entries, _lost_state, _swapped_entries,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*its noise is drawn in another order")
@every_sampler
@pytest.mark.parametrize(
    ("change", "centered"),
    [(c, centered) for c in CHANGES for centered in (False, True) if (c, centered) != (_shorter_in_place, True)],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "centered" if value else "",
)
def test_a_change_between_steps_is_noticed(member, change, centered):
    options = {"prior_mean": [_normal(shape, 50 + i) for i, shape in enumerate(SHAPES)]} if centered else {}
    runs = []
    for keeps in (True, False):
        parameters = _parameters()
        sampler = member.chain(parameters, **options)
        for step in range(4):
            _set_gradients(parameters, step)
            sampler.step()
        if not keeps:
            fresh = member.chain(parameters, seed=99, **options)
            fresh.load_state_dict(sampler.state_dict())
            sampler = fresh
        change(sampler, parameters)
        for step in range(4, 7):
            _set_gradients(parameters, step)
            sampler.step()
        runs.append([p.detach() for p in parameters])
    assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_sampler
def test_a_prior_mean_that_does_not_fit_any_more_is_refused(member):
    parameters = _parameters()
    sampler = member.chain(parameters, prior_mean=[torch.ones(shape) for shape in SHAPES])
    for step in range(4):
        _set_gradients(parameters, step)
        sampler.step()
    _shorter_in_place(sampler, parameters)
    _set_gradients(parameters, 4)
    before = [p.detach().clone() for p in parameters]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"its prior mean \(300,\)"):
            sampler.step()
    assert all(map(torch.equal, parameters, before))


@every_sampler
def test_gradients_that_come_and_go_are_followed(member):
    """Each parameter draws its own noise whichever others have a gradient, be there as many as at the last step."""
    without = [(), (), (1,), (1,), (3,), (3,), (0, 2), (1, 3), (), (4,)]
    together = _parameters()
    sampler = member.chain(together)
    for step, missing in enumerate(without):
        _set_gradients(together, step, missing)
        sampler.step()
    forgetful = _parameters()
    other = member.chain(forgetful)
    for step, missing in enumerate(without):
        _set_gradients(forgetful, step, missing)
        other.step()
        other.load_state_dict(other.state_dict())
    assert all(map(torch.equal, together, forgetful))


@every_sampler
def test_a_gradient_in_another_order_is_followed(member):
    runs = []
    for turned in (False, True):
        parameters = _parameters()
        sampler = member.chain(parameters)
        for step in range(6):
            _set_gradients(parameters, step)
            if turned and step in (3, 4):
                p = parameters[2]
                p.grad = p.grad.t().contiguous().t()
            sampler.step()
        runs.append(parameters)
    assert all(map(torch.equal, *runs))


@every_sampler
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_sparse_gradient_after_dense_ones_is_refused(member, order):
    parameters = _parameters()
    parameters[0].data = parameters[0].detach().to(memory_format=order)
    sampler = member.chain(parameters)
    for step in range(3):
        _set_gradients(parameters, step)
        sampler.step()
    before = [p.detach().clone() for p in parameters]
    parameters[4].grad = None
    parameters[4].grad = torch.zeros(300).to_sparse()
    with pytest.raises(TypeError, match=r"must be dense \(torch.strided\)"):
        sampler.step()
    assert all(map(torch.equal, parameters, before))


@every_sampler
@pytest.mark.parametrize("key", ["own", "mean"])
def test_a_state_that_does_not_fit_any_more_is_refused(member, key):
    if key == "own" and not member.make.states:
        pytest.skip("it has none")
    parameters = _parameters()
    sampler = member.chain(parameters)
    for step in range(4):
        _set_gradients(parameters, step)
        sampler.step()
    sampler.track_moments(start=4)
    sampler.state[parameters[3]][member.make.states[0] if key == "own" else key] = torch.zeros(5)
    before = [p.detach().clone() for p in parameters]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a parameter must keep its shape, device and placements"):
            sampler.step()
    assert all(map(torch.equal, parameters, before))


@every_sampler
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_freed_memory_is_refused_before_anything_moves(member, what, steps):
    """As sharding frameworks free what they will gather again: the tensor keeps its shape, and has nothing behind it."""
    parameters = _parameters()
    sampler = member.chain([{"params": parameters[:2]}, {"params": parameters[2:]}])
    for step in range(steps):
        _set_gradients(parameters, step)
        sampler.step()
    _set_gradients(parameters, steps)
    p = parameters[3]
    (p if what == "parameter" else p.grad).untyped_storage().resize_(0)
    before = [p.detach().clone() for p in parameters[:3]]
    with pytest.raises(ValueError, match=rf"{what} .*has no memory: its storage was freed"):
        sampler.step()
    assert all(map(torch.equal, parameters, before))


@every_sampler
def test_gradients_are_not_held(member):
    parameters = _parameters()
    sampler = member.chain(parameters)
    gradients = []
    for step in range(4):
        _set_gradients(parameters, step)
        gradients += [weakref.ref(p.grad) for p in parameters]
        sampler.step()
    sampler.zero_grad(set_to_none=True)
    assert not any(ref() is not None for ref in gradients)


@every_sampler
@pytest.mark.parametrize("how", ["replaced", "cleared"])
def test_the_state_is_not_held(member, how):
    """Moved away between steps, as loops do that need the device's memory for something else, it is gone there."""
    parameters = _parameters()
    sampler = member.chain(parameters)
    for step in range(4):
        _set_gradients(parameters, step)
        sampler.step()
    tensors = [weakref.ref(tensor) for entry in sampler.state.values() for tensor in entry.values()]
    assert len(tensors) == len(member.make.states) * len(parameters)
    if how == "cleared":
        sampler.state.clear()
    for entry in sampler.state.values():
        for key, value in entry.items():
            entry[key] = value.clone()
        del value
    assert not any(tensor() is not None for tensor in tensors)


# ---- what stands for the tensors of a launch where tables of their addresses are kept ----


def _group(dtype=torch.float32):
    params = [torch.nn.Parameter(_normal(shape, i).to(dtype)) for i, shape in enumerate(SHAPES)]
    group = {"params": params, "parameter_ids": [*range(len(params))], "chains": 1}
    _set_gradients(params, 0)
    return group, params


@torch.no_grad()
def _identity(layout, group):
    """Of the one launch, and that it has the gradients of now."""
    (launch,) = layout.launches(group)
    assert all(g is p.grad for g, p in zip(launch.gradient, launch.theta, strict=True))
    return launch.identity


def test_the_identity_stays_while_only_gradients_move():
    group, params = _group()
    layout = Layout()
    assert _identity(layout, group) is None  # nobody knows yet whether it will come again
    first = _identity(layout, group)
    assert first is not None
    _set_gradients(params, 1)
    assert _identity(layout, group) is first


def _moved(p):
    p.data = p.detach().clone()


def _shortened(p):
    p.data = p.detach().view(-1)[:7].view(7, *[1] * (p.dim() - 1))
    p.grad = torch.zeros_like(p)


def _turned(p):
    p.data = p.detach().t()


def _reinterpreted(p):
    p.data = p.detach().view(torch.bfloat16)
    p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("change", [_moved, _shortened, _turned, _reinterpreted], ids=lambda f: f.__name__.strip("_"))
def test_another_memory_has_another_identity(change):
    group, params = _group(torch.float16)
    layout = Layout()
    before = [_identity(layout, group) for _ in range(2)][1]
    change(params[2])
    with torch.no_grad():
        after = [launch.identity for launch in layout.launches(group)]
    assert before not in after


def test_no_identity_where_copies_stand_for_parameters():
    group, params = _group()
    params[2].data = torch.zeros(6, 12)[:, ::2]
    params[2].grad = torch.zeros(6, 6)
    layout = Layout()
    with torch.no_grad():
        assert all(launch.identity is None for _ in range(3) for launch in layout.launches(group))
