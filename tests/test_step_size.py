"""The suggested step size, where gradient noise and curvature are known, and what the measurement leaves untouched."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bkd_fast as bkd
from bkd_fast.step_size import suggest_lr

N, BATCH, SIZE = 2048, 16, 512


@pytest.fixture(autouse=True)
def one_thread():
    """Work this small only waits for the second thread where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Quadratic(nn.Module):
    """Energy of a row x: sum_i h_i theta_i^2 / 2 + x theta, whose batch mean has gradient h theta + mean x and Hessian diag h."""

    def __init__(self, curvatures, dtype=torch.float32):
        super().__init__()
        self.register_buffer("curvatures", curvatures.to(dtype))
        self.theta = nn.Parameter(torch.linspace(-1, 1, len(curvatures), dtype=dtype))

    def forward(self, x):
        return 0.5 * (self.curvatures * self.theta.square()).sum() + x @ self.theta


def _mean(z, y, t):
    return z.mean()


def _quadratic(curvatures=None, dtype=torch.float32):
    """The problem, its loader, and the variance of a batch's gradient in each coordinate."""
    generator = torch.Generator().manual_seed(0)
    if curvatures is None:
        curvatures = torch.logspace(-3, 1, SIZE)
    student = _Quadratic(curvatures, dtype)
    x = torch.randn(N, len(curvatures), generator=generator).to(dtype)
    loader = DataLoader(TensorDataset(x, x[:, 0]), BATCH, shuffle=True, generator=generator)
    return student, loader, x.var(0) / BATCH * (1 - BATCH / N)


def _sampler(student, kind=bkd.SGLD, lr=0.1, **settings):
    return kind(student.named_parameters(), lr, **{"num_data": N, **settings})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limited_by_the_gradient_noise(dtype):
    student, loader, variance = _quadratic(dtype=dtype)
    sampler = _sampler(student, temperature=0.5, prior_precision=4.0)
    found = suggest_lr(student, sampler, _mean, loader, noise_share=0.02)
    assert found.limit == "noise_share"
    error = 5 * math.sqrt(2 / (15 * SIZE))  # 5 standard errors of a variance from 16 batches
    assert found.gradient_variance[0] == pytest.approx(float(variance.mean()), rel=error)
    assert found.lr == pytest.approx(2 * 0.5 * 0.02 / (N * float(variance.mean())), rel=error)
    assert found.noise_share[0] == pytest.approx(0.02) and found.effective_lr == pytest.approx(found.lr)
    # a diagonal has no error from random signs
    mean = float(student.curvatures.mean()) + 4 / N
    assert found.mean_curvature == pytest.approx(mean, rel=1e-3)
    assert found.largest_curvature == pytest.approx(10 + 4 / N, rel=1e-2)
    assert found.mixing_steps == pytest.approx(1 / (found.lr * mean), rel=1e-3)
    assert found.prior_mixing_steps == pytest.approx(N / (4 * found.lr))


def test_limited_by_the_largest_curvature():
    student, loader, _ = _quadratic()
    found = suggest_lr(student, _sampler(student), _mean, loader, noise_share=100.0)
    assert found.limit == "curvature" and found.noise_share[0] < 100
    assert found.lr == pytest.approx(0.5 / 10, rel=1e-2)
    assert found.prior_mixing_steps == math.inf


def test_more_batches_measure_the_variance_better():
    student, loader, variance = _quadratic()
    found = suggest_lr(student, _sampler(student), _mean, loader, batches=200)
    assert found.gradient_variance[0] == pytest.approx(float(variance.mean()), rel=5 * math.sqrt(2 / (199 * SIZE)))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(bkd.SGHMC, {"momentum": 0.9, "dampening": 0.5}), (bkd.BAOAB, {"friction": 30.0}), (bkd.BAOAB, {"friction": 1e4})],
)
@pytest.mark.parametrize("noise_share", [0.05, 100.0])
def test_a_momentum_is_translated(kind, settings, noise_share):
    """Whatever the present lr: that of SGLD is the effective one."""
    student, loader, _ = _quadratic()
    wanted = suggest_lr(student, _sampler(student), _mean, loader, noise_share=noise_share).lr
    _, loader, _ = _quadratic()  # shuffles as the first
    sampler = _sampler(student, kind, lr=0.0, **settings)
    found = suggest_lr(student, sampler, _mean, loader, noise_share=noise_share)
    assert found.effective_lr == pytest.approx(wanted, rel=1e-6)
    assert sampler.effective_lr({**sampler.param_groups[0], "lr": found.lr}) == pytest.approx(wanted, rel=1e-6)


def test_a_metric_weighs_noise_and_curvature():
    student, loader, variance = _quadratic()
    sampler = _sampler(student, bkd.PSGLD, prior_precision=2.0)
    theta = student.theta.detach().clone()
    student.theta.grad = 10 * torch.rand(SIZE, generator=torch.Generator().manual_seed(1)) + 1
    sampler.step()
    student.theta.data.copy_(theta)
    metric = sampler.metric(student.theta)
    found = suggest_lr(student, sampler, _mean, loader)
    weighted = metric * variance
    deviation = math.sqrt(2 / 15 * float(weighted.square().sum())) / float(weighted.sum())
    assert found.gradient_variance[0] == pytest.approx(float(weighted.mean()), rel=5 * deviation)
    curvatures = metric * (student.curvatures + 2 / N)
    assert found.largest_curvature == pytest.approx(float(curvatures.max()), rel=1e-2)
    assert found.mean_curvature == pytest.approx(float(curvatures.mean()), rel=1e-3)
    assert found.prior_mixing_steps == pytest.approx(N / (2 * found.lr * float(metric.mean())))


def test_groups_share_the_smallest_lr():
    student, loader, variance = _quadratic()
    other = nn.Parameter(torch.zeros(SIZE))
    student.register_parameter("other", other)
    forward = student.forward
    student.forward = lambda x: forward(x) + 3 * x @ student.other  # nine times the variance
    groups = [{"params": [student.theta], "weight_decay": 0.5}, {"params": [other], "temperature": 2.0}]
    sampler = bkd.SGLD(groups, 0.1, num_data=N)
    found = suggest_lr(student, sampler, _mean, loader, noise_share=0.01)
    expected = 2 * 2 * 0.01 / (N * 9 * float(variance.mean()))
    assert found.lr == pytest.approx(expected, rel=5 * math.sqrt(2 / (15 * SIZE)))
    assert found.noise_share[1] == pytest.approx(0.01) and found.noise_share[0] == pytest.approx(0.01 * 2 / 9, rel=0.2)
    assert found.prior_mixing_steps == math.inf  # of the group without a prior
    assert found.mean_curvature == pytest.approx((float(student.curvatures.mean()) + 0.5) / 2, rel=1e-3)


def test_a_log_posterior_that_is_maximised():
    student, loader, _ = _quadratic()
    sampler = _sampler(student, maximize=True, prior_precision=100.0)
    found = suggest_lr(student, sampler, lambda z, y, t: -z.mean(), loader)
    assert found.largest_curvature == pytest.approx(10 + 100 / N, rel=1e-2)


def test_linear_regression():
    """The Hessian of the mean loss is X'X / n, whatever the parameters; a batch of all data has no gradient noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 30, generator=generator) @ torch.randn(30, 30, generator=generator)
    y = torch.randn(200, 1, generator=generator)
    student = nn.Linear(30, 1, bias=False)
    sampler = bkd.SGLD(student.parameters(), 0.1, num_data=200, prior_precision=3.0)
    found = suggest_lr(student, sampler, lambda z, y, t: 0.5 * (z - y).square().mean(), [(x, y)])
    spectrum = torch.linalg.eigvalsh((x.T @ x / 200).double()) + 3 / 200
    assert found.largest_curvature == pytest.approx(float(spectrum[-1]), rel=1e-3)
    deviation = math.sqrt(2 * float(spectrum.square().sum()) / 8) / float(spectrum.sum())  # of 8 probes, at most
    assert found.mean_curvature == pytest.approx(float(spectrum.mean()), rel=5 * deviation)
    assert found.limit == "curvature" and found.gradient_variance[0] == pytest.approx(0, abs=1e-9)
    assert found.lr == pytest.approx(0.5 / float(spectrum[-1]), rel=1e-3)


def _network(*layers):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 12), *layers, nn.Tanh(), nn.Linear(12, 3))
    teacher = nn.Linear(6, 3)
    x = torch.randn(256, 6)
    return student, teacher, x, torch.arange(256) % 3


def test_kd_loss_of_a_network():
    """Against the Hessian that autograd has of the same energy, written plainly."""
    student, teacher, x, y = _network()
    sampler = bkd.SGLD(student.named_parameters(), 0.1, num_data=256, prior_precision=1.0)
    found = suggest_lr(student, sampler, bkd.KDLoss(2.0), [(x, y)], teacher=teacher)
    names, shapes = zip(*((name, p.shape) for name, p in student.named_parameters()), strict=True)
    p = teacher(x).detach().double().softmax(-1)

    def energy(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        tensors = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        log_q = torch.func.functional_call(student, tensors, (x.double(),)).log_softmax(-1)
        return -(log_q[torch.arange(256), y] + 2 * (p * log_q).sum(-1)).mean()

    flat = torch.cat([q.detach().flatten() for q in student.parameters()]).double()
    spectrum = torch.linalg.eigvalsh(torch.autograd.functional.hessian(energy, flat)) + 1 / 256
    assert found.largest_curvature == pytest.approx(float(spectrum[-1]), rel=1e-2)
    deviation = math.sqrt(2 * float(spectrum.square().sum()) / 8) / float(spectrum.sum())
    assert found.mean_curvature == pytest.approx(float(spectrum.mean()), rel=5 * deviation)


def test_dropout_is_not_taken_for_curvature():
    """Its masks would differ between the two gradients of a difference."""
    found = []
    for p in (0.0, 0.5):
        student, teacher, x, y = _network(nn.Dropout(p))
        sampler = bkd.SGLD(student.named_parameters(), 0.1, num_data=256)
        found.append(suggest_lr(student, sampler, bkd.KDLoss(2.0), [(x, y)], teacher=teacher))
    assert found[1].largest_curvature == pytest.approx(found[0].largest_curvature, rel=1e-5)
    assert found[1].gradient_variance[0] > 1e-8 > found[0].gradient_variance[0]


def test_the_chain_has_the_noise_share_asked_for():
    student, loader, _ = _quadratic(torch.full((SIZE,), 0.1))
    sampler = _sampler(student, bkd.SGHMC, prior_precision=1.0)
    sampler.param_groups[0]["lr"] = suggest_lr(student, sampler, _mean, loader, noise_share=0.05).lr
    health = []

    class AtEnd(bkd.Callback):
        def on_end(self, found):
            health.append(found)

    list(bkd.sample(student, sampler, _mean, loader, num_draws=1, progress=False, callbacks=[AtEnd()]))
    # two measurements of one variance
    assert health[0].noise_share[0] == pytest.approx(0.05, rel=5 * math.sqrt(2 * 2 / (15 * SIZE)))


def test_the_student_is_afterwards_as_it_was():
    student, teacher, x, y = _network(nn.BatchNorm1d(12), nn.Dropout(0.5))
    teacher = nn.Sequential(teacher, nn.Dropout(0.5))
    student(x)  # running statistics
    student[-1].eval()
    student[0].weight.grad = torch.ones_like(student[0].weight)
    sampler = bkd.SGLD(student.named_parameters(), 0.1, num_data=256)
    loader = DataLoader(TensorDataset(x, y), 32)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    modes = [m.training for m in student.modules()]
    gradients = [p.grad for p in student.parameters()]

    def check():
        assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
        assert [m.training for m in student.modules()] == modes and teacher.training
        assert all(p.grad is g for p, g in zip(student.parameters(), gradients, strict=True))
        assert torch.equal(student[0].weight.grad, torch.ones_like(student[0].weight))
        assert sampler.param_groups[0]["step"] == 0 and sampler.param_groups[0]["lr"] == 0.1

    suggest_lr(student, sampler, bkd.KDLoss(1.0), loader, teacher=teacher)
    check()

    class Fails(bkd.KDLoss):
        calls = 0

        def forward(self, *arguments):
            self.calls += 1
            if self.calls == 50:  # among the differences
                raise KeyboardInterrupt
            return super().forward(*arguments)

    with pytest.raises(KeyboardInterrupt):
        suggest_lr(student, sampler, Fails(1.0), loader, teacher=teacher)
    check()


def test_it_prints_what_it_found():
    student, loader, _ = _quadratic()
    found = suggest_lr(student, _sampler(student, prior_precision=1.0), _mean, loader, noise_share=0.01)
    lines = str(found).splitlines()
    assert lines[0] == f"lr = {found.lr:.3g}, limited by the minibatch gradient's noise"
    for line, start in zip(
        lines[1:], ("noise share ", "largest curvature 10, lr' l = ", "mean curvature ", "prior alone "), strict=True
    ):
        assert line.startswith("  " + start)


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        ({"noise_share": 0.0}, {}, ValueError, r"noise_share = 0\.0: must be positive and finite"),
        ({"noise_share": math.nan}, {}, ValueError, "noise_share = nan"),
        ({"batches": 1}, {}, ValueError, "batches = 1: must be at least 2"),
        ({"batches": 2.0}, {}, TypeError, r"batches = 2\.0: must be an int"),
        ({"loader": []}, {}, ValueError, "train_loader is empty"),
        ({"loss_fn": bkd.KDLoss(1.0, reduction="sum")}, {}, ValueError, "reduction = 'sum'"),
        ({"loss_fn": lambda z, y, t: z.mean() * math.nan}, {}, bkd.NonFiniteError, "not finite"),
        ({}, {"temperature": 0.0}, ValueError, r"temperature = 0\.0 of parameter group 0: must be positive"),
        ({}, {"step_in_backward": True}, ValueError, "step_in_backward = True of parameter group 0"),
    ],
)
def test_bad_arguments(change, settings, error, message):
    student, loader, _ = _quadratic()
    theta = student.theta.detach().clone()
    arguments = {"loss_fn": _mean, **change}
    with pytest.raises(error, match=message):
        suggest_lr(
            student,
            _sampler(student, **settings),
            arguments.pop("loss_fn"),
            arguments.pop("loader", loader),
            **arguments,
        )
    assert torch.equal(student.theta, theta) and student.theta.grad is None


def test_students_that_cannot_be_measured():
    student, loader, _ = _quadratic()
    with pytest.raises(ValueError, match="must hold only its own"):
        suggest_lr(student, _sampler(nn.Linear(2, 2)), _mean, loader)
    with pytest.raises(TypeError, match=r"parameter of torch\.bfloat16: must be float32 or float64"):
        suggest_lr(student, _sampler(student.to(torch.bfloat16)), _mean, loader)
    student, loader, _ = _quadratic()
    student.unused = nn.Parameter(torch.zeros(2))
    sampler = bkd.SGLD([student.unused], 0.1, num_data=N)
    with pytest.raises(ValueError, match="no parameter that gets a gradient"):
        suggest_lr(student, sampler, _mean, loader)
    student, _, _ = _quadratic(torch.zeros(4))
    with pytest.raises(ValueError, match="neither gradient noise nor curvature"):
        suggest_lr(student, _sampler(student), _mean, [(torch.ones(1, 4), None)])
