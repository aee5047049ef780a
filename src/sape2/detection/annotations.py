"""Reads and checks the annotations of one split in COCO format.

Unusable fields raise a one-line error that names the file and the id. A field with one evident meaning is accepted; if that
changes an object or leaves it out, `notes` count such cases and name the first. docs/detection.md has the whole list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sape2.data.labels import check_names, first_of
from sape2.data.pixels import MAX_PIXELS
from sape2.detection.masks import RunLengths, area_and_box, beyond, encode_segmentation, extent, is_number, is_outline
from sape2.encodings.grid import Grid

LISTS = {"images": "image", "annotations": "annotation", "categories": "category"}
ROUNDING = 0.02  # pixels; published boxes are rounded to hundredths
Entry = dict[str, Any]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class CocoObject:
    """An annotated object: its box as x1, y1, x2, y2 inside the image in pixels, its mask where masks are read."""

    category_id: int
    box: Box
    area: float
    crowd: bool
    mask: RunLengths | None


class Annotations:
    """images (id, file_name, height, width) of the first `limit`, category names by id, objects by image id, notes."""

    def __init__(self, where: Path, masks: bool, limit: int | None) -> None:
        self.where, self.masks = where, masks
        values = read_json(where)
        self._counts: Counter[str] = Counter()  # objects that were changed or left out, by kind
        self._first: dict[str, str] = {}
        self.categories = self._read_categories(values)
        images = [self._read_image(name, entry) for name, entry in self._entries(values, "images")]
        self.images = images[:limit]
        if not self.images:
            raise ValueError(f"{where} has no images")
        self.objects: dict[int, list[CocoObject]] = {entry["id"]: [] for entry in self.images}
        sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in images}
        seen: set[tuple[Any, ...]] = set()
        for name, entry in self._entries(values, "annotations"):
            found = self._read_object(name, entry, sizes)
            image = entry["image_id"]
            if found is None or image not in self.objects:
                continue
            if (image, found.category_id, found.box) in seen:
                self._note("objects with the category and the box of another one of their image", name)
            seen.add((image, found.category_id, found.box))
            self.objects[image].append(found)
        told = [f"{where}: {kind}: {count}, the first: {self._first[kind]}" for kind, count in self._counts.items()]
        self.notes = [*told, *self._notes_of_the_whole()]

    def _note(self, kind: str, first: str) -> None:
        self._counts[kind] += 1
        self._first.setdefault(kind, first)

    # --- lists -------------------------------------------------------------------------------------------------------

    def _entries(self, values: Entry, key: str) -> Iterator[tuple[str, Entry]]:
        """Each entry with what to call it. Ids are whole numbers, each there once; annotations may be without."""
        first: dict[int, Entry] = {}
        for number, entry in enumerate(values[key], start=1):
            name = f"{LISTS[key]} number {number}"
            if not isinstance(entry, dict):
                raise ValueError(f"{self.where}: {name} must be an object; got {_short(entry)}")
            identity: Any = entry.get("id")
            if identity is None and key == "annotations":
                yield name, entry
                continue
            if type(identity) is not int:
                raise ValueError(f"{self.where}: {name} needs id as a whole number; got {_short(identity)} in {_called(entry)}")
            if identity in first:
                both = f"{_called(first[identity])} and {_called(entry)}"
                raise ValueError(f"{self.where}: {key} has id {identity} twice: {both}; give each its own")
            first[identity] = entry
            yield f"{LISTS[key]} {identity}", entry

    def _read_categories(self, values: Entry) -> dict[int, str]:
        """Names by id, in the order of the ids."""
        found: dict[int, str] = {}
        for name, entry in self._entries(values, "categories"):
            text: Any = entry.get("name")
            _need(_is_text(text), f"{self.where}: {name}", "name as a text", text)
            if text in found.values():
                first = next(number for number, other in found.items() if other == text)
                raise ValueError(
                    f"{self.where}: categories {first} and {entry['id']} both have the name {text!r}; give each its own"
                )
            found[entry["id"]] = text
        if not found:
            raise ValueError(f"{self.where} has no categories")
        check_names(list(found.values()), str(self.where))
        return dict(sorted(found.items()))

    def _read_image(self, name: str, entry: Entry) -> Entry:
        file = entry.get("file_name")
        sides: list[Any] = [entry.get(key) for key in ("height", "width")]
        where = f"{self.where}: {name}"
        _need(_is_text(file), where, "file_name as a text", file)
        where = f"{where} ({file})"
        whole = all(type(side) is int and side > 0 for side in sides)
        _need(whole, where, "height and width as whole numbers above 0", sides)
        most = f"at most {MAX_PIXELS} pixels to be read safely, so make it smaller first"
        _need(sides[0] * sides[1] <= MAX_PIXELS, where, most, sides)
        return {"id": entry["id"], "file_name": file, "height": sides[0], "width": sides[1]}

    # --- objects -----------------------------------------------------------------------------------------------------

    def _read_object(self, name: str, entry: Entry, sizes: dict[int, Grid]) -> CocoObject | None:
        """None for an object of no size inside its image."""
        where = f"{self.where}: {name}"
        image, category = entry.get("image_id"), entry.get("category_id")
        if type(image) is not int or image not in sizes:
            raise ValueError(f"{where} speaks of image {_short(image)}, which is not listed")
        if type(category) is not int or category not in self.categories:
            known = first_of([str(number) for number in self.categories])
            raise ValueError(f"{where} has category {_short(category)}; known ids: {known}")
        x, y, width, height = _read_box(where, entry)
        crowd, area = _read_crowd(where, entry), _read_area(where, entry)
        size = sizes[image]
        if entry.get("ignore") and image in self.objects:
            self._note("objects with ignore, taken as any other, for crowds alone (iscrowd) are passed over", name)
        box = _inside((x, y, x + width, y + height), size)
        told = f"{name} with bbox {_short(entry['bbox'])} in image {image} of {size[0]}x{size[1]}"
        outline = entry.get("segmentation")
        mask = _read_mask(where, outline, size) if self.masks else None
        if image not in self.objects:  # beyond the limit: checked, not told
            return None
        if box[2] <= box[0] or box[3] <= box[1]:
            self._note("boxes (x, y, width, height) of no size inside their image, left out", told)
            return None
        if max(box[0] - x, box[1] - y, x + width - box[2], y + height - box[3]) > ROUNDING:
            self._note("boxes (x, y, width, height) that end outside of their image, cut off at its border", told)
        if mask is not None and not self._is_seen(mask, outline, size, told):
            return None
        if not _is_box_of(box, outline, mask, size):
            self._note("boxes (x, y, width, height) that are not those of their segmentation, taken as they are", told)
        if min(box[2] - box[0], box[3] - box[1]) < 1:
            self._note("boxes less than one pixel wide or high, measured but not trained on", told)
        if not area:  # torchmetrics takes 0 for missing
            self._note("objects without area, or of area 0, which get that of their box", name)
            area = (box[2] - box[0]) * (box[3] - box[1])
        elif not _is_area_of(area, width, height, exact=not outline):
            self._note("areas that do not fit their box, taken as they are", f"area {area:g}, {told}")
        return CocoObject(category, box, area, crowd, mask)

    def _is_seen(self, mask: RunLengths, outline: Any, size: Grid, told: str) -> bool:
        """True if the mask has a pixel; notes an empty mask, or an outline that leaves the image."""
        if area_and_box(mask)[0] == 0:
            self._note("masks without a pixel inside their image, left out with their objects", told)
            return False
        if isinstance(outline, list) and beyond(outline, size) > ROUNDING:
            self._note("polygons that end outside of their image, cut off at its border", told)
        return True

    # --- the whole ---------------------------------------------------------------------------------------------------

    def _notes_of_the_whole(self) -> list[str]:
        notes, number = [], len(self.images)
        empty = sum(not found for found in self.objects.values())
        crowds = sum(bool(found) and all(item.crowd for item in found) for found in self.objects.values())
        used = {item.category_id for found in self.objects.values() for item in found if not item.crowd}
        unused = [name for category, name in self.categories.items() if category not in used]
        if empty:
            notes.append(f"{self.where}: images without an object: {empty} of {number}")
        if crowds:
            notes.append(f"{self.where}: images of crowds alone, which are empty to training: {crowds} of {number}")
        if unused and used:
            notes.append(
                f"{self.where}: categories without an object here: {len(unused)} of {len(self.categories)}, {first_of(unused)}"
            )
        return notes


# --- fields ----------------------------------------------------------------------------------------------------------


def _need(holds: bool, where: str, what: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{where} needs {what}; got {_short(got)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _read_box(where: str, entry: Entry) -> Box:
    box: Any = entry.get("bbox")
    numbers = isinstance(box, list) and len(box) == 4 and all(is_number(value) for value in box)
    _need(numbers, where, "bbox as four finite numbers, x, y, width, height", box)
    x, y, width, height = map(float, box)
    _need(width >= 0 and height >= 0, where, "bbox as x, y, width, height, the last two not negative", box)
    return x, y, width, height


def _read_crowd(where: str, entry: Entry) -> bool:
    """True for a crowd; a missing value or null means that it is none."""
    value = entry.get("iscrowd")
    _need(value is None or (isinstance(value, int) and value in (0, 1)), where, "iscrowd as 0 or 1", value)
    return bool(value)


def _read_area(where: str, entry: Entry) -> float | None:
    value = entry.get("area")
    _need(value is None or (is_number(value) and value >= 0), where, "area as a number of pixels", value)
    return None if value is None else float(value)


def _read_mask(where: str, outline: Any, size: Grid) -> RunLengths:
    if not outline:
        raise ValueError(f"{where} has no segmentation, and masks are asked for; give --set detector.masks=false to do without")
    try:
        return encode_segmentation(outline, size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _is_area_of(area: float, width: float, height: float, exact: bool) -> bool:
    """True if an area fits a box, up to a pixel on each side; `exact` without a segmentation."""
    least = max(width - 1, 0) * max(height - 1, 0) if exact else 0
    return 0 < area <= (width + 1) * (height + 1) and area >= least


def _is_box_of(box: Box, outline: Any, mask: RunLengths | None, size: Grid) -> bool:
    """Whether each side lies where that of the segmentation does, but for two pixels and a tenth of the box."""
    if is_outline(outline):
        x1, y1, x2, y2 = _inside(extent(outline), size)
    elif mask is not None:
        x1, y1, width, height = area_and_box(mask)[1]
        x2, y2 = x1 + width, y1 + height
    else:
        return True
    near_x, near_y = 2 + (box[2] - box[0]) / 10, 2 + (box[3] - box[1]) / 10
    near = (near_x, near_y, near_x, near_y)
    return all(abs(own - other) <= most for own, other, most in zip(box, (x1, y1, x2, y2), near, strict=True))


def _inside(corners: Box, size: Grid) -> Box:
    (x1, y1, x2, y2), (height, width) = corners, map(float, size)
    return min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)


def _short(value: Any) -> str:
    return repr(value)[:80]


def _called(entry: Entry) -> str:
    name = entry.get("file_name") or entry.get("name") or {key: entry.get(key) for key in ("image_id", "category_id", "bbox")}
    return str(name)[:80]


def _each_once(pairs: list[tuple[str, Any]]) -> Entry:
    """An object as a dict. Raises ValueError for a key that is there twice, of which json takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has {_short(twice)} twice; put together what belongs together")
    return found


def read_json(path: Path) -> Entry:
    """The three lists that every file in COCO format has; what else it holds is not read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for key in LISTS:
        if not isinstance(values, dict) or not isinstance(values.get(key), list):
            raise ValueError(f"{path} is not in COCO format: it needs a list called {key}")
    return values
