"""Cross-fitting: no row is labelled by a teacher that saw it, columns stay with their classes, and what cannot be is refused."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import bkd_fast as bkd
from bkd_fast.methods.cross_fitting import (
    CrossFit,
    aligned_probs,
    assign_folds,
    cross_fit,
    cross_fit_estimator,
    cross_fit_modules,
    cross_validated,
)

ROWS = 400


def _noise(rows=ROWS, classes=3):
    """Inputs that say nothing about their labels: who gets a label right has seen it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (rows,), generator=generator)


def _accuracy(probs, labels):
    return float((probs.argmax(1) == labels).double().mean())


class Memory(nn.Module):
    """The label of the nearest row that it was trained on."""

    def __init__(self):
        super().__init__()
        self.rows = self.labels = None
        self.mark = torch.rand(())

    def forward(self, x):
        nearest = torch.cdist(x, self.rows).argmin(1)
        return 50.0 * nn.functional.one_hot(self.labels[nearest], 3)


def _memorise(module, x, labels):
    module.rows, module.labels = x, labels


# ---- nobody labels what it has seen ----


def test_a_memorising_estimator_is_right_in_its_fold_and_at_chance_out_of_it():
    x, y = _noise()
    nearest = KNeighborsClassifier(1)
    seen = aligned_probs(nearest.fit(x, y), x.numpy(), 3)
    assert _accuracy(seen, y) == 1.0
    out_of_fold = _accuracy(cross_fit_estimator(nearest, x.numpy(), y).probs, y)
    # labels are independent of x: binomial with p = 1/3, 5 standard errors
    assert abs(out_of_fold - 1 / 3) < 5 * (2 / 9 / ROWS) ** 0.5


def test_a_memorising_module_is_at_chance_out_of_its_fold():
    x, y = _noise()
    memory = Memory()
    _memorise(memory, x, y)
    assert _accuracy(memory(x), y) == 1.0
    out_of_fold = _accuracy(cross_fit_modules(Memory, _memorise, x, y, folds=5).probs, y)
    assert abs(out_of_fold - 1 / 3) < 5 * (2 / 9 / ROWS) ** 0.5


def test_every_row_is_labelled_by_the_one_teacher_that_was_trained_without_its_fold():
    _, y = _noise()
    given = {}

    def train(rows, number):
        given[number] = set(rows.tolist())
        return lambda asked: torch.eye(3, dtype=torch.float64)[torch.full((len(asked),), number % 3)]

    crossed = cross_fit(train, y, folds=7, seed=3)
    for row, fold in enumerate(crossed.folds.tolist()):
        assert row not in given[fold] and all(row in given[k] for k in range(7) if k != fold)
        assert crossed.probs[row].argmax() == fold % 3
    assert all({*crossed.trained_on[k].nonzero().flatten().tolist()} == given[k] for k in range(7))


def test_use_of_a_row_that_its_teacher_saw_is_refused():
    x, y = _noise()
    crossed = cross_fit_estimator(KNeighborsClassifier(1), x.numpy(), y, folds=4)
    rows = (crossed.folds == 2).nonzero().flatten()
    crossed.verify(rows)
    crossed.verify(rows, 2)
    crossed.verify(rows, crossed.folds[rows])
    with pytest.raises(ValueError, match=rf"row {int(rows[0])} is labelled by teacher 1, which was trained on it"):
        crossed.verify(rows, 1)
    swapped = torch.full_like(rows, 2)
    swapped[5] = 0
    with pytest.raises(ValueError, match=rf"row {int(rows[5])} is labelled by teacher 0"):
        crossed.verify(rows, swapped)


def test_a_leaking_record_cannot_be_made():
    probs, folds = torch.full((4, 2), 0.5, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    trained_on = torch.stack([folds != 0, folds != 1])
    CrossFit(probs, folds, trained_on)
    leak = trained_on.clone()
    leak[1, 3] = True
    with pytest.raises(ValueError, match="row 3 is labelled by teacher 1"):
        CrossFit(probs, folds, leak)
    with pytest.raises(ValueError, match=r"folds of torch.int64 in \[0, 2\]: must be integers in \[0, 2\)"):
        CrossFit(probs, torch.tensor([0, 0, 1, 2]), trained_on)
    with pytest.raises(ValueError, match=r"trained_on has torch\.int64"):
        CrossFit(probs, folds, trained_on.long())
    with pytest.raises(ValueError, match=r"must be torch.bool and \(teachers, 4\)"):
        CrossFit(probs, folds, trained_on[:, :3])


# ---- folds ----


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_folds_are_even_in_size_and_in_every_class(folds):
    _, y = _noise(203)
    dealt = assign_folds(y, folds, seed=1)
    assert dealt.bincount().max() - dealt.bincount().min() <= 1
    for label in range(3):
        members = dealt[y == label].bincount(minlength=folds)
        assert members.max() - members.min() <= 1


def test_folds_depend_on_the_seed_alone():
    _, y = _noise()
    state = torch.get_rng_state()
    assert torch.equal(assign_folds(y, 10, 1), assign_folds(y, 10, 1))
    assert not torch.equal(assign_folds(y, 10, 1), assign_folds(y, 10, 2))
    assert torch.equal(state, torch.get_rng_state())


def test_a_row_for_each_fold_is_legal():
    x, y = _noise(12)
    with pytest.warns(bkd.BKDFastWarning, match="fewer than folds = 12"):
        crossed = cross_fit_estimator(KNeighborsClassifier(1), x.numpy(), y, folds=12)
    assert torch.equal(crossed.folds.sort().values, torch.arange(12))


# ---- estimators and modules ----


def test_a_class_that_a_fold_has_not_seen_does_not_shift_the_others():
    x, y = _noise(60)
    y[y == 1] = 0
    y[7] = 1  # the only member: its own teacher knows classes 0 and 2
    with pytest.warns(bkd.BKDFastWarning, match="class 1 has 1 rows, fewer than folds = 5: some folds are without it"):
        crossed = cross_fit_estimator(RandomForestClassifier(20, random_state=0), x.numpy(), y, folds=5)
    own = crossed.folds[7]
    assert (crossed.probs[crossed.folds == own, 1] == 0).all()
    assert (crossed.probs[:, 2] > 0).any() and (crossed.probs[crossed.folds == own, 2] > 0).any()
    teacher = RandomForestClassifier(20, random_state=int(own))
    training = crossed.trained_on[own]
    teacher.fit(x[training].numpy(), y[training].numpy())
    assert teacher.classes_.tolist() == [0, 2]
    expected = torch.from_numpy(teacher.predict_proba(x[~training].numpy()))
    assert torch.equal(crossed.probs[~training][:, [0, 2]], expected)


def test_classes_that_nobody_has_seen_have_probability_zero():
    x, y = _noise()
    crossed = cross_fit_estimator(KNeighborsClassifier(1), x.numpy(), y, classes=5)
    assert crossed.probs.shape == (ROWS, 5) and (crossed.probs[:, 3:] == 0).all()


def test_seeds_reach_every_random_state_and_the_estimator_is_left_alone():
    x, y = load_digits(return_X_y=True)
    x, y = x[:300], torch.from_numpy(y[:300]).long()
    estimator = make_pipeline(StandardScaler(), RandomForestClassifier(10))
    runs = [cross_fit_estimator(estimator, x, y, folds=5, seed=seed).probs for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert estimator[-1].random_state is None and not hasattr(estimator[-1], "classes_")
    assert _accuracy(runs[0], y) > 0.7


def test_modules_are_seeded_and_leave_the_generator_alone():
    x, y = _noise()
    marks = []

    def fit(module, x, labels):
        _memorise(module, x, labels)
        marks.append(float(module.mark))

    state = torch.get_rng_state()
    for seed in (0, 0, 1):
        cross_fit_modules(Memory, fit, x, y, folds=3, seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    assert marks[:3] == marks[3:6] and len({*marks[:3]}) == 3 and marks[6:8] == marks[1:3]  # seed + k


def test_modules_predict_in_evaluation_mode_from_logits_or_probabilities():
    x, y = _noise(2500)

    def make():
        return nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3, dtype=torch.float64))

    def fit(module, x, labels):
        module.train()

    logits = cross_fit_modules(make, fit, x, y, folds=2).probs
    probs = cross_fit_modules(lambda: nn.Sequential(*make(), nn.Softmax(-1)), fit, x, y, folds=2, outputs="probs").probs
    torch.testing.assert_close(logits, probs, rtol=1e-12, atol=0)
    assert not logits.requires_grad


# ---- the choice of a constant ----


def test_the_value_with_the_best_mean_score_is_chosen_on_rows_held_out():
    folds = torch.tensor([0, 1, 2] * 5)
    seen = []

    def score(value, training, held_out):
        seen.append((len(training), len(held_out), set(training.tolist()) & set(held_out.tolist())))
        return -((value - 1.2) ** 2) + 0.1 * float(folds[held_out[0]])

    assert cross_validated(score, [0.0, 1.0, 3.0, 1.4], folds) == 1.0
    assert seen == [(10, 5, set())] * 12
    assert cross_validated(lambda *_: 0.5, [3.0, 1.0], folds) == 3.0
    with pytest.raises(ValueError, match="values is empty"):
        cross_validated(score, [], folds)
    with pytest.raises(ValueError, match=r"score of value 2.0 is NaN"):
        cross_validated(lambda *_: float("nan"), [2.0], folds)


# ---- bad input ----


@pytest.mark.parametrize("folds", [-1, 0, 1, ROWS + 1])
def test_folds_must_be_from_two_to_the_rows(folds):
    x, y = _noise()
    with pytest.raises(ValueError, match=rf"folds = {folds}: must be at least 2 and at most {ROWS}"):
        cross_fit_estimator(KNeighborsClassifier(1), x.numpy(), y, folds=folds)


def test_labels_must_be_classes():
    x, y = _noise()
    nearest = KNeighborsClassifier(1)
    with pytest.raises(ValueError, match=r"labels\[0\] = .: must be in \[0, 1\)"):
        cross_fit_estimator(nearest, x.numpy(), y + 1, classes=1)
    y[3] = -100
    with pytest.raises(ValueError, match=r"labels\[3\] = -100: must be in \[0, 3\)"):
        cross_fit_estimator(nearest, x.numpy(), y)
    with pytest.raises(ValueError, match=r"labels has dtype torch\.float32"):
        assign_folds(y.float(), 3)
    with pytest.raises(ValueError, match=r"labels has shape \(0,\)"):
        assign_folds(y[:0], 3)
    for x_like in (x[:-1], x.numpy()[:-1]):
        with pytest.raises(ValueError, match=f"x has {ROWS - 1} rows: must be {ROWS}"):
            if isinstance(x_like, np.ndarray):
                cross_fit_estimator(nearest, x_like, y.abs() % 3)
            else:
                cross_fit_modules(Memory, _memorise, x_like, y.abs() % 3)


@pytest.mark.parametrize("wrong", [[0.5, 0.4, 0.0], [1.2, -0.2, 0.0], [float("nan"), 0.5, 0.5]])
def test_a_teacher_that_gives_no_probabilities_is_reported_by_row(wrong):
    _, y = _noise()

    def train(rows, number):
        def predict(asked):
            probs = torch.full((len(asked), 3), 1 / 3, dtype=torch.float64)
            probs[asked == 123] = torch.tensor(wrong, dtype=torch.float64)
            return probs

        return predict

    with pytest.raises(ValueError, match="probabilities in row 123: must be >= 0 and sum to 1"):
        cross_fit(train, y)


def test_a_teacher_of_another_number_of_classes_is_reported():
    _, y = _noise()
    with pytest.raises(ValueError, match=r"teacher 0 gives shape \(40, 2\): must be \(40, 3\)"):
        cross_fit(lambda rows, number: lambda asked: torch.full((len(asked), 2), 0.5), y)
    with pytest.raises(ValueError, match="outputs = 'odds': must be 'logits' or 'probs'"):
        cross_fit_modules(Memory, _memorise, *_noise(), outputs="odds")
