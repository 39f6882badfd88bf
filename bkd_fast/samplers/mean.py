"""The network at the posterior mean of its weights."""

import copy

import torch
from torch import nn

from bkd_fast.samplers.sampler import Sampler


@torch.no_grad()
def mean_model(model: nn.Module, sampler: Sampler) -> nn.Module:
    """A copy of the model whose sampled parameters are their posterior means, as `sampler.track_moments` has them.

    One forward pass then stands for the posterior's centre (Izmailov et al., UAI 2018, average weights likewise); it is not the
    posterior predictive. Buffers are the live model's: estimate batch norm's again with `torch.optim.swa_utils.update_bn`.

    Args:
        model: holds the parameters of `sampler`; it stays as it is.
        sampler: a sampler whose moments are tracked; what it does not hold keeps the live value.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: the model has none of the sampler's parameters, or one of them has fewer than two counted draws.
    """
    sampled = {id(parameter) for group in sampler.param_groups for parameter in group["params"]}
    live = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in sampled]
    if not live:
        raise ValueError("model has none of the sampler's parameters: pass the network that it samples")
    means = {name: sampler.moments(parameter).mean for name, parameter in live}
    averaged = copy.deepcopy(model)
    parameters = dict(averaged.named_parameters())
    for name, mean in means.items():
        parameters[name].copy_(mean)
    return averaged.eval()
