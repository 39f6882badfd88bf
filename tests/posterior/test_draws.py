"""Kept draws: which are kept, what the file holds, and that predicting from it equals predicting from the snapshots."""

from dataclasses import dataclass, field

import pytest
import torch
from safetensors import safe_open
from torch import nn

import bkd_fast as bkd


@dataclass
class FakeDraw:
    index: int
    model: nn.Module
    run: int = 77
    chain: int = 3
    step: int = 0
    names: tuple[str, ...] = field(default=())

    def snapshot(self):
        generator = torch.Generator().manual_seed(self.index)
        return {
            name: torch.randn(p.shape, generator=generator).to(p.dtype)
            for name, p in self.model.named_parameters()
            if not self.names or name in self.names
        }


def _model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)).to(dtype)


@pytest.mark.parametrize(
    ("added", "kept"), [(1, [0]), (4, [0, 1, 2, 3]), (5, [0, 2, 4]), (8, [0, 2, 4, 6]), (17, [0, 8, 16])]
)
def test_draws_are_thinned_evenly(tmp_path, added, kept):
    model = _model()
    draws = bkd.Draws(tmp_path / "draws.safetensors", model, keep=4)
    for index in range(added):
        draws.add(FakeDraw(index, model))
    assert sorted(draws._records()[draws._records()[:, 4] > 0][:, 2].tolist()) == kept
    assert len(draws) == len(kept)


def test_prediction_equals_direct_evaluation(tmp_path):
    model = _model().train()
    x = torch.randn(6, 5)
    draws, direct = bkd.Draws(tmp_path / "draws.safetensors", model), bkd.PosteriorPredictive(6, 3)
    for index in range(10):
        draw = FakeDraw(index, model)
        draws.add(draw)
        model.eval()
        with torch.no_grad():
            direct.update_logits(torch.func.functional_call(model, draw.snapshot(), (x,)))
        model.train()
    predicted = draws.predict(x)
    assert model.training and all(m.training for m in model)
    assert predicted.counts.tolist() == [10] * 6
    torch.testing.assert_close(predicted.mean, direct.mean)
    assert torch.equal(predicted.quantile(0.3), direct.quantile(0.3))


def test_an_existing_file_is_opened_and_goes_on(tmp_path):
    model, path, x = _model(), tmp_path / "draws.safetensors", torch.randn(2, 5)
    first = bkd.Draws(path, model, keep=4)
    for index in range(6):
        first.add(FakeDraw(index, model))
    mean = first.predict(x).mean
    del first
    again = bkd.Draws(path, _model())
    assert len(again) == 3 and again.keep == 4
    torch.testing.assert_close(again.predict(x).mean, mean)
    for index in range(6, 9):
        again.add(FakeDraw(index, model))
    assert len(again) <= 4


def test_only_the_sampled_parameters_are_stored_and_the_rest_is_the_models(tmp_path):
    model, path, x = _model().eval(), tmp_path / "head.safetensors", torch.randn(2, 5)
    draws = bkd.Draws(path, model, keep=3)
    draws.add(FakeDraw(0, model, names=("2.weight", "2.bias")))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"2.weight", "2.bias", "bkd_fast.records"}
    with torch.no_grad():
        expected = torch.softmax(
            torch.func.functional_call(model, FakeDraw(0, model, names=("2.weight", "2.bias")).snapshot(), (x,)), -1
        )
    torch.testing.assert_close(draws.predict(x).mean, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_survive(tmp_path, dtype):
    model = _model(dtype)
    draws = bkd.Draws(tmp_path / "draws.safetensors", model, keep=3)
    draws.add(FakeDraw(1, model))
    with safe_open(tmp_path / "draws.safetensors", framework="pt") as file:
        for name, tensor in FakeDraw(1, model).snapshot().items():
            assert torch.equal(file.get_slice(name)[0], tensor)


def test_errors(tmp_path):
    model = _model()
    with pytest.raises(ValueError, match="keep = 1"):
        bkd.Draws(tmp_path / "a", model, keep=1)
    empty = bkd.Draws(tmp_path / "a", model)
    with pytest.raises(ValueError, match="holds no draws"):
        empty.predict(torch.randn(1, 5))
    empty.add(FakeDraw(0, model))
    with pytest.raises(ValueError, match=r"the snapshot's tensors are \['2\.bias'\]"):
        empty.add(FakeDraw(1, model, names=("2.bias",)))
    with pytest.raises(ValueError, match="missing"):
        bkd.Draws(tmp_path / "a", nn.Linear(2, 2))
    (tmp_path / "b").write_bytes((16).to_bytes(8, "little") + b'{"a":1}         ')
    with pytest.raises(ValueError, match="no file of draws"):
        bkd.Draws(tmp_path / "b", model)
