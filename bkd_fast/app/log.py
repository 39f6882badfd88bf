"""The record of a run, log.jsonl: one JSON object per line, each with its `event` and the seconds since the start."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from bkd_fast.sampling import Callback, Draw, Health, StepRecord


class Log:
    """Appends events to a file as they happen, so that a run that stops leaves what it did."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
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
    """Follows the chain: the mean energy of every `every` steps goes to the log and stays for the trace."""

    def __init__(self, log: Log, every: int) -> None:
        self.steps: list[int] = []
        self.phases: list[str] = []
        self.energies: list[float] = []
        self.noise_share: list[float] = []
        self.stationarity: list[float] = []
        self._log = log
        self._every = every
        self._phase = ""
        self._sum: Tensor | None = None
        self._count = 0
        self._last_step = 0

    def on_step(self, record: StepRecord) -> None:
        if record.phase != self._phase:
            self._write()
            self._phase = record.phase
        self._sum = record.energy.double() if self._sum is None else self._sum + record.energy
        self._count += 1
        self._last_step = record.step
        if self._count == self._every:
            self._write()

    def on_draw(self, draw: Draw) -> None:
        self._log.write("draw", index=draw.index, step=draw.step, chain=draw.chain)

    def on_end(self, health: Health) -> None:
        self._write()
        self.noise_share = [float(share) for share in health.noise_share]
        self.stationarity = [float(share) for share in health.stationarity]
        self._log.write("health", noise_share=self.noise_share, stationarity=self.stationarity)

    def _write(self) -> None:
        """Close the current stretch of steps. The one place where the energy leaves its device."""
        if self._sum is None:
            return
        energy = float(self._sum) / self._count
        self._log.write("steps", phase=self._phase, last_step=self._last_step, count=self._count, energy=energy)
        self.steps.append(self._last_step)
        self.phases.append(self._phase)
        self.energies.append(energy)
        self._sum, self._count = None, 0
