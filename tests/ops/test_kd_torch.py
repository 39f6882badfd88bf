"""The KD energy inside torch: opcheck, compile, vmap, func.grad, repeated and double backward."""

import pytest
import torch

from bkd_fast.ops.kd import PRIORS, kd_energy


def _batch(prior="dirichlet", rows=9, classes=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator).to(dtype)
    teacher = torch.randn(*((2,) if prior == "mixture" else ()), rows, classes, generator=generator).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    return logits, teacher, target


def _arguments(logits, teacher, target, prior, reduction, weights=None):
    settings = (prior, False, False, 2.0, 1.5, 0.8, 0.1, False, -100, reduction)
    return (logits, target, teacher, None, None, weights, *settings)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(prior, reduction, dtype):
    logits, teacher, target = _batch(prior, dtype=dtype)
    torch.library.opcheck(torch.ops.bkd_fast.kd_energy, _arguments(logits, teacher, target, prior, reduction))
    leaf = logits.clone().requires_grad_()
    soft = torch.softmax(teacher.reshape(-1, *logits.shape)[0], -1)
    torch.library.opcheck(torch.ops.bkd_fast.kd_energy, _arguments(leaf, teacher, soft, prior, reduction))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_of_signed_targets_and_teachers_by_label(reduction):
    logits, teacher, target = _batch()
    signed = teacher - (teacher.sum(-1, keepdim=True) - 1) / teacher.shape[-1]
    settings = ("dirichlet", False, False, 2.0, 1.5, 0.8, 0.1, True, -100, reduction)
    torch.library.opcheck(torch.ops.bkd_fast.kd_energy, (logits, signed, teacher, None, None, None, *settings))
    settings = ("reverse_kl", False, True, -2.0, 1.5, 0.8, 0.1, False, -100, reduction)
    torch.library.opcheck(torch.ops.bkd_fast.kd_energy, (logits, target, teacher[:5], None, None, None, *settings))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_into_one_graph(reduction, dtype):
    def loss(logits, target, teacher):
        energy = kd_energy(logits * 2, target, teacher, prior_strength=2.0, temperature=2.0, reduction=reduction)
        return (energy * 3).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):  # the same graph with other numbers: nothing of the first batch is baked in
        logits, teacher, target = _batch(dtype=dtype, seed=seed)
        results = []
        for function in (loss, compiled):
            leaf = logits.clone().requires_grad_()
            value = function(leaf, target, teacher)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])


def test_compiled_loss_without_a_factor_gives_the_whole_gradient():
    def loss(logits, target, teacher):
        return kd_energy(logits, target, teacher, prior_strength=2.0)

    logits, teacher, target = _batch()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(leaf, target, teacher).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0])


# which of logits, target and teacher are mapped, and over which dimension
MAPPED = [(0, None, None), (1, None, None), (2, None, None), (0, 0, None), (None, 0, 0), (0, None, 1), (2, 1, 0)]


@pytest.mark.parametrize("in_dims", MAPPED)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("prior", ["dirichlet", "mixture"])
def test_vmap_is_a_loop(prior, reduction, in_dims):
    size = 4
    batches = [_batch(prior, seed=seed) for seed in range(size)]
    columns = list(zip(*batches, strict=True))
    logits, teachers, targets = columns
    tensors = [logits, targets, teachers]
    given = [
        columns[0] if dim is None else torch.stack(list(columns), dim)
        for columns, dim in zip(tensors, in_dims, strict=True)
    ]

    def loss(logits, target, teacher):
        return kd_energy(logits, target, teacher, prior=prior, prior_strength=2.0, temperature=2.0, reduction=reduction)

    def gradient(logits, target, teacher):
        return torch.func.grad(lambda z: loss(z, target, teacher).sum())(logits)

    rows = [[c[0] if d is None else c[i] for c, d in zip(tensors, in_dims, strict=True)] for i in range(size)]
    torch.testing.assert_close(torch.vmap(loss, in_dims)(*given), torch.stack([loss(*row) for row in rows]))
    torch.testing.assert_close(torch.vmap(gradient, in_dims)(*given), torch.stack([gradient(*row) for row in rows]))


@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (0, 0, None), (None, 0, 0), (2, 1, None), (0, None, 1), (1, 1, 2)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_over_teachers_by_label(reduction, in_dims):
    columns = list(zip(*((z, y, t[:5]) for z, t, y in (_batch(seed=seed) for seed in range(4))), strict=True))
    given = [c[0] if d is None else torch.stack(c, d) for c, d in zip(columns, in_dims, strict=True)]
    settings = {"prior": "reverse_kl", "prior_strength": -2.0, "temperature": 2.0, "teacher_by_label": True}

    def loss(logits, target, table):
        return kd_energy(logits, target, table, reduction=reduction, **settings)

    def gradient(logits, target, table):
        return torch.func.grad(lambda z: loss(z, target, table).sum())(logits)

    rows = [[c[0] if d is None else c[i] for c, d in zip(columns, in_dims, strict=True)] for i in range(4)]
    for function in (loss, gradient):
        torch.testing.assert_close(torch.vmap(function, in_dims)(*given), torch.stack([function(*row) for row in rows]))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_vmap_over_mixture_weights(per_row, mapped):
    size, rows = 3, 9
    logits, teacher, target = _batch("mixture", rows=rows)
    shape = (size, *((rows,) if per_row else ()), 2)
    weights = torch.softmax(torch.randn(shape, generator=torch.Generator().manual_seed(2)), -1)
    teachers = torch.stack([teacher, teacher * 2, teacher * 3])

    def loss(weights, teacher):
        return kd_energy(logits, target, teacher, prior="mixture", prior_strength=2.0, mixture_weights=weights)

    got = torch.vmap(loss, (0 if mapped else None, 0))(weights if mapped else weights[0], teachers)
    wanted = [loss(weights[i if mapped else 0], teachers[i]) for i in range(size)]
    torch.testing.assert_close(got, torch.stack(wanted))


def test_vmap_of_float16_gradients():
    logits, teacher, target = _batch(dtype=torch.float16)
    batch = torch.stack([logits, logits + 1, logits * 2])

    def gradient(z):
        return torch.func.grad(lambda z: kd_energy(z, target, teacher, prior_strength=2.0))(z)

    torch.testing.assert_close(torch.vmap(gradient)(batch), torch.stack([gradient(z) for z in batch]))


def test_batched_gradients():
    logits, teacher, target = _batch()
    leaf = logits.clone().requires_grad_()
    loss = kd_energy(leaf, target, teacher, prior_strength=2.0)
    factors = torch.tensor([1.0, 2.0, -3.0])
    (batched,) = torch.autograd.grad(loss, leaf, factors, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(batched, factors[:, None, None] * one)


def test_backward_multiplies_by_the_incoming_gradient():
    logits, teacher, target = _batch()
    leaf = logits.clone().requires_grad_()
    (one,) = torch.autograd.grad(kd_energy(leaf, target, teacher, prior_strength=2.0), leaf)
    (three,) = torch.autograd.grad(kd_energy(leaf, target, teacher, prior_strength=2.0) * 3, leaf)
    torch.testing.assert_close(three, one * 3)
    weights = torch.arange(9.0)
    energy = kd_energy(leaf, target, teacher, prior_strength=2.0, reduction="none")
    (weighted,) = torch.autograd.grad((energy * weights).sum(), leaf)
    torch.testing.assert_close(weighted, one * 9 * weights[:, None])


def test_a_graph_that_is_kept_gives_its_gradient_every_time():
    logits, teacher, target = _batch()
    leaf = logits.clone().requires_grad_()
    loss = kd_energy(leaf, target, teacher, prior_strength=2.0)
    (one,) = torch.autograd.grad(kd_energy(leaf, target, teacher, prior_strength=2.0), leaf)
    for times in (1, 2, 3):
        loss.backward(retain_graph=times < 3)
        torch.testing.assert_close(leaf.grad, one * times)
    loss = kd_energy(leaf, target, teacher, prior_strength=2.0)
    loss.backward(retain_graph=True)
    leaf.grad.zero_()  # writing to a gradient must not reach into the graph
    loss.backward()
    torch.testing.assert_close(leaf.grad, one)


def test_two_uses_of_the_same_logits_add_up():
    logits, teacher, target = _batch()
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1
    loss = kd_energy(hidden, target, teacher, prior_strength=2.0) + kd_energy(hidden, None, teacher, prior_strength=1.0)
    loss.backward()
    parts = []
    for strength, labels in ((2.0, target), (1.0, None)):
        alone = logits.clone().requires_grad_()
        kd_energy(alone, labels, teacher, prior_strength=strength).backward()
        parts.append(alone.grad)
    torch.testing.assert_close(leaf.grad, parts[0] + parts[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_an_error(reduction):
    logits, teacher, target = _batch()
    leaf = logits.clone().requires_grad_()
    energy = kd_energy(leaf, target, teacher, prior_strength=2.0, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(energy, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.pow(2).sum().backward()


def test_no_gradient_flows_to_what_is_data():
    logits, teacher, target = _batch()
    teacher.requires_grad_()
    leaf = logits.clone().requires_grad_()
    kd_energy(leaf, target, teacher, prior_strength=2.0).backward()
    assert leaf.grad is not None and teacher.grad is None
