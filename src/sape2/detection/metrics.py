"""Computes COCO's detection metrics of a model as rows, with torchmetrics and faster-coco-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sape2.config.detection import DetectionConfig
from sape2.detection.batches import one_size_batches, padded_size, to_unit
from sape2.detection.coco import CocoImages
from sape2.tables import Row

AVERAGE = "mean over classes and IoU 0.50:0.05:0.95"
NAMES = {
    "map": f"average precision, {AVERAGE}",
    "map_50": "average precision at IoU 0.50, mean over classes",
    "map_75": "average precision at IoU 0.75, mean over classes",
    "map_small": f"average precision of objects below 32x32 pixels, {AVERAGE}",
    "map_medium": f"average precision of objects of 32x32 to 96x96 pixels, {AVERAGE}",
    "map_large": f"average precision of objects above 96x96 pixels, {AVERAGE}",
    "mar_100": f"average recall, {AVERAGE}",
}
KINDS = {"bbox": ("box", "boxes"), "segm": ("mask", "masks")}  # COCO's name, one and many


def make_metric(masks: bool) -> Any:
    """torchmetrics' MeanAveragePrecision of boxes and, if asked for, masks."""
    try:
        import faster_coco_eval  # noqa: F401
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError as error:
        raise ImportError("COCO metrics need torchmetrics and faster-coco-eval: pip install 'sape2[detect]'") from error
    metric = MeanAveragePrecision(iou_type=("bbox", "segm") if masks else "bbox", backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    return metric


class CocoMetric:
    """COCO's metrics, a batch at a time: masks are kept as run lengths, so that those of a whole data set fit into memory."""

    def __init__(self, masks: bool = False) -> None:
        self.masks, self.metric, self.images, self.objects = masks, make_metric(masks), 0, 0

    def update(self, predictions: list[Row], targets: list[Row]) -> None:
        """`predictions` with boxes, scores, labels (and masks), `targets` as `CocoImages` gives them."""
        self.metric.update([_plain(row) for row in predictions], [_plain(row) for row in targets])
        self.images += len(targets)
        self.objects += sum(int((target["iscrowd"] == 0).sum()) for target in targets)

    def rows(self) -> list[Row]:
        """A row for each number; none for a size of which there is no object. `n` is the number of images."""
        values = self.metric.compute()
        rows = []
        for kind, (one, many) in KINDS.items():
            for name, meaning in NAMES.items():
                value = float(values.get(f"{kind}_{name}" if self.masks else name, -1))
                if value < 0 or (kind == "segm" and not self.masks):
                    continue
                row = {"measure": "detection", "name": f"{one}_{name}", "value": value, "unit": "fraction", "n": self.images}
                protocol = f"COCO {meaning}; {many} of at most 100 detections an image"
                rows.append(row | {"objects": self.objects, "protocol": protocol})
        return rows


def evaluate_detector(
    model: Any, images: CocoImages, config: DetectionConfig, watch: Callable[[int], None] = lambda done: None
) -> list[Row]:
    """Rows of COCO's metrics of a detector in float32; `watch` is told how many images are done.

    Raises ValueError if there is no object to measure.
    """
    images.check_measurable()
    metric = CocoMetric(config.detector.masks)
    for _, predictions, targets in predict(model, images, config):
        metric.update(predictions, targets)
        watch(metric.images)
    return metric.rows()


def predict(model: Any, images: CocoImages, config: DetectionConfig) -> Iterator[tuple[list[int], list[Row], list[Row]]]:
    """For each batch the numbers of its images, what the model finds in them and what there is; on the CPU, masks boolean.

    A batch holds images of one size, so that nothing depends on which images share it.
    """
    model.eval()
    device = next(model.parameters()).device
    divisor = model.transform.size_divisible
    sizes = [padded_size(size, config.model.image_size, divisor) for size in images.sizes]
    for batch in one_size_batches(sizes, config.training.batch_size):
        samples = [images[index] for index in batch]
        with torch.no_grad():
            found = model([to_unit(image).to(device) for image, _ in samples])
        rows = [{key: _as_mask(value) if key == "masks" else value.cpu() for key, value in row.items()} for row in found]
        yield batch, rows, [target for _, target in samples]


def _as_mask(probabilities: Tensor) -> Tensor:
    """(n, 1, height, width) of probabilities -> (n, height, width) of booleans."""
    return (probabilities[:, 0] > 0.5).cpu()


def _plain(row: Row) -> Row:
    """The tensors of a row without torchvision's subclasses, masks as booleans."""
    tensors = {key: value.as_subclass(Tensor) for key, value in row.items() if isinstance(value, Tensor)}
    return {key: value.bool() if key == "masks" else value for key, value in tensors.items()}
