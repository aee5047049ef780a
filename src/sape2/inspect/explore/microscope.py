"""The data behind the page: images, models, and the numbers to show. Contains no page and no drawing.

An image passes a model once (`Microscope.seen`); a click only selects other parts of that result. Notation as in the
paper: i is the patch that attends, n another patch, m a place in i's line. Head 0 is the mean of all heads.
"""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from sape2.config import RunConfig, check_image_size
from sape2.data import ImageData, ImageFiles, normalize
from sape2.data.picture import Picture
from sape2.encodings.grid import num_tokens
from sape2.evaluation.translation import Border, translate
from sape2.evaluation.views import plain_sizes, scaled
from sape2.inspect.explore.change import Change, changes
from sape2.inspect.explore.columns import Column, View, column
from sape2.inspect.explore.state import State, whole_number
from sape2.inspect.look import Look, Patch, look, of_head
from sape2.models.vit import ViT

LARGEST_GRID = 32 * 32  # patches: maps of all layers and heads stay in memory
KEPT = 12  # images that have gone through a model
KEPT_UPLOADS = 16


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained model to look into, with the name that stands above its column, and how large its training images were."""

    name: str
    model: ViT
    config: RunConfig
    trained_on: list[tuple[int, int]] | None = None


class Microscope:
    """Images, one trained model and perhaps another one; `view(state)` gives what is to be shown.

    Both models must take the same images: size, patches, channels and classes. Raises ValueError otherwise. `names` are
    given for samples that are no test set.
    """

    def __init__(
        self, subject: Subject, samples: ImageData | ImageFiles, names: Sequence[str] = (), against: Subject | None = None
    ) -> None:
        self.subject, self.samples, self.names, self.against = subject, samples, names, against
        self.uploads: OrderedDict[str, Picture] = OrderedDict()
        self._kept = functools.lru_cache(KEPT)(self._look)
        if against is not None:
            _check_alike(subject.config, against.config)

    @functools.cached_property
    def start(self) -> State:
        """The initial state: the middle patch of the first image, in the last layer, at the training size."""
        config = self.subject.config.model
        height, width = config.grid
        beside = "run" if self.against else "nothing"
        return State(layer=config.depth, patch=(height // 2, width // 2), size=config.image_size, beside=beside)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Image sizes that the page offers: from 0.6 to twice the training size."""
        config = self.subject.config.model
        sizes = plain_sizes(config.image_size, (config.patch_size,) * 2)
        return [size for size in sizes if num_tokens(check_image_size(size, config.patch_size)) <= LARGEST_GRID]

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
        if num_tokens(grid) > LARGEST_GRID:
            raise ValueError(f"size {state.size[0]}x{state.size[1]} makes {num_tokens(grid)} patches; at most {LARGEST_GRID}")
        _check_within("layer", state.layer, 1, config.depth)
        _check_within("head", state.head, 0, config.num_heads)
        for name, patch in (("patch", state.patch), ("other", state.other)):
            if patch is not None and not (0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]):
                raise ValueError(f"{name} is row,column from 0,0 to {grid[0] - 1},{grid[1] - 1}; got {patch[0]},{patch[1]}")
        for shift, length in zip(state.shift, state.size, strict=True):
            _check_within("shift", shift, -length, length)
        if state.border not in get_args(Border):
            raise ValueError(f"border must be one of {', '.join(get_args(Border))}; got {state.border!r}")
        _check_within("opacity", state.opacity, 0, 100)
        self._check_beside(state.beside)

    def _check_beside(self, beside: str) -> None:
        what, _, which = beside.partition(":")
        config = self.subject.config.model
        if what in ("head", "layer") and which:
            low, high = (0, config.num_heads) if what == "head" else (1, config.depth)
            _check_within(f"beside {what}", whole_number(what, which), low, high)
        elif beside == "run" and self.against is None:
            raise ValueError("there is no other run to set beside; start with sape2 explore RUN --against RUN2")
        elif beside not in ("nothing", "before", "run"):
            raise ValueError(f"beside must be nothing, head:N, layer:N, before or run; got {beside!r}")

    def view(self, state: State) -> View:
        """Raises ValueError for a state that cannot be shown."""
        self.check(state)
        what, _, which = state.beside.partition(":")
        columns = [self._column(self.subject, state)]
        if what in ("head", "layer"):
            other = replace(state, head=int(which)) if what == "head" else replace(state, layer=int(which))
            columns.append(self._column(self.subject, other))
        if what == "run" and self.against is not None:
            theirs = self.against.config.model  # of which the nearest layer and head are shown
            near = replace(state, layer=min(state.layer, theirs.depth), head=min(state.head, theirs.num_heads))
            columns.append(self._column(self.against, near))
        if what == "before":
            columns.append(self._column(self.subject, self._before(state), ", not moved"))
        return View(state, columns, self._changes(state) if any(state.shift) else [], self._notes(state.image))

    def _before(self, state: State) -> State:
        """The image not moved, from where the patches lay then, as nearly as whole patches can say."""
        other = None if state.other is None else self._back(state, state.other)
        return replace(state, shift=(0, 0), patch=self._back(state, state.patch), other=other)

    def _back(self, state: State, patch: Patch) -> Patch:
        down, right = self.steps(state)
        height, width = check_image_size(state.size, self.subject.config.model.patch_size)
        return (patch[0] - down) % height, (patch[1] - right) % width

    def steps(self, state: State) -> Patch:
        """The shift in whole patches (down, right), rounded."""
        patch = self.subject.config.model.patch_size
        return round(state.shift[0] / patch), round(state.shift[1] / patch)

    def _changes(self, state: State) -> list[Change]:
        both = [self.seen(self.subject, replace(state, shift=(0, 0))), self.seen(self.subject, state)]
        layers = [seen.layers[state.layer - 1] for seen in both]
        tables = [
            {name: of_head(values, state.head) for name, values in {**layer.encoded, "attention": layer.among_all}.items()}
            for layer in layers
        ]
        tokens = [layer.leaving[0].numpy() for layer in layers]
        probabilities = [seen.probabilities.numpy() for seen in both]
        return changes(tables, tokens, probabilities, both[0].grid, self.steps(state), state.border)

    def _column(self, subject: Subject, state: State, note: str = "") -> Column:
        heads = "mean of heads" if state.head == 0 else f"head {state.head}"
        name = f"{subject.name}, layer {state.layer}, {heads}{note}"
        return column(self.seen(subject, state), self.samples.classes, name, subject.config.model.encoding, state)

    def seen(self, subject: Subject, state: State) -> Look:
        """The image through the model, from memory if it has been there."""
        border = state.border if any(state.shift) else "circular"  # of an image that is not moved it makes no difference
        return self._kept(subject, state.image, state.size, state.shift, border)

    def _look(self, subject: Subject, image: str, size: tuple[int, int], shift: tuple[int, int], border: Border) -> Look:
        data = subject.config.data
        images = normalize(self._pixels(image)[None], data.mean, data.std)
        images = translate(scaled(images, size), torch.tensor([shift], dtype=torch.float32), border)
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        pixels = ((images[0] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return look(subject.model, images, pixels)

    def _pixels(self, image: str) -> Tensor:
        kind, _, which = image.partition(":")
        if kind == "upload":
            if which not in self.uploads:
                raise ValueError("this uploaded image is no longer here: uploads live as long as the server; upload it again")
            return self.uploads[which].pixels
        if kind != "test" or not re.fullmatch(r"\d{1,9}", which, re.ASCII) or int(which) >= len(self.samples):
            raise ValueError(f"image must be test:0 to test:{len(self.samples) - 1}, or an upload; got {image!r}")
        return self.samples[int(which) : int(which) + 1].images[0]

    def _notes(self, image: str) -> str:
        kind, _, which = image.partition(":")
        if kind == "upload":
            return f"uploaded: {self.uploads[which].notes}"
        if self.names:
            return self.names[int(which)]
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
