"""The examples inside other people's training code, run as a user runs them, and the posteriors that come out.

Two of them change checkouts: BKD_FAST_TORCHVISION_SRC names one of pytorch/vision, BKD_FAST_TIMM_SRC one of
huggingface/pytorch-image-models; without, they are skipped.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import stats
import torch
import torchvision_here
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import bkd_fast as bkd

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE = {"warm_start": 30, "burn_in": 30, "epochs": 160}  # epochs of ten steps
DIGITS = 0.95 - stats.SIGMAS * 0.008  # accuracy on 797 digits is some 95 %: standard error .8 %
CHANCE = 0.1 + stats.SIGMAS * (0.1 * 0.9 / 200) ** 0.5  # guesses at 200 images do better 3 times in a million
TINY = {"warm_start": 2, "burn_in": 2, "epochs": 8, "draw_every": 5}


def _module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _example(name, needs):
    """An example as a module; skips where the library that it is written for is missing."""
    if importlib.util.find_spec("torchvision"):  # which they import
        torchvision_here.make_importable()
    pytest.importorskip(needs)
    return _module(name)


def _run_lightning(example, folder, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")  # how many workers a loader could have
        return example.main(accelerator="cpu", default_root_dir=folder, **quiet, **arguments)


def _assert_posterior(posterior, draws, labels, accuracy):
    """Every row has the draws, the accuracy is above that, and intervals have a width."""
    assert (posterior.counts == draws).all()
    assert float((posterior.mean.argmax(-1) == labels).float().mean()) > accuracy
    lower, upper = posterior.interval(0.95)
    assert (upper > lower).all() and (lower >= 0).all() and (upper <= 1).all()


def _assert_same_draws(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.interval(0.5), other.interval(0.5), strict=True))
    assert torch.equal(one.mean, other.mean)


def test_lightning_module(tmp_path, capsys):
    example = _example("lightning_module", "lightning")
    module, labels = _run_lightning(example, tmp_path, enable_checkpointing=False, **SIZE)
    _assert_posterior(module.posterior, 100, labels, DIGITS)
    assert "from 100 draws" in capsys.readouterr().out


def test_a_lightning_run_resumes(tmp_path):
    """Temperature, chain and posterior come back; the order of the data is the loader's affair."""
    example = _example("lightning_module", "lightning")
    first, _ = _run_lightning(example, tmp_path, **{**TINY, "epochs": 6})
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    resumed, _ = _run_lightning(example, tmp_path / "resumed", resume=checkpoint, **TINY)
    group = resumed.trainer.optimizers[0].param_groups[0]
    assert group["step"] == 80 and group["temperature"] == 1.0
    assert (first.posterior.counts == 4).all() and (resumed.posterior.counts == 8).all()
    assert resumed.posterior.streams == [(first.posterior.streams[0][0], (0, 8))]


def test_one_seed_one_chain_in_lightning(tmp_path):
    example = _example("lightning_module", "lightning")
    runs = [_run_lightning(example, tmp_path, enable_checkpointing=False, **TINY)[0].posterior for _ in range(2)]
    _assert_same_draws(*runs)


@pytest.fixture
def accelerate_loop():
    example = _example("accelerate_loop", "accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield example
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_loop(accelerate_loop, capsys):
    posterior, labels = accelerate_loop.main(**SIZE)
    _assert_posterior(posterior, 100, labels, DIGITS)
    assert "from 100 draws" in capsys.readouterr().out


def test_one_seed_one_chain_in_accelerate(accelerate_loop):
    _assert_same_draws(*(accelerate_loop.main(**TINY)[0] for _ in range(2)))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """scikit-learn's digits as folders of images: 600 to train with, 200 to validate."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for i, (image, label) in enumerate(zip(images[:800], labels[:800], strict=True)):
        path = folder / ("train" if i < 600 else "val") / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (image.reshape(8, 8) * 15.9).astype("uint8")
        Image.fromarray(pixels).convert("RGB").resize((32, 32)).save(path)
    return folder


def _labels(folder):
    """In the order of an ImageFolder."""
    return torch.tensor([int(path.parent.name) for path in sorted(folder.rglob("*.png"))])


def _save_teacher(network, folder, path, mean, std):
    """Train a network on the digits without augmentation; its state_dict goes to a file."""
    pixels = torch.stack([torch.tensor(np.asarray(Image.open(file))) for file in sorted(folder.rglob("*.png"))])
    x = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    y = _labels(folder)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    torch.save(network.state_dict(), path)


def _checkout(variable, script):
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout")
    folder = Path(os.environ[variable])
    assert (folder / script).is_file(), f"{variable} = {folder}: has no {script}"
    return folder


def _run_example(name, *arguments):
    """In a process of its own, seeded: torchvision's script seeds nothing."""
    lines = (
        "import runpy, sys, torch, torchvision_here",
        "torchvision_here.make_importable()",
        "torch.manual_seed(0)",
        f"sys.path[0] = {str(EXAMPLES)!r}",
        f"runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')",
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(EXAMPLES.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


SAMPLING = {
    "--warm-start": 6, "--burn-in": 1, "--epochs": 10, "--sampling-lr": 3e-4, "--draw-every": 3, "--prior-strength": 2,
    "--weight-decay": 1e-3, "--device": "cpu", "--batch-size": 50,
}  # fmt: skip


def _posteriors(name, checkout, arguments, output, folder):
    """Of two runs of an example: `output` is their argument for a folder."""
    for run in ("one", "other"):
        (folder / run).mkdir()
        given = {**SAMPLING, **arguments, output: folder / run}
        _run_example(name, checkout, *(part for item in given.items() for part in item))
        yield bkd.PosteriorPredictive.load(folder / run / "posterior_0_from_0")


def test_torchvision_reference(digits, tmp_path):
    checkout = _checkout("BKD_FAST_TORCHVISION_SRC", "references/classification/train.py")
    torchvision_here.make_importable()
    from torchvision.models import shufflenet_v2_x0_5

    weights = tmp_path / "teacher.pth"
    network = shufflenet_v2_x0_5(num_classes=10)
    _save_teacher(network, digits / "train", weights, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    arguments = {
        "--data-path": digits, "--model": "shufflenet_v2_x0_5", "--teacher": "shufflenet_v2_x0_5", "--teacher-weights": weights,
        "--train-crop-size": 32, "--val-crop-size": 32, "--val-resize-size": 32, "--lr": 0.02, "--workers": 0,
    }  # fmt: skip
    one, other = _posteriors("torchvision_reference.py", checkout, arguments, "--output-dir", tmp_path)
    _assert_posterior(one, 12, _labels(digits / "val"), CHANCE)
    _assert_same_draws(one, other)


def test_timm_train(digits, tmp_path):
    checkout = _checkout("BKD_FAST_TIMM_SRC", "train.py")
    torchvision_here.make_importable()
    timm = pytest.importorskip("timm")
    weights = tmp_path / "teacher.pth"
    _save_teacher(timm.create_model("test_resnet", num_classes=10), digits / "train", weights, [0.5] * 3, [0.5] * 3)
    arguments = {
        "--data-dir": digits, "--model": "test_resnet", "--num-classes": 10, "--kd-model-name": "test_resnet",
        "--kd-weights": weights, "--kd-temperature": 1, "--img-size": 32, "--lr": 0.05, "--workers": 1,
    }  # fmt: skip
    one, other = _posteriors("timm_train.py", checkout, arguments, "--output", tmp_path)
    _assert_posterior(one, 12, _labels(digits / "val"), CHANCE)
    _assert_same_draws(one, other)


def test_a_script_of_another_version_is_refused(tmp_path):
    script = _module("edited_script")
    path = tmp_path / "train.py"
    path.write_text("a = 1\nb = 2\nb = 2\n")
    assert script.edited(path, {"a = 1\n": "a = 3\n"}, "v1") == "a = 3\nb = 2\nb = 2\n"
    for line, times in (("b = 2", 2), ("c = 3", 0)):
        with pytest.raises(ValueError, match=f"{times} times, and must have once, as v1 has:\n{line}"):
            script.edited(path, {line: ""}, "v1")


def test_the_documented_lines_are_those_of_the_examples(monkeypatch):
    """docs/frameworks.md: what a listing adds is in the example, and what it takes away is what the example looks for."""
    monkeypatch.syspath_prepend(EXAMPLES)
    text = (EXAMPLES.parent / "docs" / "frameworks.md").read_text()
    listings = [listing.split("```")[0].splitlines() for listing in text.split("```diff\n")[1:]]
    names = ["lightning_module", "accelerate_loop", "torchvision_reference", "timm_train"]
    for name, listing in zip(names, listings, strict=True):
        edits = _module(name).EDITS if name in names[2:] else None
        new = (EXAMPLES / f"{name}.py").read_text() if edits is None else "".join(edits.values())
        old = None if edits is None else "".join(edits)
        for line in listing:
            if line.startswith("+"):
                assert f"{line[1:]}\n" in new, (name, line)
            if line.startswith("-") and old is not None:
                assert f"{line[1:]}\n" in old, (name, line)
