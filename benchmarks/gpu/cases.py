"""What is measured: each operation at the sizes that people use, beside what they would use instead."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bkd_fast as bkd
from benchmarks.gpu.timing import Case, Run, graphed
from benchmarks.shapes import resnet50
from bkd_fast.ops.rules import bytes_per_parameter
from bkd_fast.ops.sketch import empty_tiles, sketch_update_

NUM_DATA, LR = 1_281_167, 1e-3
STRENGTH, TEMPERATURE = 5.0, 2.0


def backends_of(device: torch.device) -> list[str]:
    """The fast backends that can run there."""
    known = bkd.backends().values()
    return [b.name for b in known if device.type in b.devices and b.name != "reference" and b.missing is None]


# ---- the Langevin step ----


def _parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    parameters = [nn.Parameter((0.05 * torch.randn(shape, device=device)).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _eager_sgld(parameters: list[nn.Parameter], sigma: float) -> Run:
    @torch.no_grad()
    def step(_: int) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.add_(parameter.grad, alpha=-LR)
            parameter.add_(torch.randn_like(parameter), alpha=sigma)

    return step


def _compiled_sgld(parameters: list[nn.Parameter], sigma: float) -> Run:
    @torch.no_grad()
    def step(tensors: list[Tensor], gradients: list[Tensor]) -> None:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.add_(gradient, alpha=-LR)
            tensor.add_(torch.randn_like(tensor), alpha=sigma)

    torch._dynamo.reset()  # or the limit of recompilations ends in eager
    compiled = torch.compile(step, dynamic=False)
    tensors = [parameter.detach() for parameter in parameters]
    return lambda _: compiled(tensors, [p.grad for p in parameters])


def langevin(device: torch.device, small: bool) -> Iterator[Case]:
    """SGLD on ResNet-50, on a billion parameters in float32 and bfloat16, and on ten thousand small tensors."""
    big = 10**6 if small else 10**9
    suites = [
        ("ResNet-50, 161 tensors, fp32", resnet50()[: 12 if small else None], torch.float32),
        (f"{big:,} parameters, fp32", [(big,)], torch.float32),
        (f"{big:,} parameters, bf16, stochastic rounding", [(big,)], torch.bfloat16),
        ("10,000 tensors of 64, fp32", [(64,)] * (100 if small else 10_000), torch.float32),
    ]
    for name, shapes, dtype in suites:
        parameters = _parameters(shapes, dtype, device)
        total = sum(parameter.numel() for parameter in parameters)
        sigma = math.sqrt(2 * LR / NUM_DATA)
        contenders: dict[str, Run] = {}
        for chain, backend in enumerate(backends_of(device)):
            contenders[f"SGLD, {backend}"] = _step_on(backend, parameters, chain)
        if device.type == "cuda":
            for chain, backend in enumerate(backends_of(device), start=8):
                sampler = _sampler(parameters, chain, capturable=True)
                with bkd.use_backend(backend):
                    sampler.step()
                    contenders[f"SGLD, {backend}, CUDA graph"] = graphed(sampler.step)
        sgd = {"foreach": True} if device.type != "cuda" else {"fused": True}
        contenders["torch SGD, its fastest"] = _optimizer(torch.optim.SGD(parameters, LR, **sgd))
        contenders["torch Adam, fused"] = _optimizer(torch.optim.Adam(parameters, LR, fused=True))
        contenders["eager SGLD"] = _eager_sgld(parameters, sigma)
        if len(shapes) < 1000:  # compiling a graph of ten thousand tensors takes longer than everything else here
            contenders["torch.compile of eager SGLD"] = _compiled_sgld(parameters, sigma)
        yield Case("Langevin step", name, "parameter", total, 3 * total * dtype.itemsize, contenders)


def samplers(device: torch.device, small: bool) -> Iterator[Case]:
    """The rest of the family on ResNet-50, beside what torch has in their place, and 64 chains of a small network."""
    shapes = resnet50()[: 12 if small else None]
    sgd = {"fused": True} if device.type == "cuda" else {"foreach": True}
    family = {
        "SGHMC": (bkd.SGHMC, {}, lambda p: torch.optim.SGD(p, LR, momentum=0.9, **sgd)),
        "AdamSGHMC": (bkd.AdamSGHMC, {}, lambda p: torch.optim.Adam(p, LR, fused=True)),
        "PSGLD": (bkd.PSGLD, {}, lambda p: torch.optim.RMSprop(p, LR, foreach=True)),
        "SGNHT": (bkd.SGNHT, {}, lambda p: torch.optim.SGD(p, LR, momentum=0.9, **sgd)),
        "BAOAB": (bkd.BAOAB, {"friction": 1000.0}, lambda p: torch.optim.SGD(p, LR, momentum=0.9, **sgd)),
    }
    settings = {"lr": LR, "num_data": NUM_DATA, "prior_precision": 1.0, "nonfinite": "propagate"}
    for name, (sampler_class, own, theirs) in family.items():
        parameters = _parameters(shapes, torch.float32, device)
        total = sum(parameter.numel() for parameter in parameters)
        contenders: dict[str, Run] = {}
        for chain, backend in enumerate(backends_of(device)):
            sampler = sampler_class(parameters, chain=chain, **settings, **own)
            contenders[f"{name}, {backend}"] = _on(backend, sampler)
        contenders["torch's in its place"] = _optimizer(theirs(parameters))
        moved = bytes_per_parameter(sampler_class.rule) * total
        yield Case("samplers", f"{name}, ResNet-50, fp32", "parameter", total, moved, contenders)
    chains, layers = 64, [(20, 32), (32,), (32, 32), (32,), (32, 5), (5,)]
    stacked = _parameters([(chains, *shape) for shape in layers], torch.float32, device)
    alone = [_parameters(layers, torch.float32, device) for _ in range(chains)]
    total = sum(parameter.numel() for parameter in stacked)
    contenders = {}
    for number, backend in enumerate(backends_of(device), start=1):
        together = bkd.SGLD(stacked, chains=chains, chain=1000 * number, **settings)
        contenders[f"64 chains, {backend}"] = _on(backend, together)
    each = [bkd.SGLD(p, chain=500 + k, **settings) for k, p in enumerate(alone)]
    contenders["64 samplers"] = lambda _: [sampler.step() for sampler in each]
    yield Case("samplers", "64 chains of a small network", "parameter", total, 12 * total, contenders)


def _sampler(parameters: list[nn.Parameter], chain: int, capturable: bool = False) -> bkd.SGLD:
    return bkd.SGLD(
        parameters,
        LR,
        num_data=NUM_DATA,
        prior_precision=1.0,
        chain=chain,
        nonfinite="propagate",
        capturable=capturable,
    )


def _step_on(backend: str, parameters: list[nn.Parameter], chain: int) -> Run:
    return _on(backend, _sampler(parameters, chain))


def _on(backend: str, sampler: torch.optim.Optimizer) -> Run:
    def step(_: int) -> None:
        with bkd.use_backend(backend):
            sampler.step()

    return step


def _optimizer(optimizer: torch.optim.Optimizer) -> Run:
    return lambda _: optimizer.step()


# ---- the KD energy ----


def _eager_kd(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(z / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return F.cross_entropy(z, y) + STRENGTH * divergence


def kd_energy(device: torch.device, small: bool) -> Iterator[Case]:
    """Forward and backward of KDLoss from 10 to 128,256 classes, in float32 and bfloat16."""
    logits = 2**16 if small else 2**28  # 1 GiB in float32
    for classes in (10, 100, 1000, 32_000, 128_256):
        for dtype in (torch.float32, torch.bfloat16):
            rows, sets = max(2, logits // classes), 2
            z = [(3 * torch.randn(rows, classes, device=device)).to(dtype).requires_grad_() for _ in range(sets)]
            t = [(3 * torch.randn(rows, classes, device=device)).to(dtype) for _ in range(sets)]
            y = [torch.randint(classes, (rows,), device=device) for _ in range(sets)]
            loss = bkd.KDLoss(STRENGTH, TEMPERATURE)
            torch._dynamo.reset()  # or other sizes' code counts against this one's, and ends in eager
            compiled = torch.compile(_eager_kd, dynamic=False)

            def ours(i: int, z=z, y=y, t=t, loss=loss) -> None:  # type: ignore[no-untyped-def]
                z[i].grad = None
                loss(z[i], y[i], t[i]).backward()

            def eager(i: int, z=z, y=y, t=t, energy=_eager_kd) -> None:  # type: ignore[no-untyped-def]
                z[i].grad = None
                energy(z[i], y[i], t[i]).backward()

            def compiled_eager(i: int, z=z, y=y, t=t, energy=compiled) -> None:  # type: ignore[no-untyped-def]
                z[i].grad = None
                energy(z[i], y[i], t[i]).backward()

            contenders: dict[str, Run] = {"KDLoss": ours, "eager": eager, "torch.compile of eager": compiled_eager}
            liger = _liger(z, y, t)
            if liger is not None:
                contenders["Liger kl_div + cross_entropy"] = liger
            name = f"C = {classes:,}, {rows:,} rows, {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
            total = rows * classes
            yield Case("KD energy", name, "logit", total, 3 * total * dtype.itemsize, contenders, sets)


def _liger(z: list[Tensor], y: list[Tensor], t: list[Tensor]) -> Run | None:
    """Liger's kernels, where they are installed."""
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss
    except ImportError:
        return None
    divergence, entropy = LigerKLDIVLoss(reduction="batchmean", log_target=True), LigerCrossEntropyLoss()

    def run(i: int) -> None:
        z[i].grad = None
        log_q, log_p = F.log_softmax(z[i] / TEMPERATURE, -1), F.log_softmax(t[i] / TEMPERATURE, -1)
        (entropy(z[i].clone(), y[i]) + STRENGTH * divergence(log_q, log_p)).backward()  # its entropy works in place

    return run


# ---- the posterior predictive ----


def predictive(device: torch.device, small: bool) -> Iterator[Case]:
    """Updates of W = 1, 8 and 32 draws, everything on, beside the quantiles of as many stored draws."""
    cells = 2**14 if small else 2**25
    for classes in (10, 100, 1000):
        rows = cells // classes
        for draws in (1, 8, 32):
            logits = 3 * torch.randn(draws, rows, classes, device=device)
            contenders: dict[str, Run] = {}
            for backend in backends_of(device):
                contenders[f"update, {backend}"] = _update_on(backend, rows, classes, logits)
                if classes == 1000:
                    contenders[f"update of 16 tracked classes, {backend}"] = _update_on(
                        backend, rows, classes, logits, "topk:16"
                    )
            units = draws * rows * classes
            floor = 4 * units + 288 * rows * classes
            case = Case(
                "posterior predictive", f"C = {classes:,}, W = {draws}", "cell and draw", units, floor, contenders
            )
            if draws == 32:
                stored = logits[:, : max(1, rows // 16)].softmax(-1)  # torch.quantile takes 16 M elements at most

                def quantile(_: int, stored: Tensor = stored) -> Tensor:
                    return torch.quantile(stored[:, : 2**23 // (32 * stored.shape[2])], 0.95, dim=0)

                yield Case(
                    "posterior predictive",
                    f"C = {classes:,}, one quantile of 32 stored draws",
                    "cell and draw",
                    32 * min(stored.shape[1], 2**23 // (32 * classes)) * classes,
                    None,
                    {"torch.quantile": quantile},
                )
            yield case


def _update_on(backend: str, rows: int, classes: int, logits: Tensor, track: str = "all") -> Run:
    posterior = bkd.PosteriorPredictive(rows, classes, track=track, device=logits.device)
    if track != "all":
        posterior.choose_classes_by(logits[0])
    with bkd.use_backend(backend):
        for _ in range(3):  # past the change from kept draws to counters
            posterior.update_logits(logits.repeat(max(1, 32 // len(logits)), 1, 1)[:32])

    def update(_: int) -> None:
        with bkd.use_backend(backend):
            posterior.update_logits(logits)

    return update


def sketch(device: torch.device, small: bool) -> Iterator[Case]:
    """W = 1 and 32 draws of codes into tiles: cells that each are a row (parameters), and 17 in a row (tracked classes)."""
    cells = 2**14 if small else 2**25
    for row_cells in (1, 17):
        rows = cells // row_cells
        for draws in (1, 32):
            codes = torch.randint(-4000, 4000, (draws, rows, row_cells), dtype=torch.int16, device=device)
            contenders: dict[str, Run] = {}
            for backend in backends_of(device):
                contenders[f"sketch_update_, {backend}"] = _add_codes_on(backend, codes)
            units = codes.numel()
            floor = 2 * units + 264 * rows * row_cells  # codes; 64 counters and two extremes, read and written
            name = f"rows of {row_cells}, W = {draws}"
            yield Case("sketch", name, "cell and draw", units, floor, contenders)


def _add_codes_on(backend: str, codes: Tensor) -> Run:
    tiles = empty_tiles(codes.shape[1], codes.shape[2], 64, codes.device)

    def update(_: int) -> None:
        with bkd.use_backend(backend):
            sketch_update_(tiles, codes)

    for i in range(-(-96 // len(codes))):  # past the change from kept codes to counters
        update(i)
    return update


# ---- the head step ----


def head(device: torch.device, small: bool) -> Iterator[Case]:
    """A linear head on cached features, K chains at once, beside the same from autograd and an optimizer."""
    rows, features = (64, 32) if small else (4096, 2048)
    classes = 10 if small else 1000
    for chains in (1, 8):
        x = torch.randn(rows, features, device=device)
        y, t = torch.randint(classes, (rows,), device=device), 3 * torch.randn(rows, classes, device=device)
        settings = {"lr": LR, "num_data": NUM_DATA, "prior_strength": STRENGTH, "temperature": TEMPERATURE}
        sampler = bkd.LinearHeadSampler(features, classes, chains=chains, seed=3, device=device, **settings)
        weight = nn.Parameter(torch.zeros(chains, classes, features, device=device))
        plain = bkd.SGLD([weight], LR, num_data=NUM_DATA, seed=4, nonfinite="propagate")
        loss = bkd.KDLoss(STRENGTH, TEMPERATURE)

        def one_pass(_: int, sampler=sampler, x=x, y=y, t=t) -> None:  # type: ignore[no-untyped-def]
            sampler.step(x, y, t)

        def two_operations(_: int, weight=weight, plain=plain, loss=loss, x=x, y=y, t=t) -> None:  # type: ignore[no-untyped-def]
            weight.grad = None
            (loss(x @ weight.mT, y, t) * len(weight)).backward()
            plain.step()

        def eager(_: int, weight=weight, x=x, y=y, t=t) -> None:  # type: ignore[no-untyped-def]
            weight.grad = None
            logits = x @ weight.mT
            torch.stack([_eager_kd(z, y, t) for z in logits]).sum().backward()
            with torch.no_grad():
                weight.add_(weight.grad, alpha=-LR)
                weight.add_(torch.randn_like(weight), alpha=math.sqrt(2 * LR / NUM_DATA))

        contenders: dict[str, Run] = {"head step": one_pass, "KDLoss + SGLD": two_operations, "eager": eager}
        units = chains * classes * features
        yield Case(
            "head step", f"K = {chains}, {rows:,} x {features:,} -> {classes:,}", "weight", units, None, contenders
        )


# ---- a whole training step ----


def training_step(device: torch.device, small: bool) -> Iterator[Case]:
    """BKD (KDLoss, SGLD, moments every tenth step) beside plain training (cross-entropy, SGD with momentum)."""
    width, batch = (32, 16) if small else (4096, 4096)
    classes = 100

    def network() -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(6):
            layers += [nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, classes)).to(device)

    x = torch.randn(batch, width, device=device)
    y, t = torch.randint(classes, (batch,), device=device), 3 * torch.randn(batch, classes, device=device)
    student, plain = network(), network()
    sampler = bkd.SGLD(student.parameters(), 1e-4, num_data=NUM_DATA, seed=5)
    sampler.track_moments(every=10)
    sgd = torch.optim.SGD(plain.parameters(), 1e-4, momentum=0.9, fused=device.type == "cuda" or None)
    loss = bkd.KDLoss(STRENGTH, TEMPERATURE)

    def ours(_: int) -> None:
        sampler.zero_grad()
        loss(student(x), y, t).backward()
        sampler.step()

    def baseline(_: int) -> None:
        sgd.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        sgd.step()

    contenders: dict[str, Run] = {"BKD: KDLoss + SGLD + moments": ours, "cross-entropy + SGD(momentum)": baseline}
    yield Case("training step", f"7-layer MLP {width}, batch {batch}", "example", batch, None, contenders)


SUITES = {
    "langevin": langevin,
    "samplers": samplers,
    "kd": kd_energy,
    "predictive": predictive,
    "sketch": sketch,
    "head": head,
    "training": training_step,
}
