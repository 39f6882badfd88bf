"""The posterior predictive on a GPU: the CPU's bits, nothing that waits, faults and warnings in time, merges across devices."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import pytest
import torch
from predictive_states import (
    assert_close,
    assert_moments_close,
    assert_same_bits,
    assert_same_tiles,
    copied,
    filled_unequally,
    logits_of,
)
from torch import Tensor, nn

from bkd_fast.errors import BKDFastWarning
from bkd_fast.ops import backends, use_backend
from bkd_fast.ops.predictive import empty_state, predictive_update_
from bkd_fast.ops.sketch import (
    empty_tiles,
    sketch_deviance_quantile,
    sketch_histogram,
    sketch_merge_,
    sketch_quantile,
    sketch_sort_,
    sketch_update_,
    tiles_on,
)
from bkd_fast.posterior.predictive import PosteriorPredictive

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
WINDOWS = (1, 7, 32, 20, 5, 64, 40, 3)
SHAPES = [(70, 2), (70, 10), (70, 17), (9, 33), (9, 37), (8, 64), (8, 100), (7, 129), (300, 10), (65, 1000), (3, 32768)]
KERNELS = pytest.mark.parametrize("backend", ["cuda", "triton"])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What a kernel leaves unwritten in new memory is NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def chosen(backend: str) -> Iterator[None]:
    if backends()[backend].missing:
        pytest.skip(backends()[backend].missing)
    with use_backend(backend):
        yield


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@KERNELS
@pytest.mark.parametrize("bins", [64, 128])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_states_are_the_cpus(backend: str, rows: int, classes: int, bins: int) -> None:
    logits = logits_of(sum(WINDOWS), rows, classes, seed=classes)
    theirs, ours = empty_state(rows, classes, bins), empty_state(rows, classes, bins, GPU)
    for piece in logits.split(WINDOWS):
        predictive_update_(theirs, piece)
        with chosen(backend):
            predictive_update_(ours, piece.to(GPU))
    if backend == "cuda":
        assert_same_bits(copied(ours), theirs)
    else:
        assert_close(copied(ours), theirs)


@KERNELS
@pytest.mark.parametrize(("rows", "classes"), SHAPES[:-1])
def test_subsets_of_rows_are_the_cpus(backend: str, rows: int, classes: int) -> None:
    logits = logits_of(64, rows, classes, seed=classes + 1)
    theirs, ours = empty_state(rows, classes, 64), empty_state(rows, classes, 64, GPU)
    generator = torch.Generator().manual_seed(0)
    for k in range(15):
        ids = torch.randperm(rows, generator=generator)[: max(1, rows * (1 + k % 3) // 4)]
        batch = logits[: (1, 7, 32, 20, 64, 3)[k % 6], ids]
        predictive_update_(theirs, batch, ids)
        with chosen(backend):
            predictive_update_(ours, batch.to(GPU), ids.to(GPU) if k % 2 else ids)
    if backend == "cuda":
        assert_same_bits(copied(ours), theirs)
    else:
        assert_close(copied(ours), theirs)


def test_logits_at_odd_addresses() -> None:
    logits = logits_of(8, 5, 10, seed=1)
    theirs, ours = empty_state(5, 10, 64), empty_state(5, 10, 64, GPU)
    predictive_update_(theirs, logits)
    shifted = torch.empty(logits.numel() + 1, device=GPU)[1:].view_as(logits)
    with chosen("cuda"):
        predictive_update_(ours, shifted.copy_(logits))
    assert_same_bits(copied(ours), theirs)


@KERNELS
@pytest.mark.parametrize("bins", [64, 128])
def test_sketches_are_the_cpus(backend: str, bins: int) -> None:
    counts = [[0, 5, 64, 65, 128, 129, 300], [3, 0, 9, 70, 1, 129, 400]]
    theirs, other = (filled_unequally(7, 13, bins, n) for n in counts)
    ours, our_other = copied(theirs, "cuda"), copied(other, "cuda")
    for q in (0.0, 0.3, 0.975, 1.0):
        with chosen(backend):
            found = sketch_quantile(ours.tiles, q)
        for a, b in zip(found, sketch_quantile(theirs.tiles, q), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
    levels = torch.tensor([0.05, 0.5, 0.95, 1.0, 0.3, 0.7, 0.9], dtype=torch.float64)
    with chosen(backend):
        deviance = sketch_deviance_quantile(ours.tiles, levels.to(GPU))
        plain = sketch_histogram(ours.tiles, 1, 6)
    # where a sum meets the level within rounding, the next code (2^-10) is as right
    torch.testing.assert_close(
        deviance.cpu(), sketch_deviance_quantile(theirs.tiles, levels), rtol=1.1e-3, atol=1e-9, equal_nan=True
    )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(plain, sketch_histogram(theirs.tiles, 1, 6), strict=True))
    for tiles, more in ((ours.tiles, our_other.tiles), (theirs.tiles, other.tiles)):
        with chosen(backend):
            sketch_merge_(tiles, more)
            sketch_sort_(tiles)
    assert_same_bits(copied(ours), theirs)


@KERNELS
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_picked_codes_and_states_without_histograms_are_the_cpus(backend: str, rows: int, classes: int) -> None:
    theirs = empty_state(rows, classes, 64, histogram=False)
    ours = empty_state(rows, classes, 64, GPU, histogram=False)
    generator = torch.Generator().manual_seed(classes)
    picked = torch.randint(classes, (rows, 3), generator=generator).int()
    for draws in (64, 7):
        ids = torch.randperm(rows, generator=generator)[: rows - 1]
        logits = logits_of(draws, rows, classes, seed=draws)[:, ids]
        expected = predictive_update_(theirs, logits, ids, picked=picked)
        with chosen(backend):
            found = predictive_update_(ours, logits.to(GPU), ids, picked=picked.to(GPU))
        assert torch.equal(found.valid.cpu(), expected.valid)
        codes = found.codes.cpu()[expected.valid].int() - expected.codes[expected.valid]
        assert int(codes.abs().max()) <= (backend == "triton")
    if backend == "cuda":
        assert_same_bits(copied(ours), theirs)
    else:
        assert_moments_close(copied(ours), theirs)


@KERNELS
@pytest.mark.parametrize("bins", [64, 128])
@pytest.mark.parametrize("row_cells", [1, 2, 17, 64, 150])
def test_codes_go_into_tiles_to_the_cpus_bits(backend: str, row_cells: int, bins: int) -> None:
    rows, generator = 90, torch.Generator().manual_seed(row_cells)
    theirs, ours = empty_tiles(rows, row_cells, bins), empty_tiles(rows, row_cells, bins, GPU)
    for draws in (1, 60, 7, 64, 30, 64):
        ids = torch.randperm(rows, generator=generator)[:70].sort().values
        spread = 10 ** torch.randint(1, 5, (row_cells,), generator=generator)
        codes = (spread * torch.randn(draws, 70, row_cells, generator=generator)).round().clamp(-32768, 32767)
        codes, valid = codes.to(torch.int16), torch.rand(draws, 70, generator=generator) > 0.2
        mask = None if draws == 7 else valid
        order = torch.cat([ids, torch.tensor([rows])])  # whose last row is left out, which a GPU does not look at
        sketch_update_(theirs, codes, mask, ids)
        padded = [torch.cat([x, x[:, :1]], 1).to(GPU) for x in (codes, valid)]
        on_gpu = order.to(GPU)
        with chosen(backend), nothing_waits():
            sketch_update_(ours, padded[0], None if mask is None else padded[1], on_gpu)
    assert_same_tiles(tiles_on(ours, torch.device("cpu")), theirs)


@dataclass
class FakeDraw:
    model: nn.Module
    index: int
    run: int = 11
    chain: int = 2

    def snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


@KERNELS
def test_updates_wait_for_nothing(backend: str) -> None:
    model = nn.Linear(3, 10).to(GPU)
    inputs, ids = torch.randn(64, 3), torch.arange(64)
    loader = [(inputs[:40].pin_memory(), ids[:40]), (inputs[40:].pin_memory(), ids[40:])]
    on_gpu = [(x.to(GPU), rows.to(GPU)) for x, rows in loader]
    logits, index = torch.randn(4, 64, 10), count()
    posterior = PosteriorPredictive(64, 10, device="cuda")
    with chosen(backend):
        posterior.update_logits(logits)  # compiles; allocates
        for waits in (False, True):
            with nothing_waits() if waits else warnings.catch_warnings():
                posterior.update_logits(logits.to(GPU, non_blocking=True))
                posterior.update_logits(logits.to(GPU, non_blocking=True)[:, :40], ids[:40].to(GPU, non_blocking=True))
                posterior.update_logits(logits.to(GPU, non_blocking=True)[:, :40], ids[:40])
                for batches in (loader, on_gpu):
                    for _ in range(3):
                        posterior.update(FakeDraw(model, next(index)), batches, rows="last")
                    posterior.flush()
        assert posterior.counts.tolist() == [40] * 40 + [24] * 24
        assert not posterior.invalid_counts.any()


def test_row_ids_on_the_gpu_are_recorded() -> None:
    posterior = PosteriorPredictive(5, 3, device="cuda")
    logits = torch.randn(2, 4, 3)
    with nothing_waits():
        posterior.update_logits(
            logits.to(GPU, non_blocking=True), torch.tensor([4, 7, 0, 0]).to(GPU, non_blocking=True)
        )
    with pytest.raises(
        ValueError, match=r"3 row ids of earlier updates were left out, rows holds 0: must be in 0 .. 4"
    ):
        _ = posterior.mean
    assert posterior.counts.tolist() == [0, 0, 0, 0, 2]
    torch.testing.assert_close(posterior.mean[4].cpu(), logits[:, 0].softmax(-1).mean(0))
    for ids, message in (([5, 0, 1, 2], "rows holds 5"), ([1, 1, 2, 3], "rows holds 1 twice")):
        with pytest.raises(ValueError, match=message):  # at once, where the host can see them
            posterior.update_logits(logits, torch.tensor(ids))
    assert posterior.streams[0][1] == (0, 2)


def test_the_warning_of_invalid_rows_comes_with_a_result() -> None:
    posterior = PosteriorPredictive(5, 3, device="cuda")
    logits = torch.zeros(5, 3)
    logits[2, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.update_logits(logits)
    with pytest.warns(BKDFastWarning, match="logits of rows 2 hold NaN"):
        assert posterior.counts.tolist() == [1, 1, 0, 1, 1]
    assert posterior.invalid_counts.tolist() == [0, 0, 1, 0, 0]


def filled(device: str, logits: Tensor, chain: int) -> PosteriorPredictive:
    posterior = PosteriorPredictive(*logits.shape[1:], stream=(1, chain), device=device)
    for piece in logits.split(32):
        posterior.update_logits(piece)
    return posterior


def results(posterior: PosteriorPredictive) -> dict[str, Tensor]:
    lower, upper = posterior.quantile_bounds(0.9)
    names = ("mean", "variance", "expected_entropy", "predictive_entropy", "mutual_information", "mean_deviance")
    return {
        **{name: getattr(posterior, name) for name in names},
        "quantile": posterior.quantile(0.3),
        "lower": lower,
        "upper": upper,
        "deviance": posterior.deviance_upper(0.95),
    }


def test_results_are_on_the_device_and_the_cpus() -> None:
    logits = logits_of(100, 9, 7, seed=2, invalid=False)
    ours, theirs = filled("cuda", logits, 0), filled("cpu", logits, 0)
    for (name, a), b in zip(results(ours).items(), results(theirs).values(), strict=True):
        assert a.device.type == "cuda" and a.dtype == torch.float32
        torch.testing.assert_close(a.cpu(), b, rtol=2e-5, atol=1e-7, equal_nan=True, msg=name)


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_merges_across_devices(devices: tuple[str, str]) -> None:
    logits = logits_of(150, 9, 7, seed=3, invalid=False)
    whole = filled("cpu", logits, 0)
    posterior, other = filled(devices[0], logits[:70], 0), filled(devices[1], logits[70:], 1)
    posterior.merge_(other)
    assert posterior.device.type == devices[0] and other.counts.tolist() == [80] * 9
    ours, theirs = posterior.state_dict(), whole.state_dict()
    for name in ("counters", "minimum", "maximum", "counts"):
        bits = [state[name].cpu().view(torch.uint8)[..., : 2 * 63] for state in (ours, theirs)]  # not the padding
        assert torch.equal(*bits), name
    for (name, a), b in zip(results(posterior).items(), results(whole).values(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-4, atol=1e-7, equal_nan=True, msg=name)


def test_states_are_saved_and_loaded_across_devices() -> None:
    logits = logits_of(100, 9, 7, seed=4, invalid=False)
    ours = filled("cuda", logits, 0)
    saved = ours.state_dict()
    for device in ("cpu", "cuda"):
        loaded = PosteriorPredictive(9, 7, device=device)
        loaded.load_state_dict(saved)
        for name, value in loaded.state_dict().items():
            if isinstance(value, Tensor):
                assert torch.equal(value.cpu().view(torch.uint8), saved[name].cpu().view(torch.uint8)), name
            else:
                assert value == saved[name]
        assert loaded.streams == ours.streams
        loaded.update_logits(logits[:1])
        assert loaded.streams == [((1, 0), (0, 101))]


def test_the_limit_of_draws_holds() -> None:
    posterior = PosteriorPredictive(2, 3, device="cuda")
    logits = torch.zeros(65_535, 1, 3, device=GPU)
    for row in range(2):
        posterior.update_logits(logits, torch.tensor([row]))
    with pytest.raises(ValueError, match="65536 draws in one row"):
        posterior.update_logits(logits[:1], torch.tensor([1]))
    assert posterior.counts.tolist() == [65_535] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    logits = logits_of(80, 9, 7, seed=5, invalid=False)
    ours, theirs = filled("cuda:1", logits, 0), filled("cpu", logits, 0)
    assert ours.mean.device == torch.device("cuda:1")
    torch.testing.assert_close(ours.mean.cpu(), theirs.mean)
