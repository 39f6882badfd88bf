"""The typed configuration of a run: a YAML file, overrides from the command line, errors that name the key.

The defaults are the demo: scikit-learn's digits, few labels, a student sixteen times narrower than its teacher.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)


class ConfigError(ValueError):
    """A configuration cannot be used; the message names every offending key, its value and what is allowed."""


class Section(BaseModel):
    """A block of keys: immutable, typed, and closed, so that a misspelt key never falls back to a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            unknown = [str(key) for key in values if key not in cls.model_fields]
            if unknown:
                raise ValueError("; ".join(_unknown_key(key, list(cls.model_fields)) for key in unknown))
        return values


def _unknown_key(key: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown key {key!r}; {hint}Known keys: {', '.join(known)}"


class MLP(Section):
    """A fully connected network with ReLU between its layers."""

    name: Literal["mlp"] = "mlp"
    hidden: list[PositiveInt] = Field(description="widths of the hidden layers, in units")


class CNN(Section):
    """Blocks of 3x3 convolution, ReLU and 2x2 max pooling, then fully connected layers."""

    name: Literal["cnn"] = "cnn"
    channels: list[PositiveInt] = Field(min_length=1, description="output channels of each block")
    hidden: list[PositiveInt] = Field(description="widths of the fully connected layers after them, in units")


def _model_name(values: Any) -> Any:
    """What tells the networks apart; without a name it is an MLP, so that `model.hidden` alone can be overridden."""
    return values.get("name", "mlp") if isinstance(values, Mapping) else getattr(values, "name", None)


Model = Annotated[Annotated[MLP, Tag("mlp")] | Annotated[CNN, Tag("cnn")], Discriminator(_model_name)]


class Data(Section):
    """Which images, and how many of them."""

    name: Literal["digits", "mnist"] = Field(
        default="digits",
        description="digits: scikit-learn's 1,797 images of 8x8 pixels; mnist: 70,000 of 28x28 from $BKD_FAST_DATA",
    )
    train_size: PositiveInt | None = Field(
        default=500, description="training images, drawn at random from the training part (null: all of them)"
    )
    test_size: PositiveInt | None = Field(
        default=None, description="test images, the first ones of the test part (null: all of them)"
    )


class Training(Section):
    """How a point estimate is trained: AdamW with a cosine learning rate that ends at 0."""

    epochs: PositiveInt = Field(default=300, description="passes over the training images")
    batch_size: PositiveInt = Field(default=100, description="images per step")
    lr: float = Field(default=3e-3, gt=0, description="AdamW's initial learning rate, per step")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay, per unit of lr")

    @property
    def optimizer(self) -> str:
        """What the report calls it."""
        return "AdamW"


class Teacher(Training):
    """The teacher: its network and its training on the labels."""

    model: Model = Field(default=MLP(hidden=[256, 256]), description="the network")
    epochs: PositiveInt = Field(default=150, description="passes over the training images")
    lr: float = Field(default=1e-3, gt=0, description="AdamW's initial learning rate, per step")
    weight_decay: float = Field(default=1e-2, ge=0, description="AdamW's decoupled weight decay, per unit of lr")


class Student(Training):
    """The student: its network and the training of the distilled point estimate, where the chain starts."""

    model: Model = Field(default=MLP(hidden=[16]), description="the network")


class Distillation(Section):
    """The teacher-informed prior Dirichlet(1 + prior_strength * teacher probabilities) of Fang et al. (ICML 2024)."""

    prior_strength: float = Field(
        default=5.0, ge=0, description="lambda: pseudo-labels that the teacher adds to each image"
    )
    temperature: float = Field(
        default=2.0, gt=0, description="softens teacher and student inside the prior (1: not at all)"
    )


class Sampling(Section):
    """The chain: stochastic gradient Langevin dynamics over all of the student's parameters."""

    lr: float = Field(default=0.15, gt=0, description="step size as in torch.optim.SGD, on the mean loss")
    batch_size: PositiveInt = Field(default=100, description="images per step")
    temperature: float = Field(
        default=1.0, gt=0, description="1 samples the posterior; below, a colder and narrower law"
    )
    prior_precision: float = Field(
        default=2.0, ge=0, description="precision of the Gaussian prior on every parameter, in 1 / parameter squared"
    )
    warm_start: int = Field(default=500, ge=0, description="steps at temperature 0 before the chain")
    burn_in: int = Field(default=4000, ge=0, description="steps at `temperature` that are thrown away")
    thin: PositiveInt = Field(default=25, description="steps from one draw to the next")
    num_draws: PositiveInt = Field(default=400, le=65_535, description="draws that make the posterior")
    log_every: PositiveInt = Field(default=12, description="steps per line of log.jsonl, which holds their mean energy")


class Posterior(Section):
    """What is kept of the posterior."""

    level: float = Field(default=0.95, gt=0, lt=1, description="probability inside a credible interval")
    keep: int = Field(default=32, ge=2, description="parameter draws in draws.safetensors, for inputs that come later")


class Root(Section):
    """A whole configuration, from a file."""

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and apply overrides such as `sampling.num_draws=10`.

        Raises:
            ConfigError: the file cannot be read, is no mapping, or a key or value in it or in `overrides` is wrong.
        """
        return cls.build(read(path), overrides, source=str(path))

    @classmethod
    def build(cls, values: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "configuration") -> Self:
        """Check `values` (a nested mapping) with `overrides` applied; raises ConfigError as `load` does."""
        nested = _deep_copy(values)
        for override in overrides:
            _apply(nested, override)
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise ConfigError(f"{source}:\n" + "\n".join(_explain(item) for item in error.errors())) from error


class Config(Root):
    """One run, from teacher to report."""

    title: str = Field(
        default="Bayesian knowledge distillation on handwritten digits", description="the report's heading"
    )
    output: Path = Field(
        default=Path("runs/demo"), description="folder of the results, relative to where the run starts"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="seed of the split, the initialisations, the shuffling, the chain"
    )
    threads: PositiveInt | None = Field(
        default=1, description="CPU threads (null: torch's own choice); the demo's small networks are fastest on one"
    )
    data: Data = Data()
    teacher: Teacher = Teacher()
    student: Student = Student()
    distillation: Distillation = Distillation()
    sampling: Sampling = Sampling()
    posterior: Posterior = Posterior()


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; a configuration maps keys to values")
    return values


def _deep_copy(values: Any) -> Any:
    return {key: _deep_copy(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _apply(values: dict[str, Any], override: str) -> None:
    """Write `a.b=value`, the value read as YAML, into the nested mapping."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r}: must be KEY=VALUE with a dotted key, e.g. sampling.num_draws=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value {text!r} is not YAML: {error}") from error
    block = values
    for depth, key in enumerate(keys[:-1], start=1):
        block = block.setdefault(key, {})
        if not isinstance(block, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(keys[:depth])} is a value, not a block of keys")
    block[keys[-1]] = value


def _explain(item: Any) -> str:
    """One line for one of pydantic's complaints: the dotted key, what is allowed, the value found."""
    # pydantic inserts the chosen network's name after `model`; no such key stands in the file
    parts = [part for before, part in zip((None, *item["loc"]), item["loc"], strict=False) if before != "model"]
    key = ".".join(str(part) for part in parts) or "top level"
    message = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], Mapping):
        return f"  {key}: {message}"
    return f"  {key} = {item['input']!r}: {message}"
