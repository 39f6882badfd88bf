"""Cached features: recorded once, read back bit for bit, streamed in an order that is a pure function, and sampled on."""

import json
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import stats
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bkd_fast as bkd
from bkd_fast import features as module

FINGERPRINT = {"backbone": "a", "data": "b"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 rows of 3 float32 features, 4 of them mixed."""
    monkeypatch.setattr(module, "BLOCK", 7 * 12 + 5)
    monkeypatch.setattr(module, "MIXED", 4)


def _data(rows, inputs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=generator), torch.randint(3, (rows,), generator=generator)


def _loader(x, y, batch=16):
    return DataLoader(TensorDataset(x, y, torch.arange(len(x))), batch)


def _record(path, x, y=None, backbone=None, **settings):
    y = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    settings = {"fingerprint": FINGERPRINT, "dtype": torch.float32, **settings}
    return bkd.record_features(nn.Identity() if backbone is None else backbone, _loader(x, y), path, **settings)


# ---- the file ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 1), (37, 5), (64, 3)])
def test_what_was_recorded_comes_back(tmp_path, dtype, rows, inputs):
    x, y = _data(rows, inputs)
    backbone = nn.Sequential(nn.Linear(inputs, 7), nn.Dropout(0.5)).train()
    made = _record(tmp_path / "runs" / "f", x, y, backbone, dtype=dtype)
    assert backbone[1].training  # recorded in eval mode, and put back
    for cache in (made, bkd.FeatureCache(tmp_path / "runs" / "f.json", expect=FINGERPRINT)):
        assert (cache.shape, cache.dtype, len(cache)) == ((rows, 7), dtype, rows)
        expected = torch.cat([backbone[0](part) for part in torch.split(x, 16)]).detach().to(dtype)
        assert torch.equal(cache.rows(0, rows), expected)
        assert torch.equal(cache.rows(rows // 2, rows - 1 or 1), expected[rows // 2 : rows - 1 or 1])
        assert torch.equal(cache.targets, y) and torch.equal(cache.ids, torch.arange(rows))
    with pytest.raises(ValueError, match=rf"rows 0 \.\. {rows + 1}: must be within 0 \.\. {rows}"):
        made.rows(0, rows + 1)


def test_rows_of_any_shape_in_any_order(tmp_path):
    x = torch.randn(20, 2, 3, 4)
    order = torch.randperm(20)
    loader = [(x[order[:9]], order[:9] % 3, order[:9]), (x[order[9:]], order[9:] % 3, order[9:])]
    cache = bkd.record_features(nn.Identity(), loader, tmp_path / "f", fingerprint={}, dtype=torch.float32)
    assert torch.equal(cache.ids, order) and torch.equal(cache.targets, order % 3)
    assert torch.equal(cache.rows(0, 20), x[order])
    batch, target, _ = next(iter(bkd.FeatureBatches(cache, batch_size=20, seed=0)))
    assert batch.shape == x.shape and torch.equal(batch.sum((1, 2, 3)).sort().values, x.sum((1, 2, 3)).sort().values)
    assert torch.equal(target.sort().values, (order % 3).sort().values)


def _alter(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def _sidecar(**change):
    def spoil(path):
        about = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(
            json.dumps({name: value for name, value in {**about, **change}.items() if value is not None})
        )

    return spoil


FAULTS = {
    "missing": (lambda p: p.unlink(), bkd.StateFileError, r"f\.json names f\.bin, which is missing"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1]), bkd.StateFileError, "f.bin has 1331 bytes: must have 1332"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"0"), bkd.StateFileError, "f.bin has 1333 bytes: must have 1332"),
    "altered": (_alter, bkd.StateFileError, r"f\.bin is altered: its checksum is not the one in f\.json"),
    "unfinished": (lambda p: p.with_suffix(".json").unlink(), bkd.StateFileError, "f.json is missing beside f.bin: unfinished"),
    "killed": (lambda p: (p.with_suffix(".json").unlink(), p.rename(p.with_name("f.bin.new"))), bkd.StateFileError, "unfinished"),
    "nothing": (lambda p: (p.with_suffix(".json").unlink(), p.unlink()), FileNotFoundError, r"f\.json"),
    "no JSON": (lambda p: p.with_suffix(".json").write_text("{"), bkd.StateFileError, r"f\.json is no JSON"),
    "another kind": (_sidecar(format="bkd_fast.draws"), bkd.StateFileError, "must be 'bkd_fast.features'"),
    "the future": (_sidecar(version=2), bkd.StateFileError, "version 2: must be 1; it was written by a later bkd_fast"),
    "incomplete": (_sidecar(dtype=None), bkd.StateFileError, r"f\.json is incomplete: KeyError"),
    "another dtype": (_sidecar(dtype="int8"), bkd.StateFileError, r"f\.json is incomplete: KeyError\('int8'\)"),
    "another shape": (_sidecar(shape=[37, 4]), bkd.StateFileError, "f.bin has 1332 bytes: must have 1184"),
    "another backbone": (_sidecar(fingerprint={**FINGERPRINT, "data": "c"}), ValueError, "data is 'c' there, 'b' here$"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_cache_is_said(tmp_path, fault):
    cache = _record(tmp_path / "f", *_data(37))
    spoil, error, message = FAULTS[fault]
    spoil(cache.path)
    with pytest.raises(error, match=message):
        bkd.FeatureCache(tmp_path / "f", expect=FINGERPRINT)


def test_damage_after_opening_is_an_error_too(tmp_path):
    cache = _record(tmp_path / "f", *_data(37))
    _alter(cache.path)
    bkd.FeatureCache(tmp_path / "f", verify=False)  # looks at the length alone
    with cache.path.open("r+b") as file:
        file.truncate(400)
    with pytest.raises(bkd.StateFileError, match="truncated since it was opened"):
        cache.rows(10, 30)


X, Y, IDS = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.arange(4)


class _Broken(nn.Module):
    def forward(self, x):
        return torch.where(x == 3, torch.inf, x)


@pytest.mark.parametrize(
    ("batches", "settings", "error", "message"),
    [
        ([], {}, ValueError, "loader is empty"),
        ([(X, Y)], {}, TypeError, r"\['Tensor', 'Tensor'\]: must yield three tensors"),
        ([X], {}, TypeError, "loader yields Tensor"),
        ([(X, Y.float(), IDS)], {}, ValueError, r"target of torch\.float32 \(4,\): must be torch\.int64 \(4,\)"),
        ([(X, Y, IDS[:3])], {}, ValueError, r"ids of torch\.int64 \(3,\)"),
        ([(X, Y, IDS), (X[:, :1], Y, IDS)], {}, ValueError, r"features \(4, 1\): must be \(4, 2\)"),
        ([(X[:, 0], Y, IDS)], {}, ValueError, r"features \(4,\): must be \(rows, features \.\.\.\)"),
        ([(X, Y, IDS), (X + 3, Y, IDS + 4)], {}, bkd.NonFiniteError, "features of sample 4 are not finite in torch.float16"),
        ([(X + 1e5, Y, IDS)], {}, bkd.NonFiniteError, "sample 0 are not finite in torch.float16"),
        ([(X, Y, IDS)], {"dtype": torch.float64}, ValueError, r"dtype = torch\.float64"),
        ([(X, Y, IDS)], {"fingerprint": "abc"}, TypeError, "fingerprint = 'abc'"),
        ([(X, Y, IDS)], {"fingerprint": {"a": 1}}, TypeError, "must be a mapping of str to str"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_leaves_nothing(tmp_path, batches, settings, error, message):
    with pytest.raises(error, match=message):
        bkd.record_features(_Broken(), batches, tmp_path / "f", **{"fingerprint": {}, **settings})
    assert not [*tmp_path.iterdir()]


def test_a_cache_is_recorded_once(tmp_path):
    _record(tmp_path / "f", *_data(9))
    with pytest.raises(FileExistsError, match=r"f\.json exists"):
        _record(tmp_path / "f", *_data(8))
    assert len(bkd.FeatureCache(tmp_path / "f")) == 9
    (tmp_path / "f.json").unlink()  # as if the first run had been killed
    _record(tmp_path / "f", *_data(8))
    assert len(bkd.FeatureCache(tmp_path / "f")) == 8


# ---- the order ----


def _numbered(tmp_path, rows):
    """Features that are the row's number, and targets too."""
    numbers = torch.arange(rows)
    return _record(tmp_path / "f", numbers[:, None].repeat(1, 3).float(), numbers)


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (7, 7), (50, 4), (113, 30), (113, 113)])
def test_every_row_comes_once_an_epoch(tmp_path, small_blocks, rows, batch):
    batches = bkd.FeatureBatches(_numbered(tmp_path, rows), batch_size=batch, seed=5)
    stream = torch.cat([target for _, target, _ in islice(batches, 3 * rows // batch + 1)])
    epochs = [stream[k * rows : (k + 1) * rows] for k in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(rows))
    assert rows < 50 or not torch.equal(epochs[0], epochs[1])
    for x, target, logits in islice(batches, 9):  # and every row keeps what is its own
        assert x.shape == (batch, 3) and torch.equal(x, target[:, None].repeat(1, 3).float()) and logits is None


def test_batches_are_a_function_of_seed_and_step(tmp_path, small_blocks):
    cache = _numbered(tmp_path, 113)
    batches = bkd.FeatureBatches(cache, batch_size=10, seed=2**64 - 1)
    stream = [target for _, target, _ in islice(batches, 60)]
    for step in (0, 1, 5, 11, 12, 33, 59):
        again = bkd.FeatureBatches(cache, batch_size=10, seed=2**64 - 1).at(step)
        assert all(torch.equal(a[1], b) for a, b in zip(islice(again, 60 - step), stream[step:], strict=True))
    other = next(iter(bkd.FeatureBatches(cache, batch_size=10, seed=2**64 - 2)))[1]
    assert not torch.equal(other, stream[0])


@pytest.mark.parametrize("order", ["shuffled", "sorted"])
def test_batches_vary_as_it_is_written(tmp_path, small_blocks, order):
    """12 blocks of 7 rows, 4 mixed, batches of 14: the means of 4 of 12 blocks, and of 14 of their 28 rows about those.

    In a shuffled file that is the variance of 14 random rows, in a sorted one 1 + rho b / 4 (1 - 4 / 12) times as much.
    """
    x = torch.arange(12.0).repeat_interleave(7)
    x = x[torch.randperm(84, generator=torch.Generator().manual_seed(1))] if order == "shuffled" else x
    batches = bkd.FeatureBatches(_record(tmp_path / "f", x[:, None].repeat(1, 3)), batch_size=14, seed=3)
    means = torch.stack([batch[:, 0].double().mean() for batch, _, _ in islice(batches, 400 * 6)]).view(400, 6)
    torch.testing.assert_close(
        means.mean(1), torch.full((400,), 5.5, dtype=torch.float64)
    )  # an epoch is unbiased, exactly
    variance = float(x.double().var(correction=0))
    between = float(x.double().view(12, 7).mean(1).var()) / 4 * (1 - 4 / 12)
    within = (variance - between) / 14 * (28 - 14) / 27
    stats.assert_ergodic_mean((means - 5.5).square().numpy(), between + within, "variance of a batch's mean")
    of_random_rows = variance / 14 * (84 - 14) / 83
    ratio = (between + within) / of_random_rows
    assert abs(ratio - 1) < 0.3 if order == "shuffled" else ratio > 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, r"batch_size = 0: must be an int in \[1, 10\)"),
        ({"batch_size": 10}, "batch_size = 10"),
        ({"batch_size": 2.0}, r"batch_size = 2\.0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "seed = 18446744073709551616"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        bkd.FeatureBatches(_numbered(tmp_path, 9), **{"batch_size": 3, "seed": 0, **change})


def test_a_bad_step(tmp_path):
    with pytest.raises(ValueError, match="step = -1: must be an int of at least 0"):
        bkd.FeatureBatches(_numbered(tmp_path, 9), batch_size=3, seed=0).at(-1)


class _Teacher:
    def __init__(self, table):
        self.table = table

    def logits(self, ids):
        return self.table[ids]


def test_teachers_are_asked_by_sample_id(tmp_path):
    x = torch.arange(30.0)[:, None]
    ids = torch.arange(30).flip(0) + 100
    cache = bkd.record_features(
        nn.Identity(), [(x, torch.zeros_like(ids), ids)], tmp_path / "f", fingerprint={}, dtype=torch.float32
    )
    table = torch.randn(130, 4).half()
    file = np.memmap(tmp_path / "table", np.float16, "w+", shape=(130, 4))
    file[:] = table.numpy()
    for teacher in (table, file, _Teacher(table)):
        for x, _, logits in islice(bkd.FeatureBatches(cache, teacher, batch_size=7, seed=0), 5):
            assert torch.equal(logits, table[129 - x[:, 0].long()])


LARGE = """
import sys
from itertools import islice

import torch

import bkd_fast as bkd


def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


torch.set_num_threads(1)
x = torch.randn(500, 2048)


def loader():
    for begin in range(0, 50_000, 500):
        ids = torch.arange(begin, begin + 500)
        yield x + 1e-6 * begin, ids % 10, ids


before = anonymous()
cache = bkd.record_features(torch.nn.Identity(), loader(), sys.argv[1], fingerprint={})
recorded = anonymous()
sampler = bkd.LinearHeadSampler(2048, 10, lr=1e-3, num_data=50_000, prior_strength=0.0)
peak = 0.0
for _ in bkd.sample_heads(sampler, bkd.FeatureBatches(cache, batch_size=500, seed=0), thin=10, num_draws=12):
    peak = max(peak, anonymous())
print(recorded - before, peak - before, cache.path.stat().st_size / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_file_of_200_mb_is_streamed(tmp_path):
    output = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path / "f")], capture_output=True, text=True, check=True
    ).stdout
    recording, sampling, size = map(float, output.split())
    assert size > 195
    assert recording < 60 and sampling < 90, output  # 32 MB are the rows that are mixed


# ---- sampling ----


def _network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3))


def test_head_chains_on_a_cache_are_those_on_features_in_memory(tmp_path):
    x, y = _data(200)
    backbone, head = bkd.split_head(_network(), "4")
    cache = _record(tmp_path / "f", x, y, backbone)
    teacher = 3 * torch.randn(200, 3)
    batches = bkd.FeatureBatches(cache, teacher, batch_size=30, seed=2)
    settings = {"lr": 0.05, "num_data": 200, "chains": 2, "prior_strength": 2.0, "init": head.weight, "seed": 3}
    ours = bkd.LinearHeadSampler(6, 3, **settings)
    draws = list(bkd.sample_heads(ours, batches, burn_in=4, thin=3, num_draws=2))
    other = bkd.LinearHeadSampler(6, 3, **settings)
    with torch.no_grad():
        features = torch.cat([backbone(part) for part in torch.split(x, 16)])
    for cached, _, _ in islice(batches, 10):
        rows = (cached[:, None] == features).all(2).nonzero()[:, 1]
        other.step(features[rows], y[rows], teacher[rows])
    assert len(draws) == 4
    assert torch.equal(ours.weight, other.weight) and torch.equal(ours.bias, other.bias) and ours.steps == 10


@pytest.mark.parametrize("chains", [1, 2])
def test_the_last_block_is_sampled_by_the_ordinary_loop(tmp_path, chains):
    """Equal to sampling a network whose body is frozen, on the same batches of its inputs."""
    x, y = _data(60)
    network = _network()
    cache = _record(tmp_path / "f", x, y, network[:2], dtype=torch.float32)
    teacher = 2 * torch.randn(60, 3)
    counts = {"warm_start": 3, "burn_in": 2, "thin": 2, "num_draws": 3, "progress": False}
    settings = {"num_data": 60, "prior_precision": 1.0, "seed": 4, "chains": chains}

    def draws(student, sampled, batches):
        sampler = bkd.SGHMC(sampled, 0.02, **settings)
        return [d.snapshot() for d in bkd.sample(student, sampler, bkd.KDLoss(2.0), batches, **counts)]

    batches = bkd.FeatureBatches(cache, teacher, batch_size=20, seed=1)
    block = bkd.StackedModule(network[2:], chains=chains) if chains > 1 else network[2:]
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ours = draws(block, block.named_parameters(), batches)

    network.load_state_dict(start)
    network[:2].requires_grad_(False)
    whole = bkd.StackedModule(network, chains=chains) if chains > 1 else network
    rows = bkd.FeatureBatches(_record(tmp_path / "x", x, y), teacher, batch_size=20, seed=1)
    theirs = draws(whole, [(n, p) for n, p in whole.named_parameters() if p.requires_grad], rows)
    assert len(ours) == len(theirs) == 3 * chains
    for mine, other in zip(ours, theirs, strict=True):
        for (name, a), (_, b) in zip(mine.items(), other.items(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_features_of_16_bits_for_modules_of_32(tmp_path):
    x, y = _data(40)
    cache = _record(tmp_path / "f", x, y, dtype=torch.float16)
    student = nn.Linear(5, 3)
    sampler = bkd.SGLD(student.parameters(), 0.01, num_data=40)
    batches = bkd.FeatureBatches(cache, batch_size=10, seed=0, dtype=torch.float32)
    assert len(list(bkd.sample(student, sampler, bkd.KDLoss(0.0), batches, num_draws=2, progress=False))) == 2
    assert next(iter(batches))[0].dtype == torch.float32


def test_a_run_goes_on_where_it_stopped(tmp_path):
    cache = _record(tmp_path / "f", *_data(50))
    batches = bkd.FeatureBatches(cache, batch_size=8, seed=6)

    def chains():
        return bkd.LinearHeadSampler(5, 3, lr=0.05, num_data=50, chains=2, prior_strength=0.0, seed=1)

    through, first, second = chains(), chains(), chains()
    list(bkd.sample_heads(through, batches, num_draws=20))
    list(bkd.sample_heads(first, batches, num_draws=9))
    second.load_state_dict(first.state_dict())
    list(bkd.sample_heads(second, batches.at(second.steps), num_draws=11))
    assert torch.equal(second.weight, through.weight)
