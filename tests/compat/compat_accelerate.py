"""accelerate around a sampler: the same chain, bit for bit."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "samplers"))
from family import every_sampler


@pytest.fixture(autouse=True)
def accelerator():
    """One for each test: accelerate keeps its settings in shared state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def _parts(member, dtype=torch.float32):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).to(dtype)
    data = TensorDataset(torch.randn(40, 6).to(dtype), torch.randint(3, (40,)))
    sampler = member.chain(model.named_parameters(), seed=2**64 - 3)
    sampler.track_moments(start=2)
    return model, sampler, DataLoader(data, batch_size=8)


def _train(model, sampler, loader, backward, epochs):
    for _ in range(epochs):
        for inputs, labels in loader:
            sampler.zero_grad()
            backward(torch.nn.functional.cross_entropy(model(inputs).float(), labels))
            sampler.step()


def _values(model, sampler):
    parameters = [*model.parameters()]
    return [*parameters, *(moment for p in parameters for moment in sampler.moments(p)[:2])]


def _assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_that_without_accelerate(member, dtype, accelerator):
    plain = _parts(member, dtype)
    _train(*plain, torch.Tensor.backward, epochs=2)
    model, sampler, loader = accelerator.prepare(*_parts(member, dtype))
    _train(model, sampler, loader, accelerator.backward, epochs=2)
    _assert_equal(_values(*plain[:2]), _values(accelerator.unwrap_model(model), sampler.optimizer))
    group = sampler.param_groups[0]
    assert group["seed"] == 2**64 - 3 and group["step"] == 10 and type(group["step"]) is int


@every_sampler
def test_gradient_accumulation_and_clipping(member):
    """A step that accumulates is none: it uses up no noise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain_model, plain, loader = _parts(member)
    for number, (inputs, labels) in enumerate(loader):
        (torch.nn.functional.cross_entropy(plain_model(inputs), labels) / 2).backward()
        if number % 2 or number == len(loader) - 1:
            torch.nn.utils.clip_grad_norm_(plain_model.parameters(), 0.1)
            plain.step()
            plain.zero_grad()
    model, sampler, loader = accelerator.prepare(*_parts(member))
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.cross_entropy(model(inputs), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            sampler.step()
            sampler.zero_grad()
    assert sampler.param_groups[0]["step"] == plain.param_groups[0]["step"] == 3
    _assert_equal(plain_model.parameters(), accelerator.unwrap_model(model).parameters())


@every_sampler
def test_a_saved_and_loaded_run_goes_on(member, accelerator, tmp_path):
    whole = _parts(member)
    _train(*whole, torch.Tensor.backward, epochs=3)
    prepared = accelerator.prepare(*_parts(member))
    _train(*prepared, accelerator.backward, epochs=1)
    accelerator.save_state(str(tmp_path))
    _train(*prepared, accelerator.backward, epochs=1)  # to be undone
    accelerator.load_state(str(tmp_path))
    _train(*prepared, accelerator.backward, epochs=2)
    model, sampler, _ = prepared
    _assert_equal(_values(*whole[:2]), _values(accelerator.unwrap_model(model), sampler.optimizer))


@every_sampler
def test_a_scheduler(member, accelerator):
    runs = []
    for prepare in (False, True):
        model, sampler, loader = _parts(member)
        schedule = torch.optim.lr_scheduler.ExponentialLR(sampler, 0.8)
        backward = torch.Tensor.backward
        if prepare:
            model, sampler, loader, schedule = accelerator.prepare(model, sampler, loader, schedule)
            backward = accelerator.backward
        for _ in range(3):
            _train(model, sampler, loader, backward, epochs=1)
            schedule.step()
        runs.append([p.detach() for p in model.parameters()])
    _assert_equal(*runs)
