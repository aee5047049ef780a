"""What the microscope shows, as numbers: from the state of the page to views. No page, no drawing.

An image goes through a model once (`Microscope.seen`); a click only cuts something else out of what that gave.
Notation as in the paper: i is the patch one looks from, n another patch, m a place in i's line. Head 0 is the mean of all.
"""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args
from urllib.parse import parse_qsl, urlencode

import numpy as np
import torch
from torch import Tensor

from sape2.attention import encode
from sape2.config import RunConfig, check_image_size
from sape2.data import ImageData, normalize
from sape2.encodings import AttentionEncoding
from sape2.encodings.base import full_precision
from sape2.encodings.cope import CoPE
from sape2.encodings.sape2 import SaPE2, table_products
from sape2.evaluation.translation import Border, translate
from sape2.evaluation.views import plain_sizes, scaled
from sape2.explore.change import Change, changes
from sape2.grid import Grid
from sape2.picture import Picture
from sape2.vit import ViT

Patch = tuple[int, int]
LARGEST_GRID = 32 * 32  # patches: maps of all layers and heads stay in memory
KEPT = 12  # images that have gone through a model
KEPT_UPLOADS = 16


# --- state -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Everything that decides what is shown; it stands in the address of the page.

    `image` is test:NUMBER or upload:KEY; `size` HxW in pixels; `shift` (dy, dx) in pixels, positive down and to the right;
    `beside` is what stands in a second column: nothing, head:N, layer:N, before (the image not moved) or run (the other run).
    """

    image: str = "test:0"
    layer: int = 1
    head: int = 1
    patch: Patch = (0, 0)
    other: Patch | None = None
    size: tuple[int, int] = (1, 1)
    shift: tuple[int, int] = (0, 0)
    border: Border = "circular"
    beside: str = "nothing"

    def query(self) -> str:
        """As it stands in the address."""
        texts = {
            "image": self.image,
            "layer": str(self.layer),
            "head": str(self.head),
            "patch": "{},{}".format(*self.patch),
            "other": "none" if self.other is None else "{},{}".format(*self.other),
            "size": "{}x{}".format(*self.size),
            "shift": "{},{}".format(*self.shift),
            "border": self.border,
            "beside": self.beside,
        }
        return urlencode(texts, safe=":,")


PAIRS = {"patch": ",", "other": ",", "size": "x", "shift": ","}


def parse_state(query: str, default: State) -> State:
    """The state that an address asks for, `default` where it says nothing. Raises ValueError for what it cannot mean."""
    known = {field.name for field in fields(State)}
    values: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise ValueError(f"the address asks for {name!r}; known: {', '.join(sorted(known))}")
        values[name] = _parse(name, text)
    return replace(default, **values)


def _parse(name: str, text: str) -> Any:
    if name in ("layer", "head"):
        return _whole(name, text)
    if name == "other" and text == "none":
        return None
    if name in PAIRS:
        found = re.fullmatch(rf"(-?\d{{1,5}}){PAIRS[name]}(-?\d{{1,5}})", text, re.ASCII)
        if not found:
            raise ValueError(f"{name} needs two whole numbers such as 3{PAIRS[name]}5; got {text!r}")
        return int(found[1]), int(found[2])
    return text


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII):
        raise ValueError(f"{name} needs a whole number; got {text!r}")
    return int(text)


# --- one image under one model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMaps:
    """One layer: the encoding's maps, (h, N, ...), and what `maps` does not hold. `content` is attention without the bias.

    `attention` and `content` are of grid tokens among all tokens, so a row sums to 1 less what prefix tokens get.
    `products` are z_i[p], (h, N, positions), of each axis that has a table.
    """

    maps: dict[str, np.ndarray]
    attention: np.ndarray
    content: np.ndarray
    products: dict[str, np.ndarray]
    leaving: np.ndarray
    readout: str | None


@dataclass(frozen=True)
class Seen:
    """One image after one pass through one model: pixels as the model took them, (C, height, width) uint8."""

    pixels: np.ndarray
    grid: Grid
    probabilities: np.ndarray
    layers: list[LayerMaps]


@torch.no_grad()
def look(model: ViT, images: Tensor) -> tuple[np.ndarray, list[LayerMaps]]:
    """Probabilities and all layers of one normalised image (1, C, height, width)."""
    device = next(model.parameters()).device
    x, grid = model.embed(images.to(device))
    first, layers = model.num_prefix_tokens, []
    for block, maps in zip(model.layers(), model.maps(images.to(device)), strict=True):
        encoding = block.attn.encoding
        q, k, _ = block.attn.project(block.norm1(x))
        x = maps["tokens"]
        rotated_q, rotated_k, _ = encode(q, k, grid, encoding)
        content = (rotated_q * q.shape[-1] ** -0.5 @ rotated_k.transpose(-1, -2)).softmax(-1)
        named = {name: _array(value) for name, value in maps.items() if name not in ("tokens", "attention")}
        counting = [part for part in _parts(encoding) if isinstance(part, (SaPE2, CoPE))]
        products = {} if not counting else _products(counting[-1], q[:, :, first:], k[:, :, first:])
        readout = counting[-1].options.readout if counting and isinstance(counting[-1], SaPE2) else None
        attention = maps["attention"]
        layers.append(
            LayerMaps(
                named, _array(attention[:, :, first:, first:]), _array(content[:, :, first:, first:]), products,
                _array(x[:, first:]), readout,
            )
        )  # fmt: skip
    probabilities = model(images.to(device))[0].double().softmax(-1)
    return probabilities.cpu().numpy(), layers


def _parts(encoding: AttentionEncoding) -> list[torch.nn.Module]:
    return [part for part in encoding.modules() if isinstance(part, AttentionEncoding)]


def _products(encoding: SaPE2 | CoPE, q: Tensor, k: Tensor) -> dict[str, np.ndarray]:
    """Eq. 13 for every patch: the table as i sees it, for each axis."""
    vector = full_precision(k if isinstance(encoding, SaPE2) and encoding.options.dot == "key" else q)
    if isinstance(encoding, CoPE):
        return {"": _array(table_products(vector, full_precision(encoding.table)))}
    tables = {axis: full_precision(getattr(encoding, f"table_{axis}")) for axis in encoding.axes}
    return {axis: _array(table_products(vector, table)) for axis, table in tables.items()}


def _array(tensor: Tensor) -> np.ndarray:
    """Without the batch, in float64."""
    return tensor[0].detach().cpu().double().numpy()


# --- views -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AxisView:
    """Along one axis from patch i: gates (S), positions and vector (S or 2S), table products (positions)."""

    gates: np.ndarray
    positions: np.ndarray
    vector: np.ndarray | None
    products: np.ndarray | None
    other_vector: np.ndarray | None


@dataclass(frozen=True)
class Column:
    """Everything about one patch in one layer and head of one model on one image. Maps are (H, W); None: there is none."""

    name: str
    encoding: str
    grid: Grid
    patch: Patch
    other: Patch | None
    pixels: np.ndarray
    prediction: list[tuple[str, float]]
    axes: dict[str, AxisView]
    bias: np.ndarray | None
    attention: np.ndarray
    attention_without_bias: np.ndarray
    readout: str | None

    def distances(self) -> dict[str, float]:
        """Eq. 15, one axis at a time: the distance of the vectors of i and n (squared where the encoding squares it)."""
        result = {}
        for axis, view in self.axes.items():
            if view.vector is not None and view.other_vector is not None and self.readout in ("distance", "squared_distance"):
                squared = float(((view.vector - view.other_vector) ** 2).sum())
                result[axis] = squared if self.readout == "squared_distance" else squared**0.5
        return result


@dataclass(frozen=True)
class View:
    """What the page shows: one column or two, and what moved between them."""

    state: State
    columns: list[Column]
    moved: list[Change]
    notes: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number that is drawn."""
        return {
            "state": {field.name: getattr(self.state, field.name) for field in fields(State)},
            "image": self.notes,
            "columns": [_plain(column) | {"distances": column.distances()} for column in self.columns],
            "moved": [_plain(change) for change in self.moved],
        }


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return value


# --- the microscope --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A trained model to look into, with the name that stands above its column."""

    name: str
    model: ViT
    config: RunConfig


class Microscope:
    """Images, one trained model and perhaps another one; `view(state)` gives what is to be shown.

    Both models must take the same images: size, patches, channels and classes. Raises ValueError otherwise.
    """

    def __init__(self, subject: Subject, samples: ImageData, against: Subject | None = None) -> None:
        self.subject, self.samples, self.against = subject, samples, against
        self.uploads: OrderedDict[str, Picture] = OrderedDict()
        self._seen: OrderedDict[tuple, Seen] = OrderedDict()
        if against is not None:
            _check_alike(subject.config, against.config)

    @functools.cached_property
    def start(self) -> State:
        """Of the first image the patch in the middle, in the last layer, at the size trained at."""
        config = self.subject.config.model
        height, width = config.grid
        beside = "run" if self.against else "nothing"
        return State(layer=config.depth, patch=(height // 2, width // 2), size=config.image_size, beside=beside)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """What the page offers: from 0.6 to twice the size trained at."""
        config = self.subject.config.model
        sizes = plain_sizes(config.image_size, (config.patch_size,) * 2)
        return [size for size in sizes if _patches(size, config.patch_size) <= LARGEST_GRID]

    def add(self, key: str, picture: Picture) -> str:
        """Keeps an uploaded picture; returns its name for `State.image`."""
        self.uploads[key] = picture
        while len(self.uploads) > KEPT_UPLOADS:
            self.uploads.popitem(last=False)
        return f"upload:{key}"

    def check(self, state: State) -> None:
        """Raises ValueError for a state that cannot be shown."""
        config = self.subject.config.model
        self._pixels(state.image)
        grid = check_image_size(state.size, config.patch_size)
        if grid[0] * grid[1] > LARGEST_GRID:
            raise ValueError(f"size {state.size[0]}x{state.size[1]} makes {grid[0] * grid[1]} patches; at most {LARGEST_GRID}")
        _check_within("layer", state.layer, 1, config.depth)
        _check_within("head", state.head, 0, config.num_heads)
        for name, patch in (("patch", state.patch), ("other", state.other)):
            if patch is not None and not (0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]):
                raise ValueError(f"{name} is row,column from 0,0 to {grid[0] - 1},{grid[1] - 1}; got {patch[0]},{patch[1]}")
        for shift, length in zip(state.shift, state.size, strict=True):
            _check_within("shift", shift, -length, length)
        if state.border not in get_args(Border):
            raise ValueError(f"border must be one of {', '.join(get_args(Border))}; got {state.border!r}")
        self._check_beside(state.beside)

    def _check_beside(self, beside: str) -> None:
        what, _, which = beside.partition(":")
        config = self.subject.config.model
        if what in ("head", "layer") and which:
            low, high = (0, config.num_heads) if what == "head" else (1, config.depth)
            _check_within(f"beside {what}", _whole(what, which), low, high)
        elif beside == "run" and self.against is None:
            raise ValueError("there is no other run to set beside; start with sape2 explore RUN --against RUN2")
        elif beside not in ("nothing", "before", "run"):
            raise ValueError(f"beside must be nothing, head:N, layer:N, before or run; got {beside!r}")

    def view(self, state: State) -> View:
        """Raises ValueError for a state that cannot be shown."""
        self.check(state)
        what, _, which = state.beside.partition(":")
        columns = [self._column(self.subject, state, state.patch, state.other, self._name(self.subject, state))]
        if what in ("head", "layer"):
            other = replace(state, head=int(which)) if what == "head" else replace(state, layer=int(which))
            columns.append(self._column(self.subject, other, state.patch, state.other, self._name(self.subject, other)))
        if what == "run" and self.against is not None:
            theirs = _within(state, self.against.config)
            columns.append(self._column(self.against, theirs, state.patch, state.other, self._name(self.against, theirs)))
        if what == "before":
            columns.append(self._before(state))
        return View(state, columns, self._changes(state) if any(state.shift) else [], self._notes(state.image))

    def _name(self, subject: Subject, state: State) -> str:
        heads = "mean of heads" if state.head == 0 else f"head {state.head}"
        return f"{subject.name}, layer {state.layer}, {heads}"

    def _before(self, state: State) -> Column:
        """The image not moved, from where the patches lay then, as nearly as whole patches can say."""
        other = None if state.other is None else self._back(state, state.other)
        still = replace(state, shift=(0, 0))
        name = f"{self._name(self.subject, state)}, not moved"
        return self._column(self.subject, still, self._back(state, state.patch), other, name)

    def _back(self, state: State, patch: Patch) -> Patch:
        down, right = self.steps(state)
        height, width = check_image_size(state.size, self.subject.config.model.patch_size)
        return (patch[0] - down) % height, (patch[1] - right) % width

    def steps(self, state: State) -> Patch:
        """The shift in whole patches (down, right), rounded."""
        patch = self.subject.config.model.patch_size
        return round(state.shift[0] / patch), round(state.shift[1] / patch)

    def _changes(self, state: State) -> list[Change]:
        before, after = self.seen(self.subject, replace(state, shift=(0, 0))), self.seen(self.subject, state)
        pick = functools.partial(_of_head, head=state.head)
        tables = [
            {name: pick(value) for name, value in layer.maps.items()} | {"attention": pick(layer.attention)}
            for layer in (before.layers[state.layer - 1], after.layers[state.layer - 1])
        ]
        tokens = [seen.layers[state.layer - 1].leaving for seen in (before, after)]
        probabilities = [seen.probabilities for seen in (before, after)]
        return changes(tables, tokens, probabilities, before.grid, self.steps(state), state.border)

    def _column(self, subject: Subject, state: State, patch: Patch, other: Patch | None, name: str) -> Column:
        seen = self.seen(subject, state)
        layer, (height, width) = seen.layers[state.layer - 1], seen.grid
        pick = functools.partial(_of_head, head=state.head)
        i, n = patch[0] * width + patch[1], None if other is None else other[0] * width + other[1]
        from_i = {name: pick(values)[i] for name, values in layer.maps.items()}
        axes = {axis: _axis_view(layer, axis, state.head, i, n) for axis in _axes(layer.maps)}
        top = np.argsort(-seen.probabilities)[:5]
        return Column(
            name=name,
            encoding=subject.config.model.encoding,
            grid=seen.grid,
            patch=patch,
            other=other,
            pixels=seen.pixels,
            prediction=[(self.samples.classes[c], float(seen.probabilities[c])) for c in top],
            axes=axes,
            bias=from_i["bias"].reshape(height, width) if "bias" in from_i else None,
            attention=pick(layer.attention)[i].reshape(height, width),
            attention_without_bias=pick(layer.content)[i].reshape(height, width),
            readout=layer.readout,
        )

    def seen(self, subject: Subject, state: State) -> Seen:
        """The image through the model, from memory if it has been there."""
        key = (subject.name, state.image, state.size, state.shift, state.border if any(state.shift) else "")
        if key not in self._seen:
            self._seen[key] = self._look(subject, state)
            while len(self._seen) > KEPT:
                self._seen.popitem(last=False)
        self._seen.move_to_end(key)
        return self._seen[key]

    def _look(self, subject: Subject, state: State) -> Seen:
        data = subject.config.data
        images = normalize(self._pixels(state.image)[None], data.mean, data.std)
        images = translate(scaled(images, state.size), torch.tensor([state.shift], dtype=torch.float32), state.border)
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        pixels = ((images[0] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        grid = check_image_size(state.size, subject.config.model.patch_size)
        return Seen(pixels.numpy(), grid, *look(subject.model, images))

    def _pixels(self, image: str) -> Tensor:
        kind, _, which = image.partition(":")
        if kind == "upload":
            if which not in self.uploads:
                raise ValueError("this uploaded image is no longer here: uploads live as long as the server; upload it again")
            return self.uploads[which].pixels
        if kind != "test" or not re.fullmatch(r"\d{1,9}", which, re.ASCII) or int(which) >= len(self.samples):
            raise ValueError(f"image must be test:0 to test:{len(self.samples) - 1}, or an upload; got {image!r}")
        return self.samples.images[int(which)]

    def _notes(self, image: str) -> str:
        kind, _, which = image.partition(":")
        if kind == "upload":
            return f"uploaded: {self.uploads[which].notes}"
        label = self.samples.classes[int(self.samples.labels[int(which)])]
        return f"image {which} of the test set, labelled {label}"


def _check_within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}; got {value}")


def _check_alike(mine: RunConfig, theirs: RunConfig) -> None:
    for name in ("image_size", "patch_size", "in_channels", "num_classes"):
        if getattr(mine.model, name) != getattr(theirs.model, name):
            raise ValueError(
                f"the two runs cannot be shown side by side: {name} is {getattr(mine.model, name)} in one and "
                f"{getattr(theirs.model, name)} in the other; choose runs on the same images"
            )


def _within(state: State, config: RunConfig) -> State:
    """The layer and head nearest to those of the state that the other model has."""
    return replace(state, layer=min(state.layer, config.model.depth), head=min(state.head, config.model.num_heads))


def _patches(size: tuple[int, int], patch: int) -> int:
    return (size[0] // patch) * (size[1] // patch)


def _of_head(values: np.ndarray, head: int) -> np.ndarray:
    return values.mean(0) if head == 0 else values[head - 1]


def _axes(maps: Mapping[str, np.ndarray]) -> list[str]:
    """x and y where the encoding counts along lines; raster, or nothing for CoPE, where along the whole sequence."""
    return [name.removeprefix("gates").removeprefix("_") for name in maps if name.startswith("gates")]


def _axis_view(layer: LayerMaps, axis: str, head: int, i: int, n: int | None) -> AxisView:
    def of(kind: str, token: int | None) -> np.ndarray | None:
        values = layer.maps.get("_".join(filter(None, (kind, axis))))
        return None if values is None or token is None else _of_head(values, head)[token]

    gates, positions = of("gates", i), of("positions", i)
    assert gates is not None
    assert positions is not None
    products = layer.products.get(axis)
    seen = None if products is None or head == 0 else products[head - 1, i]  # a mean of heads is not read at a mean position
    return AxisView(gates, positions, of("vectors", i), seen, of("vectors", n))
