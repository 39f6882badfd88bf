"""The record of a run, log.jsonl: one JSON object per line, each with its `event` and the seconds since the start."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from bkd_fast.sampling import Callback, Draw, Health, Run, StepRecord


class Log:
    """Appends events to a file as they happen, so that a run that stops leaves what it did.

    append: keep what an earlier run wrote, which this one goes on with.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        self.path = path
        self._file = path.open("a" if append else "w", encoding="utf-8")
        self._start = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def seconds(self) -> float:
        """Since the log was opened."""
        return time.perf_counter() - self._start

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, "seconds": round(self.seconds, 3), **fields}) + "\n")
        self._file.flush()


class ChainLog(Callback):
    """Follows a chain: the mean energy of every `every` steps goes to the log and stays for the trace.

    part: what the log calls the chain; a run that goes on with an earlier one finds the trace so far under it.
    """

    def __init__(self, log: Log, every: int, part: str = "chain") -> None:
        self.part = part
        self.steps: list[int] = []
        self.phases: list[str] = []
        self.energies: list[float] = []
        self.noise_share: list[float] = []
        self.stationarity: list[float] = []
        self.taken = self.drawn = 0  # steps and draws, of this run alone where it went on with another
        self._log = log
        self._every = every
        self._phase = ""
        self._sum: Tensor | None = None
        self._count = 0
        self._last_step = 0

    def on_start(self, run: Run) -> None:
        if not run.steps:
            return
        for line in self._log.path.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "steps" and event["part"] == self.part and event["last_step"] <= run.steps:
                self._remember(event["last_step"], event["phase"], event["energy"])

    def on_step(self, record: StepRecord) -> None:
        self.taken += 1
        if record.phase != self._phase:
            self._write()
            self._phase = record.phase
        self._sum = record.energy.double() if self._sum is None else self._sum + record.energy
        self._count += 1
        self._last_step = record.step
        if self._count == self._every:
            self._write()

    def on_draw(self, draw: Draw) -> None:
        self.drawn += 1
        self._log.write("draw", index=draw.index, step=draw.step, chain=draw.chain)

    def on_end(self, health: Health) -> None:
        self._write()
        self.noise_share = [float(share) for share in health.noise_share]
        self.stationarity = [float(share) for share in health.stationarity]
        self._log.write("health", noise_share=measured(self.noise_share), stationarity=measured(self.stationarity))

    def _write(self) -> None:
        """Close the current stretch of steps. The one place where the energy leaves its device."""
        if self._sum is None:
            return
        energy = float(self._sum) / self._count
        self._log.write(
            "steps", part=self.part, phase=self._phase, last_step=self._last_step, count=self._count, energy=energy
        )
        self._remember(self._last_step, self._phase, energy)
        self._sum, self._count = None, 0

    def _remember(self, step: int, phase: str, energy: float) -> None:
        if self.steps and step <= self.steps[-1]:  # interrupted runs may have written it twice
            return
        self.steps.append(step)
        self.phases.append(phase)
        self.energies.append(energy)


def measured(figures: Sequence[float]) -> list[float | None]:
    """For JSON, which knows no NaN: None is what was not measured."""
    return [None if math.isnan(figure) else figure for figure in figures]
