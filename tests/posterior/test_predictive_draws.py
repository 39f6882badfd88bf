"""update(draw, loader): buffered snapshots against direct evaluation, modes restored, unfit loaders refused."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from bkd_fast.posterior.predictive import PosteriorPredictive

ROWS, CLASSES = 22, 4


@dataclass
class FakeDraw:
    model: nn.Module
    index: int
    run: int = 11
    chain: int = 2

    def snapshot(self) -> dict[str, Tensor]:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in named}


def network() -> nn.Sequential:
    """With BatchNorm, whose buffers differ between draws, and dropout, which eval mode must silence."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def jitter(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model[1].running_mean += 0.1 * torch.randn(8, generator=generator)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(5))


def direct(model: nn.Module, x: Tensor) -> Tensor:
    modes = [m.training for m in model.modules()]
    model.eval()
    with torch.no_grad():
        logits = model(x)
    for m, training in zip(model.modules(), modes, strict=True):
        m.training = training
    return logits


@pytest.mark.parametrize("draws", [3, 32, 75])
def test_equals_direct_evaluation(x: Tensor, draws: int) -> None:
    model, posterior = network(), PosteriorPredictive(ROWS, CLASSES)
    model[0].eval()  # an odd mode, to be found again
    modes = [m.training for m in model.modules()]
    loader = DataLoader(TensorDataset(x, torch.arange(ROWS)), batch_size=5)
    logits = []
    for index in range(draws):
        jitter(model, index)
        posterior.update(FakeDraw(model, index), loader)
        logits.append(direct(model, x))
        assert [m.training for m in model.modules()] == modes
    expected = PosteriorPredictive(ROWS, CLASSES)
    expected.update_logits(torch.stack(logits))
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.variance, expected.variance, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(posterior.quantile(0.3), expected.quantile(0.3), rtol=2e-2, atol=1e-3)
    assert posterior.counts.tolist() == [draws] * ROWS
    assert posterior.streams == [((11, 2), (0, draws))]
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def test_evaluates_when_32_wait_or_a_result_is_asked_for(x: Tensor) -> None:
    calls = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    model, posterior = Counting(3, CLASSES), PosteriorPredictive(ROWS, CLASSES)
    loader = [x[:20], x[20:]]
    for index in range(31):
        posterior.update(FakeDraw(model, index), loader)
    assert not calls
    posterior.update(FakeDraw(model, 31), loader)
    assert calls == [20] * 32 + [2] * 32
    index = 31
    for ask in (
        lambda p: p.mean, lambda p: p.variance, lambda p: p.counts, lambda p: p.invalid_counts,
        lambda p: p.quantile(0.5), lambda p: p.quantile_bounds(0.5), lambda p: p.interval(0.9),
        lambda p: p.deviance_upper(0.9), lambda p: p.state_dict(), lambda p: p.expected_entropy,
        lambda p: p.predictive_entropy, lambda p: p.mutual_information,
        lambda p: p.mean_deviance, lambda p: p.merge_(PosteriorPredictive(ROWS, CLASSES)),
        lambda p: PosteriorPredictive(ROWS, CLASSES).merge_(p), lambda p: p.streams, repr,
        lambda p: p.update_logits(torch.zeros(ROWS, CLASSES)),
    ):  # fmt: skip
        calls.clear()
        index += 1
        posterior.update(FakeDraw(model, index), loader)
        assert not calls
        ask(posterior)
        assert calls == [20, 2]


def test_batches_of_every_form(x: Tensor) -> None:
    model = nn.Linear(3, CLASSES)
    means = []
    ids = torch.arange(ROWS)
    order = torch.randperm(ROWS)
    for loader, rows in (
        ([x[:20], x[20:]], "order"),
        ([(x[:20],), [x[20:]]], "order"),
        ([(x, ids, "more")], "order"),
        (DataLoader(TensorDataset(x, torch.zeros(ROWS), ids), batch_size=4, shuffle=True), "last"),
        ([(x[order], order)], "last"),
    ):
        posterior = PosteriorPredictive(ROWS, CLASSES)
        posterior.update(FakeDraw(model, 0), loader, rows=rows)
        means.append(posterior.mean)
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0])


def test_what_is_not_in_the_snapshot_stays_as_in_the_model(x: Tensor) -> None:
    model, posterior = nn.Linear(3, CLASSES), PosteriorPredictive(ROWS, CLASSES)

    class BiasOnly(FakeDraw):
        def snapshot(self) -> dict[str, Tensor]:
            return {"bias": torch.zeros(CLASSES)}

    posterior.update(BiasOnly(model, 0), [x])
    expected = (x @ model.weight.T).softmax(-1)
    torch.testing.assert_close(posterior.mean, expected.detach())


def test_another_loader_model_or_row_order_evaluates_what_waits(x: Tensor) -> None:
    first, second = nn.Linear(3, CLASSES), nn.Linear(3, CLASSES)
    posterior, loader = PosteriorPredictive(ROWS, CLASSES), [x]
    posterior.update(FakeDraw(first, 0), loader)
    posterior.update(FakeDraw(second, 1), loader)
    posterior.update(FakeDraw(second, 2), [x[:20], x[20:]])
    posterior.update(FakeDraw(second, 3), [(x, torch.arange(ROWS))], rows="last")
    expected = torch.stack([(m(x)).softmax(-1) for m in (first, second, second, second)]).mean(0)
    torch.testing.assert_close(posterior.mean, expected.detach())


def test_a_draw_counts_once(x: Tensor) -> None:
    model, posterior = nn.Linear(3, CLASSES), PosteriorPredictive(ROWS, CLASSES)
    loader = [x]
    posterior.update(FakeDraw(model, 0), loader)
    with pytest.raises(ValueError, match="already in this posterior"):
        posterior.update(FakeDraw(model, 0), loader)
    with pytest.raises(ValueError, match=r"draws 0 .. 0 of stream \(run 11, chain 2\) are already in this posterior"):
        posterior.update(FakeDraw(model, 0), [x])  # while it waits, by another loader
    assert posterior.counts.tolist() == [1] * ROWS
    with pytest.raises(ValueError, match="already in this posterior"):
        posterior.update(FakeDraw(model, 0), [x])
    posterior.update(FakeDraw(model, 0, chain=3), [x])
    posterior.update(FakeDraw(model, 0, run=12), [x])
    assert posterior.counts.tolist() == [3] * ROWS


class Endless(IterableDataset):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x)


def test_loaders_whose_order_says_nothing_are_refused(x: Tensor) -> None:
    data = TensorDataset(x)
    model, posterior = nn.Linear(3, CLASSES), PosteriorPredictive(ROWS, CLASSES)

    class Own(BatchSampler):
        pass

    cases: list[tuple[Any, str]] = [
        (DataLoader(data, batch_size=4, shuffle=True), "RandomSampler.*rows='last'"),
        (DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(ROWS))), "SubsetRandomSampler"),
        (DataLoader(data, batch_sampler=Own(SequentialSampler(data), 4, False)), "Own"),
        (DataLoader(data, batch_size=None, shuffle=True), "RandomSampler"),
        (DataLoader(data, batch_size=4, drop_last=True), "20 examples: must have num_rows = 22"),
        (DataLoader(TensorDataset(x[:7]), batch_size=4), "7 examples"),
    ]
    for loader, message in cases:
        with pytest.raises(ValueError, match=message):
            posterior.update(FakeDraw(model, 0), loader)
    with pytest.raises(ValueError, match="rows = 'first': must be 'order' or 'last'"):
        posterior.update(FakeDraw(model, 0), [x], rows="first")
    assert not posterior.counts.any() and not posterior.streams
    for loader in (DataLoader(data, batch_size=4), DataLoader(Endless(x), batch_size=4)):
        posterior.update(FakeDraw(model, int(posterior.counts[0])), loader)
    assert posterior.counts.tolist() == [2] * ROWS


def test_what_only_reading_shows_is_raised_then(x: Tensor) -> None:
    ids = torch.arange(ROWS)
    cases: list[tuple[nn.Module, Any, str, type[Exception], str]] = [
        (nn.Linear(3, CLASSES), [torch.cat([x, x])], "order", ValueError, "more than num_rows = 22 rows"),
        (nn.Linear(3, CLASSES), ["text"], "order", TypeError, "loader yields str"),
        (nn.Linear(3, CLASSES), [{"x": x}], "order", TypeError, "loader yields dict"),
        (nn.Linear(3, CLASSES), [x], "last", ValueError, "last element is not int64 row ids"),
        (nn.Linear(3, CLASSES), [(x, ids.float())], "last", ValueError, "last element is not int64 row ids"),
        (nn.Linear(3, CLASSES), [(x, ids + 1)], "last", ValueError, "rows holds 22"),
        (nn.Linear(3, CLASSES), [(x, ids * 0)], "last", ValueError, "rows holds 0 twice"),
        (nn.Linear(3, CLASSES + 1), [x], "order", ValueError, r"shape \(22, 5\): must be \(22, 4\)"),
        (nn.LSTM(3, CLASSES), [x], "order", TypeError, "model returns tuple"),
    ]
    for model, loader, rows, error, message in cases:
        posterior = PosteriorPredictive(ROWS, CLASSES)
        model.train()
        posterior.update(FakeDraw(model, 0), loader, rows=rows)
        with pytest.raises(error, match=message):
            posterior.flush()
        assert not posterior.counts.any() and not posterior.streams and model.training


def test_a_failure_half_way_says_what_was_taken(x: Tensor) -> None:
    posterior, model = PosteriorPredictive(ROWS, CLASSES), nn.Linear(3, CLASSES)
    posterior.update(FakeDraw(model, 0), [x[:20]])
    with pytest.raises(ValueError, match="loader yielded 20 rows: must be num_rows = 22") as caught:
        posterior.flush()
    assert caught.value.__notes__ == ["20 rows had taken these 1 draws; the others lack them"]
    assert posterior.counts.tolist() == [1] * 20 + [0, 0] and posterior.streams == [((11, 2), (0, 1))]
