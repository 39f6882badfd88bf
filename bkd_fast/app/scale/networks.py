"""Networks by name, from torchvision or timm, as the configuration wants them computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bkd_fast.app.config import ConfigError
from bkd_fast.app.scale.config import Runtime


def build(name: str, classes: int, seed: int) -> nn.Module:
    """A network with new parameters, from images (N, 3, H, W) to logits (N, classes).

    Args:
        name: torchvision:NAME or timm:NAME.
        classes: width of its last layer.
        seed: of the parameters; torch's global generator is left as it was.

    Raises:
        ConfigError: the library does not know the name; the nearest ones are suggested.
    """
    library, _, model = name.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"torchvision": _of_torchvision, "timm": _of_timm}[library](model, classes)


def _of_torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise ConfigError(_unknown("torchvision", name, models.list_models()))
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return model


def _of_timm(name: str, classes: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ConfigError(_unknown("timm", name, timm.list_models()))
    model: nn.Module = timm.create_model(name, num_classes=classes)
    return model


def _unknown(library: str, name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    return f"model = {library}:{name}: must be a model of {library}{', such as ' + ', '.join(near) if near else ''}"


def load_weights(model: nn.Module, file: Path) -> None:
    """Fill a network from a safetensors file of its state_dict.

    Raises:
        ConfigError: the file is missing or another thing, or its tensors are not the network's.
    """
    try:
        model.load_state_dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"weights = {file}: cannot be read as safetensors ({error})") from error
    except RuntimeError as error:
        raise ConfigError(f"weights = {file}: are of another network: {error}") from error


def device_of(runtime: Runtime, local_rank: int) -> torch.device:
    """Where this process computes.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise ConfigError("runtime.device = cuda: torch sees no CUDA device; must be auto or cpu here")
    return torch.device("cuda", local_rank) if available and runtime.device != "cpu" else torch.device("cpu")


def prepared(model: nn.Module, runtime: Runtime, device: torch.device) -> nn.Module:
    """The network on its device, in the memory format and precision of the configuration. Its logits are float32."""
    model = model.to(device)
    if runtime.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.forward = _forward(model.forward, runtime, device)
    if runtime.compile:
        model.compile()
    return model


def _forward(forward: Callable[..., Any], runtime: Runtime, device: torch.device) -> Callable[[Tensor], Tensor]:
    layout = torch.channels_last if runtime.channels_last else torch.contiguous_format

    def compute(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=runtime.bf16):
            logits: Tensor = forward(x.contiguous(memory_format=layout))
        return logits.float()

    return compute
