"""Diagnostics of streamed chains against ArviZ on the stored draws, and of chains whose state is known."""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bkd_fast.posterior.predictive import PosteriorPredictive

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    arviz = pytest.importorskip("arviz")

ROWS, CHAINS = 40, 4


def chains_of(phi: float, draws: int, seed: int = 0) -> np.ndarray:
    """(chains, draws, rows) AR(1) of spread .7 around a row's centre: the log odds of class 0 against class 1."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(CHAINS, draws, ROWS))
    for s in range(1, draws):
        x[:, s] = phi * x[:, s - 1] + np.sqrt(1 - phi**2) * x[:, s]
    return 0.7 * x + generator.normal(size=ROWS)


def streamed(x: np.ndarray, window: int = 32, **settings) -> PosteriorPredictive:
    pooled = None
    for chain in range(len(x)):
        posterior = PosteriorPredictive(
            x.shape[2], 2, diagnostics=True, stream=(1, chain), labels=torch.zeros(x.shape[2]).long(), **settings
        )
        logits = torch.stack([torch.from_numpy(x[chain]).float(), torch.zeros(x.shape[1], x.shape[2])], 2)
        posterior.choose_classes_by(logits[0])
        for piece in logits.split(window):
            posterior.update_logits(piece)
        if pooled is None:
            pooled = posterior
        else:
            pooled.merge_(posterior)
    assert pooled is not None
    return pooled


@pytest.mark.parametrize("phi", [0.0, 0.9])
@pytest.mark.parametrize(("draws", "known"), [(300, True), (256, False)])
def test_rhat_is_arvizs(phi: float, draws: int, known: bool) -> None:
    x = chains_of(phi, draws)
    found = streamed(x, num_draws=draws if known else None).diagnostics()
    assert found.rhat.shape == (ROWS, 2)
    assert torch.equal(found.classes, torch.tensor([[0, 1]]).expand(ROWS, -1))
    exact = np.array([arviz.rhat(x[:, :, r]) for r in range(ROWS)])
    near = exact < 1.06
    for column in range(2):  # log odds of the two classes are each other's negatives
        assert np.abs(found.rhat[:, column].numpy() - exact)[near].max() < 2e-3


def test_chains_that_are_split_off_their_middle_still_tell() -> None:
    """300 draws of unknown number are split at 256 or 128; a stuck chain is seen, and good ones pass."""
    x = chains_of(0.0, 300)
    assert (streamed(x).diagnostics().rhat < 1.02).all()
    x[2, :, :20] += 2
    found = streamed(x).diagnostics()
    assert (found.rhat[:20] > 1.2).all() and (found.rhat[20:] < 1.02).all()
    assert found.unconverged == pytest.approx(0.5, abs=0.2)
    assert "4 chains, 1,200 draws: median R-hat 1." in found.sentence()


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_effective_sizes(phi: float) -> None:
    """Medians over rows against N (1 - phi) / (1 + phi); ArviZ's own from the traces, to the codes' rounding."""
    x = chains_of(phi, 2000)
    found = streamed(x, traces=True).diagnostics()
    truth = CHAINS * 2000 * (1 - phi) / (1 + phi)
    for ess, bar in ((found.batch_ess[0], 0.2), (found.batch_ess[1], 0.3), (found.between_chain_ess, 0.6)):
        assert abs(float(ess[:, 0].median()) / truth - 1) < bar
    assert (found.ess <= torch.minimum(*found.batch_ess) + 1e-9).all()
    exact = [arviz.ess(x[:, :, r], method="mean") for r in range(ROWS)]
    np.testing.assert_allclose(found.trace_ess.numpy(), exact, rtol=0.02)
    assert found.traces.codes.shape == (CHAINS, 2000, ROWS)


def test_quantile_errors_and_certified_widths() -> None:
    x = chains_of(0.5, 2000)
    found = streamed(x).diagnostics()
    p = 1 / (1 + np.exp(-x))
    for q in (0.025, 0.5):
        exact = np.array([arviz.mcse(p[:, :, r], method="quantile", prob=q) for r in range(ROWS)])
        # the mean's effective draws stand for those of the quantile's indicator
        ratio = found.quantile_mcse(q)[:, 0].numpy() / exact
        assert 0.6 < np.median(ratio) < 1.7
    width = found.certified_width(0.5)
    spread = torch.from_numpy(p.max((0, 1)) - p.min((0, 1)))
    assert (width[:, 0] > 0).all() and (width[:, 0] < spread / 10).all()
    with pytest.raises(ValueError, match="q = 2"):
        found.quantile_mcse(2)


def test_nested_rhat_of_groups() -> None:
    x = chains_of(0.0, 50)
    found = streamed(x).diagnostics()
    assert (found.nested_rhat() < 1.1).all()
    x[2:] += 1.5
    apart = streamed(x).diagnostics()
    assert (apart.nested_rhat(torch.tensor([0, 0, 1, 1])) > 1.4).all()
    # groups that each hold chains of both places agree
    assert (apart.nested_rhat(torch.tensor([0, 1, 0, 1])) < 1.1).all()
    with pytest.raises(ValueError, match=r"superchains has shape \(3,\): must be \(4,\)"):
        found.nested_rhat(torch.tensor([0, 0, 1]))


def test_rows_that_lack_draws_are_nan_and_constant_ones_too() -> None:
    posterior = PosteriorPredictive(3, 2, diagnostics=True, labels=torch.tensor([0, 1, 0]))
    posterior.choose_classes_by(torch.zeros(3, 2))
    x = torch.randn(100, 2, 2, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 1.0
    posterior.update_logits(x, torch.tensor([0, 2]))
    found = posterior.diagnostics()
    assert (~found.rhat[0].isnan()).all() and found.rhat[1:].isnan().all()
    assert (found.ess[0] > 20).all() and found.ess[1:].isnan().all()
    assert found.between_chain_ess is None and found.traces is None and found.trace_ess is None


def test_rows_with_fewer_draws_than_others_have_no_batch_means() -> None:
    posterior = PosteriorPredictive(2, 2, diagnostics=True)
    posterior.choose_classes_by(torch.zeros(2, 2))
    x = torch.randn(128, 2, 2, generator=torch.Generator().manual_seed(0))
    posterior.update_logits(x[:100])
    posterior.update_logits(x[100:, :1], torch.tensor([0]))
    ess, _ = posterior.diagnostics().batch_ess
    assert ess[1].isnan().all() and (ess[0] > 0).all()


@dataclass
class FakeDraw:
    model: nn.Module
    index: int
    chain: int = 0
    cycle: int = 0
    run: int = 5

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}


def test_every_cycle_and_chain_is_a_chain() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(2, 3), torch.randn(6, 2)
    posterior = PosteriorPredictive(6, 3, diagnostics=True)
    for index in range(40):
        for chain in (0, 3):
            with torch.no_grad():
                model.weight.normal_()
            posterior.update(FakeDraw(model, index, chain, index // 20), [x])
    found = posterior.diagnostics()
    assert [(piece.chain, piece.cycle, piece.start) for piece in found.chains] == [
        (0, 0, 0), (0, 1, 20), (3, 0, 0), (3, 1, 20),
    ]  # fmt: skip
    assert all((record.counts == 20).all() for record in found.records.values())
    assert found.rhat.shape == (6, 1)


def test_thinned_draws_stay_one_chain() -> None:
    model, x = nn.Linear(2, 3), torch.randn(6, 2)
    posterior = PosteriorPredictive(6, 3, diagnostics=True)
    for index in range(0, 60, 7):
        posterior.update(FakeDraw(model, index), [x])
    assert len(posterior.diagnostics().chains) == 1


def test_without_diagnostics() -> None:
    posterior = PosteriorPredictive(3, 2)
    posterior.update_logits(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="diagnostics = False: must be True when the posterior is made"):
        posterior.diagnostics()
    with pytest.raises(ValueError, match="has no draws to diagnose"):
        PosteriorPredictive(3, 2, diagnostics=True).diagnostics()
