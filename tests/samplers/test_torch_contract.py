"""What torch's own tests ask of an optimizer, asked of every sampler: its results at temperature 0, its manners at any."""

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from family import FAMILY, OPTIMIZERS, every_optimizer, every_sampler
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal import common_optimizers
from torch.utils import _pytree as pytree

torch.backends.__allow_nonbracketed_mutation_flag = (
    True  # what torch's test helpers forbid, when imported, to the whole process
)

SHAPES = [(), (1,), (0,), (33,), (17, 33), (2, 3, 4, 5), (5, 1000)]
FLOATS = [torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.bfloat16, torch.float16]


def _normal(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _parameters(shapes=((7, 5), (300,), ()), dtype=torch.float32):
    return [torch.nn.Parameter(_normal(shape, 100 + i, dtype)) for i, shape in enumerate(shapes)]


def _real(dtype):
    """The type of the arithmetic."""
    return dtype if dtype in FLOATS else torch.float32


def _copies(parameters):
    return [torch.nn.Parameter(p.detach().clone()) for p in parameters]


def _set_gradients(parameters, step):
    for i, parameter in enumerate(parameters):
        parameter.grad = _normal(parameter.shape, 1000 * step + i, parameter.dtype)


def _train(sampler, parameters, steps):
    for step in steps:
        _set_gradients(parameters, step)
        sampler.step()


def _equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _same(state, other):
    """Whether two states are equal, tensors bit for bit."""
    leaves, shape = pytree.tree_flatten(state)
    theirs, their_shape = pytree.tree_flatten(other)
    return shape == their_shape and all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(leaves, theirs, strict=True)
    )


def _info(optimizer):
    return next(info for info in common_optimizers.optim_db if info.optim_cls is optimizer)


# ---- torch's inputs ----

IMPLEMENTATIONS = {
    "foreach": "foreach chooses among torch's implementations: there is one here, and it takes all tensors at once",
    "fused": "fused chooses among torch's implementations: there is one here, and it is fused",
    "differentiable": "a step writes in place, outside autograd: none is differentiable",
}


def _why_not(member, arguments):
    """Why an input of torch's makes no sense for a sampler; None if it does."""
    for name, reason in IMPLEMENTATIONS.items():
        if arguments.get(name):
            return reason
    missing = sorted({*arguments} - member.arguments - {*IMPLEMENTATIONS})
    return f"{member.name} has no {', '.join(missing)}" if missing else None


def _inputs(skipped=True):
    """torch's inputs of every optimizer that is a sampler's; those that make no sense are skipped, or not there."""
    for member in OPTIMIZERS:
        info = _info(member.optimizer)
        for given in common_optimizers._get_optim_inputs_including_global_cliquey_kwargs("cpu", None, info):
            reason = _why_not(member, given.kwargs)
            if reason and not skipped:
                continue
            arguments = {name: value for name, value in given.kwargs.items() if name not in IMPLEMENTATIONS}
            marks = pytest.mark.skip(reason=reason) if reason else ()
            yield pytest.param(member, arguments, marks=marks, id=f"{member.name}-{given.desc}")


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("member", "arguments"), [*_inputs(skipped=False)])
def test_an_input_of_torchs_gives_torchs_result(member, arguments, dtype, capturable):
    """Bit for bit where docs/samplers.md says so. 16-bit parameters: as torch in float32, rounded at every step or, with masters,
    at the end; on 16-bit parameters torch itself rounds at every operation."""
    ours = _parameters(SHAPES, dtype)
    theirs = [torch.nn.Parameter(p.detach().to(_real(dtype), copy=True)) for p in ours]
    sampler = member.cold(ours, **copy.deepcopy(arguments), capturable=capturable)
    optimizer = member.optimizer(theirs, **copy.deepcopy(arguments), foreach=False)
    for step in range(5):
        _set_gradients(ours, step)
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = mine.grad.to(other.dtype)
        sampler.step()
        optimizer.step()
        if sampler.param_groups[0]["rounding"] != "master":
            for parameter in theirs:
                parameter.data.copy_(parameter.data.to(dtype))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(dtype), **({"rtol": 0, "atol": 0} if member.bit_equal else {}))


@pytest.mark.parametrize(("member", "arguments"), [*_inputs()])
def test_an_input_of_torchs_goes_the_right_way_on_views(member, arguments):
    """On parameters that are columns of larger tensors, equal to torch's to rounding."""
    columns = [_normal((10, 5, 2), 1), _normal((10, 2), 2)]
    runs = []
    for make in (member.cold, functools.partial(member.optimizer, foreach=False)):
        weight, bias = (torch.nn.Parameter(c.clone()[..., 0]) for c in columns)
        assert not weight.is_contiguous()
        optimizer, losses = make([weight, bias], **copy.deepcopy(arguments)), []

        def closure(weight=weight, bias=bias, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (weight.mv(_normal((5,), 3)) + bias).square().sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(20)]
        assert losses[-1] > losses[0] if arguments.get("maximize") else losses[-1] < losses[0]
        runs.append((weight.detach(), bias.detach()))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def _errors():
    for member in FAMILY:
        make = common_optimizers.get_error_inputs_for_all_optims
        if member.optimizer is not None:
            make = _info(member.optimizer).optim_error_inputs_func
        for error in make("cpu", torch.float32):
            given = error.optimizer_error_input
            reason = _why_not(member, given.kwargs)
            marks = pytest.mark.skip(reason=reason) if reason else ()
            yield pytest.param(member, error, marks=marks, id=f"{member.name}-{given.desc}")


@pytest.mark.parametrize(("member", "error"), [*_errors()])
def test_an_error_of_torchs_is_an_error_of_the_same_type(member, error):
    given = error.optimizer_error_input
    # torch gives None where the parameters do not matter, and looks at them last
    params = _parameters() if given.params is None else given.params
    warns = issubclass(error.error_type, Warning)
    with pytest.warns(error.error_type) if warns else pytest.raises(error.error_type):
        member.chain(params, **given.kwargs)


@every_sampler
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_choice_of_implementation_is_refused(member, name):
    with pytest.raises(TypeError, match=name):
        member.chain(_parameters(), **{name: True})


@every_sampler
def test_a_complex_parameter_is_refused(member):
    with pytest.raises(TypeError, match=r"torch\.complex64"):
        member.chain([*_parameters(), torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@every_sampler
def test_a_sparse_gradient_is_refused_before_anything_moves(member):
    parameters = _parameters()
    before = _copies(parameters)
    sampler = member.chain(parameters)
    _set_gradients(parameters, 0)
    parameters[1].grad = parameters[1].grad.to_sparse()
    with pytest.raises(TypeError, match=r"gradient of parameter 1 of shape \(300,\) is torch\.sparse_coo"):
        sampler.step()
    assert _equal(parameters, before) and sampler.param_groups[0]["step"] == 0


@every_sampler
def test_a_device_without_a_backend_is_refused_before_anything_moves(member):
    """`meta` stands for any device that is neither a CPU nor a GPU."""
    parameters = _parameters()
    before = _copies(parameters)
    elsewhere = torch.nn.Parameter(torch.zeros(3, device="meta"))
    sampler = member.chain([{"params": parameters}, {"params": [elsewhere]}])
    _set_gradients(parameters, 0)
    elsewhere.grad = torch.zeros(3, device="meta")
    with pytest.raises((TypeError, ValueError, RuntimeError), match="meta"):
        sampler.step()
    assert _equal(parameters, before)


# ---- parameters ----


@every_sampler
def test_a_step_writes_in_place_and_leaves_gradients(member):
    parameters = _parameters(SHAPES)
    addresses = [p.data_ptr() for p in parameters]
    sampler = member.chain(parameters)
    _set_gradients(parameters, 0)
    gradients = [p.grad.clone() for p in parameters]
    sampler.step()
    assert addresses == [p.data_ptr() for p in parameters]
    assert _equal([p.grad for p in parameters], gradients)


@every_sampler
def test_mixed_dtypes_move_as_they_would_alone(member):
    """One call with parameters of every dtype, against one sampler for each dtype: a parameter's number is that of its place."""
    runs = []
    for apart in (False, True):
        parameters = [p for dtype in DTYPES for p in _parameters(dtype=dtype)]
        sampler = member.chain(parameters)
        for step in range(3):
            _set_gradients(parameters, step)
            if apart:  # four steps, each with the gradients of one dtype
                gradients = [p.grad for p in parameters]
                for dtype in DTYPES:
                    for p, g in zip(parameters, gradients, strict=True):
                        p.grad = g if p.dtype == dtype else None
                    sampler.param_groups[0]["step"] = step
                    sampler.step()
            else:
                sampler.step()
        runs.append(parameters)
    assert _equal(*runs)


@every_sampler
def test_without_gradients_nothing_happens(member):
    parameters = _parameters()
    before = _copies(parameters)
    sampler = member.chain(parameters)
    for set_to_none in (True, False):  # there are none yet
        sampler.zero_grad(set_to_none=set_to_none)
        sampler.step()
    assert _equal(parameters, before) and sampler.param_groups[0]["step"] == 0


@every_optimizer
def test_zero_gradients_move_nothing_at_temperature_zero(member):
    parameters = _parameters(SHAPES)
    before = _copies(parameters)
    sampler = member.cold(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    sampler.step()
    assert _equal(parameters, before)


@every_sampler
def test_lr_zero_moves_nothing_and_uses_up_no_noise(member):
    """A number or a tensor; and no prior, however strong."""
    for lr in (0.0, torch.tensor(0.0)):
        parameters = _parameters()
        before = _copies(parameters)
        sampler = member.chain(parameters, lr=lr, prior_precision=1e6)
        _train(sampler, parameters, range(2))
        assert _equal(parameters, before) and sampler.param_groups[0]["step"] == 0


@every_sampler
def test_parameters_replaced_after_construction_carry_the_chain_on(member):
    """FSDP2 under accelerate puts new tensors into `param_groups[i]["params"]`; the prior's mean goes with the place."""
    runs = []
    for replace in (False, True):
        parameters = _parameters()
        sampler = member.chain(parameters, prior_mean=[torch.ones(p.shape) for p in parameters])
        if replace:
            parameters = _copies(parameters)
            sampler.param_groups[0]["params"] = parameters
        _train(sampler, parameters, range(3))
        runs.append(parameters)
    assert _equal(*runs)


@every_sampler
def test_parameters_given_a_new_memory_are_followed(member):
    """`.data` is assigned by `module.to` and by frameworks that flatten parameters: no address is kept."""
    runs = []
    for move in (False, True):
        parameters = _parameters()
        sampler = member.chain(parameters)
        _train(sampler, parameters, range(2))
        if move:
            for parameter in parameters:
                parameter.data = parameter.detach().clone()
        _train(sampler, parameters, range(2, 4))
        runs.append(parameters)
    assert _equal(*runs)


# ---- parameter groups, learning rates, schedulers ----


@every_optimizer
def test_groups_with_their_own_lr_and_weight_decay(member):
    """As torch's optimizer with the same groups."""
    changes = [{}, {"lr": 0.03}, {"weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.0, "maximize": True}]
    runs = []
    for make in (member.cold, functools.partial(member.optimizer, foreach=False)):
        parameters = _parameters([(4, 3)] * len(changes))
        groups = [{"params": [p], **change} for p, change in zip(parameters, changes, strict=True)]
        optimizer = make(groups[:-1], lr=0.01, weight_decay=0.05)
        optimizer.add_param_group(groups[-1])
        for step in range(4):
            _set_gradients(parameters, step)
            optimizer.step()
        runs.append(parameters)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if member.bit_equal else {}))


@every_sampler
def test_a_tensor_is_the_number_that_it_holds(member):
    """Filled in place between steps, as schedulers and graphs do it; 0 among them."""
    lrs = [0.01, 0.005, 0.0, 0.0, 0.002]
    runs = []
    for lr in (lrs[0], torch.tensor(lrs[0], dtype=torch.float64)):
        parameters = _parameters()
        sampler = member.chain(parameters, lr=lr)
        for step, value in enumerate(lrs):
            if isinstance(lr, torch.Tensor):
                lr.fill_(value)
                assert sampler.param_groups[0]["lr"] is lr
            else:
                sampler.param_groups[0]["lr"] = value
            _train(sampler, parameters, [step])
        runs.append(parameters)
    assert _equal(*runs)


def _chained(optimizer):
    return lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.LinearLR(optimizer)])


def _sequential(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=7, cycle_momentum=False),
    "ChainedScheduler": _chained,
    "SequentialLR": _sequential,
}
BASES = {"LRScheduler", "_LRScheduler"}


def test_every_scheduler_of_torchs_is_there():
    classes = {name for name, value in vars(lr_scheduler).items() if isinstance(value, type)}
    theirs = {name for name in classes if issubclass(getattr(lr_scheduler, name), lr_scheduler.LRScheduler)}
    assert {*SCHEDULERS} == theirs - BASES


@every_sampler
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_is_the_same_rates_by_hand(member, scheduler, as_tensor):
    """The rates are those that torch's SGD sees, in every group, and the chain is the one with those rates."""

    def groups(parameters, tensors):
        lrs = [torch.tensor(lr, dtype=torch.float64) if tensors else lr for lr in (0.01, 0.02)]
        return [{"params": parameters[i::2], "lr": lr} for i, lr in enumerate(lrs)]

    scheduled, by_hand, reference = _parameters(), _parameters(), _parameters()
    sampler, hand = member.chain(groups(scheduled, as_tensor)), member.chain(groups(by_hand, False))
    sgd = torch.optim.SGD(groups(reference, as_tensor))
    schedules = [SCHEDULERS[scheduler](sampler), SCHEDULERS[scheduler](sgd)]
    for step in range(6):
        rates = [float(group["lr"]) for group in sgd.param_groups]
        assert [float(group["lr"]) for group in sampler.param_groups] == rates
        for group, rate in zip(hand.param_groups, rates, strict=True):
            group["lr"] = rate
        _train(sampler, scheduled, [step])
        _train(hand, by_hand, [step])
        sgd.step()
        for schedule in schedules:
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
    assert _equal(scheduled, by_hand)


# ---- closures and hooks ----


@every_sampler
def test_a_closure_runs_once_with_gradients_and_its_value_comes_back(member):
    parameters, calls = _parameters(), []
    sampler = member.chain(parameters)
    answer = object()

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        _set_gradients(parameters, 0)
        return answer

    with torch.no_grad():  # Lightning calls so
        assert sampler.step(closure) is answer
        assert sampler.step(closure=closure) is answer
    assert len(calls) == 2 and sampler.param_groups[0]["step"] == 2
    assert sampler.step() is None


@every_sampler
def test_a_closure_that_fails_moves_nothing(member):
    parameters = _parameters()
    _set_gradients(parameters, 0)
    before = _copies(parameters)
    sampler = member.chain(parameters)
    with pytest.raises(ZeroDivisionError):
        sampler.step(lambda: 1 / 0)
    assert _equal(parameters, before) and sampler.param_groups[0]["step"] == 0


@every_sampler
def test_hooks_of_the_step_run_around_it_in_order(member):
    parameters, seen = _parameters(), []
    sampler = member.chain(parameters)
    _set_gradients(parameters, 0)

    def hook(name):
        return lambda optimizer, args, kwargs: seen.append((name, optimizer.param_groups[0]["step"]))

    handles = [
        register_optimizer_step_pre_hook(hook("every sampler's, before")),
        sampler.register_step_pre_hook(hook("before")),
        sampler.register_step_post_hook(hook("after")),
        register_optimizer_step_post_hook(hook("every sampler's, after")),
    ]
    try:
        sampler.step()
    finally:
        for handle in handles:
            handle.remove()
    sampler.step()
    assert seen == [("every sampler's, before", 0), ("before", 0), ("after", 1), ("every sampler's, after", 1)]


@every_sampler
def test_a_hook_may_replace_the_arguments_of_the_step(member):
    parameters = _parameters()
    sampler = member.chain(parameters)
    sampler.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: "replaced"), kwargs))
    assert sampler.step(lambda: "given") == "replaced"


@every_sampler
def test_hooks_of_the_state(member):
    parameters, seen = _parameters(), []
    sampler = member.chain(parameters)
    _train(sampler, parameters, range(2))
    sampler.register_state_dict_pre_hook(lambda optimizer: seen.append("before saving"))
    sampler.register_state_dict_post_hook(lambda optimizer, state: {**state, "mine": 1})
    sampler.register_load_state_dict_pre_hook(lambda optimizer, state: seen.append("before loading"))
    sampler.register_load_state_dict_post_hook(lambda optimizer: seen.append("after loading"))
    state = sampler.state_dict()
    assert state["mine"] == 1 and seen == ["before saving"]
    sampler.load_state_dict(state)
    assert seen == ["before saving", "before loading", "after loading"]


@every_sampler
def test_a_hook_may_replace_the_state_that_is_loaded(member):
    """torch loads what the hook returns: moments too, which a sampler brings back in float32."""
    parameters = _parameters(dtype=torch.bfloat16)
    sampler = member.chain(parameters)
    sampler.track_moments()
    _train(sampler, parameters, range(3))

    def double(optimizer, state):
        state = copy.deepcopy(state)
        for entry in state["state"].values():
            entry["mean"] *= 2
        return state

    wanted = [2 * sampler.moments(p).mean for p in parameters]
    sampler.register_load_state_dict_pre_hook(double)
    sampler.load_state_dict(sampler.state_dict())
    assert _equal([sampler.moments(p).mean for p in parameters], wanted)


@every_sampler
def test_a_hook_after_loading_sees_the_state_as_it_will_be(member):
    """In float32 for 16-bit parameters, not as torch casts it on the way."""
    parameters = _parameters(dtype=torch.bfloat16)
    sampler = member.chain(parameters)
    sampler.track_moments()
    _train(sampler, parameters, range(3))
    wanted, seen = [sampler.moments(p).mean for p in parameters], []
    sampler.register_load_state_dict_post_hook(
        lambda optimizer: seen.extend(optimizer.state[p]["mean"] for p in parameters)
    )
    sampler.load_state_dict(sampler.state_dict())
    assert _equal(seen, wanted)


# ---- the state ----


@every_sampler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("saved_with_names", [False, True])
@pytest.mark.parametrize("loaded_with_names", [False, True])
def test_a_loaded_state_carries_the_chain_on(member, dtype, saved_with_names, loaded_with_names, tmp_path):
    """Bit for bit, through a file that is read without pickle; loading changes neither the file's state nor the sampler's."""

    def chain(parameters, names):
        sampler = member.chain([(f"name{i}", p) for i, p in enumerate(parameters)] if names else parameters)
        sampler.track_moments(start=1)
        return sampler

    whole = _parameters(dtype=dtype)
    first = chain(whole, saved_with_names)
    _train(first, whole, range(3))
    state = first.state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    kept = copy.deepcopy(loaded)
    parameters = _copies(whole)
    second = chain(parameters, loaded_with_names)
    second.load_state_dict(loaded)
    assert _same(loaded, kept)
    _train(first, whole, range(3, 6))
    _train(second, parameters, range(3, 6))
    assert _equal(whole, parameters)
    mine, other = first.state_dict(), second.state_dict()
    for groups in (mine["param_groups"], other["param_groups"]):
        assert groups[0].get("param_names", ["name0", "name1", "name2"]) == ["name0", "name1", "name2"]
        groups[0].pop("param_names", None)
    assert _same(mine, other)
    second.param_groups.extend(second.param_groups)  # a group that is there twice is written alike
    assert _same(*second.state_dict()["param_groups"])


@every_sampler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_that_is_carried_round_changes_nothing(member, dtype):
    """accelerate takes the state, moves its tensors and loads it again: when it wraps an optimizer, and when it resumes."""
    runs = []
    for carry in (False, True):
        parameters = _parameters(dtype=dtype)
        sampler = member.chain(parameters, seed=2**64 - 3)
        sampler.track_moments()
        for step in range(4):
            if carry:
                state = sampler.state_dict()
                sampler.load_state_dict(pytree.tree_map_only(torch.Tensor, lambda t: t.to("cpu", copy=True), state))
            _train(sampler, parameters, [step])
        runs.append([*parameters, *(m for p in parameters for m in sampler.moments(p)[:2])])
        assert sampler.param_groups[0]["seed"] == 2**64 - 3 and sampler.param_groups[0]["step"] == 4
    assert _equal(*runs)


@every_sampler
@pytest.mark.parametrize("key", ["maximize", "capturable", "rounding", "moments", "strides"])
def test_an_older_state_without_a_key_can_be_loaded(member, key):
    """Such a state is from before the key existed, and means what the key's default means."""
    parameters = _parameters()
    sampler = member.chain(parameters)
    _train(sampler, parameters, range(2))
    state = copy.deepcopy(sampler.state_dict())
    state["param_groups"][0].pop(key, None)
    whole, parameters = parameters, _copies(parameters)
    _train(sampler, whole, range(2, 4))
    older = member.chain(parameters)
    older.load_state_dict(state)
    _train(older, parameters, range(2, 4))
    assert _equal(whole, parameters)


@every_sampler
def test_copies_have_what_the_original_has_and_carry_the_chain_on(member):
    parameters = _parameters()
    sampler = member.chain(parameters)
    _train(sampler, parameters, range(2))
    others = [copy.deepcopy((parameters, sampler)), pickle.loads(pickle.dumps((parameters, sampler)))]
    _train(sampler, parameters, range(2, 4))
    for theirs, other in others:
        assert {k for k in vars(sampler) if k[0] != "_"} == {k for k in vars(other) if k[0] != "_"}
        _train(other, theirs, range(2, 4))
        assert _equal(theirs, parameters)


@every_sampler
def test_a_state_of_other_groups_is_refused_and_nothing_changes(member):
    parameters = _parameters()
    sampler = member.chain(parameters)
    _train(sampler, parameters, range(2))
    before = copy.deepcopy(sampler.state_dict())
    for other in (_parameters([(2,)]), [{"params": [p]} for p in _parameters()]):
        with pytest.raises(ValueError, match="parameter group"):
            sampler.load_state_dict(member.chain(other, chain=1).state_dict())
    assert _same(sampler.state_dict(), before)


@every_sampler
def test_a_state_of_another_optimizer_is_refused_and_nothing_changes(member):
    """It has no noise coordinates."""
    parameters = _parameters()
    sampler = member.chain(parameters)
    _train(sampler, parameters, range(2))
    before = copy.deepcopy(sampler.state_dict())
    with pytest.raises(ValueError, match="parameter_ids"):
        sampler.load_state_dict(torch.optim.SGD(_copies(parameters), 0.1).state_dict())
    assert _same(sampler.state_dict(), before)


@every_sampler
def test_a_subclass_may_have_a_constructor_of_its_own(member):
    class Mine(member.make):
        def __init__(self, params, **arguments):
            super().__init__(params, **{"lr": 0.01, "num_data": 50, **member.settings, **arguments})

    parameters = _parameters()
    sampler = Mine(parameters, seed=3)
    _train(sampler, parameters, range(2))
    assert sampler.param_groups[0]["seed"] == 3 and sampler.param_groups[0]["step"] == 2


@every_sampler
def test_a_sampler_can_be_printed(member):
    text = repr(member.chain(_parameters()))
    assert member.make.__name__ in text and "temperature: 0.7" in text


# ---- what stands around an optimizer ----


@every_sampler
@pytest.mark.parametrize(("nonfinite", "track"), [(None, False), ("raise", True)])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_the_step(member, backend, nonfinite, track):
    """dynamo makes every optimizer capturable that it traces: a sampler is not traced, so its settings hold."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        parameters = _parameters()
        sampler = member.chain(parameters, nonfinite=nonfinite)
        if track:
            sampler.track_moments()
        step = torch.compile(sampler.step, backend=backend) if compiled else sampler.step
        for number in range(3):
            _set_gradients(parameters, number)
            step()
        runs.append(parameters)
        assert sampler.param_groups[0]["step"] == 3 and not sampler.param_groups[0]["capturable"]
    assert _equal(*runs)


@every_sampler
def test_a_gradient_scaler_unscales_and_leaves_out_the_infinite_step(member):
    runs = []
    for scale in (1.0, 1024.0):  # a power of two: exact
        parameters = _parameters()
        sampler = member.chain(parameters)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=0.5)
        for step in range(4):
            _set_gradients(parameters, step)
            for parameter in parameters:
                parameter.grad.mul_(scaler.scale(torch.tensor(1.0)))
            if step == 1:
                parameters[1].grad[41] = torch.inf
            before = _copies(parameters)
            scaler.step(sampler)
            scaler.update()
            assert _equal(parameters, before) == (step == 1)
        assert sampler.param_groups[0]["step"] == 3
        runs.append(parameters)
    assert _equal(*runs)


class _Net(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight, self.bias = _parameters([(4, 3), (3,)], dtype)


def _groups_of(net, grouped):
    if not grouped:
        return net.named_parameters()
    return [{"params": [("weight", net.weight)]}, {"params": [("bias", net.bias)], "lr": 0.02}]


@every_sampler
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_checkpoint_library_prepares_the_state_without_moving_the_chain(member, as_tensor):
    """torch.distributed.checkpoint takes a step with lr = 0 and zero gradients before it reads or loads a state."""
    runs = []
    for prepare in (False, True):
        net = _Net(torch.float32)
        lr = torch.tensor(0.01, dtype=torch.float64) if as_tensor else 0.01
        parameters = [*net.parameters()]
        sampler = member.chain(net.named_parameters(), lr=lr, prior_mean=[torch.full(p.shape, 9.0) for p in parameters])
        if prepare:
            before = _copies(parameters)
            dcp._init_optim_state(sampler)
            assert _equal(parameters, before) and sampler.param_groups[0]["step"] == 0
            assert sampler.param_groups[0]["lr"] is lr and all(p.grad is None for p in parameters)
        _train(sampler, parameters, range(3))
        runs.append(parameters)
    assert _equal(*runs)


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("extra", [None, "moments", "prior_mean"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_state_goes_through_torchs_distributed_checkpoints(member, dtype, grouped, extra, flat):
    """`get_optimizer_state_dict` names the parameters, `set_optimizer_state_dict` finds them again: the same chain.

    A flat state is loaded into the tensors that the step at lr = 0 has made, unless there is any state before: then into those.
    """
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)

    def make():
        net = _Net(dtype)
        groups = _groups_of(net, grouped)
        if extra == "prior_mean":
            groups = [
                {"params": [entry], "prior_mean": [torch.ones_like(entry[1])]} for entry in net.named_parameters()
            ]
        sampler = member.chain(groups)
        if extra == "moments":
            sampler.track_moments()
        return net, sampler

    net, sampler = make()
    parameters = [*net.parameters()]
    _train(sampler, parameters, range(3))
    state = copy.deepcopy(dcp.get_optimizer_state_dict(net, sampler, options=options))
    values = _copies(parameters)
    _train(sampler, parameters, range(3, 6))
    resumed, other = make()
    theirs = [*resumed.parameters()]
    dcp.set_optimizer_state_dict(resumed, other, state, options=options)
    with torch.no_grad():
        for parameter, value in zip(theirs, values, strict=True):
            parameter.copy_(value)
    _train(other, theirs, range(3, 6))
    assert _equal(parameters, theirs)
    if extra == "moments":
        for a, b in zip(parameters, theirs, strict=True):
            assert sampler.moments(a).draws == other.moments(b).draws == 6
            assert torch.equal(sampler.moments(a).mean, other.moments(b).mean)
