"""KDLoss: its identities with the losses it generalises, its arguments, and its use as a module."""

import math

import pytest
import torch
import torch.nn.functional as F

from bkd_fast.distill import KDLoss


def _batch(rows=24, classes=10, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, rows, classes, generator=generator, dtype=dtype) * 3
    return logits.requires_grad_(), torch.randint(classes, (rows,), generator=generator), teacher


def _gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def _entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 3.3])
def test_from_hinton_has_hintons_gradient_and_his_value_plus_a_constant(alpha, temperature):
    logits, target, teacher = _batch()
    divergence = F.kl_div(
        torch.log_softmax(logits / temperature, -1),
        torch.log_softmax(teacher / temperature, -1),
        log_target=True,
        reduction="batchmean",
    )
    hinton = (1 - alpha) * F.cross_entropy(logits, target) + alpha * temperature**2 * divergence
    loss = KDLoss.from_hinton(alpha, temperature)
    energy = loss(logits, target, teacher)
    torch.testing.assert_close(_gradient(energy, logits), _gradient(hinton, logits), rtol=1e-12, atol=1e-15)
    constant = alpha * temperature**2 * _entropy(teacher / temperature).mean()
    torch.testing.assert_close(energy, hinton + constant, rtol=1e-12, atol=1e-12)
    assert loss.posterior_temperature == (math.inf if alpha == 1 else 1 / (1 - alpha))


def test_hintons_loss_is_a_tempered_energy():
    logits, target, teacher = _batch()
    alpha, temperature = 0.8, 2.0
    hinton = KDLoss.from_hinton(alpha, temperature)
    energy = KDLoss(alpha * temperature**2 / (1 - alpha), temperature)
    assert energy.posterior_temperature == 1.0
    torch.testing.assert_close(
        hinton(logits, target, teacher) * hinton.posterior_temperature, energy(logits, target, teacher)
    )


def test_dirichlet_is_minus_the_log_posterior_up_to_its_normaliser():
    logits, target, teacher = _batch()
    strength, classes = 3.0, 10
    p, q = torch.softmax(teacher, -1), torch.softmax(logits, -1)
    prior = torch.distributions.Dirichlet(1 + strength * p).log_prob(q)
    likelihood = torch.distributions.Categorical(q).log_prob(target)
    normaliser = torch.lgamma(1 + strength * p).sum(-1) - math.lgamma(classes + strength)
    energy = KDLoss(strength, reduction="none")(logits, target, teacher)
    torch.testing.assert_close(energy + normaliser, -(prior + likelihood))


def test_dirichlet_is_cross_entropy_plus_lambda_cross_entropy():
    logits, target, teacher = _batch()
    wanted = F.cross_entropy(logits, target) + 5 * F.cross_entropy(logits / 2, torch.softmax(teacher / 2, -1))
    torch.testing.assert_close(KDLoss(5.0, 2.0)(logits, target, teacher), wanted)


def test_reverse_kl_and_continuous_categorical_differ_by_the_entropy():
    logits, _, teacher = _batch()
    reverse = KDLoss(2.0, prior="reverse_kl")(logits, None, teacher)
    linear = KDLoss(2.0, prior="continuous_categorical")(logits, None, teacher)
    torch.testing.assert_close(reverse, linear - 2 * _entropy(logits).mean())


@pytest.mark.parametrize("weights", ["entropy", "uniform", torch.ones(1)])
def test_a_mixture_of_one_teacher_has_the_dirichlet_gradient(weights):
    logits, target, teacher = _batch()
    mixture = KDLoss(3.0, 2.0, prior="mixture", mixture_weights=weights)(logits, target, teacher[None])
    single = KDLoss(3.0, 2.0)(logits, target, teacher)
    torch.testing.assert_close(_gradient(mixture, logits), _gradient(single, logits), rtol=1e-12, atol=1e-14)


def test_a_mixture_of_equal_teachers_is_one_teacher_whatever_the_weights():
    logits, target, teacher = _batch()
    one = KDLoss(3.0, prior="mixture")(logits, target, teacher[None])
    for weights in ("entropy", "uniform", torch.tensor([0.1, 0.2, 0.7])):
        three = KDLoss(3.0, prior="mixture", mixture_weights=weights)(logits, target, teacher.expand(3, -1, -1))
        torch.testing.assert_close(three, one)


def test_mixture_weights_count_for_teachers_that_disagree():
    logits, target, teacher = _batch()
    teachers = torch.stack([teacher, -teacher])
    losses = [KDLoss(3.0, prior="mixture", mixture_weights=torch.tensor(w)) for w in ([1.0, 0.0], [0.0, 1.0])]
    for loss, one in zip(losses, teachers, strict=True):
        alone = KDLoss(3.0)(logits, target, one)
        torch.testing.assert_close(_gradient(loss(logits, target, teachers), logits), _gradient(alone, logits))


def test_no_prior_is_cross_entropy():
    logits, target, teacher = _batch()
    for smoothing in (0.0, 0.1, 1.0):
        wanted = F.cross_entropy(logits, target, label_smoothing=smoothing)
        torch.testing.assert_close(KDLoss(0.0, label_smoothing=smoothing)(logits, target), wanted)
    torch.testing.assert_close(KDLoss(0.0)(logits, target, teacher), F.cross_entropy(logits, target))


def test_teacher_probs_are_teacher_logits():
    logits, target, teacher = _batch()
    for temperature in (1.0, 2.0, 3.3):
        loss = KDLoss(5.0, temperature)
        probs = torch.softmax(teacher, -1)
        torch.testing.assert_close(loss(logits, target, teacher_probs=probs), loss(logits, target, teacher))


def test_a_one_hot_soft_target_is_a_hard_target():
    logits, target, teacher = _batch()
    loss = KDLoss(5.0, 2.0, label_smoothing=0.1)
    one_hot = F.one_hot(target, 10).double()
    torch.testing.assert_close(loss(logits, one_hot, teacher), loss(logits, target, teacher))


def test_rows_without_labels_keep_their_teacher_and_count_in_the_mean():
    logits, target, teacher = _batch()
    loss = KDLoss(5.0, 2.0, ignore_index=-1)
    unlabelled = target.clone()
    unlabelled[::2] = -1
    energies = KDLoss(5.0, 2.0, reduction="none")
    labelled, teacher_only = energies(logits, target, teacher), energies(logits, None, teacher)
    mixed = torch.where(unlabelled == -1, teacher_only, labelled)
    torch.testing.assert_close(loss(logits, unlabelled, teacher), mixed.mean())
    torch.testing.assert_close(loss(logits, torch.full_like(target, -1), teacher), loss(logits, None, teacher))


def test_a_label_weight_of_zero_is_no_label():
    logits, target, teacher = _batch()
    torch.testing.assert_close(
        KDLoss(5.0, label_weight=0.0)(logits, target, teacher), KDLoss(5.0)(logits, None, teacher)
    )


def test_the_mean_with_chains_is_over_everything():
    logits, target, teacher = _batch()
    chains = torch.stack([logits.detach(), logits.detach() * 2]).requires_grad_()
    loss = KDLoss(5.0, 2.0)
    value = loss(chains, target, teacher)
    torch.testing.assert_close(value, (loss(chains[0], target, teacher) + loss(chains[1], target, teacher)) / 2)
    own = torch.cat([_gradient(loss(z, target, teacher), z) for z in (chains[0:1], chains[1:2])])
    torch.testing.assert_close(_gradient(2 * value, chains), own)


def test_gradient_descent_on_the_energy_finds_the_posterior_mode():
    # free logits of one row: (1 + lambda) q = y + lambda p, the mean of label and teacher
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    teacher, strength = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64), 2.0
    loss, target = KDLoss(strength), torch.tensor([2])
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(400):
        optimizer.zero_grad()
        loss(logits, target, teacher_probs=teacher).backward()
        optimizer.step()
    wanted = (F.one_hot(target, 3) + strength * teacher) / (1 + strength)
    torch.testing.assert_close(torch.softmax(logits.detach(), -1), wanted, rtol=1e-8, atol=1e-10)


def test_a_teacher_that_asks_for_gradients_is_data():
    logits, target, teacher = _batch()
    teacher.requires_grad_()
    KDLoss(5.0)(logits, target, teacher).backward()
    assert logits.grad is not None and teacher.grad is None


def test_autocast_logits():
    logits, target, teacher = _batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.nn.functional.linear(logits, torch.eye(10))
        assert half.dtype == torch.bfloat16
        loss = KDLoss(5.0, 2.0)(half, target, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, KDLoss(5.0, 2.0)(logits.bfloat16().float(), target, teacher))


def test_module():
    weights = torch.tensor([0.25, 0.75])
    loss = KDLoss(5.0, 2.0, prior="mixture", mixture_weights=weights)
    assert loss.to(torch.float64).mixture_weights.dtype == torch.float64
    torch.testing.assert_close(loss.state_dict()["mixture_weights"], weights.double())
    assert not list(loss.parameters())
    assert "prior_strength=5, temperature=2" in repr(loss)
    assert KDLoss(5.0).reduction == "mean" and not KDLoss(5.0).state_dict()


def test_a_negative_reverse_kl_rewards_distance_from_the_teacher():
    logits, teacher = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    kl = torch.nn.functional.kl_div(teacher.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True)
    energy = KDLoss(-2.0, prior="reverse_kl", reduction="none")(logits, None, teacher)
    torch.testing.assert_close(energy, -2 * kl.sum(-1), rtol=1e-5, atol=1e-5)


ARGUMENTS = [
    ({"prior_strength": -1.0}, "prior_strength = -1.0: must be a finite number >= 0"),
    ({"prior_strength": math.nan}, "prior_strength = nan"),
    ({"prior_strength": math.inf}, "prior_strength = inf"),
    *(
        ({"prior_strength": -1.0, "prior": prior}, "prior_strength = -1.0: must be a finite number >= 0")
        for prior in ("continuous_categorical", "mixture")
    ),
    ({"prior_strength": -math.inf, "prior": "reverse_kl"}, "prior_strength = -inf: must be a finite number$"),
    ({"temperature": 0.0}, "temperature = 0.0: must be a finite number > 0"),
    ({"temperature": -2.0}, "temperature = -2.0"),
    ({"label_weight": -0.5}, "label_weight = -0.5: must be a finite number >= 0"),
    ({"label_smoothing": 1.5}, r"label_smoothing = 1.5: must be in \[0, 1\]"),
    ({"prior": "beta"}, "prior = 'beta': must be one of"),
    ({"reduction": "average"}, "reduction = 'average': must be one of"),
    ({"mixture_weights": "even"}, "mixture_weights = 'even': must be 'entropy', 'uniform' or a tensor"),
]


@pytest.mark.parametrize(("changed", "message"), ARGUMENTS)
def test_bad_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        KDLoss(**{"prior_strength": 1.0, **changed})


def test_bad_hinton_arguments():
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha = .*: must be in \[0, 1\]"):
            KDLoss.from_hinton(alpha, 2.0)
    with pytest.raises(ValueError, match="temperature = 0"):
        KDLoss.from_hinton(0.5, 0)


def test_both_forms_of_the_teacher():
    logits, target, teacher = _batch()
    with pytest.raises(ValueError, match="teacher_logits and teacher_probs are both given"):
        KDLoss(1.0)(logits, target, teacher, teacher_probs=torch.softmax(teacher, -1))
