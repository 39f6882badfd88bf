"""Runs that survive: everything of a run in one folder per checkpoint, on any number of processes, whole or not there at all.

`step-000120/` holds the networks and samplers of all chains (torch.distributed.checkpoint), a posterior file for each stretch of
rows, and `checkpoint.json`: counters, and the size and SHA-256 of every file. It is written under another name and renamed when
all of it is safe on disk.
"""

import io
import json
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from bkd_fast.collectives import gather, processes, rank, reduce_max_
from bkd_fast.errors import StateFileError, warn
from bkd_fast.posterior.predictive import PosteriorPredictive
from bkd_fast.posterior.saving import checksum_of
from bkd_fast.sampling import Callback, Health, Run, StepRecord

VERSION = 1
MANIFEST = "checkpoint.json"
ASKED_EVERY = 16  # steps between looks, together, at whether any process was told to stop


class Terminated(SystemExit):
    """The process was told to end (SIGTERM); a checkpoint was written. Exit code 143, as the shell has it."""


class Checkpoints(Callback):
    """Saves a run of `sample` every so many steps, and lets the next run of the same script go on where it stood.

    A killed process loses at most the steps since the last checkpoint. The run that goes on is, bit for bit, the one that was
    interrupted, if its data come from `Batches` or another loader with `state_dict` and `load_state_dict`, and on other numbers
    of processes up to the order of sums. SIGTERM, which schedulers send before they kill, saves and ends the process.

    Every process of a torch.distributed run must have one, with the same folder, which all can read and write.

    Args:
        folder: of the checkpoints; they are found there again.
        every: steps between two.
        keep: how many to keep, the newest.
        chain: the chain of this process, from 0, where processes run chains side by side (`mesh.get_local_rank("chain")`).
        posterior: to be saved and put back, too.
        rows: with a posterior of a part of the rows, the first of them and the number of all, such as (rows[0], num_rows).
        loader: of the training batches; None: the position in the data is not kept.
        others: what else goes on with the run, by name: anything whose state_dict `torch.load` reads with weights_only=True, such
            as callbacks that learn from draws. Each process keeps that of its chain; processes of one chain must have it alike.

    Raises:
        TypeError: one of `others` without state_dict and load_state_dict.
        ValueError: every or keep below 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int,
        keep: int = 2,
        chain: int = 0,
        posterior: PosteriorPredictive | None = None,
        rows: tuple[int, int] | None = None,
        loader: Any = None,
        others: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}: must be an int of at least 1")
        self.others = dict(others or {})
        for name, other in self.others.items():
            if not (hasattr(other, "state_dict") and hasattr(other, "load_state_dict")):
                raise TypeError(
                    f"others[{name!r}] is a {type(other).__name__}: must have state_dict and load_state_dict"
                )
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.chain, self.posterior, self.loader = chain, posterior, loader
        self.first_row, self.num_rows = rows or (0, 0 if posterior is None else posterior.num_rows)
        self._told = threading.Event()  # that the process should end
        self._handler: Any = None
        self._newest: str | None = None  # the name of the checkpoint that holds the run as it is

    # ---- the loop ----

    def on_start(self, run: Run) -> None:
        """Put the run where the newest sound checkpoint left it, if there is one.

        Raises:
            StateFileError: there are checkpoints and none of them is sound, or of a later version, or of another run (chains,
                batches, rows).
        """
        self._run = run
        self._restore()
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._tell)

    def on_step(self, record: StepRecord) -> None:
        """Save where it is time, or where a process was told to end.

        Raises:
            Terminated: after the latter.
            StateFileError: the checkpoint could not be written; earlier ones are intact.
        """
        stop = self._stops(record.step)
        if stop or record.step % self.every == 0:
            self.save()
        if stop:
            raise Terminated(128 + signal.SIGTERM)

    def on_end(self, health: Health) -> None:
        """Save, with the last draw."""
        self.save("-end")

    def on_close(self) -> None:
        """SIGTERM ends the process as before."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told.set()

    def _stops(self, step: int) -> bool:
        """Whether to end now: all processes give the same answer at the same step."""
        if processes() == 1:
            return self._told.is_set()
        if step % ASKED_EVERY and step % self.every:
            return False
        return bool(reduce_max_(_flag(self._told.is_set())).item())

    # ---- saving ----

    def save(self, suffix: str = "") -> Path:
        """Write a checkpoint of the run as it is now; every process must call it. Older ones beyond `keep` go.

        Args:
            suffix: of its name, so that there can be two of one step.

        Raises:
            StateFileError: it could not be written, as for want of room; on every process alike, and earlier ones are intact.
        """
        name = f"step-{self._run.steps:09d}{suffix}"
        if self._newest == name:
            return self.folder / name
        unfinished = self.folder / f"{name}.unfinished"
        with _alike(f"{name} could not be saved"):
            if self.posterior is not None:
                self.posterior.flush()
            if rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
        stretch = (self.chain, self.first_row)
        writes = gather(stretch).index(stretch) == rank()  # one of those that hold the same rows
        with _alike(f"{name} could not be saved", leaving=unfinished):
            self._write_tensors(unfinished)
            posterior = self._write_posterior(unfinished) if writes else None
        with _alike(f"{name} could not be saved", leaving=unfinished):
            files = _checksums(unfinished, rank(), processes())
        everybody = gather((self._description(), posterior, files))
        with _alike(f"{name} could not be saved", leaving=unfinished):
            if rank() == 0:
                self._finish(unfinished, everybody)
        self._newest = name
        return self.folder / name

    def _write_tensors(self, folder: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        with _quietly():
            save(self._tensors(), checkpoint_id=folder, no_dist=processes() == 1)

    def _tensors(self) -> dict[str, Any]:
        """What torch.distributed.checkpoint saves or fills, shards as such: it cuts them anew for other numbers of processes."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        student, sampler = self._run.student, self._run.sampler
        state = {"student": get_model_state_dict(student), "sampler": get_optimizer_state_dict(student, sampler)}
        quantiles = _Packed(sampler.state_dict().get("quantiles"))
        others = {name: _Packed(other.state_dict()) for name, other in self.others.items()}
        return {f"chain{self.chain}": {**state, "quantiles": quantiles, "others": others}}

    def _write_posterior(self, folder: Path) -> dict[str, Any] | None:
        """What the manifest says of the posterior's file; without a draw there is none."""
        if self.posterior is None or not self.posterior.streams:
            return None
        file = self.posterior.save(folder / f"posterior-{self.chain}-{self.first_row}")
        return {"chain": self.chain, "first_row": self.first_row, "rows": self.posterior.num_rows, "file": file.name}

    def _description(self) -> dict[str, Any]:
        loader = self.loader.state_dict() if hasattr(self.loader, "state_dict") else None
        return {
            "chain": self.chain,
            "run": self._run.state_dict(),
            "loader": loader,
            "num_rows": self.num_rows,
            "others": [*self.others],
        }

    def _finish(self, unfinished: Path, everybody: list[Any]) -> None:
        chains = {description["chain"]: description for description, _, _ in everybody}
        manifest = {
            "format": "bkd_fast.checkpoint",
            "version": VERSION,
            "chains": [chains[chain] for chain in sorted(chains)],
            "posteriors": [posterior for _, posterior, _ in everybody if posterior is not None],
            "files": {name: about for _, _, files in everybody for name, about in files.items()},
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for place in (*unfinished.iterdir(), unfinished):
            _to_disk(place)
        unfinished.rename(unfinished.with_suffix(""))
        _to_disk(self.folder)
        for old in (*_newest_first(self.folder)[self.keep :], *self.folder.glob("step-*.unfinished")):
            shutil.rmtree(old, ignore_errors=True)

    # ---- going on ----

    def _restore(self) -> None:
        names = gather([path.name for path in _newest_first(self.folder)])[0]
        for i, name in enumerate(names):
            problems = [problem for problem in gather(_problem_of(self.folder / name, rank(), processes())) if problem]
            if not problems:
                if rank() == 0:
                    for damaged in names[:i]:
                        _set_aside(self.folder / damaged)
                self._load(self.folder / name)
                return
            warn(f"checkpoint {name} is damaged ({problems[0]}): an earlier one is used, if there is any.")
        if names:
            raise StateFileError(
                f"none of the {len(names)} checkpoints in {self.folder.name} is sound: move them away to begin anew"
            )

    def _load(self, path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            later = "; it was written by a later bkd_fast" if manifest["version"] > VERSION else ""
            raise StateFileError(f"{path.name} has version {manifest['version']}: must be {VERSION}{later}")
        chains = max(gather(self.chain)) + 1
        if len(manifest["chains"]) != chains:
            raise StateFileError(f"{path.name} has {len(manifest['chains'])} chains: must have {chains}, as this run")
        mine = manifest["chains"][self.chain]
        if self.posterior is not None and mine["num_rows"] != self.num_rows:
            raise StateFileError(f"{path.name} has posteriors of {mine['num_rows']} rows: must have {self.num_rows}")
        if missing := [name for name in self.others if name not in mine.get("others", ())]:  # earlier versions had none
            raise StateFileError(f"{path.name} lacks {', '.join(missing)}: must have all of others, as this run")
        if mine["loader"] is not None and hasattr(self.loader, "load_state_dict"):
            self.loader.load_state_dict(mine["loader"])
        self._read_tensors(path)
        self._read_posterior(path, manifest["posteriors"])
        self._run.load_state_dict(mine["run"])
        self._newest = path.name

    def _read_tensors(self, path: Path) -> None:
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        name, alone = f"chain{self.chain}", processes() == 1
        mine = self._tensors()[name]
        student, sampler = self._run.student, self._run.sampler
        with _quietly():
            load({name: {"student": mine["student"]}}, checkpoint_id=path, no_dist=alone)
            # moments whose first draw is still to come are not there
            planner = DefaultLoadPlanner(allow_partial_load=True)
            load({name: mine}, checkpoint_id=path, planner=planner, no_dist=alone)
        set_model_state_dict(student, mine["student"])
        set_optimizer_state_dict(student, sampler, mine["sampler"])
        quantiles = mine["quantiles"].value()
        if quantiles is not None:
            sampler.load_state_dict({**sampler.state_dict(), "quantiles": quantiles})
        for name, other in self.others.items():
            other.load_state_dict(mine["others"][name].value())

    def _read_posterior(self, path: Path, parts: list[Mapping[str, Any]]) -> None:
        """The rows of this process, out of the stretches that were saved."""
        if self.posterior is None:
            return
        first, last = self.first_row, self.first_row + self.posterior.num_rows
        found, rows = [], []
        for part in sorted(parts, key=lambda part: int(part["first_row"])):
            begin, end = max(first, part["first_row"]), min(last, part["first_row"] + part["rows"])
            if part["chain"] == self.chain and begin < end:
                found.append(PosteriorPredictive.load(path / part["file"], self.posterior.device))
                rows.append(slice(begin - part["first_row"], end - part["first_row"]))
        if found:
            self.posterior.load_state_dict(PosteriorPredictive.join_rows(found, rows).state_dict())


class _Packed:
    """Something that torch.distributed.checkpoint must keep as one value: its lists of tensors have other lengths each time."""

    def __init__(self, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        self.bytes = buffer.getvalue()

    def value(self) -> Any:
        return torch.load(io.BytesIO(self.bytes), weights_only=True)


@contextmanager
def _alike(message: str, leaving: Path | None = None) -> Iterator[None]:
    """What fails on one process fails on all, as a StateFileError; `leaving` is removed then."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    problems = gather(None if problem is None else f"process {rank()}: {problem}")
    first = next((text for text in problems if text is not None), None)
    if first is not None:
        if leaving is not None and rank() == 0:
            shutil.rmtree(leaving, ignore_errors=True)
        raise StateFileError(f"{message} ({first}); earlier checkpoints are intact") from problem


def _newest_first(folder: Path) -> list[Path]:
    """The finished checkpoints."""
    return sorted((path for path in folder.glob("step-*") if not path.suffix), reverse=True)


def _set_aside(path: Path) -> None:
    """A damaged checkpoint out of the way of a new one of the same step."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch.distributed.checkpoint's warning that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _checksums(folder: Path, rank: int, processes: int) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of this process's share of the files."""
    files = sorted(folder.iterdir())[rank::processes]
    return {path.name: {"bytes": path.stat().st_size, "sha256": checksum_of(path)} for path in files}


def _problem_of(path: Path, rank: int, processes: int) -> str | None:
    """What is wrong with a checkpoint, as far as this process's share of its files tells."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = sorted(manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error!r}"
    for name, about in files[rank::processes]:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != about["bytes"]:
            return f"{name} has {file.stat().st_size} bytes and should have {about['bytes']}"
        if checksum_of(file) != about["sha256"]:
            return f"{name} is altered"
    return None


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flag(value: bool) -> torch.Tensor:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return torch.tensor(int(value), device=device)
