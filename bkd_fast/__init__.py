"""A fast Bayesian knowledge distillation sampler engine for PyTorch.

KDLoss is the energy (minus the log posterior per example), SGLD and its kin are samplers in the place of an optimizer,
PosteriorPredictive streams what the draws predict, and `sample` is the loop that joins them.
"""

from bkd_fast import noise, ops
from bkd_fast.batches import Batches
from bkd_fast.checking import SamplerCheck, check_sampler
from bkd_fast.checkpoint import Checkpoints, Terminated
from bkd_fast.distill import KDLoss, TopKLogits
from bkd_fast.errors import BackendUnavailableError, BKDFastWarning, MissingLibraryError, NonFiniteError, StateFileError
from bkd_fast.features import FeatureBatches, FeatureCache, record_features
from bkd_fast.heads import LinearHeadSampler, sample_heads, split_head
from bkd_fast.mesh import chain_mesh, data_parallel, data_rank, rows_here
from bkd_fast.ops import backends, use_backend
from bkd_fast.posterior import Diagnostics, DrawRecord, Draws, PosteriorPredictive, data_hash
from bkd_fast.samplers import BAOAB, PSGLD, SGHMC, SGLD, SGNHT, AdamSGHMC, CyclicalSchedule, mean_model
from bkd_fast.sampling import Callback, Draw, Health, Run, StepRecord, sample
from bkd_fast.sketch import QuantileSketch
from bkd_fast.stacked import StackedModule
from bkd_fast.step_size import StepSize, suggest_lr
from bkd_fast.teacher_cache import TeacherCache, TeacherCacheWriter, fingerprint_of, record_teacher

__version__ = "0.1.0"

__all__ = [
    "BAOAB",
    "PSGLD",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "AdamSGHMC",
    "BKDFastWarning",
    "BackendUnavailableError",
    "Batches",
    "Callback",
    "Checkpoints",
    "CyclicalSchedule",
    "Diagnostics",
    "Draw",
    "DrawRecord",
    "Draws",
    "FeatureBatches",
    "FeatureCache",
    "Health",
    "KDLoss",
    "LinearHeadSampler",
    "MissingLibraryError",
    "NonFiniteError",
    "PosteriorPredictive",
    "QuantileSketch",
    "Run",
    "SamplerCheck",
    "StackedModule",
    "StateFileError",
    "StepRecord",
    "StepSize",
    "TeacherCache",
    "TeacherCacheWriter",
    "Terminated",
    "TopKLogits",
    "backends",
    "chain_mesh",
    "check_sampler",
    "data_hash",
    "data_parallel",
    "data_rank",
    "fingerprint_of",
    "mean_model",
    "noise",
    "ops",
    "record_features",
    "record_teacher",
    "rows_here",
    "sample",
    "sample_heads",
    "split_head",
    "suggest_lr",
    "use_backend",
]
