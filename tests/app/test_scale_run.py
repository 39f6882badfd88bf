"""Runs on images: data, networks, the run itself with every kind of teacher, alone and on several processes."""

import contextlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from rich.console import Console
from safetensors import safe_open
from torchvision_here import make_importable
from typer.testing import CliRunner

import bkd_fast as bkd
from bkd_fast import BKDFastWarning
from bkd_fast.app.cli import app
from bkd_fast.app.config import ConfigError
from bkd_fast.app.data import DataUnavailableError
from bkd_fast.app.scale import images, networks, upper
from bkd_fast.app.scale.config import ImageFiles, Runtime, ScaleConfig
from bkd_fast.app.scale.dry_run import examine
from bkd_fast.app.scale.images import UndecodableImageError
from bkd_fast.app.scale.run import Place, run

make_importable()

CLASSES, TRAIN, TEST, SIZE = 3, 8, 3, 32  # images of each class; pixels


def picture(generator: np.random.Generator, label: int) -> Image.Image:
    pixels = generator.integers(0, 120, (40, 44, 3))
    pixels[..., label] += 120
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """train/ and test/ with a folder a class, and the same as archives."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("test", TEST)):
        blobs, labels = [], []
        for label in range(CLASSES):
            (root / part / f"n{label}").mkdir(parents=True)
            for i in range(count):
                file = root / part / f"n{label}" / f"{i}.jpeg"
                picture(generator, label).save(file, quality=95)
                blobs.append(file.read_bytes())
                labels.append(label)
        offsets = np.cumsum([0, *map(len, blobs)])
        blob = np.frombuffer(b"".join(blobs), np.uint8)
        np.savez(root / f"{part}.npz", blob=blob, offsets=offsets, labels=np.array(labels))
    return root


def files(folder: Path, **settings) -> ImageFiles:
    return ImageFiles(train=folder / "train", test=folder / "test", size=SIZE, resize=36, workers=0, **settings)


def config(folder: Path, output: Path, *overrides: str) -> ScaleConfig:
    training = {"epochs": 2, "batch_size": 8, "lr": 0.05}
    network = {"model": "timm:test_resnet", "training": training}
    values = {
        "output": str(output),
        "data": files(folder).model_dump(mode="json"),
        "teacher": network,
        "student": network,
        "sampling": {
            "lr": 0.001,
            "batch_size": 8,
            "warm_start": 2,
            "burn_in": 3,
            "thin": 2,
            "num_draws": 4,
            "log_every": 2,
        },
        "posterior": {"keep": 2},
        "checkpoints": {"every": 4},
    }
    return ScaleConfig.build(values, overrides)


# ---- images ----


def test_a_folder_and_an_archive_are_the_same_images(folder) -> None:
    ours = images.load(files(folder), 0)
    theirs = images.load(ImageFiles(train=folder / "train.npz", test=folder / "test.npz", size=SIZE, resize=36), 0)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.labels, b.labels) and len(a) == len(b) and a.labels.bincount().unique().numel() == 1
        assert torch.equal(a[5][0], b[5][0]) and a[5][0].shape == (3, SIZE, SIZE)
    assert ours[0].source.class_names == ("n0", "n1", "n2")


def test_a_view_is_what_seed_image_and_number_make_it(folder) -> None:
    train, _ = images.load(files(folder), 3)
    before = torch.get_rng_state()
    view = train[5, 2][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(train[5, 2][0], view) and torch.equal(images.load(files(folder), 3)[0][5, 2][0], view)
    for other in (train[5, 3][0], train[6, 2][0], images.load(files(folder), 4)[0][5, 2][0], train[5][0]):
        assert not torch.equal(other, view)


def broken(folder: Path, tmp_path: Path) -> Path:
    import shutil

    root = tmp_path / "broken"
    shutil.copytree(folder, root)
    (root / "train" / "n1" / "3.jpeg").write_bytes(b"no image")
    data = (root / "train" / "n2" / "0.jpeg").read_bytes()
    (root / "train" / "n2" / "0.jpeg").write_bytes(data[: len(data) // 2])
    return root


def test_images_that_cannot_be_decoded_are_named(folder, tmp_path) -> None:
    root = broken(folder, tmp_path)
    train, _ = images.load(files(root), 0)
    for index, name in ((TRAIN + 3, "n1/3.jpeg"), (2 * TRAIN, "n2/0.jpeg")):
        with pytest.raises(UndecodableImageError, match=f"{name} cannot be decoded .*data.undecodable=exclude"):
            train[index]
    with pytest.warns(BKDFastWarning, match=r"2 images cannot be decoded and are left out: .*n1/3.jpeg, .*n2/0.jpeg\."):
        train, test = images.load(files(root, undecodable="exclude"), 0)
    assert len(train) == CLASSES * TRAIN - 2 and len(test) == CLASSES * TEST
    assert all(train[i][0].isfinite().all() for i in range(len(train)))


def test_images_that_are_not_there(folder, tmp_path) -> None:
    with pytest.raises(DataUnavailableError, match="nowhere"):
        images.load(ImageFiles(train=folder / "nowhere", test=folder / "test"), 0)
    with pytest.raises(DataUnavailableError, match=r"nowhere.npz: is no .npz file"):
        images.load(ImageFiles(train=folder / "nowhere.npz", test=folder / "test"), 0)
    (tmp_path / "one").mkdir()
    buffer = io.BytesIO()
    picture(np.random.default_rng(0), 0).save(buffer, "jpeg")
    (tmp_path / "one" / "a.jpeg").write_bytes(buffer.getvalue())
    with pytest.raises(DataUnavailableError, match=r"has 3 classes and .* 1: must be the same"):
        images.load(ImageFiles(train=folder / "train", test=tmp_path), 0)
    with pytest.raises(ConfigError, match=r"data.train_size = 99: must be at most 24"):
        images.load(files(folder, train_size=99), 0)


# ---- networks ----


def test_names_that_no_library_knows() -> None:
    with pytest.raises(ConfigError, match="torchvision:resnet81: must be a model of torchvision, such as resnet18"):
        networks.build("torchvision:resnet81", 3, 0)
    with pytest.raises(ConfigError, match="timm:test_resnett: must be a model of timm, such as test_resnet"):
        networks.build("timm:test_resnett", 3, 0)


def test_a_network_is_its_name_and_seed(tmp_path) -> None:
    before = torch.get_rng_state()
    first, second = (networks.build("timm:test_resnet", 5, 1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    from safetensors.torch import save_file

    save_file(first.state_dict(), tmp_path / "w.safetensors")
    networks.load_weights(networks.build("timm:test_resnet", 5, 2), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"w.safetensors: are of another network"):
        networks.load_weights(networks.build("timm:test_resnet", 6, 2), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"nothing.safetensors: cannot be read"):
        networks.load_weights(first, tmp_path / "nothing.safetensors")


def test_half_precision_and_another_memory_format_change_little() -> None:
    x = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    plain, other = (
        networks.prepared(networks.build("timm:test_resnet", 5, 1), runtime, torch.device("cpu")).eval()(x)
        for runtime in (Runtime(device="cpu"), Runtime(device="cpu", bf16=True, channels_last=True))
    )
    assert other.dtype == torch.float32 and not torch.equal(plain, other)
    torch.testing.assert_close(other, plain, rtol=0.05, atol=0.05)


# ---- the run ----


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    run(config(folder, output), Console(quiet=True))
    return output


def test_a_run_ends_with_figures_and_report(done) -> None:
    found = metrics(done)
    assert found["data"] == {"name": "train", "train_images": 24, "test_images": 9, "classes": 3}
    assert set(found["models"]) == {"teacher", "kd", "bkd"} and found["teacher_reused"] is False
    assert "<h1>Bayesian knowledge distillation</h1>" in (done / "report.html").read_text()
    assert len(list((done / "figures").glob("*.png"))) == 5
    events = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    assert {event["part"] for event in events if event["event"] == "steps"} == {"teacher", "student", "chain"}
    card = json.loads((done / "draws-0.json").read_text())
    assert card["draws"]


def test_it_goes_on_for_more_draws_and_repeats_nothing(done, folder) -> None:
    before, weights = metrics(done), (done / "student.safetensors").read_bytes()
    run(config(folder, done, "sampling.num_draws=6"), Console(quiet=True))
    after = metrics(done)
    assert after["teacher_reused"] and (done / "student.safetensors").read_bytes() == weights
    for name in ("teacher", "kd"):
        assert after["models"][name] == before["models"][name]
    assert after["models"]["bkd"] != before["models"]["bkd"]
    with pytest.raises(ConfigError, match=r"holds a run with student.training.lr = 0.05, which is 0.1 here"):
        run(config(folder, done, "student.training.lr=0.1"), Console(quiet=True))


@pytest.mark.parametrize("mode", [("clean", "teacher.top_k=2"), ("views", "teacher.views=2")])
def test_a_cached_teacher_is_written_once(folder, tmp_path, mode, monkeypatch) -> None:
    settings = config(folder, tmp_path / "out", f"teacher.mode={mode[0]}", mode[1], "sampling.num_draws=2")
    run(settings, Console(quiet=True))
    rows = (tmp_path / "out" / "teacher-logits" / "rows.bin").read_bytes()
    monkeypatch.setattr("bkd_fast.record_teacher", lambda *a, **k: [None for _ in a[1]])  # nothing is left to record
    run(settings, Console(quiet=True))
    assert (tmp_path / "out" / "teacher-logits" / "rows.bin").read_bytes() == rows


def on_processes(folder: Path, output: Path, overrides: tuple[str, ...]) -> None:
    import torch.distributed as dist

    os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"] = str(dist.get_world_size()), str(dist.get_rank())
    results = run(config(folder, output, *overrides), Console(quiet=True))
    assert (results is None) == (dist.get_rank() > 0)
    if results is not None:
        assert results.bkd.probs.shape == (9, 3) and bool(results.lower.isfinite().all())
        torch.save(results.bkd.probs, output / "probs.pt")


def test_chains_share_a_run(folder, tmp_path) -> None:
    output, overrides = tmp_path / "out", ("processes.chains=2", "sampling.num_draws=3")
    in_processes(2, on_processes, tmp_path, folder, output, overrides)
    assert sorted(path.name for path in output.glob("draws-*.safetensors")) == [
        f"draws-{k}.safetensors" for k in range(2)
    ]
    probs = torch.load(output / "probs.pt")
    in_processes(2, on_processes, tmp_path, folder, output, overrides)  # with nothing left to do
    assert torch.equal(torch.load(output / "probs.pt"), probs)


def test_shards_of_which_one_has_no_test_images_share_a_run(folder, tmp_path) -> None:
    """Nine test images on four processes are 3, 3, 3 and 0: forward passes that differ in number must not upset FSDP2."""
    output, overrides = tmp_path / "out", ("processes.shards=2", "teacher.mode=clean", "sampling.num_draws=3")
    in_processes(4, on_processes, tmp_path, folder, output, overrides)
    assert (output / "draws-0.safetensors").exists()


def test_one_process_cannot_be_many(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match="chains x shards = 2: must be 1 for one process; start with torchrun"):
        run(config(folder, tmp_path / "out", "processes.chains=2"), Console(quiet=True))
    assert not (tmp_path / "out").exists()


# ---- the configuration and the dry run ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.mod=clean", "unknown key 'mod'; did you mean 'mode'"),
        ("teacher.views=2", "views = 2 with mode: online: must be 1"),
        ("teacher.top_k=2", "top_k = 2 with mode: online: must be null"),
        ("student.training=null", "weights and training are both null"),
        ("student.model=resnet18", "student.model = 'resnet18'"),
    ],
)
def test_settings_that_make_no_sense(folder, tmp_path, override, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config(folder, tmp_path, override)


def test_a_dry_run_tells_what_it_would_take(folder, tmp_path) -> None:
    rows, problems = examine(config(folder, tmp_path / "out", "teacher.mode=clean"))
    assert not problems and not (tmp_path / "out").exists()
    assert rows["images"] == "24 for training, 9 for the test, 3 classes"
    assert rows["disk for the teacher's logits"] == "168 B"  # 24 (2 x 3 + 1)
    assert rows["chain"].startswith("13 steps, ") and "s on this cpu" in rows["a step of the chain"]
    _, problems = examine(config(folder, tmp_path / "out", "sampling.batch_size=99"))
    assert problems == ["sampling.batch_size = 99: must be at most 24, the training images"]


def test_the_command_line_knows_the_kind(folder, tmp_path) -> None:
    import yaml

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config(folder, tmp_path / "out").model_dump(mode="json")))
    shown = CliRunner().invoke(app, ["run", str(file), "--dry-run"])
    assert shown.exit_code == 0 and "timm:test_resnet" in shown.output
    wrong = CliRunner().invoke(app, ["run", str(file), "--dry-run", "--set", "teacher.model=timm:test_resnot"])
    assert wrong.exit_code == 2 and "such as test_resnet" in wrong.output


# ---- heads and last modules on recorded features ----


@pytest.mark.parametrize(
    ("sampled", "more"),
    [
        ("head", ("runtime.bf16=true", "runtime.channels_last=true")),
        ("layer4", ("sampling.momentum=0.9", "teacher.mode=clean", "teacher.top_k=2", "runtime.channels_last=true")),
    ],
)
def test_upper_parts_are_sampled_on_recorded_features(folder, tmp_path, sampled, more) -> None:
    output = tmp_path / "run"
    settings = config(folder, output, f"sampling.sampled={sampled}", "sampling.chains=3", *more)
    results = run(settings, Console(quiet=True))
    assert results is not None
    posterior = results.bkd
    assert torch.isfinite(posterior.probs).all() and (results.upper > results.lower).any()
    assert results.draws == results.trace.drawn == 3 * 4 and results.convergence.rhat is not None
    with safe_open(output / "draws-0.safetensors", "pt") as kept:
        names = list(kept.keys())
    assert names and not any("conv1" in name and "layer" not in name for name in names)
    student = networks.build("timm:test_resnet", CLASSES, 0)
    assert len(bkd.Draws(output / "draws-0.safetensors", student.fc if sampled == "head" else student)) == 2
    # the features are those of the first run: another chain takes no time for them
    stamp = (output / "features" / "train.bin").stat().st_mtime_ns
    again = run(settings, Console(quiet=True))
    assert (output / "features" / "train.bin").stat().st_mtime_ns == stamp
    assert again is not None and torch.equal(again.bkd.probs, posterior.probs)


def test_features_and_logits_of_a_head_are_those_of_the_images_as_they_are(folder, tmp_path) -> None:
    """The teacher is asked online by the student's training; of what the head sees, its logits are recorded."""
    run(config(folder, tmp_path, "sampling.sampled=head"), Console(quiet=True))
    train, test = images.load(files(folder), 0)
    teacher, student = (networks.build("timm:test_resnet", CLASSES, 0).eval() for _ in range(2))
    networks.load_weights(teacher, tmp_path / "teacher.safetensors")
    networks.load_weights(student, tmp_path / "student.safetensors")
    cache = bkd.FeatureCache(tmp_path / "features" / "train")
    assert torch.equal(cache.targets, train.labels[cache.ids])
    assert torch.equal(cache.ids.sort().values, torch.arange(len(train))) and not torch.equal(
        cache.ids, torch.arange(len(train))
    )
    logits = bkd.TeacherCache(tmp_path / "features" / "teacher-logits").logits(cache.ids)
    with torch.no_grad():
        x = torch.stack([train[int(i)][0] for i in cache.ids])
        torch.testing.assert_close(logits.float(), teacher(x), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(student.fc(cache.rows(0, len(train)).float()), student(x), rtol=2e-3, atol=2e-3)
        seen = bkd.FeatureCache(tmp_path / "features" / "test").rows(0, len(test)).float()
        x = torch.stack([test[i][0] for i in range(len(test))])
        torch.testing.assert_close(student.fc(seen), student(x), rtol=2e-3, atol=2e-3)


def run_to_the_third_draw(settings: ScaleConfig, monkeypatch) -> None:
    """A run that is interrupted before its third draw is taken in."""
    offer = bkd.PosteriorPredictive.update

    def update(posterior, draw, loader) -> None:
        if draw.index == 2:
            raise KeyboardInterrupt
        offer(posterior, draw, loader)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bkd.PosteriorPredictive, "update", update)
        run(settings, Console(quiet=True))


def test_a_killed_head_begins_anew_with_the_features_that_it_has(folder, tmp_path, monkeypatch) -> None:
    settings = config(folder, tmp_path / "a", "sampling.sampled=head", "sampling.chains=2")
    whole = run(settings, Console(quiet=True))
    killed = config(folder, tmp_path / "b", "sampling.sampled=head", "sampling.chains=2")
    run_to_the_third_draw(killed, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(bkd, "record_features", lambda *a, **k: pytest.fail("the features are there"))
        again = run(killed, Console(quiet=True))
    assert torch.equal(again.bkd.probs, whole.bkd.probs) and again.trace.taken == whole.trace.taken
    cards = [json.loads((tmp_path / name / "draws-0.json").read_text()) for name in "ab"]
    assert [[draw["index"] for draw in card["draws"]] for card in cards] == [[0, 2], [0, 2]]


def test_killed_last_modules_go_on_where_they_stood(folder, tmp_path, monkeypatch) -> None:
    def settings(name: str) -> ScaleConfig:
        more = ("sampling.chains=2", "sampling.momentum=0.9", "checkpoints.every=3")
        return config(folder, tmp_path / name, "sampling.sampled=layer4", *more)

    whole = run(settings("a"), Console(quiet=True))
    run_to_the_third_draw(settings("b"), monkeypatch)
    again = run(settings("b"), Console(quiet=True))
    assert torch.equal(again.bkd.probs, whole.bkd.probs) and again.trace.taken < whole.trace.taken
    cards = [json.loads((tmp_path / name / "draws-0.json").read_text()) for name in "ab"]
    assert [[draw["index"] for draw in card["draws"]] for card in cards] == [[0, 2], [0, 2]]


def test_a_head_says_what_was_measured_of_it(folder, tmp_path) -> None:
    run(config(folder, tmp_path, "sampling.sampled=head", "sampling.chains=2"), Console(quiet=True))
    found = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["health"]["noise_share"][0] > 0 and found["health"]["stationarity"] == [None]
    assert found["seconds"]["features"] > 0
    page = (tmp_path / "report.html").read_text()
    assert "not measured" in page and "Only the last linear layer is sampled, 2\nchains at once" in page
    assert "Features below head" in page and "of 8 draws" in page
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {event["chain"] for event in events if event["event"] == "draw"} == {0, 1}


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_resnet", "timm:test_efficientnet"])
def test_a_network_in_two_is_the_network(name) -> None:
    network = networks.build(name, CLASSES, 0).eval()
    x = torch.randn(2, 3, 64, 64)
    wheres = ["head"] + (["layer3", "layer4"] if "resnet" in name else [])
    for where in wheres:
        parts = upper.cut(network, where, 64)
        with torch.no_grad():
            torch.testing.assert_close(parts.top(parts.body(x)), network(x))
        assert {id(p) for p in parts.top.parameters()} < {id(p) for p in network.parameters()}
    below = upper.cut(network, wheres[-1], 64)
    assert (
        not {id(p) for p in below.body.parameters()} & {id(p) for p in below.top.parameters()} or wheres[-1] == "head"
    )


def test_networks_that_are_not_cut_there() -> None:
    network = networks.build("timm:test_vit", CLASSES, 0)
    with pytest.raises(ConfigError, match=r"sampling.sampled = 'layer4': must be all, head, or one of patch_embed"):
        upper.cut(network, "layer4", 160)
    with pytest.raises(ConfigError, match=r"sampled = norm: the network is not its children in turn, from norm \("):
        upper.cut(network, "norm", 160)
    with pytest.raises(ConfigError, match=r"data.size = 32: the network cannot take such images \(Input height"):
        upper.cut(networks.build("timm:vit_tiny_patch16_224", CLASSES, 0), "head", 32)
    with pytest.raises(ConfigError, match=r"no nn.Linear; must be all, or one of 0, 1"):
        upper.cut(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten()), "head", 8)
    with pytest.raises(ConfigError, match=r"sampled = head: the network is not what is below and then 1 \(gives other"):
        upper.cut(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4), torch.nn.ReLU()), "head", 8)


def test_a_part_that_is_not_there_is_noticed_before_anything_is_trained(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"sampling.sampled = 'layer9': must be all, head, or one of conv1"):
        run(config(folder, tmp_path / "out", "sampling.sampled=layer9"), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_upper_parts_are_for_one_process(folder, tmp_path, monkeypatch) -> None:
    shared = contextlib.nullcontext(Place(mesh=object(), device=torch.device("cpu")))
    monkeypatch.setattr("bkd_fast.app.scale.run._processes", lambda config: shared)
    with pytest.raises(ConfigError, match=r"sampling.sampled = head on \d processes: must be all"):
        run(config(folder, tmp_path / "out", "sampling.sampled=head"), Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.chains=2"], "sampling.chains = 2 with sampling.sampled = all: must be 1"),
        (["sampling.sampled=head", "sampling.augment=true"], "sampling.augment = True"),
        (["sampling.sampled=head", "sampling.momentum=0.9"], "sampling.momentum = 0.9"),
        (["sampling.sampled=head", "processes.chains=2"], "must be one chain and one shard"),
    ],
)
def test_settings_that_upper_parts_do_not_go_with(folder, tmp_path, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config(folder, tmp_path, *overrides)


@pytest.mark.parametrize("sampled", ["head", "layer4"])
def test_a_dry_run_tells_what_upper_parts_take(folder, tmp_path, sampled) -> None:
    network = networks.build("timm:test_resnet", CLASSES, 0)  # a sixteenth of the image's side before layer4
    width = network.fc.in_features if sampled == "head" else network.layer4[0].conv1.in_channels * (SIZE // 16) ** 2
    settings = config(folder, tmp_path / "run", f"sampling.sampled={sampled}", "sampling.chains=3")
    rows, problems = examine(settings)
    bytes_of = 2 * width * CLASSES * (TRAIN + TEST)
    assert not problems and rows["disk for features"] == f"{bytes_of / 1000:.3g} kB, {width:,} numbers an image"
    assert rows["sampled"].endswith(" parameters, 3 chains at once")
    assert rows["recording of features"].startswith("33 images, ") and rows["chain"].startswith("13 steps, ")
    assert rows["a step of the chain"].endswith("reading features not included")
    assert ("begins anew" in rows["disk for a checkpoint"]) == (sampled == "head")
    assert rows["disk for the teacher's logits on the features' views"] == "168 B"
    only = config(folder, tmp_path / "run", f"sampling.sampled={sampled}", "teacher.mode=clean")
    assert "disk for the teacher's logits on the features' views" not in examine(only)[0]
    with pytest.raises(ConfigError, match=r"sampling.sampled = 'layer9': must be all, head, or one of"):
        examine(config(folder, tmp_path / "run", "sampling.sampled=layer9"))


# ---- tar files ----


@pytest.fixture(scope="module")
def tars(folder, tmp_path_factory) -> Path:
    """The images of `folder` as webdataset would write them: train-{00..02}.tar, test.tar."""
    root = tmp_path_factory.mktemp("tars")
    for part, files in (("train", [f"train-{i:02d}.tar" for i in range(3)]), ("test", ["test.tar"])):
        images = sorted((folder / part).rglob("*.jpeg"))
        for number, name in enumerate(files):
            with tarfile.open(root / name, "w") as tar:
                for i in range(len(images)):
                    if i * len(files) // len(images) != number:
                        continue
                    tar.add(images[i], f"{i:06d}.jpg")
                    text = images[i].parent.name.removeprefix("n").encode()
                    info = tarfile.TarInfo(f"{i:06d}.cls")
                    info.size = len(text)
                    tar.addfile(info, io.BytesIO(text))
    return root


def test_tar_files_are_the_same_images(folder, tars) -> None:
    ours = images.load(files(folder), 0)
    theirs = images.load(ImageFiles(train=tars / "train-{00..02}.tar", test=tars / "test.tar", size=SIZE, resize=36), 0)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(a[i][0], b[i][0]) for i in (0, 5, len(a) - 1))
    loader = torch.utils.data.DataLoader(theirs[0], 8, num_workers=2)
    assert torch.equal(torch.cat([y for _, y in loader]), ours[0].labels)


def tar_of(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x/000007.jpg": b"1"}, "x/000007 lacks a .cls"),
        ({"000007.cls": b"1"}, "a.tar: 000007 lacks an image"),
        ({"7.jpg": b"", "7.cls": b"cat\n"}, "7.cls is b'cat': must be a class number"),
        ({"7.jpg": b"", "7.cls": b"-1"}, "7.cls is b'-1': must be a class number"),
        ({"7.jpg": b"", "7.png": b"", "7.cls": b"0"}, "7 has two images"),
        ({"7.txt": b""}, "a.tar: holds no images"),
    ],
)
def test_tar_files_that_lack_something(tmp_path, members, message) -> None:
    with pytest.raises(DataUnavailableError, match=message):
        images.TarFiles(tar_of(tmp_path / "a.tar", members))


def test_tar_files_that_are_none(tars, tmp_path) -> None:
    with pytest.raises(DataUnavailableError, match=r"there is no file .*train-03.tar"):
        images.TarFiles(tars / "train-{00..03}.tar")
    with pytest.raises(DataUnavailableError, match=r"there is no file \*.tar"):
        images.TarFiles(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar file")
    with pytest.raises(DataUnavailableError, match=r"a.tar: is no uncompressed tar file"):
        images.TarFiles(tmp_path)
    with pytest.raises(DataUnavailableError, match=r"a.tar: is no uncompressed tar file"):
        images.TarFiles(tar_of(tmp_path / "a.tar", {"7.jpg": b"1", "7.cls": b"0"}, "w:gz"))


def test_suffixes_in_tar_files_may_be_in_capitals(folder, tmp_path) -> None:
    image = (folder / "test" / "n0" / "0.jpeg").read_bytes()
    found = images.TarFiles(tar_of(tmp_path / "a.tar", {"A.JPEG": image, "A.CLS": b"0", "b.PNG": image, "b.cls": b"1"}))
    assert found.labels.tolist() == [0, 1] and found.open(0).size == found.open(1).size == (44, 40)


def test_tar_files_of_other_classes(tars, tmp_path) -> None:
    two = tar_of(tmp_path / "a.tar", {"a.jpg": b"", "a.cls": b"0", "b.jpg": b"", "b.cls": b"1"})
    with pytest.raises(
        DataUnavailableError, match=r"train-\{00\.\.02\}.tar has 3 classes and .*a.tar 2: must be the same"
    ):
        images.load(ImageFiles(train=tars / "train-{00..02}.tar", test=two), 0)


def test_an_image_of_a_tar_file_that_cannot_be_decoded_is_named(tmp_path) -> None:
    train = tar_of(tmp_path / "a.tar", {"7.jpg": b"no image", "7.cls": b"0"})
    loaded, _ = images.load(ImageFiles(train=train, test=train), 0)
    with pytest.raises(UndecodableImageError, match=r"a.tar at byte 512 cannot be decoded"):
        loaded[0]


# ---- real images ----


@pytest.mark.skipif(
    "BKD_FAST_DATA" not in os.environ, reason="BKD_FAST_DATA is not set: it names the folder with the data sets"
)
@pytest.mark.parametrize(("sampled", "mode"), [("all", "clean"), ("head", "online")])
@pytest.mark.parametrize(
    ("train", "test", "size", "count"),
    [
        ("tiny_imagenet_train_100_per_class.npz", "tiny_imagenet_val_25_per_class.npz", 32, 48),
        ("imagenet_sample_1000.npz", "imagenet_sample_1000.npz", 64, 24),
    ],
    ids=["tiny_imagenet", "imagenet"],
)
def test_real_images_through_the_same_path(tmp_path, train, test, size, count, sampled, mode) -> None:
    """Two epochs of a few dozen images of ImageNet's classes: every part runs; nothing can be learned from so few."""
    data = Path(os.environ["BKD_FAST_DATA"])
    values = {
        "output": str(tmp_path / "run"),
        "data": {"train": str(data / train), "test": str(data / test), "size": size, "resize": size + 4, "workers": 0,
                 "train_size": count, "test_size": 12},
        "teacher": {"model": "timm:test_resnet", "mode": mode, "training": {"epochs": 2, "batch_size": 12, "lr": 0.05}},
        "student": {"model": "timm:test_resnet", "training": {"epochs": 2, "batch_size": 12, "lr": 0.05}},
        "sampling": {"sampled": sampled, "lr": 1e-3, "batch_size": 12, "warm_start": 2, "burn_in": 2, "thin": 1, "num_draws": 4,
                     "log_every": 2},
        "posterior": {"keep": 2},
    }  # fmt: skip
    results = run(ScaleConfig.build(values), Console(quiet=True))
    assert results is not None and (tmp_path / "run" / "report.html").stat().st_size > 10_000
    probabilities = results.bkd.probs
    assert probabilities.shape == (12, len(results.images.class_names))
    assert torch.allclose(probabilities.sum(1), torch.ones(12).double(), atol=1e-3)
    assert results.trace.taken == 2 * (sampled == "all") + 2 + 4 == results.trace.steps[-1]
    assert (tmp_path / "run" / "features" / "test.bin").exists() == (sampled == "head")
