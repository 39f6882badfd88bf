"""Sampling the upper part of a student alone, its head or its last modules, on features that are recorded once."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bkd_fast as bkd
from bkd_fast.app.config import ConfigError
from bkd_fast.app.log import ChainLog
from bkd_fast.app.scale.config import Sampling

HEAD = "head"
PROBES = 4  # images on which a cut is tried
READ = 1024  # rows of features at a time
WRONG = (RuntimeError, TypeError, ValueError, AssertionError)  # what networks raise for inputs that they cannot take


@dataclass(frozen=True)
class Cut:
    """A network in two: network(x) = top(body(x)).

    name: of the module that `top` begins with.
    """

    body: nn.Module
    top: nn.Module
    name: str


def cut(network: nn.Module, where: str, size: int) -> Cut:
    """Cut a network before its head, or before a child module.

    Args:
        network: in plain form, neither compiled nor under autocast. Both parts share its parameters.
        where: "head", the last nn.Linear; or the name of a child before which all children are applied in turn.
        size: pixels of the square images, on which the cut is tried.

    Raises:
        ConfigError: there is no such module, the network is not that chain, or it cannot take such images.
    """
    x = torch.randn(PROBES, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            logits = network.eval()(x)
    except WRONG as error:
        raise ConfigError(f"data.size = {size}: the network cannot take such images ({error})") from error
    children = dict(network.named_children())
    if where == HEAD:
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ConfigError(
                f"sampling.sampled = head: the network has no nn.Linear; must be all, or one of {', '.join(children)}"
            )
        found = Cut(*bkd.split_head(network, linear[-1]), linear[-1])
    elif where in children:
        names = list(children)
        below = names[: names.index(where)]
        top = _copied(network, {name: nn.Identity() for name in below})
        found = Cut(nn.Sequential(*(children[name] for name in below)), top, where)
    else:
        raise ConfigError(f"sampling.sampled = {where!r}: must be all, head, or one of {', '.join(children)}")
    try:
        with torch.no_grad():
            same = torch.allclose(found.top.eval()(found.body.eval()(x)), logits, rtol=1e-4, atol=1e-5)
        reason = "gives other logits"
    except WRONG as error:
        same, reason = False, str(error)
    if not same:
        chain = "what is below and then" if where == HEAD else "its children in turn, from"
        raise ConfigError(
            f"sampling.sampled = {where}: the network is not {chain} {found.name} ({reason}); must be all, or another of its "
            f"modules: {', '.join(children)}"
        )
    return found


@dataclass(frozen=True)
class Recorded:
    """What the upper part of a student is sampled on.

    top: the part, as the point estimate has it.
    train, test: the features that reach it, of training images in random order and of test images as they come.
    teacher: logits by training image, of the view that the features are of.
    """

    top: nn.Module
    train: bkd.FeatureCache
    test: bkd.FeatureCache
    teacher: bkd.TeacherCache


def _copied(network: nn.Module, replaced: dict[str, nn.Module]) -> nn.Module:
    """The network with some children replaced, sharing all parameters and buffers."""
    memo: dict[int, Any] = {id(t): t for t in (*network.parameters(), *network.buffers())}
    memo |= {id(network.get_submodule(name)): module for name, module in replaced.items()}
    return copy.deepcopy(network, memo)


class _Numbered(Dataset[tuple[Tensor, int, int]]):
    """(x, label, number) of images in an order."""

    def __init__(self, images: Dataset[tuple[Tensor, int]], order: Sequence[int]) -> None:
        self.images, self.order = images, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> tuple[Tensor, int, int]:
        number = self.order[place]
        return (*self.images[number], number)


def record(
    body: nn.Module, images: Any, file: Path, fingerprint: dict[str, str], *, shuffled: int | None, workers: int,
    device: torch.device, batch_size: int = 256,
) -> bkd.FeatureCache:  # fmt: skip
    """The body's features of images, in float16; taken from the file where it has these already.

    shuffled: the seed of their order in the file; None: as they come.

    Raises:
        ValueError: the file has those of another network or of other images.
    """
    if file.with_suffix(".json").exists():
        return bkd.FeatureCache(file, expect=fingerprint)
    count = len(images)
    order = (
        range(count)
        if shuffled is None
        else torch.randperm(count, generator=torch.Generator().manual_seed(shuffled)).tolist()
    )
    loader = DataLoader(_Numbered(images, order), batch_size, num_workers=workers)
    return bkd.record_features(body, loader, file, fingerprint=fingerprint, device=device)


class Rows:
    """A recorded test set as a loader: batches of float32 features in the images' order."""

    def __init__(self, cache: bkd.FeatureCache) -> None:
        self.cache = cache

    def __iter__(self) -> Iterator[Tensor]:
        for begin in range(0, len(self.cache), READ):
            yield self.cache.rows(begin, min(begin + READ, len(self.cache))).float()


class Stream:
    """The batches of `FeatureBatches` from where it stopped, for checkpoints."""

    def __init__(self, batches: bkd.FeatureBatches) -> None:
        self.batches, self.step = batches, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Any]]:
        for batch in self.batches.at(self.step):
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def head_draws(
    recorded: Recorded, batches: bkd.FeatureBatches, loss: bkd.KDLoss, settings: Sampling, seed: int, log: ChainLog
) -> tuple[bkd.LinearHeadSampler, Iterator[bkd.Draw]]:
    """K chains of a linear head, gradient and noise in one operation, all from where it is after the warm start.

    Their noise share is measured there, as `sample` does with any network; `sample_heads` has no health of its own.
    """
    head, num_data = recorded.top, len(recorded.train)
    assert isinstance(head, nn.Linear)
    sampler = bkd.LinearHeadSampler(
        head.in_features, head.out_features, lr=settings.lr, num_data=num_data, chains=settings.chains,
        prior_strength=loss.prior_strength, temperature=loss.temperature, posterior_temperature=0.0,
        prior_precision=settings.prior_precision, bias=head.bias is not None, init=head.weight, seed=seed,
    )  # fmt: skip
    if sampler.bias is not None:
        sampler.bias.copy_(head.bias.detach())
    for batch in islice(batches, settings.warm_start):
        sampler.step(*(part.to(sampler.weight.device) for part in batch))
    sampler.posterior_temperature = settings.temperature

    ended = _Ended()
    model = copy.deepcopy(sampler.head(0)).requires_grad_()
    alike = bkd.SGLD(
        model.named_parameters(), settings.lr, num_data=num_data, temperature=settings.temperature, seed=seed
    )
    for _ in bkd.sample(model, alike, loss, batches, num_draws=1, progress=False, callbacks=[ended]):
        pass
    draws = bkd.sample_heads(
        sampler, batches.at(sampler.steps), burn_in=settings.burn_in, thin=settings.thin, num_draws=settings.num_draws,
        callbacks=[_Told(log, ended.health.noise_share)],
    )  # fmt: skip
    return sampler, draws


class _Ended(bkd.Callback):
    """The health of a loop that has ended."""

    health: bkd.Health

    def on_end(self, health: bkd.Health) -> None:
        self.health = health


class _Told(bkd.Callback):
    """The log of a chain, told of a noise share that its own loop does not measure."""

    def __init__(self, log: ChainLog, noise_share: list[float]) -> None:
        self.log, self.noise_share = log, noise_share

    def on_step(self, record: bkd.StepRecord) -> None:
        self.log.on_step(record)

    def on_draw(self, draw: bkd.Draw) -> None:
        self.log.on_draw(draw)

    def on_end(self, health: bkd.Health) -> None:
        self.log.on_end(replace(health, noise_share=self.noise_share))
