"""Device times by events, contenders in turns: medians of one run, and ratios to a copy of the same bytes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Run = Callable[[int], object]

LEAST_SECONDS = 1e-3  # of one reading: below it, events' resolution shows
LEAST_LOOPS = 3
# a millisecond in which the host gets ahead, so that its gap before a first launch is not the device's
BUSY_CYCLES = 2_000_000


@dataclass
class Row:
    """What one contender took in one case."""

    operation: str
    case: str
    contender: str
    microseconds: float
    host_microseconds: float
    times_floor: float | None  # of a device copy of the operation's bytes, timed in the same turns
    nanoseconds_per_unit: float


@dataclass
class Case:
    """One comparison. `floor_bytes` is what the operation must read and write; `units` are what times are divided by.

    Contenders are called with the number of an input set, 0 .. sets - 1, so that a cache cannot hold what they read.
    """

    operation: str
    name: str
    unit: str
    units: int
    floor_bytes: int | None
    contenders: dict[str, Run]
    sets: int = 1
    rows: list[Row] = field(default_factory=list)

    def measure(self, device: torch.device, turns: int, seconds: float) -> list[Row]:
        """Time every contender and a copy of the floor's bytes in turns; at least 3 turns, then until `seconds` are over."""
        runs = dict(self.contenders)
        if self.floor_bytes is not None:
            runs["copy of the same bytes"] = _copy(self.floor_bytes, device)
        loops = {name: _loops(run, self.sets, device) for name, run in runs.items()}
        device_times: dict[str, list[float]] = {name: [] for name in runs}
        host_times: dict[str, list[float]] = {name: [] for name in runs}
        start = time.perf_counter()
        for turn in range(turns):
            if turn >= 3 and time.perf_counter() - start > seconds:
                break
            for name, run in runs.items():
                elapsed, host = _time(run, loops[name], self.sets, turn, device)
                device_times[name].append(elapsed)
                host_times[name].append(host)
        medians = {name: statistics.median(times) for name, times in device_times.items()}
        floor = medians.get("copy of the same bytes")
        self.rows = [
            Row(
                self.operation,
                self.name,
                name,
                1e6 * taken,
                1e6 * statistics.median(host_times[name]),
                taken / floor if floor else None,
                1e9 * taken / self.units,
            )
            for name, taken in medians.items()
        ]
        return self.rows


def _copy(floor_bytes: int, device: torch.device) -> Run:
    source = torch.empty(max(1, floor_bytes // 8), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return lambda _: target.copy_(source)


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is never ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _loops(run: Run, sets: int, device: torch.device) -> int:
    """How often to run within one reading; warms up, too."""
    for i in range(max(2, sets)):
        run(i % sets)
    synchronize(device)
    start = time.perf_counter()
    run(0)
    synchronize(device)
    once = time.perf_counter() - start
    return max(sets, LEAST_LOOPS, min(1000, int(LEAST_SECONDS / max(once, 1e-7))))


def _time(run: Run, loops: int, sets: int, turn: int, device: torch.device) -> tuple[float, float]:
    """(device seconds, host seconds) of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(loops):
            run((turn + i) % sets)
        elapsed = time.perf_counter() - start
        return elapsed / loops, elapsed / loops
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(BUSY_CYCLES)
    before.record()
    start = time.perf_counter()
    for i in range(loops):
        run((turn + i) % sets)
    host = time.perf_counter() - start
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) * 1e-3 / loops, host / loops


def graphed(run: Callable[[], object]) -> Run:
    """The same as a CUDA graph, replayed: what is left when the host does nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda _: graph.replay()
