"""What works on this machine: every backend and instruction set runs every operation and is held against the oracle."""

import platform
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

import bkd_fast as bkd
from bkd_fast.ops import backends, use_backend
from bkd_fast.ops.cpp import native

WORKS = "works"
MISSING = "missing"
WRONG = "WRONG"

# operations other than the noise, whose bits are specified, may differ by rounding
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """A backend, or one instruction set of it; its state is WORKS, MISSING or WRONG, and the reason says why."""

    name: str
    devices: str
    state: str
    reason: str


def versions() -> dict[str, str]:
    """What a result was made with: package versions, threads, the instruction set in use."""
    return {
        "bkd_fast": version("bkd_fast"),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "instruction set": native.isa() if native is not None else "none: reference backend",
    }


def examine() -> list[Finding]:
    """Run every operation everywhere it can run and compare with the reference backend."""
    with use_backend("reference"):
        expected = _exercise()
    findings = []
    for backend in backends().values():
        devices = ", ".join(backend.devices)
        if backend.missing is not None:
            findings.append(Finding(backend.name, devices, MISSING, backend.missing))
        elif backend.name == "reference":
            findings.append(Finding(backend.name, devices, WORKS, "the oracle that the others are held against"))
        elif backend.name == "cpp":
            findings += _examine_instruction_sets(expected)
        else:
            with use_backend(backend.name):
                findings.append(_judge(backend.name, backend.devices[0], expected))
    return findings


def _examine_instruction_sets(expected: dict[str, Tensor]) -> list[Finding]:
    findings = []
    before = native.isa()
    try:
        for isa in ("avx512", "avx2", "scalar"):
            if isa not in native.isas():
                reason = f"this processor ({platform.machine()}) does not have its instructions"
                findings.append(Finding(f"cpp, {isa}", "cpu", MISSING, reason))
                continue
            native.use_isa(isa)
            with use_backend("cpp"):
                finding = _judge(f"cpp, {isa}", "cpu", expected)
            in_use = ", in use" if isa == before and finding.state == WORKS else ""
            findings.append(Finding(finding.name, finding.devices, finding.state, finding.reason + in_use))
    finally:
        native.use_isa(before)
    return findings


def _judge(name: str, device: str, expected: dict[str, Tensor]) -> Finding:
    found = _exercise(device)
    for operation, wanted in expected.items():
        allowed = 0.0 if operation == "noise" else TOLERANCE
        gap = float((found[operation] - wanted).abs().max())
        if not gap <= allowed:
            reason = f"{operation}: differs from the reference by {gap:.3g}, allowed {allowed:g}"
            return Finding(name, device, WRONG, reason)
    return Finding(name, device, WORKS, f"agrees with the reference on {', '.join(expected)}")


def _exercise(device: str = "cpu") -> dict[str, Tensor]:
    """Every operation once, at an odd size, on fixed input; results on the CPU."""
    rows, classes = 37, 11
    ramp = torch.linspace(-3, 3, rows * classes).view(rows, classes).to(device)
    logits = (5 * torch.sin(7 * ramp)).requires_grad_()
    labels = (torch.arange(rows) % classes).to(device)
    energy = bkd.KDLoss(2.0, 2.0)(logits, labels, teacher_logits=torch.cos(3 * ramp))
    energy.backward()
    assert logits.grad is not None

    theta = torch.nn.Parameter(ramp.clone())
    theta.grad = torch.sin(ramp)
    bkd.SGLD([theta], lr=0.1, num_data=10, prior_precision=1.0, seed=1).step()

    posterior = bkd.PosteriorPredictive(num_rows=rows, num_classes=classes, device=device)
    posterior.update_logits(torch.stack([logits.detach() + shift * ramp for shift in range(4)]))

    head = bkd.LinearHeadSampler(
        classes, 3, lr=0.1, num_data=10, prior_strength=2.0, temperature=2.0, seed=1, device=device
    )
    head.step(ramp, labels % 3, torch.cos(ramp[:, :3]))
    found = {
        "noise": bkd.noise.normal((1001,), seed=1, device=device),
        "Langevin step": theta.detach(),
        "KD energy": torch.cat([energy.detach().view(1), logits.grad.flatten()]),
        "posterior predictive": torch.cat([posterior.mean, posterior.quantile(0.9)]),
        "head step": head.weight.detach(),
    }
    return {operation: result.cpu() for operation, result in found.items()}
