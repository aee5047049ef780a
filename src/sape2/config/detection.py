"""What a detection run is: frozen dataclasses beside those of `sape2.config`, which hold the model. No torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from sape2.config import ModelConfig, Real, check_types, make_config

SCALES = (4.0, 2.0, 1.0, 0.5)


@dataclass(frozen=True)
class DetectorConfig:
    """What stands on the backbone, and the windows inside it.

    `window` in patches (None: every block is global), `num_global` blocks that are not windowed; `scales` of the levels
    of the pyramid, halves of one another; `anchor_sizes` in pixels, one for each level and for the extra level (none given:
    eight times the stride); `proposals` of an image go on to the heads, which learn from `box_samples` of them;
    `score_threshold` below which a detection is not reported.
    """

    masks: bool = False
    window: int | None = 14
    num_global: int = 4
    scales: tuple[float, ...] = SCALES
    extra_level: bool = True
    out_channels: int = 256
    anchor_sizes: tuple[int, ...] = ()
    proposals: int = 1000
    box_samples: int = 512
    box_features: int = 1024
    mask_channels: int = 256
    score_threshold: Real = 0.05

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("out_channels", "proposals", "box_samples", "box_features", "mask_channels"):
            _require(getattr(self, name) >= 1, f"detector.{name} must be at least 1; got {getattr(self, name)}")
        _require(self.window is None or self.window >= 1, f"detector.window must be at least 1; got {self.window}")
        _require(self.num_global >= 0, f"detector.num_global must not be negative; got {self.num_global}")
        runs = [SCALES[i:j] for i in range(len(SCALES)) for j in range(i + 1, len(SCALES) + 1)]
        _require(
            self.scales in runs, f"detector.scales must be neighbours in {list(SCALES)}, finest first; got {list(self.scales)}"
        )
        _require(
            len(self.anchor_sizes) in (0, self.num_levels),
            f"detector.anchor_sizes needs one size for each of {self.num_levels} levels; got {list(self.anchor_sizes)}",
        )
        _require(
            all(size >= 1 for size in self.anchor_sizes), f"detector.anchor_sizes must be positive; got {self.anchor_sizes}"
        )
        _require(0 <= self.score_threshold < 1, f"detector.score_threshold must be in [0, 1); got {self.score_threshold}")

    @property
    def num_levels(self) -> int:
        """Maps that proposals are made on."""
        return len(self.scales) + self.extra_level


@dataclass(frozen=True)
class ImagesConfig:
    """Which images, in COCO format, and what is done to those of the training.

    `source` is a folder (see `detection.coco`); `train_images` and `test_images` take the first so many (None: all). The set
    "coco_digits" is composed with so many where `source` does not exist yet. `scale_jitter` (low, high) resizes an image by
    such a factor and crops or pads it to the size of the model; () leaves it. `flip` mirrors half of the images.
    """

    name: Literal["coco", "coco_digits"] = "coco"
    source: str | None = None
    train_images: int | None = None
    test_images: int | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    flip: bool = True
    scale_jitter: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("train_images", "test_images"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"images.{name} must be at least 1; got {value}")
            _require(value is not None or self.name == "coco", f"images.{name} must say how many images to compose")
        _require(
            len(self.mean) == len(self.std) == 3, f"images.mean and images.std need three values; got {self.mean}, {self.std}"
        )
        _require(all(value > 0 for value in self.std), f"images.std must be above 0; got {self.std}")
        jitter = self.scale_jitter
        _require(
            not jitter or (len(jitter) == 2 and 0 < jitter[0] <= jitter[1]),
            f"images.scale_jitter needs two factors, 0 < low <= high, or none; got {list(jitter)}",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """AdamW with warm-up, then cosine decay to `min_lr` or, for "steps", a tenth at 8/9 and again at 26/27 of the updates.

    `precision` auto is bf16 where the machine has it, else fp32.
    """

    epochs: int = 100
    batch_size: int = 64
    lr: Real = 1e-4
    min_lr: Real = 1e-6
    schedule: Literal["cosine", "steps"] = "cosine"
    warmup_steps: int = 250
    weight_decay: Real = 0.1
    clip_grad: Real | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = 4

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "batch_size"):
            _require(getattr(self, name) >= 1, f"training.{name} must be at least 1; got {getattr(self, name)}")
        for name in ("min_lr", "warmup_steps", "weight_decay", "workers"):
            _require(getattr(self, name) >= 0, f"training.{name} must not be negative; got {getattr(self, name)}")
        _require(self.lr > 0, f"training.lr must be above 0; got {self.lr}")
        _require(self.min_lr <= self.lr, f"training.min_lr must not be above training.lr; got {self.min_lr} and {self.lr}")
        _require(self.clip_grad is None or self.clip_grad > 0, f"training.clip_grad must be above 0; got {self.clip_grad}")


@dataclass(frozen=True)
class DetectionConfig:
    """Everything that decides the result of a detection run. `model.num_classes` counts objects, not the background."""

    recipe: str
    model: ModelConfig
    detector: DetectorConfig
    images: ImagesConfig
    training: TrainingConfig
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        _require(self.seed >= 0, f"the seed must not be negative; got {self.seed}")
        _require(self.model.in_channels == 3, f"photographs have 3 channels; got model.in_channels={self.model.in_channels}")
        _require(
            self.model.pool == "mean" and self.model.num_registers == 0,
            "a backbone takes no prefix tokens: model.pool=mean and model.num_registers=0",
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DetectionConfig:
        """Raises ValueError that names the field for anything unknown, missing or of another type."""
        return make_config(DetectionConfig, values, "")

    def identity(self) -> dict[str, Any]:
        """The config without what does not change the result, as plain JSON values."""
        values = json.loads(self.to_json())
        del values["images"]["source"], values["training"]["workers"]
        return values


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
