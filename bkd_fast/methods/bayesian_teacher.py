"""A Bayesian teacher: soft labels that are the mean over a posterior's draws, on the student's training inputs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bkd_fast.posterior.evaluation import batches_of, evaluating
from bkd_fast.posterior.predictive import PosteriorPredictive
from bkd_fast.sampling import Callback, Draw

SMALLEST = torch.finfo(torch.float32).tiny  # of a mean, whose logarithm is a logit


class BayesianTeacher(Callback):
    """Follows `bkd_fast.sample` of a teacher and keeps the mean of softmax(z_s / T) over its draws s on given inputs.

    Distilling a posterior's predictive into one network is Bayesian dark knowledge (Balan et al., NIPS 2015); here the labels are
    made first, and the student may be sampled in turn::

        labels = BayesianTeacher(inputs, num_rows=N, num_classes=C, temperature=2.0)
        for draw in bkd.sample(teacher, sampler, bkd.KDLoss(0.0), loader, num_draws=100, callbacks=[labels]): ...
        loss = bkd.KDLoss(5.0, temperature=2.0)  # of batches (x, y, rows of labels.logits)

    Args:
        inputs: a loader of the student's training inputs in their order: batches x, (x,) or (x, ...). Read once for every draw.
        num_rows, num_classes: N, C.
        temperature: T of the draws, > 0: the mean of tempered probabilities is softer than the tempered mean.

    Attributes:
        posterior: `PosteriorPredictive` of the tempered draws on the inputs; its mutual information tells where they disagree.

    Raises:
        ValueError: a temperature out of range; at a draw, inputs or logits of another number of rows or classes.
    """

    def __init__(self, inputs: Iterable[Any], *, num_rows: int, num_classes: int, temperature: float = 1.0) -> None:
        if not 0 < temperature < torch.inf:
            raise ValueError(f"temperature = {temperature}: must be a finite number > 0")
        self._inputs, self.temperature = inputs, float(temperature)
        # nobody asks for quantiles: of one class they are kept, the fewest that can be
        one_class = torch.zeros(num_rows, 1, dtype=torch.int64)
        self.posterior = PosteriorPredictive(num_rows, num_classes, track=one_class)

    def on_draw(self, draw: Draw) -> None:
        device = next(draw.model.parameters()).device
        with evaluating(draw.model), torch.no_grad():
            for x, rows in batches_of(self._inputs, "order", self.posterior.num_rows):
                self.posterior.update_logits(draw.model(x.to(device)) / self.temperature, rows)

    @property
    def probs(self) -> Tensor:
        """float32 (N, C): the mean of the draws' tempered probabilities; NaN before the first draw."""
        return self.posterior.mean

    @property
    def logits(self) -> Tensor:
        """float32 (N, C), T log `probs`: teacher logits for a `KDLoss` of temperature T, whose p_T is then `probs`."""
        return self.temperature * self.probs.clamp_min(SMALLEST).log()
