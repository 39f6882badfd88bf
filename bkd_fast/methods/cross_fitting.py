"""Cross-fitting: every row gets its class probabilities from a teacher that was trained without it (Dao et al., ICLR 2021)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bkd_fast.errors import MissingLibraryError, warn
from bkd_fast.posterior.inputs import check_classes, check_probabilities

Predict: TypeAlias = Callable[[Tensor], Tensor]  # rows -> their class probabilities
CHUNK = 1000  # rows that a module predicts at a time


@dataclass(frozen=True)
class CrossFit:
    """Out-of-fold class probabilities, and the evidence that they are: it cannot be made of rows that their teacher has seen.

    Attributes:
        probs: (N, C) float64, row i by the teacher that labelled it.
        folds: (N,) int64 in [0, K), the teacher that labelled each row.
        trained_on: (K, N) bool, the rows that each teacher was trained on.

    Raises:
        ValueError: shapes that disagree, rows that are no probabilities, or a row whose teacher was trained on it.
    """

    probs: Tensor
    folds: Tensor
    trained_on: Tensor

    def __post_init__(self) -> None:
        check_probabilities(self.probs)
        rows = len(self.probs)
        if self.trained_on.dtype != torch.bool or self.trained_on.shape[1:] != (rows,):
            found = f"{self.trained_on.dtype} and shape {tuple(self.trained_on.shape)}"
            raise ValueError(f"trained_on has {found}: must be torch.bool and (teachers, {rows})")
        check_classes("folds", self.folds, self.trained_on.T)
        self.verify(torch.arange(rows))

    def verify(self, rows: Tensor, teachers: Tensor | int | None = None) -> None:
        """Refuse a student's use of rows whose teacher was trained on them.

        A copy of a row in another fold is another row here: duplicates and views of one image have to be one row.

        Args:
            rows: (n,) numbers of the rows that the student is to see.
            teachers: (n,) numbers of the teachers that labelled them, or one for all; None: those of `folds`.

        Raises:
            ValueError: the first such row and its teacher.
        """
        labelled_by = self.folds[rows] if teachers is None else torch.as_tensor(teachers).expand(len(rows))
        seen = self.trained_on[labelled_by, rows]
        if seen.any():
            first = int(seen.nonzero()[0])
            raise ValueError(
                f"row {int(rows[first])} is labelled by teacher {int(labelled_by[first])}, which was trained on it: "
                "must be labelled by a teacher that was not"
            )


def assign_folds(labels: Tensor, folds: int, seed: int = 0) -> Tensor:
    """(N,) int64 in [0, folds): folds at random, whose sizes differ by one row at most, and so do the numbers of each class.

    Warns (BKDFastWarning) of a class with fewer rows than folds: no fold-wise figure of it means much, and the teacher of its
    only row has never seen it.

    Raises:
        ValueError: `labels` are not integers >= 0 of shape (N,), or `folds` is not in [2, N].
    """
    _check_labels(labels, None)
    labels = labels.cpu()
    if not 2 <= folds <= len(labels):
        raise ValueError(f"folds = {folds}: must be at least 2 and at most {len(labels)}, the number of rows")
    members = labels.bincount()
    rare = ((members > 0) & (members < folds)).nonzero().flatten()
    if len(rare):
        of = int(rare[0])
        warn(f"class {of} has {int(members[of])} rows, fewer than folds = {folds}: some folds are without it")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # class by class, at random within each: dealt out in turn
    dealt = torch.empty_like(order)
    dealt[order] = torch.arange(len(labels)) % folds
    return dealt


def cross_fit(
    train: Callable[[Tensor, int], Predict],
    labels: Tensor,
    *,
    classes: int | None = None,
    folds: int = 10,
    seed: int = 0,
) -> CrossFit:
    """Train a teacher without each fold and let it label that fold.

    Args:
        train: (rows to train on, number of the teacher) -> what gives class probabilities (n, C) for rows (n,).
        labels: (N,) integers in [0, C), by which folds are stratified.
        classes: C; None: the largest label and one.
        folds: K, from 2 to N; the paper's is 10 for tables and 5 for images.
        seed: of the folds.

    Raises:
        ValueError: as `assign_folds`; labels beyond `classes`; a teacher's rows that are no probabilities, by their number.
    """
    classes = _check_labels(labels, classes)
    dealt = assign_folds(labels, folds, seed)
    probs = torch.full((len(labels), classes), math.nan, dtype=torch.float64)
    trained_on = torch.zeros(folds, len(labels), dtype=torch.bool)
    for teacher in range(folds):
        training, held_out = (dealt != teacher).nonzero().flatten(), (dealt == teacher).nonzero().flatten()
        predict = train(training, teacher)
        trained_on[teacher, training] = True
        predicted = predict(held_out)
        if predicted.shape != (len(held_out), classes):
            raise ValueError(
                f"teacher {teacher} gives shape {tuple(predicted.shape)}: must be ({len(held_out)}, {classes})"
            )
        probs[held_out] = predicted.to(probs)
    return CrossFit(probs, dealt, trained_on)


def cross_fit_estimator(
    estimator: Any, x: Any, labels: Tensor, *, classes: int | None = None, folds: int = 10, seed: int = 0
) -> CrossFit:
    """Cross-fitting for an estimator of scikit-learn's kind: `fit`, `predict_proba`, `classes_`.

    Every fold's teacher is a clone, every `random_state` in it seed + its number. A class that a teacher has not seen has
    probability 0; the other classes keep their columns.

    Args:
        estimator: not fitted; left as it is.
        x: (N, ...) whatever the estimator takes and NumPy indexes by rows.
        labels, classes, folds, seed: as `cross_fit`.

    Raises:
        ValueError: as `cross_fit`; x of another number of rows.
        MissingLibraryError: scikit-learn is not installed.
    """
    try:
        from sklearn.base import clone
    except ImportError as error:
        raise MissingLibraryError("cross_fit_estimator needs scikit-learn: pip install 'bkd_fast[app]'") from error
    classes = _check_labels(labels, classes)
    if len(x) != len(labels):
        raise ValueError(f"x has {len(x)} rows: must be {len(labels)}, one for each label")

    def train(rows: Tensor, number: int) -> Predict:
        teacher = clone(estimator)
        states = [name for name in teacher.get_params() if name.split("__")[-1] == "random_state"]
        teacher.set_params(**dict.fromkeys(states, seed + number))
        teacher.fit(x[rows.numpy()], labels[rows].numpy())
        return lambda asked: aligned_probs(teacher, x[asked.numpy()], classes)

    return cross_fit(train, labels, classes=classes, folds=folds, seed=seed)


def aligned_probs(estimator: Any, x: Any, classes: int) -> Tensor:
    """(n, classes) float64 `predict_proba` of a fitted estimator; classes that it was not shown have probability 0."""
    found = torch.as_tensor(estimator.predict_proba(x), dtype=torch.float64)
    probs = found.new_zeros(len(found), classes)
    probs[:, torch.as_tensor(estimator.classes_, dtype=torch.int64)] = found
    return probs


def cross_fit_modules(
    make: Callable[[], nn.Module],
    fit: Callable[[nn.Module, Tensor, Tensor], object],
    x: Tensor,
    labels: Tensor,
    *,
    outputs: Literal["logits", "probs"] = "logits",
    classes: int | None = None,
    folds: int = 10,
    seed: int = 0,
) -> CrossFit:
    """Cross-fitting for torch modules. Teacher k is made and trained under `torch.manual_seed(seed + k)`, and predicts in
    evaluation mode; torch's global generators are left as they were.

    Args:
        make: an untrained module.
        fit: trains it in place on (module, x, labels) of the other folds.
        x: (N, ...) inputs.
        outputs: what the module gives: logits (n, C), whose softmax is taken in float64, or probabilities.
        labels, classes, folds, seed: as `cross_fit`.

    Raises:
        ValueError: as `cross_fit`; x of another number of rows.
    """
    if outputs not in ("logits", "probs"):
        raise ValueError(f"outputs = {outputs!r}: must be 'logits' or 'probs'")
    if len(x) != len(labels):
        raise ValueError(f"x has {len(x)} rows: must be {len(labels)}, one for each label")

    def train(rows: Tensor, number: int) -> Predict:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed + number)
            teacher = make()
            fit(teacher, x[rows], labels[rows])
        teacher.eval()

        @torch.no_grad()
        def predict(asked: Tensor) -> Tensor:
            found = torch.cat([teacher(x[part]).double() for part in torch.split(asked, CHUNK)]).cpu()
            return found.softmax(-1) if outputs == "logits" else found

        return predict

    return cross_fit(train, labels, classes=classes, folds=folds, seed=seed)


def cross_validated(score: Callable[[float, Tensor, Tensor], float], values: Sequence[float], folds: Tensor) -> float:
    """The value whose students do best on rows that they were not trained on; the first of several that are equal.

    Such rows are new to the student, not to the teachers of its training rows: for choosing, not for reporting.

    Args:
        score: (value, rows to train on, rows held out) -> the higher the better; its mean over the folds decides.
        values: what to choose from.
        folds: (N,) int64, a fold for each row (`assign_folds`).

    Raises:
        ValueError: no values, or a score that is NaN.
    """
    if not len(values):
        raise ValueError("values is empty: must hold at least one")
    means = []
    for value in values:
        scores = [
            score(value, (folds != k).nonzero().flatten(), (folds == k).nonzero().flatten())
            for k in range(int(folds.max()) + 1)
        ]
        means.append(sum(scores) / len(scores))
        if math.isnan(means[-1]):
            raise ValueError(f"score of value {value} is NaN in some fold: must be a number")
    return values[means.index(max(means))]


def _check_labels(labels: Tensor, classes: int | None) -> int:
    """C, for labels (N,) of classes in [0, C)."""
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels has shape {tuple(labels.shape)}: must be (N,) with N >= 1")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels has dtype {labels.dtype}: must be torch.int64")
    known = int(labels.max()) + 1 if classes is None else classes
    outside = (labels < 0) | (labels >= known)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"labels[{row}] = {int(labels[row])}: must be in [0, {known})")
    return known
