"""The settings of a run: frozen dataclasses, checked when created, converted to and from JSON. Needs no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from sape2.config.checks import (
    Count,
    Inside01,
    Magnitude,
    NotNegative,
    Number,
    PartOf1,
    Positive,
    Sections,
    Share,
    ShareBelow1,
    SplitSeed,
    check_types,
    require,
)
from sape2.config.model import MODELS, ModelConfig, check_image_size, model_config, resized, sizes_of
from sape2.config.override import SEE, override

__all__ = ["HUB_IDS", "MODELS", "SEE", "AugmentConfig", "DataConfig", "ModelConfig", "RunConfig", "TrainConfig",
           "check_image_size", "model_config", "override", "resized", "sizes_of", "with_epochs"]  # fmt: skip

# Data sets of recipes that a hub has under an id.
HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k"}


@dataclass(frozen=True)
class DataConfig:
    """The images of a run. `source` is a folder or a hub id (None: the data set embedded in scikit-learn, digits only).

    The validation set is split from the training set by class with `split_seed`, the same for every run seed.
    `test_fraction` (None: there is a test set) takes that share of each class as the test set where there is only one split,
    with the same seed. `train_limit` keeps that many training images (by class, same seed). Images of another size are
    resized; with `center_crop` (0.875 is usual) that share of the middle is kept, with its aspect ratio.

    Four settings do not change a result: `layout` (None: detected), `in_memory` (decoded once and kept; None: if
    they take at most 4 GiB), `max_bad_samples` (how many images of a split may be unreadable and are skipped; None: one in
    a thousand and at most 100), and `source`.
    """

    name: str = "cifar10"
    source: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    validation_fraction: Inside01 = 0.1  # not 0: the test set is never selected on
    split_seed: SplitSeed = 0
    test_fraction: Inside01 | None = None
    train_limit: Count | None = None
    layout: Literal["folder", "parquet", "webdataset"] | None = None
    in_memory: bool | None = None
    center_crop: PartOf1 | None = None
    max_bad_samples: Number | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require(
            len(self.mean) == len(self.std),
            f"data.mean and data.std need one value per channel each; got {self.mean} and {self.std}",
        )
        require(all(value > 0 for value in self.std), f"data.std must be above 0; got {self.std}")


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images. `policy_group` images of a batch share one draw of the policy (see augment.py).

    `crop_area` cuts a random box of that share to all of the image's area, resized to the model's size (RandomResizedCrop).
    `repeats` is repeated augmentation: each image is seen that many times in an epoch of unchanged length.
    """

    crop_padding: Number = 0
    crop_area: PartOf1 | None = None
    flip: bool = False
    policy: Literal["none", "randaugment", "autoaugment"] = "none"
    policy_magnitude: Magnitude = 9
    policy_group: Count = 8
    erase: Share = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    mix_probability: Share = 1.0
    repeats: Count = 1

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def mixes(self) -> bool:
        """True if images of a batch are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser, schedule and batches. `lr` is the learning rate itself, not per 512 images.

    `optimizer` is one of timm's. The Muon family (Jordan et al., 2024) orthogonalises the updates of the weight matrices
    inside the blocks. These have a rate of their own, `muon_lr` (None: 0.02, and `lr` for AdaMuon), and `muon_momentum`
    (None: 0.95); everything else is under AdamW with `lr`. A leading n means Nesterov momentum, also in the AdamW part.
    Parameters of an encoding are never under Muon and never decay; `encoding_lr` (None: `lr`) is their rate. `schedule`
    is the decay from these rates to `min_lr`, after a linear warm-up.

    `precision` auto is bf16 where the machine has it, else fp32. `batch_size` is the number of images in one update,
    over all processes and accumulation steps. `checkpoint_every` is in updates; 0 is at the end of every epoch only.
    `parallel` says what several processes do with the weights: each has all of them (ddp), or a part (fsdp). `compile` is
    `torch.compile` for the training steps, which changes nothing but rounding.

    `shuffle_window` keeps the reading of large files local: blocks of a sixteenth of it in random order, then images
    shuffled within windows of that many; 0 shuffles the whole epoch.
    """

    epochs: Count = 100
    batch_size: Count = 128
    optimizer: Literal["adamw", "nadamw", "muon", "nmuon", "adamuon", "nadamuon"] = "adamw"
    lr: Positive = 1e-3
    encoding_lr: Positive | None = None
    muon_lr: Positive | None = None
    muon_momentum: ShareBelow1 | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "linear"] = "cosine"
    min_lr: NotNegative = 1e-5
    warmup_epochs: NotNegative = 5
    weight_decay: NotNegative = 0.05
    label_smoothing: ShareBelow1 = 0.1
    clip_grad: Positive | None = None
    ema_decay: Inside01 | None = None
    accumulation: Count = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    checkpoint_every: Number = 0
    workers: Number = 1
    shuffle_window: Number = 0
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name, rate in self.rates.items():
            require(self.min_lr <= rate, f"train.min_lr must not be above train.{name}; got {self.min_lr} and {rate}")
        require(all(0 <= beta < 1 for beta in self.betas), f"train.betas must be in [0, 1); got {self.betas}")
        for name in ("muon_lr", "muon_momentum"):
            require(
                self.uses_muon or getattr(self, name) is None,
                f"train.{name} has no effect with train.optimizer={self.optimizer}; leave it out, or choose muon",
            )
        require(
            not (self.uses_muon and self.parallel == "fsdp"),
            f"train.optimizer={self.optimizer} needs whole weight matrices, and train.parallel=fsdp divides them; "
            "choose train.parallel=ddp or train.optimizer=adamw",
        )
        require(
            self.warmup_epochs < self.epochs,
            f"train.warmup_epochs must be less than train.epochs; got {self.warmup_epochs} and {self.epochs}",
        )
        require(
            self.batch_size % self.accumulation == 0,
            f"train.batch_size must be divisible by train.accumulation; got {self.batch_size} and {self.accumulation}",
        )

    @property
    def uses_muon(self) -> bool:
        """True if the weight matrices of the blocks are updated by Muon."""
        return self.optimizer.endswith("muon")

    @property
    def uses_adamuon(self) -> bool:
        """True if these updates are also scaled element by element, as in AdamW."""
        return self.optimizer.endswith("adamuon")

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates after warm-up, by the setting that names them."""
        rates = {"lr": self.lr, "encoding_lr": self.lr if self.encoding_lr is None else self.encoding_lr}
        if self.uses_muon:
            usual = self.lr if self.uses_adamuon else 0.02
            rates["muon_lr"] = usual if self.muon_lr is None else self.muon_lr
        return rates


ADDED = ("optimizer", "encoding_lr", "muon_lr", "muon_momentum", "betas", "schedule")  # to TrainConfig, after the first runs


@dataclass(frozen=True)
class RunConfig(Sections):
    """Everything that decides the result of a run."""

    recipe: str
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: Number = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.data.mean) == self.model.in_channels,
            f"the model takes {self.model.in_channels} channels but data.mean has {len(self.data.mean)}",
        )
        require(
            not self.augment.mixes or self.train.batch_size % 2 == 0,
            f"mixup and cutmix need an even train.batch_size; got {self.train.batch_size}",
        )

    def identity(self) -> dict[str, Any]:
        """The config without what does not change the result: where and how the data lie, who reads them, who has weights."""
        values = self.to_dict()
        for name in ("source", "layout", "in_memory", "max_bad_samples"):
            del values["data"][name]
        if self.data.test_fraction is None:  # so that runs from before this setting keep their digests
            del values["data"]["test_fraction"]
        for name in ADDED:  # likewise
            if getattr(self.train, name) == getattr(TrainConfig, name):
                del values["train"][name]
        for name in ("workers", "checkpoint_every", "parallel", "compile"):
            del values["train"][name]
        return values


def with_epochs(config: RunConfig, epochs: int) -> RunConfig:
    """The same run with another number of epochs; the warm-up scales with it."""
    require(epochs >= 1, f"train.epochs must be at least 1; got {epochs}")
    warmup = config.train.warmup_epochs * epochs / config.train.epochs
    return dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=epochs, warmup_epochs=warmup))
