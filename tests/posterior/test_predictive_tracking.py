"""Sketches of chosen classes: equal to the whole sketch's, chosen before the first draw, saved, and the same in a merge."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from predictive_data import exact, stream
from torch import Tensor, nn

from bkd_fast.errors import BKDFastWarning
from bkd_fast.posterior.predictive import PosteriorPredictive

ROWS, CLASSES = 13, 11
LOGITS = stream("ar.9", 150, ROWS, CLASSES, seed=1)
LABELS = torch.arange(ROWS) % CLASSES
IDS = torch.stack([torch.randperm(CLASSES, generator=torch.Generator().manual_seed(r))[:4] for r in range(ROWS)])


def filled(logits: Tensor = LOGITS, chooses: bool = False, run: int = 1, **settings) -> PosteriorPredictive:
    posterior = PosteriorPredictive(*logits.shape[1:], stream=(run, 0), **settings)
    if chooses:
        posterior.choose_classes_by(LOGITS[0])
    for piece in logits.split(40):
        posterior.update_logits(piece)
    return posterior


def expected_classes(track, labels: Tensor | None) -> Tensor:
    if isinstance(track, Tensor):
        return track
    order = LOGITS[0].argsort(1, descending=True).tolist()
    if track == "label":
        return labels[:, None]
    k = int(track.split(":")[1])
    rows = []
    for r, classes in enumerate(order):
        first = [] if labels is None else [int(labels[r])]
        rows.append(first + [c for c in classes if c not in first][:k])
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("track", "labels"),
    [(IDS, None), ("label", LABELS), ("topk:1", None), ("topk:5", None), ("topk:3", LABELS), ("topk:11", None)],
)
def test_results_are_those_of_the_whole_sketch_at_the_tracked_classes(track, labels: Tensor | None) -> None:
    whole = filled()
    ours = filled(track=track, labels=labels, chooses=isinstance(track, str) and track != "label")
    classes = expected_classes(track, labels)
    assert torch.equal(ours.tracked_classes, classes)
    for name in ("mean", "variance", "expected_entropy", "predictive_entropy", "mutual_information", "counts"):
        assert torch.equal(getattr(ours, name), getattr(whole, name)), name
    for read in (
        lambda p: [p.quantile(q) for q in (0, 0.3, 1)],
        lambda p: p.quantile_bounds(0.2),
        lambda p: p.interval(0.9),
        lambda p: p.highest_density_interval(0.8),
        lambda p: [p.exceedance(0.1), *p.exceedance_bounds(0.1)],
    ):
        for a, b in zip(read(ours), read(whole), strict=True):
            assert torch.equal(a, b.gather(1, classes))


def test_the_deviance_interval_takes_what_is_not_tracked_for_the_least_probable() -> None:
    whole, ours = filled(), filled(track="topk:6", chooses=True)
    p = exact(LOGITS)[0]
    for level in (0.3, 0.5, float(whole.mean.gather(1, ours.tracked_classes).sum(1).min()) - 1e-3):
        found = ours.deviance_upper(level)
        assert (found >= whole.deviance_upper(level) - 0.02).all()
        errors = []
        for r, classes in enumerate(ours.tracked_classes.tolist()):
            weight = np.sort(p[:, r, classes].ravel())[::-1]
            truth = -2 * np.log(weight[np.searchsorted(weight.cumsum(), level * len(p))])
            errors.append(abs(float(found[r]) - truth))
        assert np.mean(errors) < 0.02
    with pytest.raises(
        ValueError, match=r"level = 0.99: the tracked classes of row \d+ hold 0\.\d+ of its mean probability"
    ):
        ours.deviance_upper(0.99)
    everything = filled(track=torch.arange(CLASSES).expand(ROWS, -1))
    assert torch.equal(everything.deviance_upper(1.0), whole.deviance_upper(1.0))


def test_rows_in_batches_and_invalid_draws() -> None:
    logits = stream("invalid", 120, ROWS, CLASSES, seed=2)
    whole, ours = (PosteriorPredictive(ROWS, CLASSES, track=t, stream=(1, 0)) for t in ("all", IDS))
    with pytest.warns(BKDFastWarning):
        for posterior in (whole, ours):
            for rows in torch.randperm(ROWS, generator=torch.Generator().manual_seed(3)).split(4):
                posterior.update_logits(logits[:, rows], rows)
    assert torch.equal(ours.counts, whole.counts) and torch.equal(ours.invalid_counts, whole.invalid_counts)
    assert torch.equal(ours.quantile(0.6), whole.quantile(0.6).gather(1, IDS))


@dataclass
class FakeDraw:
    model: nn.Module
    index: int
    run: int = 11
    chain: int = 0

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}


def test_update_chooses_by_the_first_draw_and_choose_classes_by_any_model() -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(3, CLASSES), nn.Linear(3, CLASSES)
    x = torch.randn(ROWS, 3)
    for chosen_by, choose in ((model, False), (other, True)):
        posterior = PosteriorPredictive(ROWS, CLASSES, track="topk:2")
        if choose:
            posterior.choose_classes(other, [x[:8], x[8:]])
        posterior.update(FakeDraw(model, 0), [x[:8], x[8:]])
        assert torch.equal(posterior.tracked_classes, chosen_by(x).topk(2).indices)
        assert posterior.counts.tolist() == [1] * ROWS
        with pytest.raises(ValueError, match="chosen already"):
            posterior.choose_classes(other, [x])


def test_merging_needs_the_same_classes() -> None:
    a, b = filled(LOGITS[:100], track="topk:3", chooses=True), filled(LOGITS[100:], track="topk:3", chooses=True, run=2)
    whole = filled(track="topk:3", chooses=True)
    a.merge_(b)
    assert torch.equal(a.quantile(0.3), whole.quantile(0.3)) and torch.equal(a.counts, whole.counts)
    for other in (filled(LOGITS[100:], track=IDS[:, :3], run=3), filled(LOGITS[100:], run=3)):
        before = a.counts
        with pytest.raises(ValueError, match="other has other tracked classes"):
            a.merge_(other)
        assert torch.equal(a.counts, before)


def test_saved_states_bring_their_classes() -> None:
    saved = filled(LOGITS[:100], track="topk:3", chooses=True).state_dict()
    loaded = PosteriorPredictive(ROWS, CLASSES, track="topk:3")
    loaded.load_state_dict(saved)
    loaded.update_logits(LOGITS[100:])
    assert torch.equal(loaded.quantile(0.3), filled(track="topk:3", chooses=True).quantile(0.3))
    for other, message in (
        (PosteriorPredictive(ROWS, CLASSES), "state has width = 3: must be 11"),
        (PosteriorPredictive(ROWS, CLASSES, track="topk:2"), "width = 3: must be 2"),
        (PosteriorPredictive(ROWS, CLASSES, track=IDS[:, :3]), "state has other tracked classes"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(saved)
        assert not other.counts.any()


def test_classes_must_be_chosen_before_the_first_draw_of_logits() -> None:
    posterior = PosteriorPredictive(ROWS, CLASSES, track="topk:3")
    assert posterior.tracked_classes.tolist() == [[-1] * 3] * ROWS and posterior.quantile(0.5).isnan().all()
    with pytest.raises(ValueError, match="not chosen yet"):
        posterior.update_logits(LOGITS)
    assert not posterior.counts.any()
    with pytest.raises(ValueError, match=r"logits have shape \(150, 13, 11\): must be \(13, 11\)"):
        posterior.choose_classes_by(LOGITS)
    with pytest.raises(ValueError, match="1 rows had no logits to choose classes by, such as row 12"):
        posterior.choose_classes(nn.Linear(3, CLASSES), [(torch.zeros(12, 3), torch.arange(12))], rows="last")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"track": "top"}, ValueError, "track = 'top': must be 'all', 'topk:k', 'label' or int64 class ids"),
        ({"track": "topk:0"}, ValueError, "track = 'topk:0': must be 'topk:1' .. 'topk:11'"),
        ({"track": "topk:11", "labels": LABELS}, ValueError, "must be 'topk:1' .. 'topk:10'"),
        ({"track": "label"}, ValueError, "track = 'label': needs labels"),
        ({"track": IDS[:5]}, TypeError, r"track is torch.int64 \(5, 4\): must be torch.int64 \(13, k\)"),
        ({"track": IDS.int()}, TypeError, "track is torch.int32"),
        ({"track": IDS[0]}, TypeError, r"track is torch.int64 \(4,\)"),
        ({"track": IDS + 8}, ValueError, r"track holds classes 8 \.\. 18: must be in 0 \.\. 10"),
        ({"track": IDS[:, [0, 1, 0]]}, ValueError, "track has a class twice in row 0"),
        ({"labels": LABELS - 1}, ValueError, r"labels holds classes -1 \.\. 9"),
        ({"labels": LABELS[:3]}, TypeError, r"labels is torch.int64 \(3,\): must be torch.int64 \(13,\)"),
        ({"traces": True}, ValueError, "traces = True and num_draws = None: need diagnostics=True"),
        ({"diagnostics": True, "num_draws": 1}, ValueError, "num_draws = 1: must be at least 2"),
    ],
)  # fmt: skip
def test_bad_settings(settings, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PosteriorPredictive(ROWS, CLASSES, **settings)
