"""The settings of a detection run: frozen dataclasses; the model is a `sape2.config.ModelConfig`. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from sape2.config import ModelConfig
from sape2.config.checks import Count, NotNegative, Number, Positive, Sections, ShareBelow1, check_types, require

SCALES = (4.0, 2.0, 1.0, 0.5)


@dataclass(frozen=True)
class DetectorConfig:
    """The detector on top of the backbone, and the attention windows inside the backbone.

    `window` in patches (None: every block is global), `num_global` blocks that are not windowed; `scales` of the levels
    of the pyramid, halves of one another; `anchor_sizes` in pixels, one for each level and for the extra level (none given:
    eight times the stride); `proposals` of an image go on to the heads, which learn from `box_samples` of them;
    `score_threshold` below which a detection is not reported.
    """

    masks: bool = False
    window: Count | None = 14
    num_global: Number = 4
    scales: tuple[float, ...] = SCALES
    extra_level: bool = True
    out_channels: Count = 256
    anchor_sizes: tuple[int, ...] = ()
    proposals: Count = 1000
    box_samples: Count = 512
    box_features: Count = 1024
    mask_channels: Count = 256
    score_threshold: ShareBelow1 = 0.05

    def __post_init__(self) -> None:
        check_types(self)
        runs = [SCALES[i:j] for i in range(len(SCALES)) for j in range(i + 1, len(SCALES) + 1)]
        require(
            self.scales in runs, f"detector.scales must be neighbours in {list(SCALES)}, finest first; got {list(self.scales)}"
        )
        require(
            len(self.anchor_sizes) in (0, self.num_levels),
            f"detector.anchor_sizes needs one size for each of {self.num_levels} levels; got {list(self.anchor_sizes)}",
        )
        require(
            all(size >= 1 for size in self.anchor_sizes), f"detector.anchor_sizes must be positive; got {self.anchor_sizes}"
        )

    @property
    def num_levels(self) -> int:
        """Maps that proposals are made on."""
        return len(self.scales) + self.extra_level


@dataclass(frozen=True)
class ImagesConfig:
    """The images of a detection run, in COCO format, and the augmentation of those used for training.

    `source` is a folder (see `detection.coco`); `train_images` and `test_images` take that many from the start (None: all). The
    set "coco_digits" is composed with these numbers of images if `source` does not exist yet. `scale_jitter` (low, high)
    resizes an image by a factor in this range and crops or pads it to the size of the model; () disables it. `flip`
    mirrors half of the images.
    """

    name: Literal["coco", "coco_digits"] = "coco"
    source: str | None = None
    train_images: Count | None = None
    test_images: Count | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    flip: bool = True
    scale_jitter: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("train_images", "test_images"):
            value = getattr(self, name)
            require(value is not None or self.name == "coco", f"images.{name} must say how many images to compose")
        require(
            len(self.mean) == len(self.std) == 3, f"images.mean and images.std need three values; got {self.mean}, {self.std}"
        )
        require(all(value > 0 for value in self.std), f"images.std must be above 0; got {self.std}")
        jitter = self.scale_jitter
        require(
            not jitter or (len(jitter) == 2 and 0 < jitter[0] <= jitter[1]),
            f"images.scale_jitter needs two factors, 0 < low <= high, or none; got {list(jitter)}",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """AdamW with warm-up, then cosine decay to `min_lr` or, for "steps", a tenth at 8/9 and again at 26/27 of the updates.

    `precision` auto is bf16 where the machine has it, else fp32.
    """

    epochs: Count = 100
    batch_size: Count = 64
    lr: Positive = 1e-4
    min_lr: NotNegative = 1e-6
    schedule: Literal["cosine", "steps"] = "cosine"
    warmup_steps: Number = 250
    weight_decay: NotNegative = 0.1
    clip_grad: Positive | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: Number = 4

    def __post_init__(self) -> None:
        check_types(self)
        require(self.min_lr <= self.lr, f"training.min_lr must not be above training.lr; got {self.min_lr} and {self.lr}")


@dataclass(frozen=True)
class DetectionConfig(Sections):
    """Everything that decides the result of a detection run. `model.num_classes` counts objects, not the background."""

    recipe: str
    model: ModelConfig
    detector: DetectorConfig
    images: ImagesConfig
    training: TrainingConfig
    seed: Number = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.model.in_channels == 3, f"photographs have 3 channels; got model.in_channels={self.model.in_channels}")

    def identity(self) -> dict[str, Any]:
        """The config without what does not change the result, as plain JSON values."""
        values = json.loads(self.to_json())
        del values["images"]["source"], values["training"]["workers"]
        return values
