"""`python -m benchmarks.gpu`: measure, print the table, and write results/<device>.json and .md."""

import argparse
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch

import bkd_fast as bkd
from benchmarks.gpu.cases import SUITES
from benchmarks.gpu.timing import Case, Row, synchronize

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the suite")
    parser.add_argument("--suite", action="append", choices=SUITES, help="only these; may be repeated")
    parser.add_argument("--seconds", type=float, default=2.0, help="per case, beyond three turns")
    parser.add_argument("--turns", type=int, default=15, help="at most, per case")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the two files go")
    options = parser.parse_args()
    device = torch.device(options.device)

    begun = time.perf_counter()
    rows: list[Row] = []
    failures: list[str] = []
    for name in options.suite or SUITES:
        try:
            for case in SUITES[name](device, options.small):
                rows += case.measure(device, options.turns, options.seconds)
                print(table(case), flush=True)
                synchronize(device)
        except Exception as error:  # one broken suite must not cost the machine's other figures
            failures.append(f"{name}: {type(error).__name__}: {error}")
            print("FAILED", failures[-1], flush=True)

    about = {**about_machine(device), "seconds": round(time.perf_counter() - begun), "failures": failures}
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "-".join(about["device"].lower().split()) + ("-small" if options.small else "")
    body = {"about": about, "rows": [asdict(row) for row in rows]}
    (options.out / f"{stem}.json").write_text(json.dumps(body, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(markdown(about, rows))
    print(f"\n{stem}: {len(rows)} rows in {about['seconds']} s; {len(failures)} failures")
    raise SystemExit(1 if failures else 0)


def about_machine(device: torch.device) -> dict[str, object]:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name,
        "capability": list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "bkd_fast": bkd.__version__,
    }


def table(case: Case) -> str:
    """A case's rows for a terminal."""
    lines = [f"{case.operation}: {case.name}"]
    for row in case.rows:
        floor = f"{row.times_floor:6.2f} x copy" if row.times_floor is not None else " " * 13
        lines.append(
            f"  {row.contender:38} {row.microseconds:12,.1f} us {floor}  host {row.host_microseconds:10,.1f} us  "
            f"{row.nanoseconds_per_unit:.4g} ns per {case.unit}"
        )
    return "\n".join(lines)


def markdown(about: dict[str, object], rows: list[Row]) -> str:
    """The rows as the table that the documentation shows."""
    lines = [
        f"{about['device']}, torch {about['torch']}, CUDA {about['cuda']}: medians of turns in one run; times of device events.",
        "",
        "| operation | case | contender | microseconds | x a copy of the same bytes | host microseconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        floor = f"{row.times_floor:.2f}" if row.times_floor is not None else ""
        lines.append(
            f"| {row.operation} | {row.case} | {row.contender} | {row.microseconds:,.1f} | {floor} "
            f"| {row.host_microseconds:,.1f} |"
        )
    return "\n".join(lines) + "\n"


main()
