"""Converts COCO segmentations (polygons, run lengths, compressed run lengths) to run lengths and masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sape2.config.extras import from_extra
from sape2.encodings.grid import Grid

RunLengths = dict[str, Any]  # "size" [height, width] and "counts", compressed to bytes


def encode_segmentation(segmentation: Any, size: Grid) -> RunLengths:
    """The mask of an image of `size` (height, width) in compressed run lengths; polygons are cut at its border.

    Raises ValueError for what is no segmentation of such an image.
    """
    if isinstance(segmentation, list):
        return _encode_polygons(segmentation, size)
    height, width = size
    run_lengths = {"size": [height, width], "counts": None}
    if not isinstance(segmentation, dict) or segmentation.get("size") != run_lengths["size"]:
        raise ValueError(
            f"a segmentation is polygons or run lengths of an image of {height}x{width}; got {str(segmentation)[:80]}"
        )
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != height * width:
            raise ValueError(f"run lengths must be whole numbers that add up to the {height * width} pixels of the image")
        return _library().frPyObjects(run_lengths | {"counts": counts}, height, width)
    if not isinstance(counts, (str, bytes)):
        raise ValueError(f"counts of a segmentation must be a list of run lengths or a string; got {str(counts)[:80]}")
    return _check_compressed(run_lengths | {"counts": counts})


def decode_run_lengths(run_lengths: RunLengths) -> np.ndarray:
    return _library().decode(run_lengths)


def area_and_box(run_lengths: RunLengths) -> tuple[int, list[float]]:
    """Pixels of the mask, and the x, y, width, height that they lie in."""
    library = _library()
    return int(library.area(run_lengths)), library.toBbox(run_lengths).tolist()


def is_number(value: Any) -> bool:
    """A finite number as JSON writes one; no integer that is too large for a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def extent(polygons: list[list[float]]) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of the box around all points."""
    x, y = ([value for part in polygons for value in part[axis::2]] for axis in (0, 1))
    return min(x), min(y), max(x), max(y)


def beyond(polygons: list[list[float]], size: Grid) -> float:
    """Number of pixels by which points of polygons lie outside an image."""
    height, width = size
    left, top, right, bottom = extent(polygons)
    return max(0.0, -left, -top, right - width, bottom - height)


def is_outline(segmentation: Any) -> bool:
    """Whether it is a list of polygons."""
    return isinstance(segmentation, list) and bool(segmentation) and all(map(_is_polygon, segmentation))


def _encode_polygons(polygons: list[Any], size: Grid) -> RunLengths:
    height, width = size
    if not is_outline(polygons):
        raise ValueError(
            f"a segmentation by polygons is a list of lists x, y, x, y, … of three points or more, as finite numbers; "
            f"got {str(polygons)[:80]}"
        )
    if (outside := beyond(polygons, size)) > max(size):  # the library walks along every edge, pixel by pixel
        raise ValueError(f"a polygon of an image of {height}x{width} ends {outside:g} pixels outside of it")
    library = _library()
    return library.merge(library.frPyObjects(polygons, height, width))


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 and all(is_number(value) for value in part)


def _check_compressed(run_lengths: RunLengths) -> RunLengths:
    """Raises ValueError unless the library decodes it to the pixels of the image."""
    try:
        _library().decode(run_lengths)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"compressed run lengths are damaged: {error}; got {str(run_lengths['counts'])[:40]!r}") from error
    return run_lengths


def _library() -> Any:
    return from_extra("detect", "faster_coco_eval.core.mask", "masks in COCO format need faster-coco-eval")
