"""PosteriorPredictive's results against float64, its merging and saving, its warnings and refusals."""

import numpy as np
import pytest
import torch
from predictive_data import exact, stream
from torch import Tensor

from bkd_fast.errors import BKDFastWarning
from bkd_fast.ops import use_backend
from bkd_fast.posterior.predictive import PosteriorPredictive


def filled(logits: Tensor, window: int = 32, stream_id: tuple[int, int] = (1, 0)) -> PosteriorPredictive:
    posterior = PosteriorPredictive(*logits.shape[1:], stream=stream_id)
    for piece in logits.split(window):
        posterior.update_logits(piece)
    return posterior


def entropies(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


@pytest.mark.parametrize("kind", ["iid", "ar.99", "sorted", "bimodal", "constant", "outliers", "masked", "huge"])
@pytest.mark.parametrize("window", [1, 8, 32, 1000])
def test_moments_and_entropies_against_float64(kind: str, window: int) -> None:
    logits = stream(kind, 300, 6, 12, seed=window)
    posterior = filled(logits, window)
    p, _ = exact(logits)
    # an exponent's rounding: logits of 10^4 are exact in float32, their differences to 2^-14
    tolerance = 2e-3 if kind == "huge" else 2e-6
    torch.testing.assert_close(posterior.mean.numpy(), p.mean(0).astype(np.float32), rtol=tolerance, atol=2e-9)
    variance = p.var(0, ddof=1)
    ours = posterior.variance.numpy()
    # relative to the variance, except where the draws' own float32 rounding (6e-8 of p) is all the variance there is
    floor = ((2e-7 * p.max(0)) ** 2).max() + 1e-12 * (kind == "huge")
    np.testing.assert_allclose(ours, variance, rtol=max(1e-5, 2 * tolerance), atol=floor)
    np.testing.assert_allclose(posterior.expected_entropy, entropies(p).mean(0), rtol=tolerance, atol=2e-7)
    np.testing.assert_allclose(posterior.mean_deviance, 2 * entropies(p).mean(0), rtol=tolerance, atol=4e-7)
    np.testing.assert_allclose(posterior.predictive_entropy, entropies(p.mean(0)), rtol=tolerance, atol=2e-7)
    assert posterior.counts.tolist() == [300] * 6
    for result in (posterior.mean, posterior.variance, posterior.expected_entropy, posterior.mutual_information):
        assert result.dtype == torch.float32


@pytest.mark.parametrize("classes", [10, 300])
@pytest.mark.parametrize("spread", [1.0, 0.1, 0.01, 0.003])
@pytest.mark.parametrize("merged", [False, True])
def test_mutual_information_of_tight_posteriors(classes: int, spread: float, merged: bool) -> None:
    """Down to about 1e-6 nats, where H[mean] - E[H] in float32 has no correct digit."""
    generator = torch.Generator().manual_seed(classes)
    center = 2 * torch.randn(12, classes, generator=generator)
    logits = center + spread * torch.randn(512, 12, classes, generator=generator)
    p = logits.double().softmax(-1).numpy()
    mean = p.mean(0)
    truth = (p * (np.log(p) - np.log(mean))).sum(-1).mean(0)  # float64: about 1e-10 of it
    if merged:  # with other references on both sides
        posterior, other = filled(logits[:200]), filled(logits[200:], stream_id=(2, 0))
        other.merge_(posterior)
        posterior = other
    else:
        posterior = filled(logits)
    if spread == 0.003:
        assert truth.min() > 1e-7 and truth.max() < 1e-5
    relative = np.abs(posterior.mutual_information.numpy() / truth - 1).max()
    assert relative < (1e-4 if spread > 0.005 else 1e-3)


@pytest.mark.parametrize(("kind", "bar"), [("iid", 0.015), ("ar.9", 0.015), ("ar.99", 0.015), ("bimodal", 0.04)])
def test_deviance_upper_against_the_exact_weighted_quantile(kind: str, bar: float) -> None:
    logits = stream(kind, 1000, 30, 10, seed=3)
    posterior = filled(logits)
    p, _ = exact(logits)
    errors = []
    for level in (0.5, 0.8, 0.95):
        ours = posterior.deviance_upper(level).numpy()
        for r in range(30):
            weight = np.sort(p[:, r].ravel())[::-1]
            truth = -2 * np.log(weight[np.searchsorted(weight.cumsum() / weight.sum(), level)])
            errors.append(abs(ours[r] - truth))
    assert np.mean(errors) < bar


def test_deviance_upper_of_few_draws_is_exact() -> None:
    logits = stream("iid", 50, 20, 5, seed=4)
    p, _ = exact(logits)
    ours = filled(logits).deviance_upper(0.95).numpy()
    for r in range(20):
        weight = np.sort(p[:, r].ravel())[::-1]
        truth = -2 * np.log(weight[np.searchsorted(weight.cumsum() / weight.sum(), 0.95)])
        assert abs(ours[r] - truth) <= 2 * 2**-11 + 1e-5


def test_the_reference_backend_gives_the_same_results() -> None:
    logits = stream("ar.9", 150, 9, 6, seed=5)
    ours = filled(logits)
    names = ("mean", "variance", "mutual_information", "predictive_entropy")
    with use_backend("reference"):
        oracle = filled(logits)
        expected = [*oracle.interval(0.9), *(getattr(oracle, name) for name in names), oracle.deviance_upper(0.95)]
    actual = [*ours.interval(0.9), *(getattr(ours, name) for name in names), ours.deviance_upper(0.95)]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)


def test_interval_and_quantile_ends() -> None:
    posterior = filled(stream("iid", 500, 4, 5, seed=6))
    lower, upper = posterior.interval(0.9)
    assert torch.equal(lower, posterior.quantile(0.04999999999999999)) and torch.equal(upper, posterior.quantile(0.95))
    assert (lower < posterior.quantile(0.5)).all() and (posterior.quantile(0.5) < upper).all()


def test_masked_classes_are_zero() -> None:
    logits = torch.randn(200, 3, 4, generator=torch.Generator().manual_seed(0))
    logits[:, :, 2] = -torch.inf
    posterior = filled(logits)
    for result in (posterior.mean, posterior.variance, posterior.quantile(0.9)):
        assert not result[:, 2].any()
    lower, upper = posterior.quantile_bounds(0.5)
    assert not lower[:, 2].any() and (upper[:, 2] < 2e-14).all()
    assert posterior.mutual_information.isfinite().all() and posterior.predictive_entropy.isfinite().all()


def test_rows_without_draws_are_nan() -> None:
    posterior = PosteriorPredictive(5, 3)
    posterior.update_logits(torch.randn(1, 2, 3), torch.tensor([3, 1]))
    assert posterior.counts.tolist() == [0, 1, 0, 1, 0]
    empty = [0, 2, 4]
    for result in (
        posterior.mean, posterior.quantile(0.5), *posterior.quantile_bounds(0.5), posterior.expected_entropy,
        posterior.predictive_entropy, posterior.mutual_information, posterior.mean_deviance,
        posterior.deviance_upper(0.9),
    ):  # fmt: skip
        assert result[empty].isnan().all() and not result[[1, 3]].isnan().any()
    assert posterior.variance.isnan().all()  # n - 1 = 0


def test_invalid_rows_are_left_out_counted_and_warned_about_once() -> None:
    logits = torch.randn(40, 9, 4, generator=torch.Generator().manual_seed(1))
    spoiled = logits.clone()
    spoiled[3, 2, 0], spoiled[5, 2, 1], spoiled[5, 7] = torch.nan, torch.inf, -torch.inf
    posterior = PosteriorPredictive(9, 4)
    with pytest.warns(BKDFastWarning, match="logits of rows 2, 7 hold NaN or .inf, or are all -inf") as caught:
        posterior.update_logits(spoiled[:20])
        posterior.update_logits(spoiled[:20] * torch.nan)
    assert len(caught) == 1
    assert posterior.counts.tolist() == [20, 20, 18, 20, 20, 20, 20, 19, 20]
    assert posterior.invalid_counts.tolist() == [20, 20, 22, 20, 20, 20, 20, 21, 20]
    kept = torch.ones(20, dtype=torch.bool)
    kept[[3, 5]] = False
    torch.testing.assert_close(posterior.mean[2], logits[:20][kept][:, 2].softmax(-1).mean(0))


def test_many_invalid_rows_are_named_in_part() -> None:
    posterior = PosteriorPredictive(9, 4)
    with pytest.warns(BKDFastWarning, match="rows 0, 1, 2, 3, 4 and 4 more"):
        posterior.update_logits(torch.full((9, 4), torch.nan))


def test_dtypes() -> None:
    logits = torch.randn(30, 5, 4, generator=torch.Generator().manual_seed(2)).half()
    single = filled(logits.float())
    for dtype in (torch.float16, torch.float64):
        other = filled(logits.to(dtype))
        assert torch.equal(single.mean, other.mean) and torch.equal(single.quantile(0.3), other.quantile(0.3))
    posterior = PosteriorPredictive(5, 4)
    with pytest.warns(BKDFastWarning, match="logits are bfloat16") as caught:
        posterior.update_logits(logits.bfloat16())
        posterior.update_logits(logits.bfloat16())
    assert len(caught) == 1
    strided = PosteriorPredictive(5, 4, stream=(1, 0))
    strided.update_logits(logits.float().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_())
    torch.testing.assert_close(strided.mean, single.mean)


def test_merging_with_rows_and_draws_that_differ() -> None:
    logits = stream("iid", 100, 8, 5, seed=7)
    whole = filled(logits)
    left = PosteriorPredictive(8, 5, stream=(1, 0))
    right = PosteriorPredictive(8, 5, stream=(0, 3))
    left.update_logits(logits[:70, :6], torch.arange(6))
    right.update_logits(logits[70:, :6], torch.arange(6))
    right.update_logits(logits[:, 6:], torch.tensor([6, 7]))
    before = right.state_dict()
    left.merge_(right)
    assert_unchanged(right, before)
    assert left.counts.tolist() == [100] * 8
    assert left.streams == [((0, 3), (0, 100)), ((1, 0), (0, 70))]
    for name in ("mean", "variance", "expected_entropy", "mutual_information"):
        torch.testing.assert_close(getattr(left, name), getattr(whole, name), rtol=2e-5, atol=1e-7)
    assert torch.equal(left.quantile(0.3), whole.quantile(0.3))


def assert_unchanged(posterior: PosteriorPredictive, before: dict[str, Tensor | int]) -> None:
    for name, value in posterior.state_dict().items():
        old = before[name]
        if isinstance(value, Tensor):
            assert torch.equal(value.view(torch.uint8), old.view(torch.uint8)), name
        else:
            assert value == old, name


def test_merge_refuses_what_it_would_count_twice() -> None:
    posterior = filled(torch.randn(10, 3, 4), stream_id=(7, 1))
    copied = PosteriorPredictive(3, 4)
    copied.load_state_dict(posterior.state_dict())
    before = posterior.state_dict()
    refusals = [
        (posterior, ValueError, r"draws 0 .. 9 of stream \(run 7, chain 1\) are already in this posterior"),
        (copied, ValueError, "already in this posterior"),
        (PosteriorPredictive(4, 4), ValueError, "other has num_rows = 4: must be 3"),
        (PosteriorPredictive(3, 5), ValueError, "other has num_classes = 5: must be 4"),
        (PosteriorPredictive(3, 4, bins=128), ValueError, "other has bins = 128: must be 64"),
        ("posterior", TypeError, "other is a str"),
    ]
    for other, error, message in refusals:
        with pytest.raises(error, match=message):
            posterior.merge_(other)
        assert_unchanged(posterior, before)
    other = filled(torch.randn(10, 3, 4), stream_id=(7, 2))
    posterior.merge_(other)
    with pytest.raises(ValueError, match="already"):
        posterior.merge_(other)
    assert posterior.counts.tolist() == [20] * 3


def test_pooled_draws_are_guarded() -> None:
    posterior, other = (filled(torch.randn(n, 2, 3), 40000, (n, 0)) for n in (40000, 25536))
    before = posterior.state_dict()
    with pytest.raises(ValueError, match="65536 draws in one row"):
        posterior.merge_(other)
    with pytest.raises(ValueError, match="65536 draws in one row"):
        posterior.update_logits(torch.randn(25536, 2, 3))
    assert_unchanged(posterior, before)
    posterior.update_logits(torch.randn(25535, 2, 3))
    assert posterior.counts.tolist() == [65535] * 2
    p_sum = posterior.state_dict()["counters"].to(torch.int64)[0, :, :6].sum(0)
    assert p_sum.tolist() == [65535] * 6


def test_state_survives_safetensors(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    posterior = filled(torch.randn(70, 3, 4))
    state = posterior.state_dict()
    save_file({k: v for k, v in state.items() if isinstance(v, Tensor)}, tmp_path / "state.safetensors")
    loaded = {**state, **load_file(tmp_path / "state.safetensors")}
    again = PosteriorPredictive(3, 4)
    again.load_state_dict(loaded)
    assert_unchanged(again, state)
    assert again.streams == posterior.streams


def test_state_dict_is_a_copy() -> None:
    posterior = filled(torch.randn(70, 3, 4))
    state, mean = posterior.state_dict(), posterior.mean
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()
    assert torch.equal(posterior.mean, mean)


def test_load_refuses_other_states() -> None:
    posterior = filled(torch.randn(70, 3, 4))
    before = posterior.state_dict()
    missing = {k: v for k, v in before.items() if k != "m2"}
    cases = [
        (missing, "state lacks m2"),
        ({**before, "version": 2}, "state has version = 2: must be 1"),
        ({**before, "bins": 128}, "state has bins = 128: must be 64"),
        ({**before, "num_rows": 5}, "state has num_rows = 5: must be 3"),
        ({**before, "mean": before["mean"].double()}, "state has mean: torch.float64"),
        ({**before, "counts": before["counts"][:2]}, r"counts: torch.int32 \(2,\): must be torch.int32 \(3,\)"),
        ({**before, "entropy": 3}, "state has entropy: int"),
        ({**before, "streams": torch.tensor([[1, 0, 5, 5]])}, r"interval \[5, 5\)"),
        ({**before, "streams": torch.tensor([[1, 0, 0, 5], [1, 0, 4, 6]])}, "already in this posterior"),
        ({**before, "streams": torch.tensor([1])}, r"streams have shape \(1,\)"),
        ({**before, "chain": -1}, "stream has chain = -1"),
    ]
    for state, message in cases:
        with pytest.raises(ValueError, match=message):
            posterior.load_state_dict(state)
        assert_unchanged(posterior, before)


@pytest.mark.parametrize(
    ("logits", "rows", "error", "message"),
    [
        (torch.zeros(3, 5), None, ValueError, r"logits have shape \(3, 5\): must be \(rows, 4\)"),
        (torch.zeros(4), None, ValueError, "logits have shape"),
        (torch.zeros(3, 4, dtype=torch.int64), None, TypeError, "logits have dtype torch.int64"),
        (torch.zeros(3, 4, dtype=torch.complex64), None, TypeError, "logits have dtype torch.complex64"),
        (torch.zeros(2, 4), None, ValueError, "2 rows and rows = None: must be all 3 rows"),
        (torch.zeros(2, 4), torch.tensor([0, 0]), ValueError, "rows holds 0 twice"),
        (torch.zeros(2, 4), torch.tensor([0, 3]), ValueError, "rows holds 3: must be in 0 .. 2"),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), ValueError, "rows holds -1: must be in 0 .. 2"),
        (torch.zeros(2, 4), torch.tensor([0.0, 1.0]), TypeError, "rows has dtype torch.float32"),
        (torch.zeros(2, 4), torch.tensor([[0, 1]]), ValueError, "rows has shape"),
    ],
)
def test_bad_logits_change_nothing(logits: Tensor, rows: Tensor | None, error: type[Exception], message: str) -> None:
    posterior = filled(torch.randn(5, 3, 4))
    before = posterior.state_dict()
    with pytest.raises(error, match=message):
        posterior.update_logits(logits, rows)
    assert_unchanged(posterior, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.quantile(1.5), r"q = 1.5: must be in \[0, 1\]"),
        (lambda p: p.quantile_bounds(-0.5), "q = -0.5"),
        (lambda p: p.interval(1.0), r"level = 1.0: must be in \(0, 1\)"),
        (lambda p: p.interval(float("nan")), "level = nan"),
        (lambda p: p.deviance_upper(0.0), "level = 0.0"),
        (lambda p: PosteriorPredictive(3, 4, stream=(-1, 0)), "run = -1"),
        (lambda p: PosteriorPredictive(3, 4, stream=(2**64, 0)), "run = 18446744073709551616"),
        (lambda p: PosteriorPredictive(3, 4, bins=32), "bins = 32"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(filled(torch.randn(5, 3, 4)))


def test_random_runs_merge_and_draws_are_numbered() -> None:
    a, b = PosteriorPredictive(4, 3), PosteriorPredictive(4, 3)
    for posterior in (a, b):
        for rows in (torch.tensor([0, 1]), torch.tensor([2, 3])):
            posterior.update_logits(torch.randn(6, 2, 3), rows)
        posterior.update_logits(torch.randn(4, 3))
    assert [interval for _, interval in a.streams] == [(0, 7)]
    a.merge_(b)
    assert len(a.streams) == 2 and a.counts.tolist() == [14] * 4


def test_the_limit_is_of_a_row_not_of_all_that_was_offered() -> None:
    posterior = PosteriorPredictive(3, 2)
    logits = torch.zeros(30_000, 1, 2)
    for row in range(3):  # together more than a row may hold
        posterior.update_logits(logits, torch.tensor([row]))
    posterior.update_logits(logits, torch.tensor([0]))
    posterior.update_logits(logits[:5535], torch.tensor([0]))
    before = posterior.state_dict()
    with pytest.raises(ValueError, match="65536 draws in one row"):
        posterior.update_logits(logits[:1], torch.tensor([0]))
    assert_unchanged(posterior, before)
    posterior.update_logits(logits[:1], torch.tensor([1]))
    assert posterior.counts.tolist() == [65_535, 30_001, 30_000]
    assert [interval for _, interval in posterior.streams] == [(0, 65_535)]


def test_own_draws_that_came_by_a_merge_are_not_given_again() -> None:
    """Numbers are looked up only when a bound meets what is held: the answer is that of looking always."""
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    saved = filled(logits, stream_id=(7, 0)).state_dict()
    saved["streams"] = torch.tensor([[7, 0, 4, 7]])  # draws 4 .. 6
    saved["run"], saved["offered"] = 8, torch.zeros(4, dtype=torch.int32)
    other = PosteriorPredictive(4, 5)
    other.load_state_dict(saved)

    posterior = PosteriorPredictive(4, 5, stream=(7, 0))
    posterior.merge_(other)
    for rows in (torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([3])):  # a bound would be 2, 4, 6
        posterior.update_logits(logits[:2, : len(rows)], rows)
    posterior.update_logits(logits[:2])
    assert [interval for _, interval in posterior.streams] == [(0, 7)]
    before = posterior.state_dict()
    with pytest.raises(ValueError, match=r"draws 4 .. 4 of stream \(run 7, chain 0\) are already"):
        posterior.update_logits(logits[:1])
    assert_unchanged(posterior, before)


def test_results_live_where_the_state_does() -> None:
    posterior = PosteriorPredictive(3, 4, device="cpu")
    assert posterior.device == torch.device("cpu")
    with torch.device("meta"):
        assert PosteriorPredictive(3, 4).device.type == "meta"  # torch's default device
