"""The public face of the dyadic histogram: streaming quantiles, with a certificate, of every element of any tensor."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bkd_fast.ops.sketch import (
    CODE_MAX,
    CODE_MIN,
    MAX_COUNT,
    Tiles,
    check_room,
    empty_tiles,
    sketch_merge_,
    sketch_quantile,
    sketch_sort_,
    sketch_update_,
    tiles_on,
)

VERSION = 1
ROUNDING = 2.0**-30  # of a code, in float64: what a value loses on its way to one and back


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of one shape broadcasts to another."""
    return len(shape) <= len(to) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(to), strict=False)
    )


class QuantileSketch:
    """Streaming quantiles of every element of a tensor: 136 bytes an element (64 bins), however many values.

    A value v becomes the code rint((v - center) / resolution), of 16 bits. The first `bins` codes of an element are kept; then
    they are counted in bins of 2^e codes, e the least for which the range of the codes fits. The order statistic ceil(q n)
    (NumPy's `inverted_cdf`) certainly lies within `quantile_bounds`, less than 2 R / (bins - 1) + resolution apart where the
    values span R. The state depends on the multiset of values only, not on their order, split or merges (docs/streaming.md).

    Values further than 32,767 resolutions from the center are counted at the ends of the scale: bounds there are infinite.
    NaN is left out, element by element.

    Args:
        shape: of the tensor.
        resolution: step between codes, positive; a number or a tensor that broadcasts to `shape`. A hundredth of the spread
            that is expected leaves room for 300 such spreads on either side.
        center: the value of code 0, likewise.
        bins: counters per element, 64 or 128.
        device: where the state and every result are; None: torch's default.

    Raises:
        ValueError: a number out of range, a tensor that does not broadcast.
    """

    def __init__(
        self,
        shape: Sequence[int],
        resolution: float | Tensor,
        center: float | Tensor = 0.0,
        *,
        bins: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        device = None if device is None else torch.device(device)
        self._tiles = empty_tiles(self.shape.numel(), 1, bins, device)
        self._resolution = self._scale("resolution", resolution)
        self._center = self._scale("center", center)
        if not bool(((self._resolution > 0) & self._resolution.isfinite()).all()):
            raise ValueError(f"resolution = {resolution!r}: must be positive and finite")
        if not bool(self._center.isfinite().all()):
            raise ValueError(f"center = {center!r}: must be finite")
        self._most = 0  # no element holds more values

    def _scale(self, name: str, value: float | Tensor) -> Tensor:
        tensor = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach()
        if not broadcasts(tensor.shape, self.shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must broadcast to {tuple(self.shape)}")
        return tensor.clone()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, bins={self.bins}, values={self._look_for_most()})"

    @property
    def bins(self) -> int:
        """Counters per element."""
        return self._tiles.counters.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the state and the results are."""
        return self._tiles.counts.device

    @property
    def resolution(self) -> Tensor:
        """Step between codes, float64."""
        return self._resolution

    @property
    def center(self) -> Tensor:
        """The value of code 0, float64."""
        return self._center

    @property
    def counts(self) -> Tensor:
        """int64 `shape`: values of each element, NaN not counted."""
        return self._tiles.counts.long().view(self.shape)

    def update(self, values: Tensor) -> None:
        """Take one value of each element, or several at once (cheaper: the state is touched once).

        Args:
            values: `shape`, or (W, *shape); any real dtype.

        Raises:
            TypeError: values that are no real numbers.
            ValueError: another shape, or more than 65,535 values of an element. Nothing is changed then.
        """
        if values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"values have dtype {values.dtype}: must be real numbers")
        if values.shape == self.shape:
            values = values[None]
        if values.shape[1:] != self.shape or values.dim() != len(self.shape) + 1:
            raise ValueError(
                f"values have shape {tuple(values.shape)}: must be {tuple(self.shape)} or (W, *{tuple(self.shape)})"
            )
        if self._most + len(values) > MAX_COUNT:
            check_room(self._tiles.counts, len(values))
            self._most = self._look_for_most()
        scaled = values.detach().to(self.device, torch.float64).sub(self._center).div_(self._resolution)
        scaled = scaled.reshape(len(values), self.shape.numel(), 1)
        missing = scaled[..., 0].isnan()
        # a CPU looks, and spares the operation an argument; a GPU would have to be waited for
        valid = ~missing if scaled.is_cuda or bool(missing.any()) else None
        codes = scaled.nan_to_num_(0, torch.inf, -torch.inf).round_().clamp_(CODE_MIN, CODE_MAX).to(torch.int16)
        sketch_update_(self._tiles, codes, valid)
        self._most += len(values)

    def _look_for_most(self) -> int:
        return int(self._tiles.counts.max()) if self._tiles.counts.numel() else 0

    def quantile(self, q: float) -> Tensor:
        """float32 `shape`: the order statistic ceil(q n), interpolated within its bin; NaN without values.

        Raises:
            ValueError: q is not in [0, 1].
        """
        return self._value(sketch_quantile(self._tiles, q).point.double()).float()

    def quantile_bounds(self, q: float) -> tuple[Tensor, Tensor]:
        """(lower, upper), float64 `shape` each: certainly lower <= the order statistic ceil(q n) <= upper. NaN without values.

        Raises:
            ValueError: q is not in [0, 1].
        """
        found = sketch_quantile(self._tiles, q)
        empty = found.point.isnan().view(self.shape)
        half = 0.5 + ROUNDING
        lower = self._value(found.lower.double() - half).masked_fill(
            (found.lower == CODE_MIN).view(self.shape), -torch.inf
        )
        upper = self._value(found.upper.double() + half).masked_fill(
            (found.upper == CODE_MAX).view(self.shape), torch.inf
        )
        return lower.masked_fill(empty, torch.nan), upper.masked_fill(empty, torch.nan)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """(lower, upper), float32 `shape` each: the equal-tailed interval, `quantile` at (1 -/+ level) / 2.

        Raises:
            ValueError: level is not in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level = {level!r}: must be in (0, 1)")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def _value(self, codes: Tensor) -> Tensor:
        return codes.view(self.shape) * self._resolution + self._center

    def merge_(self, other: "QuantileSketch") -> None:
        """Take all values of another sketch of the same shape, bins, resolution and center, on any device.

        Raises:
            TypeError: other is no QuantileSketch.
            ValueError: settings that differ, a sketch merged with itself, or more than 65,535 pooled values of an element.
                Nothing is changed then.
        """
        if not isinstance(other, QuantileSketch):
            raise TypeError(f"other is a {type(other).__name__}: must be a QuantileSketch")
        if other is self:
            raise ValueError("other is this sketch itself: its values would count twice")
        if other.shape != self.shape or other.bins != self.bins:
            raise ValueError(
                f"other has shape {tuple(other.shape)} and bins = {other.bins}: must be {tuple(self.shape)} and {self.bins}"
            )
        for name, mine, theirs in (
            ("resolution", self._resolution, other._resolution),
            ("center", self._center, other._center),
        ):
            if not torch.equal(mine.expand(self.shape), theirs.to(self.device).expand(self.shape)):
                raise ValueError(f"other has another {name}: codes would mean other values")
        sketch_merge_(self._tiles, tiles_on(other._tiles, self.device))
        self._most += other._most

    def state_dict(self) -> dict[str, Tensor | int]:
        """Everything, as tensors (copies, on `device`) and plain integers; equal multisets of values give equal tensors."""
        sketch_sort_(self._tiles)
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        return {"version": VERSION, "bins": self.bins, **tensors}

    def _tensors(self) -> dict[str, Tensor]:
        tiles = dict(zip(Tiles._fields[:4], self._tiles[:4], strict=True))
        return {**tiles, "resolution": self._resolution, "center": self._center}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Become the sketch that was saved, on any device; what was here is dropped.

        Raises:
            ValueError: a missing entry, another version or number of bins, a tensor of another shape or dtype. Nothing is
                changed then.
        """
        own = self._tensors()
        if missing := [name for name in ("version", "bins", *own) if name not in state]:
            raise ValueError(f"state lacks {', '.join(missing)}")
        for name, number in (("version", VERSION), ("bins", self.bins)):
            if int(state[name]) != number:
                raise ValueError(f"state has {name} = {int(state[name])}: must be {number}")
        loaded: dict[str, Tensor] = {}
        for name, tensor in own.items():
            value = state[name]
            scale = name in ("resolution", "center")
            if (
                not isinstance(value, Tensor)
                or value.dtype != tensor.dtype
                or not (scale or value.shape == tensor.shape)
            ):
                kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"state has {name}: {kind}: must be {tensor.dtype} {tuple(tensor.shape)}")
            loaded[name] = self._scale(name, value) if scale else value
        for tensor, name in zip(self._tiles[:4], Tiles._fields[:4], strict=True):
            tensor.copy_(loaded[name])
        self._resolution, self._center = loaded["resolution"], loaded["center"]
        self._most = self._look_for_most()
