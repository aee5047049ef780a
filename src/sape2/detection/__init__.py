"""Object detection: the ViT of this package as the backbone of torchvision's detectors, with COCO data and metrics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sape2.config.detection import DetectionConfig, DetectorConfig
    from sape2.detection.backbone import WindowedViT
    from sape2.detection.coco import CocoImages, open_split
    from sape2.detection.composed import compose
    from sape2.detection.metrics import evaluate_detector
    from sape2.detection.models import build_detector, create_detector
    from sape2.detection.pyramid import SimpleFeaturePyramid
    from sape2.detection.train import run_detection

# Looked up when first used, so that recipes, which read the settings alone, do not wait for torch.
_HOMES = {
    "CocoImages": "detection.coco",
    "DetectionConfig": "config.detection",
    "DetectorConfig": "config.detection",
    "SimpleFeaturePyramid": "detection.pyramid",
    "WindowedViT": "detection.backbone",
    "build_detector": "detection.models",
    "compose": "detection.composed",
    "create_detector": "detection.models",
    "evaluate_detector": "detection.metrics",
    "open_split": "detection.coco",
    "run_detection": "detection.train",
}
__all__ = [
    "CocoImages",
    "DetectionConfig",
    "DetectorConfig",
    "SimpleFeaturePyramid",
    "WindowedViT",
    "build_detector",
    "compose",
    "create_detector",
    "evaluate_detector",
    "open_split",
    "run_detection",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sape2.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sape2.detection' has no attribute {name!r}")
