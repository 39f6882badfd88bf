"""The typed configuration of a run on images: `kind: images` in a YAML file that `bkd-fast run` reads."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from bkd_fast.app.config import Distillation, Posterior, Root, Section
from bkd_fast.app.config import Sampling as Chain


class ImageFiles(Section):
    """Where the images are, and how the networks see them."""

    train: Path = Field(
        description="a folder with one folder of images a class; tar files of webdataset's form: one, a folder of them or "
        "NAME-{0000..0099}.tar; or an .npz of JPEGs (blob, offsets, labels)"
    )
    test: Path = Field(description="likewise, of the same classes")
    train_size: PositiveInt | None = Field(default=None, description="training images, the first ones (null: all)")
    test_size: PositiveInt | None = Field(default=None, description="test images, the first ones (null: all)")
    size: PositiveInt = Field(default=224, description="pixels of the square that the networks see")
    resize: PositiveInt = Field(
        default=256, description="pixels of an image's shorter side before the middle is cut out"
    )
    workers: int = Field(default=8, ge=0, description="processes that decode, for each process that computes")
    undecodable: Literal["raise", "exclude"] = Field(
        default="raise",
        description="raise: stop at such an image and name it; exclude: look at all before, name and leave out",
    )


class PointTraining(Section):
    """How a point estimate is trained: SGD with momentum and a cosine learning rate that ends at 0."""

    epochs: PositiveInt = Field(default=100, description="passes over the training images")
    batch_size: PositiveInt = Field(default=256, description="images per step, over all processes")
    lr: float = Field(default=0.1, gt=0, description="the initial learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)


class Network(Section):
    """A network by name, with weights from a file or from training."""

    model: str = Field(
        default="torchvision:resnet18",
        pattern=r"^(torchvision|timm):\w[\w.]*$",
        description="torchvision:NAME or timm:NAME",
    )
    weights: Path | None = Field(default=None, description="a safetensors file of its state_dict (null: trained here)")
    training: PointTraining | None = Field(
        default=PointTraining(), description="null: the weights are taken as they are"
    )

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> Self:
        if self.weights is None and self.training is None:
            raise ValueError("weights and training are both null: one of them must say where the parameters come from")
        return self

    @property
    def optimizer(self) -> str:
        """What the report calls it."""
        return "SGD with momentum"

    @property
    def epochs(self) -> int:
        """Of training."""
        return 0 if self.training is None else self.training.epochs


class TeacherNetwork(Network):
    """The teacher, and where its logits on the training images come from."""

    model: str = Field(
        default="torchvision:resnet34",
        pattern=r"^(torchvision|timm):\w[\w.]*$",
        description="torchvision:NAME or timm:NAME",
    )
    mode: Literal["online", "clean", "views"] = Field(
        default="online",
        description="online: computed on the augmented images of every step; clean: cached, one view of each image; views: "
        "cached, of so many augmentations",
    )
    views: PositiveInt = Field(default=1, description="with mode: views, how many there are of each image")
    top_k: PositiveInt | None = Field(default=None, description="cached logits to keep of each row (null: all)")

    @model_validator(mode="after")
    def _views_are_cached(self) -> Self:
        if self.mode != "views" and self.views != 1:
            raise ValueError(f"views = {self.views} with mode: {self.mode}: must be 1")
        if self.mode == "online" and self.top_k is not None:
            raise ValueError(f"top_k = {self.top_k} with mode: online: must be null, for there is no cache")
        return self


class Sampling(Chain):
    """The chain, over the student's parameters or its upper part's: SGLD, or SGHMC where there is momentum."""

    sampled: str = Field(
        default="all",
        description="all; head: the last linear layer; or the name of a child module, with which the sampled part begins "
        "(layer4 in torchvision's ResNets). What is below is fixed, and its features are recorded once",
    )
    chains: PositiveInt = Field(
        default=1, description="chains at once, where not all is sampled (else: processes.chains)"
    )
    batch_size: PositiveInt = Field(default=256, description="images per step, over all processes of a chain")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of SGHMC; 0: SGLD")
    augment: bool = Field(
        default=False, description="sample on augmented images; the posterior is then that of no fixed data set"
    )


class Processes(Section):
    """How the processes of torchrun share the work; replicas of a chain are what is left of them."""

    chains: PositiveInt = Field(default=1, description="chains side by side")
    shards: PositiveInt = Field(default=1, description="processes that share one copy of the student (FSDP2)")


class Runtime(Section):
    """How the networks are computed."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one")
    bf16: bool = Field(default=False, description="autocast to bfloat16; parameters and chain stay float32")
    channels_last: bool = Field(default=False, description="NHWC memory for images and convolutions")
    compile: bool = Field(default=False, description="torch.compile the networks")


class Saving(Section):
    """Checkpoints of every part of the run."""

    every: PositiveInt = Field(default=1000, description="steps between two")
    keep: PositiveInt = Field(default=2, description="how many are kept")


class ScaleConfig(Root):
    """One run on images, from teacher to report."""

    kind: Literal["images"] = "images"
    title: str = Field(default="Bayesian knowledge distillation", description="the report's heading")
    output: Path = Field(description="folder of the results; every process must see it")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of initialisations, order, augmentation and chains")
    data: ImageFiles
    teacher: TeacherNetwork = TeacherNetwork()
    student: Network = Network()
    distillation: Distillation = Distillation()
    sampling: Sampling = Sampling()
    posterior: Posterior = Posterior()
    processes: Processes = Processes()
    checkpoints: Saving = Saving()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _upper_parts(self) -> Self:
        chain = self.sampling
        upper, head = chain.sampled != "all", chain.sampled == "head"
        for wrong, key, value, allowed in (
            (not upper and chain.chains > 1, "sampling.chains", chain.chains, "1: processes.chains has whole networks"),
            (upper and chain.augment, "sampling.augment", True, "false: features are of one view of each image"),
            (head and chain.momentum > 0, "sampling.momentum", chain.momentum, "0: heads sample by SGLD"),
            (upper and self.processes != Processes(), "processes", self.processes, "one chain and one shard"),
        ):
            if wrong:
                raise ValueError(f"{key} = {value} with sampling.sampled = {chain.sampled}: must be {allowed}")
        return self
