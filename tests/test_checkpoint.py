"""Runs that are interrupted, killed and damaged against the run that was left alone: every bit."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from interrupted_run import Slow, Stop, run
from processes import FORKED
from torch import Tensor

from bkd_fast import BKDFastWarning, Checkpoints, PosteriorPredictive, StateFileError, Terminated
from bkd_fast.sampling import Callback

STEPS = 7 + 6 + 3 * 9
UNNAMED = ("streams", "run", "chains")  # what begins with the random number of a run


def everything(result) -> dict[str, Tensor]:
    student, sampler, posterior, batches = result
    found = {f"student.{name}": value for name, value in student.state_dict().items()}
    for name, parameter in student.named_parameters():
        found |= {f"{name}.{key}": value for key, value in sampler.state[parameter].items()}
    if sampler.state_dict().get("quantiles"):
        found["interval"] = torch.stack(sampler.quantiles("0.weight").interval(0.8))
    state = posterior.state_dict()
    found |= {f"posterior.{name}": torch.as_tensor(value) for name, value in state.items() if name not in UNNAMED}
    groups = [(g["step"], g["lr"], g["temperature"], g["moments"]) for g in sampler.param_groups]
    return found | {"position": torch.tensor(batches.position), "groups": groups}


def assert_equal(ours, theirs) -> None:
    a, b = everything(ours), everything(theirs)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value == b[name] if name == "groups" else torch.equal(value, b[name]), name


class KeepHealth(Callback):
    def on_end(self, health) -> None:
        self.health = health


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes: the number of threads decides the order of sums in torch's matrix products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone():
    return {kind: run(None, kind=kind) for kind in ("plain", "cyclical")}


class TellToEnd(Callback):
    """SIGTERM, so that the run ends at a step, saved there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record) -> None:
        if record.step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", ["plain", "cyclical"])
@pytest.mark.parametrize("stops", [(3, 9), (7,), (13, 15), (17, 19, 21), (STEPS,), (24, 31)])
def test_an_interrupted_run_is_the_run_itself(tmp_path, alone, kind, stops) -> None:
    for stop in stops:
        with pytest.raises(Terminated):
            run(tmp_path, every=10_000, kind=kind, callbacks=(TellToEnd(stop),))
        assert (tmp_path / f"step-{stop:09d}").is_dir()
    ours, theirs = KeepHealth(), KeepHealth()
    resumed = run(tmp_path, every=10_000, kind=kind, callbacks=(ours,))
    assert_equal(resumed, alone[kind])
    run(None, kind=kind, callbacks=(theirs,))
    assert ours.health == theirs.health
    assert [draws for _, draws in resumed[2].streams] == [(0, 9)], "one run, whose draws are counted on"


def test_a_finished_run_gives_nothing_more(tmp_path, alone) -> None:
    run(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"step-{STEPS:09d}", f"step-{STEPS:09d}-end"]
    assert_equal(run(tmp_path), alone["plain"])
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_only_so_many_are_kept_and_no_leavings(tmp_path) -> None:
    (tmp_path / "step-000000004.unfinished").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, every=4, keep=3, callbacks=(Stop(21),))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:09d}" for step in (12, 16, 20)]


# ---- damage ----


def interrupted(folder: Path) -> list[Path]:
    with pytest.raises(KeyboardInterrupt):
        run(folder, every=5, callbacks=(Stop(33),))
    return sorted(folder.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "posterior", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(tmp_path, alone, damage) -> None:
    newest = interrupted(tmp_path)[-1]
    tensors, manifest = next(newest.glob("*.distcp")), newest / "checkpoint.json"
    if damage == "flipped":
        flip(tensors)
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "posterior":
        flip(next(newest.glob("posterior*.safetensors")))
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-9])
    else:
        manifest.unlink()
    with pytest.warns(BKDFastWarning, match="checkpoint step-000000030 is damaged .*: an earlier one is used"):
        resumed = run(tmp_path)
    assert_equal(resumed, alone["plain"])
    assert (tmp_path / "step-000000030.damaged").is_dir()


def test_where_all_are_damaged_nothing_begins_anew(tmp_path) -> None:
    for path in interrupted(tmp_path):
        flip(next(path.glob("*.distcp")))
    with pytest.raises(StateFileError, match="none of the 2 checkpoints"), pytest.warns(BKDFastWarning):
        run(tmp_path)


def edited(folder: Path, edit) -> None:
    for path in interrupted(folder):
        manifest = path / "checkpoint.json"
        content = json.loads(manifest.read_text())
        edit(content)
        manifest.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=9), "has version 9: must be 1; it was written by a later bkd_fast"),
        (lambda m: m["chains"].append({}), "has 2 chains: must have 1"),
        (lambda m: m["chains"][0].update(num_rows=5), "has posteriors of 5 rows: must have 23"),
        (lambda m: m["chains"][0]["loader"].update(seed=8), "the saved batches have seed = 8: must be 3"),
        (lambda m: m["chains"][0]["run"].update(schedule={}), "the saved run has a schedule and this one no"),
    ],
)
def test_checkpoints_of_other_runs_are_refused(tmp_path, edit, message) -> None:
    edited(tmp_path, edit)
    with pytest.raises((StateFileError, ValueError), match=message):
        run(tmp_path)


def test_a_full_disk_leaves_the_earlier_ones(tmp_path, alone, monkeypatch) -> None:
    class Full(Callback):
        def on_step(self, record) -> None:
            if record.step == 29:
                monkeypatch.setattr(PosteriorPredictive, "save", full)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StateFileError, match=r"step-000000030 could not be saved .*No space left on device"):
        run(tmp_path, callbacks=(Full(),))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000020", "step-000000025"]
    monkeypatch.undo()
    assert_equal(run(tmp_path), alone["plain"])


@pytest.mark.parametrize("name", ["every", "keep"])
def test_counts(tmp_path, name) -> None:
    with pytest.raises(ValueError, match=f"{name} = 0: must be an int of at least 1"):
        Checkpoints(tmp_path, **{"every": 5, name: 0})


# ---- told to end, and killed ----


@pytest.fixture(scope="module")
def start():
    """Starts the run in a process of its own: (folder, steps between checkpoints, seconds a step)."""

    def begin(folder: Path, every: int, seconds: float = 0.0) -> multiprocessing.Process:
        process = FORKED.Process(target=slowly, args=(folder, every, seconds))
        process.start()
        return process

    return begin


def slowly(folder: Path, every: int, seconds: float) -> None:
    torch.set_num_threads(1)
    run(folder, every, callbacks=(Slow(seconds),))


def wait_for(folder: Path, process: multiprocessing.Process, before: set[str]) -> None:
    """Until there is something new in the folder, or the process has ended."""
    deadline = time.monotonic() + 60
    while {path.name for path in folder.glob("step-*")} <= before and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_sigterm_saves_and_ends(tmp_path, alone, start) -> None:
    process = start(tmp_path, 20, 0.05)
    wait_for(tmp_path, process, set())
    time.sleep(0.2)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    newest = sorted(tmp_path.iterdir())[-1].name
    assert 20 < int(newest.removeprefix("step-")) < STEPS, "it was saved where it was told"
    assert_equal(run(tmp_path, every=20), alone["plain"])


def test_sigterm_is_as_before_after_a_run(tmp_path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as ended:
        run(tmp_path, every=100, callbacks=(TellToEnd(12),))
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before


def killed_again_and_again(start, folder: Path, kills: int, seed: int) -> None:
    """The run, which saves after every step, killed so many times while it takes steps, mostly inside a save."""
    generator = random.Random(seed)
    for _ in range(kills):
        before = {path.name for path in folder.glob("step-*")}
        process = start(folder, 1)
        wait_for(folder, process, before)
        time.sleep(generator.uniform(0, 0.15))
        process.kill()
        process.join()


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.long)])
def test_kill_9_at_any_instant(tmp_path, alone, start, rounds) -> None:
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        killed_again_and_again(start, folder, 10, seed=number)
        assert_equal(run(folder, every=1), alone["plain"])
