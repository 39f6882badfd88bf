"""Head steps to test, and what is asked of every backend: equal to the reference within rounding, noise bit for bit."""

from dataclasses import replace
from typing import Any

import torch

from bkd_fast.noise import normal
from bkd_fast.ops import use_backend
from bkd_fast.ops.head import HeadStep
from bkd_fast.ops.reference.noise import fma

TERMS: list[dict[str, Any]] = [
    {},
    {"bias": None},
    {"target": None},
    {"teacher": None, "prior_strength": 0.0},
    {"teacher": None, "prior_strength": 0.0, "target": None},  # decay and noise are left
    {"temperature": 1.0},
    {"temperature": 4.0},
    {"temperature": 3.0},
    {"label_weight": 0.3},
    {"label_weight": 0.0},
    {"decay": 0.0},
    {"sigma": 0.0},
    {"ignore_index": 3},
    {"x": torch.bfloat16},
    {"x": torch.float16},
    {"teacher": torch.bfloat16},
    {"teacher": torch.float16},
]


def case(chains: int = 3, rows: int = 50, classes: int = 10, features: int = 36, **changed: Any) -> HeadStep:
    """A step on fresh random numbers; a dtype in the place of x or teacher casts it."""
    generator = torch.Generator().manual_seed(chains + rows + classes + features)

    def normals(*shape):
        return torch.randn(shape, generator=generator)

    tensors = {
        "weight": normals(chains, classes, features) / features**0.5,
        "bias": normals(chains, classes),
        "x": normals(rows, features),
        "target": torch.randint(classes, (rows,), generator=generator),
        "teacher": 2 * normals(rows, classes),
    }
    for name, value in changed.items():
        if isinstance(value, torch.dtype):
            changed[name] = tensors[name].to(value)
    settings = {
        "prior_strength": 2.0, "temperature": 2.0, "label_weight": 1.0, "ignore_index": -100, "lr": 0.1, "decay": 0.01,
        "sigma": 0.02, "seed": 2**64 - 3, "chain": 5, "step": 2**33 + 1, "weight_parameter": 4, "bias_parameter": 9,
    }  # fmt: skip
    return HeadStep(**{**tensors, **settings, **changed})


def copy(step: HeadStep) -> HeadStep:
    """The same step of its own heads."""
    return replace(step, weight=step.weight.clone(), bias=None if step.bias is None else step.bias.clone())


def chain_of(step: HeadStep, k: int) -> HeadStep:
    """The step of chain k alone, of its own head."""
    one = copy(step)
    return replace(one, weight=one.weight[k : k + 1].clone(), bias=one.bias[k : k + 1].clone(), chain=step.chain + k)


def arguments(step: HeadStep) -> tuple[Any, ...]:
    """As the operation's schema has them."""
    values = dict(vars(step))
    values["seed"] -= 2**64 if values["seed"] >= 2**63 else 0
    return tuple(values.values())


def rounding_of(step: HeadStep) -> tuple[torch.Tensor, torch.Tensor]:
    """What float32 rounding may do to the new W and b: a few units in the last place of every term of the gradient's sums and
    of the parameter itself. Terms: a softmax, times the label's or the prior's factor, times a feature."""
    x = step.x.double()
    logits = x @ step.weight.double().mT + (0.0 if step.bias is None else step.bias.double()[:, None])
    terms = step.prior_strength / step.temperature * torch.softmax(logits / step.temperature, -1)
    if step.teacher is not None:
        terms = terms + step.prior_strength / step.temperature * torch.softmax(
            step.teacher.double() / step.temperature, -1
        )
    terms = terms + step.label_weight * torch.softmax(logits, -1)
    if step.target is not None:
        labelled = (step.target != step.ignore_index)[:, None]
        one_hot = torch.nn.functional.one_hot(torch.where(labelled[:, 0], step.target, 0), step.weight.shape[1])
        terms = terms + step.label_weight * one_hot * labelled
    # logits carry the rounding of their own product, which the softmax makes relative
    size = 1 + (x.abs() @ step.weight.double().abs().nan_to_num(posinf=0).mT).amax()
    terms = terms * (step.lr * size * 2.0**-22 / len(x))
    ulp = 2.0**-23
    weight = terms.mT @ x.abs() + ulp * (step.weight.double().abs() + step.sigma * 7)
    bias = terms.sum(1)
    return weight, bias if step.bias is None else bias + ulp * (
        step.bias.double().abs().nan_to_num(posinf=0) + step.sigma * 7
    )


def assert_within(got: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    both = (got == expected) | ((got.double() - expected.double()).abs() <= bound)
    worst = ((got.double() - expected.double()).abs() / bound).nan_to_num().max()
    assert both.all(), (
        f"{int((~both).sum())} of {both.numel()} elements are off, the worst by {float(worst):.3g} bounds"
    )


def assert_step_equals_reference(step: HeadStep, head_step_: Any) -> None:
    """Take the step, and the reference's from the same point."""
    expected, bounds, before = copy(step), rounding_of(step), step.weight.clone()
    energy, nonfinite = head_step_(step)
    with use_backend("reference"):
        expected_energy, _ = head_step_(expected)
    assert not nonfinite.any()
    torch.testing.assert_close(energy, expected_energy, rtol=1e-5, atol=1e-5)
    assert not torch.equal(step.weight, before)
    assert_within(step.weight, expected.weight, bounds[0])
    if step.bias is not None:
        assert_within(step.bias, expected.bias, bounds[1])


def assert_noise_is_exact(step: HeadStep, head_step_: Any) -> None:
    """theta with noise is fma(sigma, xi, theta without), with the xi of each chain, parameter and element."""
    silent = replace(copy(step), sigma=0.0)
    head_step_(step)
    head_step_(silent)
    for k in range(len(step.weight)):
        for tensors, parameter in (
            ((step.weight, silent.weight), step.weight_parameter),
            ((step.bias, silent.bias), step.bias_parameter),
        ):
            noisy, plain = (tensor[k] for tensor in tensors)
            xi = normal(plain.shape, seed=step.seed, chain=step.chain + k, step=step.step, parameter=parameter)
            sigma = torch.full_like(plain, step.sigma).numpy()
            assert torch.equal(noisy, torch.from_numpy(fma(sigma, xi.numpy(), plain.numpy())))
