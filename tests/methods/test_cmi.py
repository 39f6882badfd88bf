"""Maximum CMI teachers: the identities of the functional, the fused loss against its definition, and a training run."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import in_processes
from torch import nn

from bkd_fast.methods.cmi import CMILoss, class_centroids, conditional_mutual_information


def _batch(rows=60, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[:classes] = torch.arange(classes)
    return logits, labels


def _loss(strength, logits, labels, **settings):
    """A loss with the centroids of these logits."""
    return CMILoss(strength, logits.shape[1], **settings).refresh_(nn.Identity(), [(logits, labels)])


def _definition(logits, labels, centroids, strength, temperature=1.0, label_weight=1.0):
    log_q = torch.log_softmax(logits / temperature, -1)
    divergence = (log_q.exp() * (log_q - centroids[labels].log())).sum(-1)
    return label_weight * F.cross_entropy(logits, labels, reduction="none") - strength * divergence


# ---- identities ----


def test_it_is_the_entropy_of_the_centroids_less_that_of_the_predictions():
    """CMI = sum_y pi_y H(Q^y) - mean H(P_i): mutual information with a class's members in the place of draws."""
    logits, labels = _batch()
    q = logits.softmax(1)
    centroids = class_centroids([(logits, labels)], 5)
    share = labels.bincount(minlength=5).double() / len(labels)
    entropies = torch.special.entr(centroids).sum(1)
    expected = (share * entropies).sum() - torch.special.entr(q).sum(1).mean()
    torch.testing.assert_close(conditional_mutual_information(logits, labels), expected, rtol=1e-12, atol=1e-14)
    assert expected > 0.1


def test_other_centroids_cost_their_divergence():
    logits, labels = _batch()
    own = class_centroids([(logits, labels)], 5)
    other = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
    share = labels.bincount(minlength=5).double() / len(labels)
    excess = (share * (own * (own / other).log()).sum(1)).sum()
    with_other = conditional_mutual_information(logits, labels, other)
    torch.testing.assert_close(
        with_other - conditional_mutual_information(logits, labels), excess, rtol=1e-10, atol=1e-12
    )


def test_one_member_of_each_class_says_nothing_beyond_it():
    logits, _ = _batch(rows=5)
    assert abs(float(conditional_mutual_information(logits, torch.arange(5)))) < 1e-12


# ---- the loss ----


@pytest.mark.parametrize("strength", [0.2, -0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_and_gradient(strength, dtype, temperature):
    """Against autograd on the definition, and at T = 1 against (P - y) - lambda P (log(P / Q) - KL) written out."""
    logits, labels = _batch()
    loss = _loss(strength, logits, labels, temperature=temperature, reduction="none")
    centroids = (loss.centroid_logits.double() / temperature).softmax(1)  # as they are kept
    leaf = logits.detach().requires_grad_()
    expected = _definition(leaf, labels, centroids, strength, temperature)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    given = logits.to(dtype).requires_grad_()
    energy = loss(given, labels)
    (gradient,) = torch.autograd.grad(energy.sum(), given)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(energy.double(), expected.detach(), rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=tolerance)
    if temperature == 1:
        q = logits.softmax(1)
        ratio = (q / centroids[labels]).log()
        closed = q - F.one_hot(labels, 5) - strength * q * (ratio - (q * ratio).sum(1, keepdim=True))
        torch.testing.assert_close(slope, closed, rtol=1e-9, atol=1e-11)


def test_the_mean_is_cross_entropy_less_strength_times_the_cmi():
    logits, labels = _batch()
    loss = _loss(0.25, logits, labels)
    expected = F.cross_entropy(logits, labels) - 0.25 * conditional_mutual_information(logits, labels)
    assert float(loss(logits, labels)) == pytest.approx(float(expected), abs=1e-6)
    without = _loss(0.25, logits, labels, label_weight=0.0)
    assert float(without(logits, labels)) == pytest.approx(
        -0.25 * float(conditional_mutual_information(logits, labels)), abs=1e-6
    )


def test_chains_of_logits_share_labels_and_centroids():
    logits, labels = _batch()
    loss = _loss(0.25, logits, labels, reduction="none")
    chains = torch.stack([logits, logits / 2, -logits])
    assert torch.equal(loss(chains, labels), torch.stack([loss(one, labels) for one in chains]))
    mapped = torch.func.vmap(lambda z: loss(z, labels))(chains)
    torch.testing.assert_close(mapped, loss(chains, labels), rtol=0, atol=1e-12)


def test_a_row_without_a_label_takes_no_part():
    logits, labels = _batch()
    all_rows = _loss(0.25, logits, labels, reduction="none")
    there = torch.cat([labels, torch.full((3,), -100)])
    more = torch.cat([logits, logits[:3] * 5])
    loss = _loss(0.25, more, there, reduction="none")
    assert torch.equal(loss.centroid_logits, all_rows.centroid_logits)
    leaf = more.clone().requires_grad_()
    energy = loss(leaf, there)
    (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    assert torch.equal(energy[:-3], all_rows(logits, labels)) and (gradient[:-3] != 0).any(1).all()
    assert (energy[-3:] == 0).all() and (gradient[-3:] == 0).all()
    own = conditional_mutual_information(more, there)
    torch.testing.assert_close(own, conditional_mutual_information(logits, labels), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_in_one_graph_and_under_autocast(dtype):
    logits, labels = _batch()
    loss = _loss(0.25, logits, labels)
    layer = nn.Linear(5, 5)

    def whole(x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return loss(layer(x), labels)

    expected = whole(logits.float())
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits.float()), expected, rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(expected, layer.weight)
    (gradient,) = torch.autograd.grad(compiled(logits.float()), layer.weight)
    torch.testing.assert_close(gradient, slope)


def test_certain_teachers_keep_their_centroids():
    """Shares below float32's smallest number, and predictions that have no room for one at all."""
    logits = torch.tensor([[0.0, -200.0, -300.0], [-250.0, 0.0, -150.0], [-800.0, -900.0, 0.0]], dtype=torch.float64)
    labels = torch.arange(3)
    assert float(conditional_mutual_information(logits, labels)) == 0
    loss = _loss(0.5, logits[:2, :2], labels[:2], reduction="none")
    other = torch.tensor([[-3.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    rows = logits[:2, :2].log_softmax(1)
    q = other.log_softmax(1)
    expected = -q.diagonal() - 0.5 * (q.exp() * (q - rows)).sum(1)
    torch.testing.assert_close(loss(other, labels[:2]), expected, rtol=1e-6, atol=0)


def test_checkpoints_hold_the_centroids():
    logits, labels = _batch()
    loss, other = _loss(0.25, logits, labels), CMILoss(0.25, 5)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(logits, labels), loss(logits, labels))


# ---- centroids ----


def test_centroids_stream():
    logits, labels = _batch(rows=101)
    parts = list(zip(logits.split(13), labels.split(13), strict=True))
    expected = torch.stack([logits.softmax(1)[labels == y].mean(0) for y in range(5)])
    torch.testing.assert_close(class_centroids(parts, 5), expected, rtol=1e-12, atol=1e-14)


def test_refreshing_looks_in_eval_mode_and_puts_the_mode_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4, affine=False, momentum=0.0))
    model[2].eval()  # frozen: it stays so
    x, labels = torch.randn(40, 3), torch.arange(40) % 4
    loader = list(zip(x.split(7), labels.split(7), strict=True))
    loss = CMILoss(0.2, 4).refresh_(model, loader)
    assert model.training and model[1].training and not model[2].training
    expected = class_centroids([(model.eval()(x), labels)], 4)
    torch.testing.assert_close(loss.centroids.double(), expected, rtol=1e-6, atol=1e-7)


def _refresh_a_part():
    rank = dist.get_rank()
    logits, labels = _batch(rows=53)
    mine = slice(0, 0) if rank == 2 else slice(rank, None, 2)  # one process has nothing
    found = class_centroids([(logits[mine], labels[mine])] if rank < 2 else [], 5)
    torch.testing.assert_close(found, class_centroids_alone(), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="1 rows have labels that are no classes"):
        class_centroids([(logits[:1], torch.tensor([7 if rank == 1 else 0]))], 5)
    with pytest.raises(ValueError, match=r"classes \[4\] have no examples"):
        class_centroids([(logits[labels < 4], labels[labels < 4])], 5)


def class_centroids_alone():
    logits, labels = _batch(rows=53)
    return torch.stack([logits.softmax(1)[labels == y].mean(0) for y in range(5)])


def test_processes_add_their_sums(tmp_path):
    in_processes(3, _refresh_a_part, tmp_path)


# ---- training ----


def test_a_teacher_with_the_term_has_more_cmi_than_one_without():
    """On scikit-learn's digits, from the same teacher with the same batches, as the recipe has it."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)

    def train(model, loss, epochs, lr, seed):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        order = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=order).split(100):
                optimizer.zero_grad()
                loss(model(x[rows]), y[rows]).backward()
                optimizer.step()

    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    train(start, F.cross_entropy, 10, 0.05, 0)
    found = {}
    for strength in (0.0, 0.25, -0.25):
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        model.load_state_dict(start.state_dict())
        loss = CMILoss(strength, 10).refresh_(model, [(x, y)])
        train(model, loss, 20, 0.05, 1)
        with torch.no_grad():
            logits = model(x)
        found[strength] = float(conditional_mutual_information(logits, y))
        assert float((logits.argmax(1) == y).float().mean()) > 0.95
    assert found[0.25] > 1.1 * found[0.0] > 1.2 * found[-0.25], found


# ---- bad input ----


def test_an_empty_class_has_no_centroid():
    logits, labels = _batch()
    labels[labels == 3] = 1
    with pytest.raises(ValueError, match=r"classes \[3\] have no examples"):
        class_centroids([(logits, labels)], 5)
    loss = CMILoss(0.2, 5)
    with pytest.raises(ValueError, match=r"classes \[3\] have no examples"):
        loss.refresh_(nn.Identity(), [(logits, labels)])
    with pytest.raises(RuntimeError, match="centroids: there are none yet"):
        loss(logits, labels)


def test_labels_that_are_no_classes():
    logits, labels = _batch()
    loss = CMILoss(0.2, 5).refresh_(nn.Identity(), [(logits, labels)])
    labels[7] = -1
    for call in (
        lambda: class_centroids([(logits, labels)], 5),
        lambda: conditional_mutual_information(logits, labels),
        lambda: conditional_mutual_information(logits, labels, loss.centroids),
    ):
        with pytest.raises(ValueError, match=r"1 rows have labels that are no classes: must be in \[0, 5\), or -100"):
            call()
    with pytest.raises(ValueError, match=r"target\[7\] = -1: must be a class in \[0, 5\) or ignore_index = -100$"):
        loss(logits, labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": math.inf}, "strength = inf: must be a finite number"),
        ({"classes": 1}, "classes = 1: must be at least 2"),
        ({"temperature": 0.0}, "temperature = 0.0: must be a finite number > 0"),
        ({"label_weight": -1.0}, "label_weight = -1.0: must be"),
        ({"reduction": "max"}, "reduction = 'max': must be one of"),
    ],
)
def test_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        CMILoss(**{"strength": 0.2, "classes": 5, **arguments})


def test_shapes():
    with pytest.raises(ValueError, match=r"centroids has shape \(3, 4\): must be \(4, 4\)"):
        conditional_mutual_information(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"logits has shape \(3, 4\): must be \(rows, 5\)"):
        class_centroids([(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))], 5)
