"""torchvision's Faster R-CNN and Mask R-CNN on the windowed ViT and its pyramid.

Images of one batch are padded with zeros on the right and below to the size of the largest, and attention and encodings
see the padding. Images of one size (`detection.batches`) are padded to multiples of the coarsest stride only.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from sape2.config import ModelConfig, model_config
from sape2.config.checks import make_config
from sape2.config.detection import DetectorConfig, ImagesConfig
from sape2.detection.backbone import WindowedViT
from sape2.detection.batches import fitted_size
from sape2.detection.pyramid import PyramidBackbone, SimpleFeaturePyramid, strides
from sape2.machine import drawn_seed

ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width
BOX_CELLS, MASK_CELLS = 7, 14  # of the features that are read for a box and for its mask
MASK_LAYERS = 4


def create_detector(name: str, **options: Any) -> FasterRCNN:
    """A new detector on a named ViT, with changes of `ModelConfig` and `DetectorConfig`, for example

    `create_detector("vit_small", encoding="ape+sape2", image_size=512, patch_size=16, num_classes=80, masks=True, window=14)`.
    `num_classes` counts objects without the background, label 0; `image_size` is the size that images are fitted into.
    """
    known = {field.name for field in fields(DetectorConfig)}
    detector = make_config(DetectorConfig, {key: value for key, value in options.items() if key in known}, "detector.")
    rest = {key: value for key, value in options.items() if key not in known}
    return build_detector(model_config(name, **{"pool": "mean"} | rest), detector)


def build_detector(model: ModelConfig, detector: DetectorConfig, images: ImagesConfig | None = None) -> FasterRCNN:
    """Mask R-CNN if `detector.masks`, else Faster R-CNN.

    Weights outside the encodings follow from PyTorch's seed alone, so that detectors of one seed differ in their encodings
    and in nothing else.
    """
    images = images or ImagesConfig()
    seed = drawn_seed()
    body = WindowedViT(model, detector.window, detector.num_global)
    level_strides = strides(model.patch_size, detector.scales, detector.extra_level)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pyramid = SimpleFeaturePyramid(model.dim, detector.out_channels, detector.scales, detector.extra_level)
        parts = _box_parts(detector, pyramid, model.num_classes + 1, level_strides)
        kind = FasterRCNN
        if detector.masks:
            kind, parts = MaskRCNN, parts | _mask_parts(detector, pyramid, model.num_classes + 1)
        built = kind(PyramidBackbone(body, pyramid), box_score_thresh=detector.score_threshold, **parts)
    mean, std = list(images.mean), list(images.std)
    built.transform = FitImages(min(model.image_size), max(model.image_size), mean, std, size_divisible=level_strides[-1])
    return built


class FitImages(GeneralizedRCNNTransform):
    """torchvision's resizing and padding. Raises ValueError for an image so thin that a side would have no pixel."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        (height, width), shorter = image.shape[-2:], cast("tuple[int, ...]", self.min_size)
        fitted_size((height, width), (shorter[-1], self.max_size))
        return super().resize(image, target)


def _box_parts(
    detector: DetectorConfig, pyramid: SimpleFeaturePyramid, num_classes: int, level_strides: list[int]
) -> dict[str, Any]:
    sizes = detector.anchor_sizes or [8 * stride for stride in level_strides]
    stages = [f"rpn_{stage}_nms_top_n_{mode}" for stage in ("pre", "post") for mode in ("train", "test")]
    return dict.fromkeys(stages, detector.proposals) | {
        "box_batch_size_per_image": detector.box_samples,
        "rpn_anchor_generator": AnchorGenerator(tuple((size,) for size in sizes), (ANCHOR_RATIOS,) * len(sizes)),
        "box_roi_pool": MultiScaleRoIAlign(pyramid.names, output_size=BOX_CELLS, sampling_ratio=2),
        "box_head": TwoMLPHead(pyramid.out_channels * BOX_CELLS**2, detector.box_features),
        "box_predictor": FastRCNNPredictor(detector.box_features, num_classes),
    }


def _mask_parts(detector: DetectorConfig, pyramid: SimpleFeaturePyramid, num_classes: int) -> dict[str, Any]:
    channels = detector.mask_channels
    return {
        "mask_roi_pool": MultiScaleRoIAlign(pyramid.names, output_size=MASK_CELLS, sampling_ratio=2),
        "mask_head": MaskRCNNHeads(pyramid.out_channels, [channels] * MASK_LAYERS, dilation=1),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes),
    }
