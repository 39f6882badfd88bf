"""What the experiments share: training on the student's own energy, the chains, the baselines' draws, means over seeds."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import bkd_fast as bkd
from bkd_fast.app.data import Batches

PROBES = 50  # test rows whose log odds tell R-hat
EVALUATION_BATCH = 1000


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network whose initial parameters are those of `seed`; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def fit(
    model: nn.Module, batches: Batches, loss: Callable[..., Tensor], *, epochs: int, lr: float, weight_decay: float = 0
) -> nn.Module:
    """Adam with a cosine learning rate on `loss(model(x), *targets)`; `weight_decay` = prior_precision / N makes it the MAP."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for x, *targets in batches:
            optimizer.zero_grad()
            loss(model(x), *targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """(N, C) logits, in the mode that the model is in."""
    return torch.cat([model(rows) for rows in torch.split(x, EVALUATION_BATCH)])


def dropout_logits(model: nn.Module, x: Tensor, passes: int, seed: int) -> Tensor:
    """(passes, N, C): MC dropout (Gal and Ghahramani, ICML 2016), a new mask for every row and pass."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        return torch.stack([logits_of(model, x) for _ in range(passes)])


def predictive(logits: Tensor) -> bkd.PosteriorPredictive:
    """The predictive summary of equally weighted draws (W, N, C): members of an ensemble, passes of dropout."""
    summary = bkd.PosteriorPredictive(*logits.shape[1:])
    summary.update_logits(logits)
    return summary


class HealthOf(bkd.Callback):
    def on_end(self, health: bkd.Health) -> None:
        self.health = health


def sample_posterior(
    students: Sequence[nn.Module],
    loss: bkd.KDLoss,
    training: Iterable[Any],
    tests: Sequence[Tensor],
    *,
    num_data: int,
    prior_precision: float,
    temperature: float = 1.0,
    noise_share: float = 0.05,
    burn_in: int,
    thin: int,
    num_draws: int,
    seed: int,
) -> tuple[list[bkd.PosteriorPredictive], dict[str, float]]:
    """The posterior by one SGHMC chain from each trained student, all in one launch; the step size is `suggest_lr`'s.

    Returns:
        The predictive of every set of test inputs, and the figures that tell whether to trust them: lr, noise_share,
        stationarity, and the largest R-hat over the log odds of each class in 50 test rows (NaN with one chain).
    """
    model = bkd.StackedModule(students)
    sampler = bkd.SGHMC(
        model.named_parameters(),
        1e-3,
        num_data=num_data,
        prior_precision=prior_precision,
        temperature=temperature,
        chains=len(students),
        seed=seed,
    )
    step_size = bkd.suggest_lr(model, sampler, loss, training, noise_share=noise_share)
    # its limit on the curvature l is SGLD's; with momentum mu the bias of a variance is lr l / (2 (1 + mu)), here 7 %
    lr = min(step_size.lr * noise_share / step_size.noise_share[0], 0.25 / step_size.largest_curvature)
    for group in sampler.param_groups:
        group["lr"] = lr
    posteriors, figures = run_chains(
        model, sampler, loss, training, tests, burn_in=burn_in, thin=thin, num_draws=num_draws
    )
    return posteriors, {"lr": lr, **figures}


def run_chains(
    model: bkd.StackedModule,
    sampler: Any,
    loss: bkd.KDLoss,
    training: Iterable[Any],
    tests: Sequence[Tensor],
    *,
    burn_in: int,
    thin: int,
    num_draws: int,
) -> tuple[list[bkd.PosteriorPredictive], dict[str, float]]:
    """The chains of a sampler: the predictive of every set of test inputs, and noise_share, stationarity and R-hat as above."""
    health = HealthOf()
    loaders = [Batches(x, batch_size=EVALUATION_BATCH) for x in tests]
    posteriors: list[bkd.PosteriorPredictive] = []
    traces: list[Tensor] = []
    for draw in bkd.sample(
        model,
        sampler,
        loss,
        training,
        burn_in=burn_in,
        thin=thin,
        num_draws=num_draws,
        progress=False,
        callbacks=[health],
    ):
        traces.append(logits_of(draw.model, tests[0][:PROBES]))
        if not posteriors:
            posteriors = [bkd.PosteriorPredictive(len(x), traces[0].shape[1]) for x in tests]
        for posterior, loader in zip(posteriors, loaders, strict=True):
            posterior.update(draw, loader)
    return posteriors, {
        "noise_share": health.health.noise_share[0],
        "stationarity": health.health.stationarity[0],
        "r_hat": largest_r_hat(_chains(traces, model.chains)),
    }


def sample_head(
    head: nn.Linear,
    loss: bkd.KDLoss,
    training: Batches,
    tests: Sequence[Tensor],
    *,
    num_data: int,
    prior_precision: float,
    temperature: float = 1.0,
    noise_share: float = 0.05,
    chains: int,
    burn_in: int,
    thin: int,
    num_draws: int,
    seed: int,
) -> tuple[list[bkd.PosteriorPredictive], dict[str, float]]:
    """The posterior of a linear layer on features, by SGLD chains that start from a trained one: as `sample_posterior`."""
    plain = bkd.SGLD(
        head.parameters(),
        1e-3,
        num_data=num_data,
        prior_precision=prior_precision,
        temperature=temperature,
        seed=seed,
    )
    step_size = bkd.suggest_lr(head, plain, loss, training, noise_share=noise_share)
    sampler = bkd.LinearHeadSampler(
        head.in_features,
        head.out_features,
        lr=step_size.lr,
        num_data=num_data,
        chains=chains,
        prior_strength=loss.prior_strength,
        temperature=loss.temperature,
        posterior_temperature=temperature,
        prior_precision=prior_precision,
        init=head.weight,
        seed=seed,
    )
    if sampler.bias is not None:
        sampler.bias.copy_(head.bias.detach())
    posteriors = [bkd.PosteriorPredictive(len(x), head.out_features) for x in tests]
    loaders = [Batches(x, batch_size=EVALUATION_BATCH) for x in tests]
    traces = []
    for draw in bkd.sample_heads(sampler, training, burn_in=burn_in, thin=thin, num_draws=num_draws):
        traces.append(logits_of(draw.model, tests[0][:PROBES]))
        for posterior, loader in zip(posteriors, loaders, strict=True):
            posterior.update(draw, loader)
    figures = {
        "lr": step_size.lr,
        "noise_share": step_size.noise_share[0],
        "r_hat": largest_r_hat(_chains(traces, chains)),
    }
    return posteriors, figures


def largest_r_hat(logits: Tensor) -> float:
    """The largest rank-normalised R-hat (Vehtari et al., 2021) of log odds; logits (chains, draws, rows, C); NaN for a chain."""
    import arviz

    if len(logits) < 2:
        return math.nan
    found = arviz.rhat(arviz.convert_to_dataset(log_odds(logits).numpy()))  # type: ignore[no-untyped-call]
    return float(np.max(found["x"]))


def _chains(traces: Sequence[Tensor], chains: int) -> Tensor:
    """(chains, draws, rows, C) of every draw's logits, the chains in turn."""
    return torch.stack(list(traces)).reshape(-1, chains, *traces[0].shape).transpose(0, 1)


def log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of every class, float64: never infinite, as logit(softmax) would be."""
    classes = logits.shape[-1]
    others = logits.double().unsqueeze(-2).expand(*logits.shape, classes)
    own = torch.eye(classes, dtype=torch.bool)
    return logits.double() - others.masked_fill(own, -math.inf).logsumexp(-1)


def normal_quantile(logits: Tensor, q: float) -> Tensor:
    """(N, C) quantiles of class probabilities of a few members, logits (members, N, C): those of a normal in the log odds."""
    odds = log_odds(logits)
    z = float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))
    return (odds.mean(0) + z * odds.std(0)).sigmoid()


def nll(probs: Tensor, labels: Tensor) -> float:
    """The mean negative log likelihood of labels (N,) under probabilities (N, C), in nats; a probability of 0 counts as 1e-30."""
    return float(functional.nll_loss(probs.double().clamp_min(1e-30).log(), labels))


def point_scores(log_probs: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy, NLL and KL(true || predicted), all in expectation over the true p(y given x): no test labels, no their noise.

    Args:
        log_probs, truth: (rows, C) logarithms of predicted and true probabilities.
    """
    p = truth.exp()
    nll = -(p * log_probs).sum(1).mean()
    entropy = -(p * truth).sum(1).mean()
    accuracy = p.gather(1, log_probs.argmax(1, keepdim=True)).mean()
    return {"accuracy": float(accuracy), "nll": float(nll), "kl": float(nll - entropy)}


# ---- over seeds ----


def mean_and_error(values: Sequence[float]) -> list[float]:
    """[mean, its standard error] over seeds; the error of a single one is NaN."""
    array = np.asarray(values, dtype=float)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return [float(array.mean()), float(error)]


def over_seeds(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Runs of one seed each, {row: {figure: value}}, as {row: {figure: [mean, standard error]}}."""
    return {
        row: {figure: mean_and_error([run[row][figure] for run in runs]) for figure in figures}
        for row, figures in runs[0].items()
    }


def rounded(value: Any) -> Any:
    """Five significant digits; NaN, which JSON has not, as None."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
