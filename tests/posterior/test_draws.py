"""Kept draws: which are kept, what the file holds, and that predicting from it equals predicting from the snapshots."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bkd_fast as bkd
from bkd_fast.posterior.draws import DrawRecord, reservoir_slot


def values(normals, dtype):
    if dtype == torch.bool:
        return normals > 0
    return (10 * normals.abs()).to(dtype) if not dtype.is_floating_point and not dtype.is_complex else normals.to(dtype)


@dataclass
class FakeDraw:
    """A draw whose snapshot is a function of its index alone."""

    index: int
    model: nn.Module
    run: int = 77
    chain: int = 3
    step: int = 0
    names: tuple[str, ...] = ()

    def snapshot(self):
        generator = torch.Generator().manual_seed(self.index)
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {
            name: values(torch.randn(tensor.shape, generator=generator), tensor.dtype)
            for name, tensor in tensors.items()
            if not self.names or name in self.names
        }


class ExactDraw(FakeDraw):
    """One in eighths: the sums of a matrix product are exact then, and logits do not depend on how the rows are batched."""

    def snapshot(self):
        return {name: (tensor * 8).round() / 8 for name, tensor in super().snapshot().items()}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)).to(dtype)


def indices(draws):
    return [record.index for record in draws.records]


def assert_holds(draws, model, expected, cast=lambda t: t):
    """The draws of these indices, and every bit of their tensors."""
    held = list(draws.snapshots())
    assert [record.index for record, _ in held] == expected == indices(draws)
    assert len(draws) == len(expected)
    for record, tensors in held:
        snapshot = FakeDraw(record.index, model).snapshot()
        assert tensors.keys() == snapshot.keys()
        for name, tensor in snapshot.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], cast(tensor)), name


# ---- which draws are kept ----


@pytest.mark.parametrize(
    ("keep", "added", "kept"),
    [
        (4, 1, [0]),
        (4, 4, [0, 1, 2, 3]),
        (4, 5, [0, 2, 4]),
        (4, 8, [0, 2, 4, 6]),
        (4, 17, [0, 8, 16]),
        (3, 4, [0, 2]),
        (3, 6, [0, 2, 4]),
        (3, 7, [0, 4]),
        (2, 100, [0, 64]),
    ],
)
def test_draws_are_thinned_evenly(tmp_path, keep, added, kept):
    model = network()
    draws = bkd.Draws(tmp_path / "draws.safetensors", model, keep=keep)
    for index in range(added):
        draws.add(FakeDraw(index, model))
    assert_holds(draws, model, kept)
    assert draws.offered == added


def test_a_reservoir_is_every_subset_equally_often():
    """All 210 subsets of 4 of 10 arrivals over 4200 seeds; a right reservoir fails once in a million."""
    keep, arrivals, seeds = 4, 10, 4200
    found = Counter()
    for seed in range(seeds):
        slots = {}
        for arrival in range(arrivals):
            if (slot := reservoir_slot(arrival, keep, seed)) is not None:
                slots[slot] = arrival
        found[tuple(sorted(slots.values()))] += 1
    subsets = list(combinations(range(arrivals), keep))
    assert sum(found[subset] for subset in subsets) == seeds
    expected = seeds / math.comb(arrivals, keep)
    chi_square = sum((found[subset] - expected) ** 2 / expected for subset in subsets)
    assert chi_square < stats.chi2.isf(1e-6, len(subsets) - 1)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_a_reservoir_holds_what_algorithm_r_says(tmp_path, seed):
    model = nn.Linear(2, 2)
    draws = bkd.Draws(tmp_path / "draws.safetensors", model, keep=5, select="reservoir", seed=seed)
    slots = list(range(5))
    for index in range(40):
        draws.add(FakeDraw(index, model))
        if index >= 5:
            word = int(np.random.Philox(key=seed | index << 64).random_raw())  # the key's two words: seed, arrival
            j = word * (index + 1) // 2**64
            if j < 5:
                slots[j] = index
    assert indices(draws) == sorted(slots)
    assert draws.offered == 40
    assert_holds(draws, model, sorted(slots))


@pytest.mark.parametrize("select", ["thin", "reservoir"])
def test_a_file_that_is_opened_again_goes_on_as_if_it_had_never_been_closed(tmp_path, select):
    model = network()
    once = bkd.Draws(tmp_path / "once", model, keep=4, select=select, seed=5, dtype=torch.bfloat16)
    for index in range(23):
        once.add(FakeDraw(index, model))
        # what an existing file has of its own is not asked of who opens it
        first = {"keep": 4, "select": select, "seed": 5, "dtype": torch.bfloat16} if index == 0 else {}
        again = bkd.Draws(tmp_path / "again", model, **first)
        assert again.offered == index
        again.add(FakeDraw(index, model))
    again = bkd.Draws(tmp_path / "again", model)
    assert (again.keep, again.select, again.seed, again.offered) == (4, select, 5, 23)
    assert (tmp_path / "once").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_draw_that_is_not_kept_is_not_copied(tmp_path):
    class Uncopied(FakeDraw):
        def snapshot(self):
            raise AssertionError

    model = network()
    draws = bkd.Draws(tmp_path / "draws", model, keep=2)
    for index in range(3):
        draws.add(FakeDraw(index, model))
    draws.add(Uncopied(3, model))
    assert draws.offered == 4


# ---- what the file holds ----


def test_only_what_a_snapshot_holds_is_stored_and_the_rest_is_the_models(tmp_path):
    model, path, x = network().eval(), tmp_path / "head.safetensors", torch.randn(2, 5)
    draws = bkd.Draws(path, model, keep=3)
    draw = FakeDraw(0, model, names=("2.weight", "2.bias"))
    draws.add(draw)
    with safe_open(path, framework="pt") as file:
        assert {name for name in file.keys() if not name.startswith("bkd_fast.")} == {"2.weight", "2.bias"}  # noqa: SIM118
        assert file.get_slice("2.weight").get_shape() == [3, 3, 4]
    with torch.no_grad():
        expected = torch.softmax(torch.func.functional_call(model, draw.snapshot(), (x,)), -1)
    torch.testing.assert_close(draws.predict(x).mean, expected)


class Odd(nn.Module):
    """A tensor of every kind, of sizes that are no multiples of eight bytes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5))
        self.register_buffer("b1", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("u8", torch.zeros(3, dtype=torch.uint8))
        self.register_buffer("f16", torch.zeros(3, dtype=torch.float16))
        self.register_buffer("bf16", torch.zeros(1, 3, dtype=torch.bfloat16))
        self.register_buffer("f64", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("i32", torch.zeros(3, dtype=torch.int32))
        self.register_buffer("i64", torch.zeros((), dtype=torch.int64))
        self.register_buffer("empty", torch.zeros(0, 4))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_tensors_of_every_dtype_survive_and_only_floating_point_ones_are_rounded(tmp_path, dtype):
    model, path = Odd(), tmp_path / "draws.safetensors"
    draws = bkd.Draws(path, model, keep=3, dtype=dtype)
    for index in range(3):
        draws.add(FakeDraw(index, model))

    def cast(tensor):
        return tensor.to(dtype).to(tensor.dtype) if dtype is not None and tensor.is_floating_point() else tensor

    assert_holds(bkd.Draws(path, model), model, [0, 1, 2], cast)


def test_tensors_that_do_not_lie_in_row_major_order_survive(tmp_path):
    model = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)

    class ChannelsLast(FakeDraw):
        def snapshot(self):
            tensors = super().snapshot()
            return {**tensors, "weight": tensors["weight"].to(memory_format=torch.channels_last)}

    draws = bkd.Draws(tmp_path / "draws", model, keep=2)
    draws.add(ChannelsLast(0, model))
    assert_holds(draws, model, [0])


def test_a_bfloat16_file_is_half_as_large_and_opens_with_a_model_of_another_precision(tmp_path):
    model = nn.Linear(100, 10)
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        path = tmp_path / str(dtype)
        draws = bkd.Draws(path, model, keep=2, dtype=dtype)
        draws.add(FakeDraw(0, model))
        sizes[dtype] = path.stat().st_size
    assert sizes[torch.float32] - sizes[torch.bfloat16] == pytest.approx(2 * 2 * 1010, abs=8)
    double = nn.Linear(100, 10).double()
    ((_, tensors),) = bkd.Draws(path, double).snapshots()
    rounded = FakeDraw(0, model).snapshot()["weight"].bfloat16().double()
    assert torch.equal(tensors["weight"], rounded)


def test_the_records_are_the_draws(tmp_path):
    model, path = network(), tmp_path / "draws"
    draws = bkd.Draws(path, model, keep=4)
    assert (len(draws), draws.offered, draws.records, list(draws.snapshots())) == (0, 0, [], [])
    draws.add(FakeDraw(9, model, run=2**64 - 1, chain=2**31 - 1, step=2**40))
    draws.add(FakeDraw(0, model, run=0, chain=0))
    expected = [DrawRecord(2**64 - 1, 2**31 - 1, 9, 2**40), DrawRecord(0, 0, 0, 0)]
    assert bkd.Draws(path, model).records == draws.records == expected


def test_copies_stay_when_their_slot_is_written_again(tmp_path):
    model = network()
    draws = bkd.Draws(tmp_path / "draws", model, keep=2)
    draws.add(FakeDraw(0, model))
    draws.add(FakeDraw(1, model))
    (_, _), (record, tensors) = draws.snapshots()
    draws.add(FakeDraw(2, model))
    assert indices(draws) == [0, 2]
    assert torch.equal(tensors["0.weight"], FakeDraw(record.index, model).snapshot()["0.weight"])


# ---- prediction ----


def direct(model, draws, x, classes=3):
    """The posterior of these draws in one go."""
    posterior = bkd.PosteriorPredictive(len(x), classes)
    model.eval()
    with torch.no_grad():
        for draw in draws:
            posterior.update_logits(torch.func.functional_call(model, draw.snapshot(), (x,)))
    model.train()
    return posterior


def assert_equal_posteriors(one, other):
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.variance, other.variance)
    assert torch.equal(one.counts, other.counts)
    for q in (0.0, 0.3, 1.0):
        torch.testing.assert_close(one.quantile(q), other.quantile(q))


@pytest.mark.parametrize("added", [10, 40])
def test_prediction_equals_direct_evaluation(tmp_path, added):
    model = network().train()
    x = torch.randn(6, 5)
    draws = bkd.Draws(tmp_path / "draws.safetensors", model, keep=40)
    for index in range(added):
        draws.add(FakeDraw(index, model))
    predicted = draws.predict(x)
    assert model.training and all(m.training for m in model)
    assert_equal_posteriors(predicted, direct(model, [FakeDraw(i, model) for i in range(added)], x))
    assert predicted.streams == [((77, 3), (0, added))]
    with pytest.raises(ValueError, match="already in this posterior"):
        predicted.merge_(draws.predict(x))


@pytest.mark.parametrize("form", ["tensor", "list", "tuples", "loader"])
def test_many_rows_are_predicted_in_batches(tmp_path, form):
    sizes = []

    class Watched(nn.Linear):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    model = Watched(5, 3)
    draws = bkd.Draws(tmp_path / "draws", model)
    for index in range(3):
        draws.add(ExactDraw(index, model))
    x = torch.randint(-24, 25, (600, 5)) / 8
    given = {
        "tensor": x,
        "list": list(x.split(7)),
        "tuples": [(part, torch.zeros(len(part))) for part in x.split(100)],
        "loader": DataLoader(TensorDataset(x, torch.zeros(600)), batch_size=250),
    }
    predicted = draws.predict(given[form])
    assert max(sizes) == {"tensor": 256, "list": 7, "tuples": 100, "loader": 250}[form]
    assert_equal_posteriors(predicted, direct(model, [ExactDraw(i, model) for i in range(3)], x))


def test_a_model_in_bfloat16_predicts_in_bfloat16(tmp_path):
    model = network(torch.bfloat16)
    draws = bkd.Draws(tmp_path / "draws", model, dtype=torch.float32)
    draws.add(FakeDraw(0, model))
    draws.add(FakeDraw(1, model))
    x = torch.randn(4, 5).bfloat16()
    with pytest.warns(bkd.BKDFastWarning, match="logits are bfloat16"):
        predicted = draws.predict(x)
    with pytest.warns(bkd.BKDFastWarning, match="logits are bfloat16"):
        expected = direct(model, [FakeDraw(i, model) for i in range(2)], x)
    assert_equal_posteriors(predicted, expected)


def test_the_draws_of_the_loop_are_kept_and_predict(tmp_path):
    torch.manual_seed(0)
    student, x = nn.Linear(4, 2), torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long(), torch.randn(64, 2)), batch_size=16, shuffle=True)
    sampler = bkd.SGLD(student.named_parameters(), lr=0.01, num_data=64, prior_precision=1.0)
    draws = bkd.Draws(tmp_path / "draws", student, keep=6, select="reservoir")
    posterior = bkd.PosteriorPredictive(64, 2)
    batches = [x]
    for draw in bkd.sample(student, sampler, bkd.KDLoss(1.0), loader, burn_in=5, num_draws=6, progress=False):
        draws.add(draw)
        posterior.update(draw, batches)
    assert [(record.index, record.step) for record in draws.records] == [(i, 6 + i) for i in range(6)]
    predicted = draws.predict(x)
    assert_equal_posteriors(predicted, posterior)
    assert predicted.streams == posterior.streams


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 1}, "keep = 1"),
        ({"keep": 2.5}, "keep = 2.5"),
        ({"keep": True}, "keep = True"),
        ({"select": "first"}, "select = 'first'"),
        ({"dtype": torch.float16}, r"dtype = torch\.float16"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "seed = 18446744073709551616"),
        ({"seed": 0.5}, r"seed = 0\.5"),
    ],
)
def test_arguments_that_are_not_allowed(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        bkd.Draws(tmp_path / "a", network(), **arguments)
    with pytest.raises(ValueError, match=r"must not end with \.json"):
        bkd.Draws(tmp_path / "a.json", network())


def test_draws_that_cannot_be_added_change_nothing(tmp_path):
    model, path = network(), tmp_path / "draws"
    draws = bkd.Draws(path, model, keep=2)

    def refused(draw, message):
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(ValueError, match=message):
            draws.add(draw)
        assert (path.read_bytes() if path.exists() else None) == before

    other = nn.Sequential(nn.Linear(5, 9))
    refused(
        FakeDraw(0, network(torch.float64)), r"'0\.weight' is torch\.float64 \(4, 5\): the model's is torch\.float32"
    )
    refused(FakeDraw(0, other), r"'0\.weight' is torch\.float32 \(9, 5\): the model's is torch\.float32 \(4, 5\)")
    refused(FakeDraw(0, nn.ModuleDict({"a": nn.Linear(1, 1)})), r"'a\.weight' is .*: the model's is missing")
    refused(FakeDraw(0, model, names=("nothing",)), r"tensors are \[\]: must be some of the model's")
    refused(FakeDraw(0, model, run=2**64), "run = 18446744073709551616")
    draws.add(FakeDraw(0, model))
    draws.add(FakeDraw(1, model))
    refused(FakeDraw(2, model, names=("2.bias",)), r"tensors are \['2\.bias'\]: must be \['0\.bias', .* as in draws")
    refused(FakeDraw(1, model, step=9), r"draw \(run 77, chain 3, index 1\) is in draws already")
    draws.add(FakeDraw(2, model))
    assert_holds(draws, model, [0, 2])
    draws.add(FakeDraw(1, model))  # no longer there, and not kept now
    draws.add(FakeDraw(0, model, run=78))
    assert len(draws) == 2

    complex_model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"'weight' is torch\.complex64 \(2, 2\): its dtype must be one of"):
        bkd.Draws(tmp_path / "complex", complex_model).add(FakeDraw(0, complex_model))
    assert not (tmp_path / "complex").exists()


def test_files_that_another_has_made_meanwhile_stay(tmp_path):
    model, path = network(), tmp_path / "draws"
    one, other = bkd.Draws(path, model), bkd.Draws(path, model)
    one.add(FakeDraw(0, model))
    with pytest.raises(FileExistsError, match="has come into being"):
        other.add(FakeDraw(1, model))
    assert_holds(bkd.Draws(path, model), model, [0])


def test_a_model_that_the_tensors_do_not_fit(tmp_path):
    model, path = nn.Linear(2, 2), tmp_path / "draws"
    bkd.Draws(path, model).add(FakeDraw(0, model))
    with pytest.raises(
        ValueError, match=r"holds 'weight', torch\.float32 \(2, 2\): the model's is torch\.float32 \(2, 3\)"
    ):
        bkd.Draws(path, nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"holds 'bias', torch\.float32 \(2,\): the model's is missing"):
        bkd.Draws(path, nn.Linear(2, 2, bias=False))
    counted, path = nn.BatchNorm1d(2), tmp_path / "counted"
    bkd.Draws(path, counted).add(FakeDraw(0, counted))
    counted.num_batches_tracked = torch.zeros((), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"'num_batches_tracked', torch\.int64 \(\): the model's is torch\.float32"):
        bkd.Draws(path, counted)


def test_inputs_that_cannot_be_predicted(tmp_path):
    model = network()
    draws = bkd.Draws(tmp_path / "draws", model)
    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match="holds no draws"):
        draws.predict(x)
    draws.add(FakeDraw(0, model))
    with pytest.raises(TypeError, match="generator, which can be gone through only once"):
        draws.predict(part for part in x.split(2))
    with pytest.raises(TypeError, match="yields a dict"):
        draws.predict([{"x": x}])
    with pytest.raises(ValueError, match="no batches"):
        draws.predict([])
    with pytest.raises(ValueError, match="shuffle=False"):
        draws.predict(DataLoader(TensorDataset(x), batch_size=2, shuffle=True))
    assert draws.predict(x[:0]).mean.shape == (0, 3)

    flat = nn.Sequential(nn.Linear(5, 2), nn.Flatten(0))
    draws = bkd.Draws(tmp_path / "flat", flat)
    draws.add(FakeDraw(0, flat))
    with pytest.raises(ValueError, match=r"shape \(2,\): must be logits"):
        draws.predict(x)
