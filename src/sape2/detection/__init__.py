"""Object detection: the ViT of this package as the backbone of torchvision's detectors, with COCO data and metrics."""

from sape2.config.detection import DetectionConfig, DetectorConfig
from sape2.detection.backbone import WindowedViT
from sape2.detection.coco import CocoImages, open_split
from sape2.detection.composed import compose
from sape2.detection.metrics import evaluate_detector
from sape2.detection.models import build_detector, create_detector
from sape2.detection.pyramid import SimpleFeaturePyramid
from sape2.detection.train import run_detection

__all__ = [
    "CocoImages", "DetectionConfig", "DetectorConfig", "SimpleFeaturePyramid", "WindowedViT", "build_detector", "compose",
    "create_detector", "evaluate_detector", "open_split", "run_detection",
]  # fmt: skip
