"""What becomes of draws: the streamed posterior predictive, kept draws, and the measures of both."""

from bkd_fast.posterior.draws import Draws
from bkd_fast.posterior.predictive import PosteriorPredictive

__all__ = ["Draws", "PosteriorPredictive"]
