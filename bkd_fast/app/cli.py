"""The command line: `bkd-fast run`, `demo`, `reproduce` and `doctor`."""

import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import bkd_fast
from bkd_fast.app.config import Config, ConfigError, read
from bkd_fast.app.data import DataUnavailableError

if TYPE_CHECKING:
    from bkd_fast.app.results import Results
    from bkd_fast.app.scale.config import ScaleConfig

app = typer.Typer(
    name="bkd-fast",
    help="Bayesian knowledge distillation: from a teacher to the posterior of its student, and a report on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. sampling.num_draws=10; may be repeated."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bkd_fast {bkd_fast.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Bayesian knowledge distillation: from a teacher to the posterior of its student, and a report on it."""


@app.command("run")
def run_command(
    config: Annotated[Path, typer.Argument(help="A YAML file; examples/ has some.", show_default=False)],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check paths, memory and time per step (kind: images), and run nothing.")
    ] = False,
) -> None:
    """Run a configuration: teacher, distilled student, posterior, report. Under torchrun, on all of its processes."""
    if dry_run:
        _dry_run(config, overrides or [])
        return
    _run_and_summarise(lambda: load(config, overrides or []))


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Run the demo: scikit-learn's digits, from teacher to report, in about a minute."""
    _run_and_summarise(lambda: Config.build({}, overrides or [], source="demo"))


@app.command()
def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="An experiment; without one, they are listed.", show_default=False)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="At the published scale: hours. Otherwise minutes.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many runs (default: as the experiment has it).")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/reproduce"),
) -> None:
    """Run a published experiment again: its table beside the published figures, as NAME.md and .json (--full: NAME-full)."""
    from bkd_fast.app import experiments
    from bkd_fast.app.experiments import experiment

    if name is None:
        for known in experiments.MODULES:
            typer.echo(f"{known:24} {experiments.load(known).title}")
        return
    if name not in experiments.MODULES:
        near = difflib.get_close_matches(name, experiments.MODULES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        typer.echo(f"Error: NAME = {name!r}: {hint}must be one of {', '.join(experiments.MODULES)}", err=True)
        raise typer.Exit(2)
    chosen = experiments.load(name)
    try:
        record = experiment.reproduce(chosen, "full" if full else "quick", range(seeds or chosen.seeds))
    except (DataUnavailableError, ImportError) as error:
        extras = " (pip install 'bkd_fast[app,export]')" if isinstance(error, ImportError) else ""
        typer.echo(f"Error: {error}{extras}", err=True)
        raise typer.Exit(2) from error
    typer.echo(experiment.page(record))
    for path in experiment.save(record, output):
        typer.echo(f"  {path}")


@app.command()
def doctor() -> None:
    """Say which backends and instruction sets work here, and why the others do not.

    Exit code 1: one of them gives wrong results.
    """
    from bkd_fast.app import doctor as diagnosis

    console = Console()
    about = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in diagnosis.versions().items():
        about.add_row(name, value)
    console.print(about)
    table = Table("backend", "devices", "state", "why", title_justify="left")
    findings = diagnosis.examine()
    for finding in findings:
        table.add_row(finding.name, finding.devices, finding.state, finding.reason)
    console.print(table)
    if any(finding.state == diagnosis.WRONG for finding in findings):
        raise typer.Exit(1)


def load(path: Path, overrides: Sequence[str]) -> "Config | ScaleConfig":
    """The configuration of a file, of the kind that it says.

    Raises:
        ConfigError: as `Config.load`.
    """
    if read(path).get("kind") == "images":
        from bkd_fast.app.scale.config import ScaleConfig

        return ScaleConfig.load(path, overrides)
    return Config.load(path, overrides)


def _dry_run(path: Path, overrides: Sequence[str]) -> None:
    console = Console()
    try:
        config = load(path, overrides)
        if isinstance(config, Config):
            raise ConfigError(f"{path}: --dry-run is for kind: images")
        from bkd_fast.app.scale.dry_run import examine

        rows, problems = examine(config)
    except (ConfigError, DataUnavailableError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    for problem in problems:
        typer.echo(f"Problem: {problem}", err=True)
    if problems:
        raise typer.Exit(2)


def _run_and_summarise(load: "Callable[[], Config | ScaleConfig]") -> None:
    """Load the configuration, run it and print the table; what a user can mend ends with exit code 2."""
    console = Console()
    try:
        config = load()
        # heavy imports: only once there is something to run
        from bkd_fast.app.run import Outputs, run

        if isinstance(config, Config):
            results: Results | None = run(config, console)
        else:
            from bkd_fast.app.scale.run import run as run_on_images

            results = run_on_images(config, console)
    except (ConfigError, DataUnavailableError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except bkd_fast.NonFiniteError as error:
        typer.echo(
            f"Error: {error}\nThe training or the chain diverged: lower sampling.lr or the lr of the model.", err=True
        )
        raise typer.Exit(1) from error
    if results is None:  # on the first process
        return
    _summarise(results, console)
    outputs = Outputs(config.output)
    for path in (outputs.report, outputs.metrics, outputs.figures, outputs.draws, outputs.log):
        if not path.exists():  # one file for each chain
            continue
        console.print(f"  {path}", highlight=False, soft_wrap=True)


def _summarise(results: "Results", console: Console) -> None:
    table = Table(title=results.config.title, title_justify="left", title_style="bold")
    for heading in ("model", "parameters", "accuracy", "NLL", "Brier", "ECE", "AURC"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for prediction in results.predictions:
        score = results.scores[prediction.key]
        table.add_row(
            prediction.name,
            f"{prediction.parameters:,}",
            f"{100 * score.accuracy:.2f} %",
            f"{score.nll:.4f}",
            f"{score.brier:.4f}",
            f"{100 * score.ece:.2f} %",
            f"{100 * score.aurc:.3f} %",
        )
    console.print(table)
    level = results.config.posterior.level
    noise = max(results.trace.noise_share, default=float("nan"))
    drift = max(results.trace.stationarity, key=abs, default=float("nan"))
    stationarity = f", stationarity {drift:+.3f}" if not math.isnan(drift) else ""
    console.print(
        f"{100 * level:g} % deviance intervals cover {100 * results.covered.plug_in:.1f} % of the labels. "
        f"Noise share {noise:.4f}{stationarity}. "
        f"{results.throughput['steps_per_second']:,.0f} steps/s; {results.timings.total:.0f} s in all.",
        highlight=False,
    )
