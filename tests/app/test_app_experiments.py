"""`bkd-fast reproduce`: every experiment runs end to end at tiny settings, and the tables say what was found."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bkd_fast.app import cli, experiments
from bkd_fast.app.data import DataUnavailableError
from bkd_fast.app.experiments.experiment import Experiment, page, reproduce, save, table

RECORDS = sorted((Path(__file__).parents[2] / "docs" / "reproductions").glob("*.json"))


@dataclass(frozen=True)
class Settings:
    size: int = 3
    several: tuple[int, ...] = (1, 2)


def experiment(**changes) -> Experiment[Settings]:
    def run(seed: int, settings: Settings):
        assert torch.get_num_threads() == 1
        return {"ours": {"accuracy": 0.5 + 0.01 * seed, "nll": math.nan}, "base": {"accuracy": settings.size / 4}}

    arguments = {
        "name": "made-up",
        "title": "A made-up experiment",
        "source": "Nobody (1900), Table 1",
        "comparison": "same method, other data",
        "run": run,
        "full": Settings(2),
        "quick": Settings(),
        "tiny": Settings(1),
        "columns": ("accuracy", "nll"),
        "published": {"ours": {"accuracy": 0.7}, "theirs alone": {"accuracy": 0.25}},
        "deviations": ("nothing is measured",),
    }
    return Experiment(**(arguments | changes))


def test_a_table_has_means_errors_and_the_published_figures_beside_them():
    text = table(reproduce(experiment(), "quick", [0, 2, 4]))
    assert text.splitlines() == [
        "|  | accuracy | published | nll |",
        "|---|---|---|---|",
        "| ours | 0.520 ± 0.012 | 0.7 |  |",
        "| base | 0.75 |  |  |",
        "| theirs alone |  | 0.25 |  |",
    ]


def test_one_seed_has_no_error_and_nothing_published_no_column():
    text = table(reproduce(experiment(published={}), "tiny", [1]))
    assert text.splitlines()[0] == "|  | accuracy | nll |"
    assert "| ours | 0.51 |  |" in text and "| base | 0.25 |  |" in text


def test_rounding_is_no_error_and_small_numbers_have_exponents():
    def run(seed: int, settings: Settings):
        return {"ours": {"accuracy": 0.97 + 1e-17 * seed, "nll": 4e-10 * (seed - 1)}}

    text = table(reproduce(experiment(run=run, published={}), "tiny", [0, 1, 2, 3]))
    assert text.splitlines()[2] == "| ours | 0.97 | 2.0e-10 ± 2.6e-10 |"


def test_a_page_says_what_was_run_and_how_to_read_it(tmp_path):
    before = torch.get_num_threads()
    record = reproduce(experiment(), "full", [0, 1])
    assert torch.get_num_threads() == before
    data, text = save(record, tmp_path / "new")
    assert (data.name, text.name) == ("made-up-full.json", "made-up-full.md")
    shown = text.read_text()
    for part in (
        "not the published setting",
        "made-up --full --seeds 2",
        "* nothing is measured",
        "size = 2",
        "Table 1",
    ):
        assert part in shown
    assert page(json.loads(data.read_text())) == shown


def test_a_quick_run_may_be_less_than_the_published_setting():
    made_up = experiment(comparison="same data, same protocol", quick_comparison="same method, other data")
    shown = {scale: page(reproduce(made_up, scale, [0])) for scale in ("full", "quick")}
    assert "compare the numbers." in shown["full"] and "not the published setting" in shown["quick"]


@pytest.mark.parametrize("name", experiments.MODULES)
def test_every_experiment_runs(name):
    chosen = experiments.load(name)
    try:
        record = reproduce(chosen, "tiny", [0])
    except DataUnavailableError as error:
        pytest.skip(str(error))
    if chosen.published:  # tiny settings may have fewer rows
        assert {*chosen.published} & {*record["results"]}, "nothing is quoted that has no counterpart"
    for row, figures in record["results"].items():
        for figure, (mean, _) in figures.items():
            assert mean is not None, (row, figure)
    for column in chosen.columns:
        assert any(column in figures for figures in record["results"].values()), column
    assert page(record).count("\n") > 10


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_page_of_the_documentation_is_what_was_measured(path):
    record = json.loads(path.read_text())
    assert record["name"] == path.stem.removesuffix("-full") in experiments.MODULES
    assert record["scale"] == ("full" if path.stem.endswith("-full") else "quick")
    assert page(record) == path.with_suffix(".md").read_text()
    # figures of the paper and deviations are today's, not those of the day of the run
    chosen = experiments.load(record["name"])
    assert record["published"] == {row: dict(figures) for row, figures in chosen.published.items()}
    assert record["deviations"] == list(chosen.deviations)


def test_the_command_lists_experiments_and_suggests_the_nearest():
    runner = CliRunner()
    listed = runner.invoke(cli.app, ["reproduce"])
    assert listed.exit_code == 0
    for name in experiments.MODULES:
        assert name in listed.output
    found = runner.invoke(cli.app, ["reproduce", "no-such-thing"])
    assert found.exit_code == 2 and "NAME = 'no-such-thing': " in found.output


def test_the_command_writes_both_files_and_prints_the_page(tmp_path, monkeypatch):
    monkeypatch.setitem(experiments.MODULES, "made-up", "nowhere")
    monkeypatch.setattr(experiments, "load", lambda name: experiment(name=name))
    done = CliRunner().invoke(cli.app, ["reproduce", "made-up", "--seeds", "2", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "# A made-up experiment" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made-up.json", "made-up.md"]
    assert json.loads((tmp_path / "made-up.json").read_text())["seeds"] == [0, 1]
