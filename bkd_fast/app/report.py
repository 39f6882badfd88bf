"""The report of a run: one HTML file that needs nothing beside it, images and style included."""

import base64
from pathlib import Path

import jinja2
import yaml

from bkd_fast.app.results import Results
from bkd_fast.app.scores import Difference

# above it the chain is noticeably hotter than it was told to be
NOISE_SHARE_LIMIT = 0.1

BETTER = {"accuracy": max, "nll": min, "brier": min, "ece": min, "error_auroc": max, "aurc": min}


def write(results: Results, figures: dict[str, Path], path: Path) -> None:
    """Render the report with the figures (PNG files by name) inlined."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bkd_fast.app", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "percent": _percent, "signed": _signed, "duration": _duration}
    template = environment.get_template("report.html.jinja")
    page = template.render(
        results=results,
        config=results.config,
        scores=results.scores,
        best=_best(results),
        differences=_comparison(results),
        verdict=_sentence(results),
        covered=results.covered,
        noise_share_limit=NOISE_SHARE_LIMIT,
        figures={name: _inline(file) for name, file in figures.items()},
        configuration=yaml.safe_dump(results.config.model_dump(mode="json"), sort_keys=False, default_flow_style=None),
    )
    path.write_text(page, encoding="utf-8")


def _best(results: Results) -> dict[str, set[str]]:
    """Per score, the keys of the predictions that have the best value."""
    scores = results.scores
    best: dict[str, set[str]] = {}
    for name, better in BETTER.items():
        values = {key: getattr(score, name) for key, score in scores.items() if getattr(score, name) is not None}
        best[name] = {key for key, value in values.items() if value == better(values.values())} if values else set()
    return best


def _comparison(results: Results) -> list[dict[str, str]]:
    """Rows of the paired comparison: what, BKD minus KD with its standard error, and what to make of it."""
    scale = {"accuracy": (100.0, 2, " points"), "nll": (1.0, 4, " nats"), "brier": (1.0, 4, "")}
    names = {"accuracy": "Accuracy", "nll": "NLL", "brier": "Brier score"}
    rows = []
    for name, difference in results.differences.items():
        factor, digits, unit = scale[name]
        mean, error = factor * difference.mean, factor * difference.standard_error
        rows.append(
            {
                "name": names[name],
                "value": f"{_signed(mean, digits)} ± {error:.{digits}f}{unit}",
                "verdict": _verdict(difference, higher_is_better=name == "accuracy"),
            }
        )
    return rows


def _sentence(results: Results) -> str:
    """The comparison in words, the scores grouped by their verdict."""
    names = {"accuracy": "accuracy", "nll": "NLL", "brier": "Brier score"}
    groups: dict[str, list[str]] = {"BKD better": [], "KD better": [], "no clear difference": []}
    for name, difference in results.differences.items():
        groups[_verdict(difference, higher_is_better=name == "accuracy")].append(names[name])
    words = {
        "BKD better": "BKD is better in ",
        "KD better": "BKD is worse in ",
        "no clear difference": "there is no clear difference in ",
    }
    parts = [words[verdict] + _enumerate(group) for verdict, group in groups.items() if group]
    return f"Against KD, image by image, {'; '.join(parts)}."


def _enumerate(names: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _verdict(difference: Difference, *, higher_is_better: bool) -> str:
    if difference.verdict == "no clear difference":
        return difference.verdict
    return "BKD better" if (difference.mean > 0) == higher_is_better else "KD better"


def _inline(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def _count(value: float) -> str:
    """1234567 -> 1,234,567."""
    return f"{value:,.0f}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
