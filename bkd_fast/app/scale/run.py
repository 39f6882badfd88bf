"""A run on images, on one process or all of a torchrun: teacher, distilled student, chain, report. It goes on where it stopped.

Each of the three is `sample` with checkpoints: a point estimate is a chain at temperature 0.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, Dataset, Subset

import bkd_fast as bkd
from bkd_fast.app import figures, report
from bkd_fast.app.config import ConfigError
from bkd_fast.app.doctor import versions
from bkd_fast.app.log import ChainLog, Log
from bkd_fast.app.models import count_parameters
from bkd_fast.app.results import Convergence, Coverage, Results, Timings, Trace
from bkd_fast.app.run import COVERAGE_LEVELS, Outputs, coverage
from bkd_fast.app.scale import images, networks, upper
from bkd_fast.app.scale.config import Network, PointTraining, ScaleConfig
from bkd_fast.app.scores import Prediction
from bkd_fast.collectives import gather, processes, rank

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Place:
    """Where this process is: its device, and its part of the work."""

    mesh: DeviceMesh | None  # None: there is one process
    device: torch.device

    @property
    def chain(self) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank("chain")

    @property
    def shard(self) -> tuple[int, int]:
        return (0, 1) if self.mesh is None else bkd.data_rank(self.mesh)

    def rows(self, count: int) -> Tensor:
        """The test images whose posterior is kept here."""
        return torch.arange(count) if self.mesh is None else bkd.rows_here(count, self.mesh)

    def parallel(self, model: nn.Module) -> nn.Module:
        return model if self.mesh is None else bkd.data_parallel(model, self.mesh)


def run(config: ScaleConfig, console: Console) -> Results | None:
    """Do everything that `config` asks for; parts that are done already are taken from its folder. The first process has results.

    Raises:
        DataUnavailableError, ConfigError: before anything is written.
    """
    with _processes(config) as place:
        train, test = images.load(config.data, config.seed)
        classes = len(train.source.class_names)
        networks.build(config.teacher.model, classes, config.seed)
        student = networks.build(config.student.model, classes, config.seed)
        if config.sampling.sampled != "all":
            if place.mesh is not None:
                raise ConfigError(
                    f"sampling.sampled = {config.sampling.sampled} on {processes()} processes: must be all; heads and last "
                    "modules are sampled on one"
                )
            upper.cut(student, config.sampling.sampled, config.data.size)
        job = _Job(config, place, train, test, classes, console)
        return job.run()


class _Job:
    def __init__(
        self,
        config: ScaleConfig,
        place: Place,
        train: images.LabelledImages,
        test: images.LabelledImages,
        classes: int,
        console: Console,
    ) -> None:
        self.config, self.place, self.train, self.test, self.classes = config, place, train, test, classes
        self.console, self.first = console, rank() == 0
        self.outputs = Outputs(config.output)
        self.rows = place.rows(len(test))
        self.test_loader = self._loader(Subset(test, self.rows.tolist()))

    def run(self) -> Results | None:
        config = self.config
        if self.first:
            self.outputs.figures.mkdir(parents=True, exist_ok=True)
        problem = gather(_other_run(config) if self.first else None)[0]
        if problem is not None:
            raise ConfigError(problem)
        with Log(self.outputs.log if self.first else Path(os.devnull), append=True) as log:
            log.write("start", config=config.model_dump(mode="json"), machine=versions())
            begin = time.perf_counter()
            teacher, reused = self._network("teacher", config.teacher, config.seed, bkd.KDLoss(0.0), None, log)
            teacher_logits = self._logits(teacher)
            cache = self._cache(teacher)
            online = teacher if cache is None else None
            ended = [begin, time.perf_counter()]

            loss = bkd.KDLoss(config.distillation.prior_strength, config.distillation.temperature)
            student, _ = self._network("student", config.student, config.seed + 1, loss, (online, cache), log)
            student_logits = self._logits(student)
            ended.append(time.perf_counter())

            whole = config.sampling.sampled == "all"
            recorded = None if whole else self._recorded(student, teacher, cache)
            ended.append(time.perf_counter())

            trace = ChainLog(log, config.sampling.log_every)
            predictive = self._sample(student, student_logits, loss, online, cache, recorded, trace)
            ended.append(time.perf_counter())
            posterior = self._pooled()
            if posterior is None:
                return None
            teaching, studying, recording, sampling = (b - a for a, b in pairwise(ended))
            timings = Timings(teaching, studying, sampling - predictive, predictive, log.seconds, recording)
            parameters = {name: count_parameters(m) for name, m in (("teacher", teacher), ("student", student))}
            results = self._results(posterior, teacher_logits, student_logits, parameters, trace, timings, reused)
            self.outputs.metrics.write_text(json.dumps(results.as_dict(), indent=2) + "\n", encoding="utf-8")
            report.write(results, figures.draw_all(results, self.outputs.figures), self.outputs.report)
            log.write("end")
            return results

    # ---- point estimates ----

    def _network(
        self,
        name: str,
        network: Network,
        seed: int,
        loss: bkd.KDLoss,
        taught_by: tuple[nn.Module | None, bkd.TeacherCache | None] | None,
        log: Log,
    ) -> tuple[nn.Module, bool]:
        """The network with its parameters, and whether they were there already."""
        model = networks.build(network.model, self.classes, seed)
        file = self.config.output / f"{name}.safetensors"
        done = file.exists()
        if done or network.weights is not None:
            networks.load_weights(model, file if done or network.weights is None else network.weights)
        model = networks.prepared(model, self.config.runtime, self.place.device)
        if network.training is not None and not done:
            self._fit(name, model, network.training, seed, loss, *(taught_by or (None, None)), log)
            if self.first:
                unfinished = file.with_suffix(".unfinished")
                save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, unfinished)
                unfinished.replace(file)
            gather(None)
            networks.load_weights(model, file)  # running statistics of batch norms differ between processes
        return model.eval(), done or network.training is None

    def _fit(
        self,
        name: str,
        model: nn.Module,
        training: PointTraining,
        seed: int,
        loss: bkd.KDLoss,
        teacher: nn.Module | None,
        cache: bkd.TeacherCache | None,
        log: Log,
    ) -> None:
        """Train the network in place; every process does, whatever its chain, and all end with the same parameters."""
        batches = self._batches(training.batch_size, seed, cache, (rank(), processes()), augment=True)
        steps = training.epochs * len(batches)
        trained = nn.parallel.DistributedDataParallel(model) if processes() > 1 else model
        sampler = bkd.SGHMC(
            trained.named_parameters(),
            training.lr,
            num_data=len(self.train),
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            temperature=0.0,
            seed=seed,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sampler, steps)
        saved = self._checkpoints(name, loader=batches)
        follow = [saved, ChainLog(log, self.config.sampling.log_every, name)]
        progress = self.console.is_terminal and self.first
        for _ in bkd.sample(
            trained, sampler, loss, batches, teacher=teacher, burn_in=steps - 1, num_draws=1, batch_norm="train",
            schedule=schedule, progress=progress, callbacks=follow,
        ):  # fmt: skip
            pass

    # ---- the teacher's logits ----

    def _cache(self, teacher: nn.Module) -> bkd.TeacherCache | None:
        settings = self.config.teacher
        if settings.mode == "online":
            return None
        return self._logits_on_disk(teacher, "teacher-logits", settings.views if settings.mode == "views" else None)

    def _logits_on_disk(self, teacher: nn.Module, folder: str, views: int | None) -> bkd.TeacherCache:
        """The teacher's logits of so many augmentations of each training image; None: of the image as it is."""
        data = self.config.data
        about = {
            "teacher": bkd.fingerprint_of(teacher),
            "data": bkd.data_hash(self.train.ids, self.train.labels),
            "images": str(data.train),
            "view": f"{data.size}/{data.resize}" + ("" if views is None else f", seed {self.config.seed}"),
        }
        writer = bkd.TeacherCache.create(
            self.config.output / folder, num_samples=len(self.train), classes=self.classes, views=views or 1,
            top_k=self.config.teacher.top_k, fingerprint=about,
        )  # fmt: skip
        for view in range(views or 1):
            missing = writer.missing(view)
            mine = missing[missing * processes() // len(self.train) == rank()]
            keys: list[Any] = mine.tolist() if views is None else [(i, view) for i in mine.tolist()]
            loader = self._loader(_WithIds(self.train, keys))
            bkd.record_teacher(teacher, loader, writer, device=self.place.device, view=view)
        return writer.finish()

    # ---- features below the part that is sampled ----

    def _recorded(self, student: nn.Module, teacher: nn.Module, cache: bkd.TeacherCache | None) -> upper.Recorded:
        """The sampled part of the student, features of all images below it, and the teacher's logits of the same views."""
        config, device = self.config, self.place.device
        network = networks.build(config.student.model, self.classes, config.seed)
        network.load_state_dict(student.state_dict())
        parts = upper.cut(network, config.sampling.sampled, config.data.size)
        whose = {
            "network": bkd.fingerprint_of(network),
            "below": parts.name,
            "images": f"{config.data.size}/{config.data.resize}, {bkd.data_hash(self.train.ids, self.test.ids)}",
        }
        body = networks.prepared(parts.body, config.runtime, device)
        train, test = (
            upper.record(
                body, images, config.output / "features" / name, {**whose, "part": name}, shuffled=order,
                workers=config.data.workers, device=device,
            )
            for name, images, order in (("train", self.train, config.seed), ("test", self.test, None))
        )  # fmt: skip
        if config.teacher.mode != "clean":  # the point estimates saw augmentations, or still do
            cache = self._logits_on_disk(teacher, "features/teacher-logits", None)
        assert cache is not None
        return upper.Recorded(parts.top.to(device), train, test, cache)

    # ---- the chain ----

    def _sample(
        self,
        student: nn.Module,
        student_logits: Tensor,
        loss: bkd.KDLoss,
        teacher: nn.Module | None,
        cache: bkd.TeacherCache | None,
        recorded: upper.Recorded | None,
        trace: ChainLog,
    ) -> float:
        """Run this process's part of the chain into `self.posterior`; the seconds that the posterior took."""
        settings, place = self.config.sampling, self.place
        self.posterior = bkd.PosteriorPredictive(
            len(self.rows), self.classes, labels=self.test.labels[self.rows], diagnostics=True,
            num_draws=settings.num_draws if settings.num_draws > 1 else None, device=place.device,
        )  # fmt: skip
        self.posterior.choose_classes_by(student_logits[self.rows])  # alike in all chains
        test: Iterable[Any] = self.test_loader
        if recorded is None:
            sampler, chain = self._whole_chain(student, loss, teacher, cache, trace)
        else:
            sampler, chain = self._upper_chain(recorded, loss, trace)
            test = upper.Rows(recorded.test)
        keeps = place.shard[0] == 0
        draws = None
        seconds = 0.0
        for draw in chain:
            begin = time.perf_counter()
            self.posterior.update(draw, test)
            if keeps and draws is None:
                file = self.config.output / f"draws-{place.chain}.safetensors"
                draws = bkd.Draws(file, draw.model, keep=self.config.posterior.keep)
            # a run that goes on makes some again; of chains at once the first one's are kept
            if draws is not None and draw.chain == place.chain and draw.index >= draws.offered:
                draws.add(draw)
            seconds += time.perf_counter() - begin
        self.posterior.flush()
        if draws is not None:
            draws.write_card(
                data_hash=bkd.data_hash(self.train.ids, self.train.labels),
                sampler=sampler if isinstance(sampler, torch.optim.Optimizer) else None,
                health={"noise_share": trace.noise_share, "stationarity": trace.stationarity},
                notes={"data": self.config.data.train.name, "title": self.config.title, "sampler": repr(sampler)},
            )
        return seconds

    def _whole_chain(
        self,
        student: nn.Module,
        loss: bkd.KDLoss,
        teacher: nn.Module | None,
        cache: bkd.TeacherCache | None,
        trace: ChainLog,
    ) -> tuple[Any, Iterator[bkd.Draw]]:
        """The sampler of all parameters, and its draws."""
        settings, place = self.config.sampling, self.place
        model = place.parallel(_copy_of(student, self.config, self.classes, place.device))
        batches = self._batches(
            settings.batch_size, self.config.seed + 2 + place.chain, cache, place.shard, settings.augment
        )
        return self._chain(model, 1, loss, batches, teacher, trace)

    def _upper_chain(
        self, recorded: upper.Recorded, loss: bkd.KDLoss, trace: ChainLog
    ) -> tuple[Any, Iterator[bkd.Draw]]:
        """The sampler of the student's head or last modules, and its draws."""
        settings, seed = self.config.sampling, self.config.seed
        batches = bkd.FeatureBatches(
            recorded.train, recorded.teacher, batch_size=settings.batch_size, seed=seed + 2, dtype=torch.float32
        )
        if isinstance(recorded.top, nn.Linear):
            return upper.head_draws(recorded, batches, loss, settings, seed, trace)
        model = bkd.StackedModule(recorded.top, settings.chains) if settings.chains > 1 else recorded.top
        return self._chain(model, settings.chains, loss, upper.Stream(batches), None, trace)

    def _chain(
        self, model: nn.Module, chains: int, loss: bkd.KDLoss, batches: Any, teacher: nn.Module | None, trace: ChainLog
    ) -> tuple[Any, Iterator[bkd.Draw]]:
        """The configured sampler of a model's parameters and its draws, with checkpoints."""
        settings = self.config.sampling
        arguments: dict[str, Any] = {"chains": chains} if chains > 1 else {}
        kind: Callable[..., Any] = bkd.SGLD
        if settings.momentum:
            kind, arguments["momentum"] = bkd.SGHMC, settings.momentum
        sampler = kind(
            model.named_parameters(), settings.lr, num_data=len(self.train), temperature=settings.temperature,
            prior_precision=settings.prior_precision, seed=self.config.seed, chain=self.place.chain, **arguments,
        )  # fmt: skip
        first = int(self.rows[0]) if len(self.rows) else 0
        saved = self._checkpoints(
            "chain", chain=self.place.chain, posterior=self.posterior, rows=(first, len(self.test)), loader=batches
        )
        return sampler, bkd.sample(
            model, sampler, loss, batches, teacher=teacher, warm_start=settings.warm_start, burn_in=settings.burn_in,
            thin=settings.thin, num_draws=settings.num_draws, progress=self.console.is_terminal and self.first,
            callbacks=[saved, trace],
        )  # fmt: skip

    def _pooled(self) -> bkd.PosteriorPredictive | None:
        """The posterior of all chains and test images, on the first process and its CPU; its stretches of rows stay on disk."""
        if self.place.mesh is not None:
            self.posterior.merge_across_(self.place.mesh.get_group("chain"))
        folder = self.config.output / "posterior"
        if self.place.chain == 0 and len(self.rows):
            self.posterior.save(folder / f"rows-{int(self.rows[0]):09d}")
        gather(None)
        if not self.first:
            return None
        size = -(-len(self.test) // self.place.shard[1])  # of a stretch, as rows_here cuts them
        return bkd.PosteriorPredictive.join_rows(
            [
                bkd.PosteriorPredictive.load(folder / f"rows-{start:09d}", "cpu")
                for start in range(0, len(self.test), size)
            ]
        )

    # ---- what all have in common ----

    def _batches(
        self, batch_size: int, seed: int, cache: bkd.TeacherCache | None, shard: tuple[int, int], augment: bool
    ) -> bkd.Batches:
        views = images.FRESH if augment else None
        if cache is not None:  # the student sees what the teacher saw
            views = cache.about.views if self.config.teacher.mode == "views" else None
        return bkd.Batches(
            self.train, batch_size, seed=seed, shard=shard, views=views, teacher=cache, num_workers=self.config.data.workers,
            pin_memory=self.place.device.type == "cuda",
        )  # fmt: skip

    def _loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(dataset, EVALUATION_BATCH, num_workers=self.config.data.workers)

    def _checkpoints(self, name: str, **arguments: Any) -> bkd.Checkpoints:
        saving = self.config.checkpoints
        return bkd.Checkpoints(
            self.config.output / "checkpoints" / name, every=saving.every, keep=saving.keep, **arguments
        )

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        """(N, C) float32 logits of all test images, on the CPU: each process computes its rows."""
        model.eval()
        own = [model(x.to(self.place.device)).cpu() for x, _ in self.test_loader]
        mine = torch.cat(own) if own else torch.empty(0, self.classes)
        return torch.cat(gather(mine)[: self.place.shard[1]])

    def _results(
        self,
        posterior: bkd.PosteriorPredictive,
        teacher: Tensor,
        student: Tensor,
        parameters: dict[str, int],
        trace: ChainLog,
        timings: Timings,
        reused: bool,
    ) -> Results:
        config = self.config
        lower, upper = posterior.interval(config.posterior.level)
        levels = sorted({*COVERAGE_LEVELS, config.posterior.level})
        covered: list[Coverage] = coverage(posterior, self.test.labels, levels)
        small = config.student.model.partition(":")[2]
        return Results(
            config=config,
            images=images.Pictures(
                str(config.data.train.name),
                self.train.labels,
                self.test.labels,
                self.train.source.class_names,
                self.test,
            ),
            architectures={"teacher": config.teacher.model.partition(":")[2], "kd": small, "bkd": small},
            teacher=Prediction.from_logits("teacher", "Teacher", teacher, parameters["teacher"]),
            kd=Prediction.from_logits("kd", "KD student", student, parameters["student"]),
            bkd=Prediction.from_posterior("bkd", "BKD student", posterior, parameters["student"]),
            lower=lower.cpu(),
            upper=upper.cpu(),
            mutual_information=posterior.mutual_information.cpu(),
            convergence=Convergence.of(posterior.diagnostics()),
            coverage=covered,
            trace=Trace.of(trace),
            timings=timings,
            teacher_reused=reused,
            machine=versions(),
        )


class _WithIds(Dataset[tuple[Tensor, int]]):
    """(x, id) of some images: a key is an id, or (id, view)."""

    def __init__(self, train: images.LabelledImages, keys: list[Any]) -> None:
        self.train, self.keys = train, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        key = self.keys[place]
        return self.train[key][0], key[0] if isinstance(key, tuple) else key


# what may change when a run goes on: none of it changes what was done so far
FREE = (
    "title", "output", "processes", "checkpoints", "runtime", "posterior", "data.workers", "sampling.num_draws",
    "sampling.log_every",
)  # fmt: skip


def _other_run(config: ScaleConfig) -> str | None:
    """What is wrong with going on in the output folder, which then remembers this run's settings."""
    file = config.output / "run.json"
    wanted = _flat(config.model_dump(mode="json"))
    found = json.loads(file.read_text()) if file.exists() else wanted
    differing = [key for key in wanted if found.get(key) != wanted[key] and not key.startswith(FREE)]
    if differing:
        key = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        return (
            f"output = {config.output}: holds a run with {key} = {found.get(key)!r}, which is {wanted[key]!r} here{more}: "
            "must be another folder, or be emptied"
        )
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(wanted, indent=2) + "\n")
    unfinished.replace(file)
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _copy_of(student: nn.Module, config: ScaleConfig, classes: int, device: torch.device) -> nn.Module:
    """The chain's own network, where the point estimate is."""
    model = networks.build(config.student.model, classes, config.seed)
    model.load_state_dict(student.state_dict())
    return networks.prepared(model, config.runtime, device)


@contextmanager
def _processes(config: ScaleConfig) -> Iterator[Place]:
    """This process among those of torchrun; by itself where there is none."""
    wanted = config.processes.chains * config.processes.shards
    device = networks.device_of(config.runtime, int(os.environ.get("LOCAL_RANK", 0)))
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        if wanted > 1:
            raise ConfigError(
                f"processes: chains x shards = {wanted}: must be 1 for one process; start with torchrun --nproc-per-node"
            )
        yield Place(None, device)
        return
    begun = dist.is_initialized()
    if not begun:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        try:
            mesh = bkd.chain_mesh(config.processes.chains, shards=config.processes.shards, device_type=device.type)
        except ValueError as error:
            raise ConfigError(f"processes: {error}") from error
        yield Place(mesh, device)
    finally:
        if not begun:
            dist.destroy_process_group()
