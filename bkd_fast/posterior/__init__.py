"""What becomes of draws: the streamed posterior predictive, kept draws, and the measures of both."""

from bkd_fast.posterior.card import data_hash
from bkd_fast.posterior.diagnostics import Diagnostics
from bkd_fast.posterior.draw_file import DrawRecord
from bkd_fast.posterior.draws import Draws
from bkd_fast.posterior.predictive import PosteriorPredictive

__all__ = ["Diagnostics", "DrawRecord", "Draws", "PosteriorPredictive", "data_hash"]
