"""The main job end to end at a small size, through the command line, and what its outputs must hold."""

import base64
import json
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import bkd_fast as bkd
from bkd_fast.app import cli, config, data, models
from bkd_fast.app.config import Config, ConfigError
from bkd_fast.app.run import Outputs, run

SMALL = [
    "data.train_size=200",
    "data.test_size=120",
    "teacher.model.hidden=[24]",
    "teacher.epochs=20",
    "teacher.batch_size=50",
    "teacher.lr=0.01",
    "student.model.hidden=[8]",
    "student.epochs=20",
    "student.batch_size=50",
    "student.lr=0.01",
    "sampling.warm_start=20",
    "sampling.burn_in=60",
    "sampling.thin=2",
    "sampling.num_draws=40",
    "posterior.keep=8",
]
FIGURES = {"intervals", "reliability", "risk_coverage", "coverage", "trace"}


class Page(HTMLParser):
    """What a test asks of a page: tags, image sources, links, the text, and whether every tag is closed."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.outside, self.sections, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag == "section":
            self.sections.append(attributes["id"])
        self.outside += [
            attributes[key] for key in ("src", "href") if not attributes.get(key, "data:").startswith("data:")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        self.words.append(words)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run by the command line, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "results"
    overrides = [part for override in [*SMALL, f"output={folder}"] for part in ("--set", override)]
    result = CliRunner().invoke(cli.app, ["demo", *overrides], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Outputs(folder), result.output


@pytest.fixture(scope="module")
def metrics(finished):
    outputs, _ = finished
    return json.loads(outputs.metrics.read_text())


def test_the_outputs_are_all_there_and_named(finished):
    outputs, printed = finished
    found = {path.relative_to(outputs.folder).as_posix() for path in outputs.folder.rglob("*") if path.is_file()}
    pngs = {f"figures/{name}.png" for name in FIGURES}
    assert (
        found
        == {"metrics.json", "report.html", "log.jsonl", "draws.safetensors", "draws.json", "teacher.safetensors"} | pngs
    )
    for name in ("report.html", "metrics.json", "figures", "draws.safetensors", "log.jsonl"):
        assert name in printed
    assert "BKD student" in printed


def test_the_metrics_are_those_of_a_run_that_learnt(metrics):
    assert metrics["data"] == {"name": "scikit-learn digits", "train_images": 200, "test_images": 120, "classes": 10}
    assert metrics["config"]["sampling"]["num_draws"] == 40
    assert metrics["models"]["bkd"]["parameters"] == 65 * 8 + 9 * 10
    for name in ("teacher", "kd", "bkd"):
        scores = metrics["models"][name]
        assert 0.5 < scores["accuracy"] <= 1
        assert 0 < scores["nll"] < 2.3
        assert 0 < scores["brier"] < 0.9
        assert 0 <= scores["ece"] < 0.5
        assert 0 <= scores["aurc"] <= 1 - scores["accuracy"] + 1e-12
    difference = metrics["bkd_minus_kd"]["accuracy"]["mean"]
    assert difference == pytest.approx(metrics["models"]["bkd"]["accuracy"] - metrics["models"]["kd"]["accuracy"])
    readings = metrics["deviance_coverage"]
    assert [reading["level"] for reading in readings] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
    for reading in ("plug_in", "averaged"):
        values = [entry[reading] for entry in readings]
        assert values == sorted(values)
        assert 0 <= values[0] <= values[-1] <= 1
    assert 0 < metrics["intervals"]["mean_length"] < 1
    assert len(metrics["health"]["noise_share"]) == len(metrics["health"]["stationarity"]) == 1
    assert all(seconds >= 0 for seconds in metrics["seconds"].values())


def test_the_log_tells_every_step_epoch_and_draw(finished):
    outputs, _ = finished
    events = [json.loads(line) for line in outputs.log.read_text().splitlines()]
    assert events[0]["event"] == "start"
    assert events[-1]["event"] == "end"
    assert sum(event["count"] for event in events if event["event"] == "steps") == 20 + 60 + 2 * 40
    assert [event["index"] for event in events if event["event"] == "draw"] == list(range(40))
    assert [event["step"] for event in events if event["event"] == "draw"] == list(range(82, 162, 2))
    for model in ("teacher", "student"):
        losses = [event["loss"] for event in events if event["event"] == "epoch" and event["model"] == model]
        assert len(losses) == 20
        assert losses[-1] < losses[0]


def test_the_report_is_one_well_formed_file_with_every_part(finished, metrics):
    outputs, _ = finished
    page = Page(outputs.report.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.outside == []
    assert page.sections == [
        "scores", "intervals", "reliability", "risk-coverage", "coverage", "chain", "throughput", "method",
    ]  # fmt: skip
    assert len(page.images) == len(FIGURES)
    drawn = {(outputs.figures / f"{name}.png").read_bytes() for name in FIGURES}
    assert {base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images} == drawn
    assert all(image["alt"] for image in page.images)
    for name in ("teacher", "kd", "bkd"):
        scores = metrics["models"][name]
        for shown in (f"{100 * scores['accuracy']:.2f} %", f"{scores['nll']:.4f}", f"{scores['brier']:.4f}"):
            assert shown in page.text
    assert f"{metrics['health']['noise_share'][0]:.4f}" in page.text
    assert "num_draws: 40" in page.text
    assert str(outputs.folder) not in page.text.replace(f"output: {outputs.folder}", "")


def test_the_figures_are_pictures_with_something_on_them(finished):
    from matplotlib.image import imread

    outputs, _ = finished
    for name in FIGURES:
        pixels = imread(outputs.figures / f"{name}.png")
        assert pixels.shape[1] >= 700
        assert (pixels[..., :3] < 0.5).any(axis=-1).mean() > 0.002


def test_the_kept_draws_predict_new_images(finished):
    outputs, _ = finished
    small = Config.build({}, SMALL)
    images = data.load(small.data, small.seed)
    student = models.build(config.MLP(hidden=[8]), images.shape, images.num_classes, seed=99)
    draws = bkd.Draws(outputs.draws, student)
    assert 4 <= len(draws) <= 8
    mean = draws.predict(images.test_x).mean
    assert (mean.argmax(1) == images.test_y).double().mean() > 0.5


def quick(folder, *more):
    return Config.build({}, [*SMALL, "sampling.num_draws=10", "sampling.burn_in=10", f"output={folder}", *more])


def test_a_run_repeats_itself_and_another_leaves_nothing_of_it(tmp_path):
    outputs = Outputs(tmp_path / "results")
    threads = torch.get_num_threads()
    first = run(quick(outputs.folder, f"threads={2 if threads == 1 else 1}"), Console(quiet=True))
    assert torch.get_num_threads() == threads
    again = run(first.config, Console(quiet=True))
    assert (first.teacher_reused, again.teacher_reused) == (False, True)
    assert torch.equal(first.bkd.probs, again.bkd.probs)
    assert torch.equal(first.lower, again.lower)

    (outputs.figures / "stale.png").write_bytes(b"")
    other = run(quick(outputs.folder, "seed=1", "student.model.hidden=[6]"), Console(quiet=True))
    assert not other.teacher_reused
    assert not torch.equal(first.teacher.probs, other.teacher.probs)
    assert {path.stem for path in outputs.figures.iterdir()} == FIGURES
    assert json.loads(outputs.metrics.read_text())["models"]["bkd"]["architecture"] == "64-6-10"


def test_a_small_cnn_on_mnist_from_a_file(tmp_path, monkeypatch):
    import numpy as np

    generator = np.random.default_rng(0)
    labels = np.arange(400) % 10
    pixels = generator.integers(0, 60, (400, 28, 28))
    for row, label in enumerate(labels):
        pixels[row, 2 * label : 2 * label + 6, 4:24] += 180  # a bar at the height of the class
    arrays = {"x_train": pixels[:300], "y_train": labels[:300], "x_test": pixels[300:], "y_test": labels[300:]}
    np.savez(tmp_path / "mnist.npz", **{name: array.astype(np.uint8) for name, array in arrays.items()})
    monkeypatch.setenv("BKD_FAST_DATA", str(tmp_path))
    cnn = "{name: cnn, channels: [8, 16], hidden: [32]}"
    more = ["data.name=mnist", "data.train_size=null", "data.test_size=null", "student.lr=0.003", "sampling.lr=0.001"]
    results = run(
        quick(tmp_path / "results", *more, f"teacher.model={cnn}", f"student.model={cnn}"),
        Console(quiet=True),
    )
    assert results.images.name == "MNIST"
    assert results.scores["bkd"].accuracy > 0.8


def test_errors_come_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("BKD_FAST_DATA", raising=False)
    folder = tmp_path / "results"
    with pytest.raises(data.DataUnavailableError):
        run(quick(folder, "data.name=mnist"), Console(quiet=True))
    with pytest.raises(ConfigError, match="can be halved"):
        run(
            quick(folder, "student.model={name: cnn, channels: [1, 1, 1, 1], hidden: []}"),
            Console(quiet=True),
        )
    assert not folder.exists()
