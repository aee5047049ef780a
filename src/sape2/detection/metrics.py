"""Computes COCO's detection metrics of a model as rows, with torchmetrics and faster-coco-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from sape2.config.detection import DetectionConfig
from sape2.config.extras import from_extra
from sape2.detection.batches import one_size_batches, padded_size, to_unit
from sape2.detection.coco import CocoImages
from sape2.machine import evaluating
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
    need = "COCO metrics need torchmetrics and faster-coco-eval"
    from_extra("detect", "faster_coco_eval", need)
    library = from_extra("detect", "torchmetrics.detection", need)
    metric = library.MeanAveragePrecision(iou_type=("bbox", "segm") if masks else "bbox", backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    return metric


def metric_rows(
    found: Iterable[tuple[list[Row], list[Row]]], masks: bool = False, watch: Callable[[int], None] = lambda done: None
) -> list[Row]:
    """A row for each number, from batches of (predictions with boxes, scores, labels (and masks), targets of `CocoImages`).

    There is none for a size of which there is no object. `n` is the number of images.
    """
    metric, images, objects = make_metric(masks), 0, 0
    for predictions, targets in found:
        metric.update(_plain(predictions), _plain(targets))  # masks are kept as run lengths, so those of a data set fit
        images += len(targets)
        objects += sum(int((target["iscrowd"] == 0).sum()) for target in targets)
        watch(images)
    values, rows = metric.compute(), []
    for kind, (one, many) in KINDS.items() if masks else [("bbox", KINDS["bbox"])]:
        for name, meaning in NAMES.items():
            value = float(values.get(f"{kind}_{name}" if masks else name, -1))
            if value >= 0:
                row = {"measure": "detection", "name": f"{one}_{name}", "value": value, "unit": "fraction", "n": images}
                protocol = f"COCO {meaning}; {many} of at most 100 detections an image"
                rows.append(row | {"objects": objects, "protocol": protocol})
    return rows


def evaluate_detector(
    model: Any, images: CocoImages, config: DetectionConfig, watch: Callable[[int], None] = lambda done: None
) -> list[Row]:
    """Rows of COCO's metrics of a detector in float32; `watch` is told how many images are done.

    Raises ValueError if there is no object to measure.
    """
    images.check_measurable()
    found = (batch[1:] for batch in predict(model, images, config))
    return metric_rows(found, config.detector.masks, watch)


def predict(model: Any, images: CocoImages, config: DetectionConfig) -> Iterator[tuple[list[int], list[Row], list[Row]]]:
    """For each batch the numbers of its images, what the model finds in them and what there is; on the CPU, masks boolean.

    A batch holds images of one size, so that nothing depends on which images share it.
    """
    divisor = model.transform.size_divisible
    sizes = [padded_size(size, config.model.image_size, divisor) for size in images.sizes]
    for batch in one_size_batches(sizes, config.training.batch_size):
        samples = [images[index] for index in batch]
        with evaluating(model) as device:
            found = model([to_unit(image).to(device) for image, _ in samples])
        rows = [{key: (value[:, 0] > 0.5 if key == "masks" else value).cpu() for key, value in row.items()} for row in found]
        yield batch, rows, [target for _, target in samples]


def _plain(rows: list[Row]) -> list[Row]:
    """The tensors of each row without torchvision's subclasses, masks as booleans."""
    plain = [{key: value.as_subclass(Tensor) for key, value in row.items() if isinstance(value, Tensor)} for row in rows]
    return [{key: value.bool() if key == "masks" else value for key, value in row.items()} for row in plain]
