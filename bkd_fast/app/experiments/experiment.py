"""An experiment: settings, a run of one seed, and the table of its figures over seeds beside the published ones."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import torch

from bkd_fast.app.doctor import versions
from bkd_fast.app.experiments.common import over_seeds, rounded

Comparison: TypeAlias = Literal["same data, same protocol", "same method, other data"]
Figures: TypeAlias = Mapping[str, Mapping[str, float]]  # {row: {figure: value}}
Settings = TypeVar("Settings")  # a frozen dataclass

HOW_TO_READ: dict[Comparison, str] = {
    "same data, same protocol": "Same data, same protocol: compare the numbers.",
    "same method, other data": "Same method, other data, **not the published setting**: compare signs and orders, not numbers.",
}


@dataclass(frozen=True)
class Experiment(Generic[Settings]):
    """One published experiment.

    Attributes:
        name: on the command line.
        title: one line.
        source: the paper, and where in it the published figures stand.
        comparison: what may be compared with them; `quick_comparison` where it is another for `quick` and `tiny`.
        run: of one seed, {row: {figure: value}}; figures that a row has not are left out.
        full, quick, tiny: settings; for the published scale, for minutes on a CPU, and for a test's seconds.
        columns: the figures of the table, in its order.
        published: figures of the paper, by row and column.
        deviations: of `full` from what was published, and of `quick` from `full`.
        seeds: how many runs the table is over.
    """

    name: str
    title: str
    source: str
    comparison: Comparison
    run: Callable[[int, Settings], Figures]
    full: Settings
    quick: Settings
    tiny: Settings
    columns: Sequence[str]
    published: Figures = field(default_factory=dict)
    deviations: Sequence[str] = ()
    seeds: int = 3
    quick_comparison: Comparison | None = None


def reproduce(
    experiment: Experiment[Settings], scale: Literal["full", "quick", "tiny"], seeds: Sequence[int]
) -> dict[str, Any]:
    """Run every seed on one thread, and give what there is to say about it, as JSON holds it."""
    settings: Settings = getattr(experiment, scale)
    begin = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are small, and figures must not depend on the number of cores
    try:
        results = over_seeds([experiment.run(seed, settings) for seed in seeds])
    finally:
        torch.set_num_threads(threads)
    return {
        "name": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "comparison": experiment.comparison
        if scale == "full"
        else experiment.quick_comparison or experiment.comparison,
        "command": f"bkd-fast reproduce {experiment.name}{' --full' if scale == 'full' else ''} --seeds {len(seeds)}",
        "scale": scale,
        "seeds": list(seeds),
        "minutes": round((time.perf_counter() - begin) / 60, 1),
        "machine": {k: v for k, v in versions().items() if k != "threads"},
        "settings": json.loads(json.dumps(asdict(settings))),  # type: ignore[call-overload]  # lists for tuples, as in the file
        "columns": list(experiment.columns),
        "results": rounded(results),
        "published": {row: dict(figures) for row, figures in experiment.published.items()},
        "deviations": list(experiment.deviations),
    }


def table(record: Mapping[str, Any]) -> str:
    """The Markdown table of a record of `reproduce`: mean ± standard error over seeds, beside them the published figures."""
    results, published = record["results"], record["published"]
    cited = [c for c in record["columns"] if any(c in figures for figures in published.values())]
    heads = [h for c in record["columns"] for h in ([c, "published"] if c in cited else [c])]
    lines = ["| " + " | ".join(["", *heads]) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in dict.fromkeys([*results, *published]):
        cells = []
        for column in record["columns"]:
            cells.append(_ours(results.get(row, {}).get(column)))
            if column in cited:
                theirs = published.get(row, {}).get(column)
                cells.append("" if theirs is None else f"{theirs:g}")
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _ours(found: Sequence[float | None] | None) -> str:
    """A mean, and its standard error where there are several seeds, with two digits of the error or four of the mean."""
    if found is None or found[0] is None:
        return ""
    mean, error = found[0], found[1] if found[1] is not None else math.nan
    if not error > 1e-5 * abs(mean):  # one seed, or no more than the rounding
        return f"{mean:.4g}"
    places = max(0, 1 - math.floor(math.log10(error)))
    if places > 6:
        return f"{mean:.1e} ± {error:.1e}"
    return f"{mean:.{places}f} ± {error:.{places}f}"


def page(record: Mapping[str, Any]) -> str:
    """A record as a page: what was run, how to read it, the table, and how it differs from the paper."""
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    seeds = len(record["seeds"])
    lines = [
        f"# {record['title']}",
        f"{record['source']}. {HOW_TO_READ[record['comparison']]}",
        "",
        f"`{record['command']}`: {seeds} seed{'s' * (seeds > 1)}, {record['minutes']:g} minutes on one thread ({machine}). "
        "Mean ± standard error over seeds.",
        "",
        table(record),
    ]
    if record["deviations"]:
        lines += ["Deviations:", *(f"* {text}" for text in record["deviations"]), ""]
    lines += ["Settings: " + ", ".join(f"{name} = {value}" for name, value in record["settings"].items()) + "."]
    return "\n".join(lines) + "\n"


def save(record: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write NAME.json and NAME.md into the folder, of a full run NAME-full.json and NAME-full.md; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = record["name"] + "-full" * (record["scale"] == "full")
    data, text = (folder / f"{stem}.{suffix}" for suffix in ("json", "md"))
    data.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text.write_text(page(record), encoding="utf-8")
    return data, text
