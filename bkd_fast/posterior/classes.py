"""Which classes of each row are looked at closely: those whose quantiles are kept, and those that are diagnosed."""

import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Literal

import torch
from torch import Tensor

from bkd_fast.ops.predictive import Rows
from bkd_fast.posterior.chains import check_tensor

Track = Literal["all", "label"] | str | Tensor  # or "topk:k", or int64 (N, k)


class Choice:
    """The most probable classes of each row, as logits come in."""

    def __init__(self, rows: int, number: int, labels: Tensor | None, device: torch.device) -> None:
        self.classes = torch.full((rows, number), -1, dtype=torch.int32, device=device)
        self.labels = labels

    def take(self, logits: Tensor, rows: Rows) -> None:
        """The classes of some rows of logits (B, C); with labels the label and then the most probable of the others."""
        here = rows.order < len(self.classes)
        order, logits = rows.order[here], logits[rows.batch[here]]
        first = []
        if self.labels is not None:
            label = self.labels[order].long()[:, None]
            logits = logits.scatter(1, label, -torch.inf)
            first = [label]
        best = logits.nan_to_num(-torch.inf, torch.inf).topk(self.classes.shape[1] - len(first), dim=1).indices
        self.classes[order] = torch.cat([*first, best], 1).int()


class ChosenClasses:
    """What `track`, `labels` and `diagnostics` ask for, and the classes once they are chosen.

    Attributes:
        tracked: int32 (N, width), the classes of the sketch; None where it holds all, or while they are not chosen.
        watched: int32 (N, 1 or 2), the diagnostic classes: the label, the most probable one; None likewise.
        picked: int32 (N, ...), both side by side, as `predictive_update_` wants them; None where there are none.
    """

    tracked: Tensor | None = None
    watched: Tensor | None = None
    picked: Tensor | None = None

    def __init__(
        self, rows: int, classes: int, track: Track, labels: Tensor | None, watches: bool, device: torch.device
    ) -> None:
        self.rows, self.device, self.watches = rows, device, watches
        self.labels = None if labels is None else self._checked("labels", labels, (rows,), classes)
        self.top: int | None = None  # classes that are still to be chosen by logits, besides the label
        self.width = classes
        if isinstance(track, Tensor):
            self.tracked = self._checked("track", track, (rows, track.shape[-1] if track.dim() == 2 else -1), classes)
            self.width = self.tracked.shape[1]
            ascending = self.tracked.sort(1).values
            repeated = (ascending[:, 1:] == ascending[:, :-1]).any(1)
            if bool(repeated.any()):
                raise ValueError(f"track has a class twice in row {int(repeated.int().argmax())}")
        elif track == "label":
            if self.labels is None:
                raise ValueError("track = 'label': needs labels")
            self.tracked, self.width = self.labels[:, None], 1
        elif (found := re.fullmatch(r"topk:(\d+)", track)) is not None:
            most = classes - (self.labels is not None)
            self.top = int(found[1])
            if not 1 <= self.top <= most:
                raise ValueError(f"track = {track!r}: must be 'topk:1' .. 'topk:{most}'")
            self.width = self.top + (self.labels is not None)
        elif track != "all":
            raise ValueError(f"track = {track!r}: must be 'all', 'topk:k', 'label' or int64 class ids ({rows}, k)")
        self.tracks_all = isinstance(track, str) and track == "all"
        self._join()

    def _checked(self, name: str, ids: Tensor, shape: tuple[int, ...], classes: int) -> Tensor:
        if ids.dtype != torch.int64 or ids.shape != shape or ids.numel() == 0 < self.rows:
            expected = f"({self.rows},)" if len(shape) == 1 else f"({self.rows}, k)"
            raise TypeError(f"{name} is {ids.dtype} {tuple(ids.shape)}: must be torch.int64 {expected}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < classes:
            raise ValueError(
                f"{name} holds classes {int(ids.min())} .. {int(ids.max())}: must be in 0 .. {classes - 1}"
            )
        return ids.to(self.device, torch.int32)

    @property
    def width_of_sketch(self) -> int:
        """How many of the picked classes are tracked ones."""
        return 0 if self.tracks_all else self.width

    @property
    def chosen(self) -> bool:
        """Whether nothing is left to be chosen by logits."""
        return (self.top is None or self.tracked is not None) and (not self.watches or self.watched is not None)

    def check_chosen(self) -> None:
        """Raise ValueError while something is left to be chosen."""
        if not self.chosen:
            raise ValueError(
                "the tracked or diagnostic classes are not chosen yet: call choose_classes(model, loader) or "
                "choose_classes_by(logits) before the first draw of logits"
            )

    def check_open(self) -> None:
        """Raise ValueError where nothing is left to be chosen."""
        if self.chosen:
            raise ValueError("the tracked and diagnostic classes are chosen already: they are the same for all draws")

    def choice(self) -> Choice:
        """To be filled with logits, and handed to `choose`."""
        return Choice(self.rows, (self.top or 1) + (self.labels is not None), self.labels, self.device)

    def choose(self, choice: Choice) -> None:
        """Take the classes of a choice that has seen every row.

        Raises:
            ValueError: rows that it has not seen.
        """
        missing = choice.classes[:, -1] < 0
        if bool(missing.any()):
            raise ValueError(
                f"{int(missing.sum())} rows had no logits to choose classes by, such as row {int(missing.int().argmax())}"
            )
        if self.top is not None:
            self.tracked = choice.classes
        if self.watches:
            self.watched = choice.classes[:, : 1 + (self.labels is not None)]
        self._join()

    def check_same(self, other: "ChosenClasses") -> None:
        """Raise ValueError where the other's classes are not these."""
        for name in ("tracked", "watched"):
            mine, theirs = getattr(self, name), getattr(other, name)
            same = (mine is None) == (theirs is None)
            if not same or (mine is not None and not torch.equal(mine, theirs.to(mine.device))):
                kind = "tracked" if name == "tracked" else "diagnostic"
                raise ValueError(
                    f"other has other {kind} classes: chains to be merged must choose them alike (`labels`, a tensor for "
                    "`track`, or choose_classes with one model)"
                )

    def loaded(self, state: Mapping[str, Tensor | int]) -> "ChosenClasses":
        """These settings with the classes that a saved state has chosen.

        Raises:
            ValueError: classes of another shape or dtype, or given ones that are not these.
        """
        new = copy(self)
        for name, number in (("tracked", self.width), ("watched", None)):
            fixed = name == "tracked" and not self.tracks_all and self.top is None
            if name in state:
                classes = check_tensor(state, name, torch.int32, (self.rows, number)).to(self.device)
                if fixed and not torch.equal(classes, self.tracked):  # type: ignore[arg-type]
                    raise ValueError("state has other tracked classes than `track` or `labels` give")
                setattr(new, name, classes)
            elif not fixed:
                setattr(new, name, None)
        new._join()
        return new

    def joined(self, parts: Sequence["ChosenClasses"], rows: Sequence[slice]) -> "ChosenClasses":
        """These settings with the given rows of each part, one after the other."""
        new = copy(self)
        new.rows = sum(here.stop - here.start for here in rows)
        for name in ("labels", "tracked", "watched"):
            arrays = [getattr(part, name) for part in parts]
            known = all(array is not None for array in arrays)
            setattr(new, name, torch.cat([a[here] for a, here in zip(arrays, rows, strict=True)]) if known else None)
        new._join()
        return new

    def _join(self) -> None:
        both = [classes for classes in (self.tracked, self.watched) if classes is not None]
        self.picked = torch.cat(both, 1).contiguous() if both else None
