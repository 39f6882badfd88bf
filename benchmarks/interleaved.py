"""The way everything here is timed: contenders take turns, and the median of each is compared with the others' of the same run.

A machine's speed drifts by tens of percent within minutes; taking turns makes ratios survive that, absolute times do not.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

ROWS: list[dict[str, object]] = []  # what this run measured, for benchmarks/results


@dataclass(frozen=True)
class Contender:
    """What is timed: `run(i)` on input set i; `sets` different sets so that a cache cannot hold them all."""

    run: Callable[[int], object]
    sets: int = 1


@dataclass
class Table:
    """One comparison: rows are cases, columns are contenders, the first column is ours."""

    title: str
    unit: str  # what the times are divided by: "element", "logit", "cell and draw"
    rows: list[tuple[str, dict[str, float]]] = field(default_factory=list)

    def time(
        self, case: str, contenders: Mapping[str, Contender | Callable[[int], object]], units: float, **limits: float
    ) -> dict[str, float]:
        """Time a case and add its row; returns nanoseconds per unit by contender."""
        nanoseconds = {name: 1e9 * t / units for name, t in medians(contenders, **limits).items()}
        self.rows.append((case, nanoseconds))
        for name, value in nanoseconds.items():
            ROWS.append(
                {"table": self.title, "case": case, "contender": name, f"ns_per_{self.unit.replace(' ', '_')}": value}
            )
        return nanoseconds

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for _, times in self.rows for name in times))
        width = max(len(case) for case, _ in self.rows)
        cells = [["", *names]]
        for case, times in self.rows:
            ours = times[next(iter(times))]
            shown = [f"{times[n]:.3g} ({times[n] / ours:.2f} x)" if n in times else "-" for n in names]
            cells.append([case, *shown])
        widths = [max(width, 4)] + [max(len(row[i]) for row in cells) for i in range(1, len(names) + 1)]
        lines = [f"{self.title}: nanoseconds per {self.unit} (multiple of the first column's time)"]
        lines += [
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        return "\n".join(lines)


def medians(
    contenders: Mapping[str, Contender | Callable[[int], object]], *, repeats: int = 11, seconds: float = 6.0
) -> dict[str, float]:
    """Median seconds of each contender, taking turns; at least 5 and at most `repeats` turns within about `seconds`."""
    timed = {name: c if isinstance(c, Contender) else Contender(c) for name, c in contenders.items()}
    for contender in timed.values():
        contender.run(0)  # first use: compile, allocate, fault pages in
    taken: dict[str, list[float]] = {name: [] for name in timed}
    deadline = time.perf_counter() + seconds
    turn = 0
    while turn < repeats and (turn < 5 or time.perf_counter() < deadline):
        for name, contender in timed.items():
            # short runs are repeated until a clock tick does not matter
            loops, elapsed = 0, 0.0
            start = time.perf_counter()
            while elapsed < 2e-3:
                contender.run((turn + loops) % contender.sets)
                loops += 1
                elapsed = time.perf_counter() - start
            taken[name].append(elapsed / loops)
        turn += 1
    return {name: statistics.median(times) for name, times in taken.items()}
