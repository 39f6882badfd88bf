"""The command line of the experiments, and their results on disk."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bkd_fast.app.experiments.common import rounded

RESULTS = Path(__file__).parents[1] / "results" / "experiments.json"
MACHINE = "2-core AVX2 EPYC, torch 2.13 CPU"


def print_table(results: Mapping[str, Mapping[str, Sequence[float]]], figures: Sequence[str]) -> None:
    """One line a row, `mean(standard error)`; a dash where a row lacks a figure."""
    width = max(map(len, results))
    print(" " * width, *(f"{figure:>16}" for figure in figures))
    for row, found in results.items():
        cells = [f"{found[f][0]:.3f}({found[f][1]:.3f})" if f in found else "-" for f in figures]
        print(f"{row:{width}}", *(f"{cell:>16}" for cell in cells))


def arguments(description: str | None, seeds: int) -> argparse.Namespace:
    """The command line of an experiment."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="how many, from --first-seed on")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="tiny settings, in seconds; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    return options


def save(key: str, command: str, settings: Mapping[str, Any], results: Mapping[str, Any], begin: float) -> None:
    """Put an experiment's results beside the others' in benchmarks/results/experiments.json."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    minutes = round((time.perf_counter() - begin) / 60, 1)
    found[key] = {
        "command": command,
        "machine": MACHINE,
        "minutes": minutes,
        "settings": settings,
        "results": rounded(results),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
