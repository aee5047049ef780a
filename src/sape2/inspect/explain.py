"""Explains the prediction of a trained model for one image: bias or attention, gates and positions, as page or picture.

The page is a single, self-contained HTML file: figures are embedded as SVG, and it has no script and links to no
other address. Its panels are those of `sape2 explore`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from sape2.config import RunConfig
from sape2.data.decoding import evaluation_crop
from sape2.data.picture import read_picture, unlike
from sape2.inspect.drawing import Drawing
from sape2.inspect.explanation import Choice, Explanation, Row, explained
from sape2.inspect.figures import (
    LETTERS,
    answer_figure,
    as_one,
    counts_figure,
    distance_figure,
    even_columns,
    named_marks,
    pairs_figure,
)
from sape2.inspect.look import LayerLook, of_head
from sape2.inspect.panels import Over
from sape2.inspect.templates import template
from sape2.models.trained import load_run_model
from sape2.runs.files import digest_of, write_text
from sape2.runs.run import Run, check_output
from sape2.tables import format_value
from sape2.viz.base import plain

MOST = 200  # bytes; with what stands around it, while it is written too


def explain(
    run: Run[RunConfig], image_path: Path, out: Path | None = None, choice: Choice | None = None, weights: str = "last"
) -> tuple[Path, list[Row]]:
    """Writes the page (.html) or the picture (.png); returns where, and the numbers on it as rows.

    Raises ValueError or OSError, before anything is written, for an image or a choice that cannot be.
    """
    config = run.config
    out = out or run.folder / "figures" / f"explain-{_short(image_path.stem)}.html"
    if out.suffix.lower() not in (".html", ".png"):
        raise ValueError(f"--out must end in .html or .png; got {out}")
    check_output(out, image_path)
    choice = choice or Choice()
    choice.check(config.model)
    picture = read_picture(image_path, config.model, evaluation_crop(config.data))
    model, classes, name = load_run_model(run, weights), run.classes, plain(image_path.name)
    found = explained(model, config, picture.pixels, classes, name, picture.notes, choice)
    found = replace(found, unlike=unlike(picture, config.data, run.image_sizes))
    if out.suffix.lower() == ".png":
        as_picture(found).save(out)
    else:
        write_text(out, page(found))
    about = {"image": str(image_path), "encoding": config.model.encoding, "model": config.model.label, "weights": weights}
    return out, [row | about for row in found.all_rows()]


def _short(stem: str) -> str:
    """The name of an image as part of a file name, which file systems keep to 255 bytes."""
    return stem if len(os.fsencode(stem)) <= MOST else f"{stem[: MOST // 4]}-{digest_of({'image': stem})}"


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """Panels in rows that are full or nearly full; the page chooses the number of columns by its width."""

    panels: list[Drawing]
    caption: str

    @property
    def kind(self) -> str:
        return "wide" if self.panels[0].width > 300 else "narrow"

    def columns(self, most: int) -> int:
        return even_columns(len(self.panels), most)


def opening(found: Explanation) -> Figure:
    """The image, bias and attention of the first patch over it, and the prediction."""
    grid, layer, letter = found.seen.grid, found.opening(), LETTERS[0]
    (patch, place), *_ = found.patches.items()
    marks, _ = named_marks({patch: place})

    def over(values: Tensor, unit: str) -> Over:
        return Over(of_head(values[:, :, found.seen.token(place)], found.choice.head).reshape(grid), unit)

    maps = {} if layer.bias is None else {f"Bias from patch {letter}": over(layer.bias, "logits")}
    maps[f"Attention from patch {letter}"] = over(layer.attention, "attention weight")
    pixels = found.seen.pixels.numpy()
    panels = answer_figure(pixels, grid, marks, maps, found.seen.likely(found.classes))
    shown = f"Layer {layer.number}, {found.heads}, patch {letter} ({patch})."
    attention = f"how much patch {letter} attends to each patch"
    if layer.bias is None:
        return Figure(panels, f"{shown} The attention is {attention}.")
    bias = f"The bias is what the encoding {found.config.model.encoding} adds to the attention logits of patch {letter}"
    return Figure(panels, f"{shown} {bias}; the attention, {attention}, is the softmax of content and bias.")


def _pairs(found: Explanation) -> list[Drawing]:
    means = {name: values.mean(0) for name, values in found.maps().items()}
    return pairs_figure(means, found.seen.grid, found.patches, found.quantity)


def figures(found: Explanation) -> dict[str, Figure]:
    """The figures below the opening, by their headings."""
    what = "Bias" if found.has_bias else "Attention"
    about = "A high bias raises the attention from the query patch to the key patch, a low one lowers it."
    if not found.has_bias:
        about = f"The encoding {found.config.model.encoding} adds no bias in these layers, so the attention is shown."
    caption = (
        f"{what} by layer, each layer on a scale of its own. Above: all pairs, queries down, keys across. Below: "
        f"from one query patch to all keys ({named_marks(found.patches)[1]}). {about}"
    )
    shown = {f"{what} between patches": Figure(_pairs(found), caption)}
    if layer := found.counting_layer():
        shown["Gates and positions"] = _counts(found, layer)
    quantity = found.quantity.replace("mean of heads", "all heads")  # the band is over heads, too
    shown[f"{what} against distance"] = Figure(
        distance_figure(found.maps(), found.seen.grid, quantity),
        f"{what} against the distance between two patches, by layer. Line: mean over all pairs at that distance; band: one "
        "standard deviation. A flat line means no dependence on distance.",
    )
    return shown


def _counts(found: Explanation, layer: LayerLook) -> Figure:
    """Gates and positions of the first patch."""
    y, x = next(iter(found.patches.values()))
    share = found.number("bias_variance_share", layer.number)
    why = f", the layer in which the bias has the largest share of the variance of the logits ({share or 0:.0%})"
    about = f"Gates and positions of patch a (row {y}, column {x}) in layer {layer.number}"
    about += (why if share is not None and not found.choice.layer else "") + ", by head. "
    about += "A gate, from 0 to 1, is how much patch a counts the patch in this place; a position is a sum of gates along "
    about += "the line, in the direction in which the encoding counts."
    return Figure(counts_figure(found.seen.pixels, found.counts(layer), found.seen.grid, (y, x)), about)


def as_picture(found: Explanation) -> Drawing:
    """The prediction and the bias (or attention) between patches, with the same words as the page."""
    top = opening(found)
    warning = f" This image is unlike the training images: {found.how_unlike}" if found.unlike else ""
    return as_one(found.headline, f"{found.about}{warning} {top.caption}", top.panels, _pairs(found))


# --- page ------------------------------------------------------------------------------------------------------------

FITTING = {"narrow": {2: 19, 3: 33, 4: 43, 5: 54, 6: 66}, "wide": {2: 38, 3: 66}}  # most columns -> from this width (rem)
COLUMNS = {  # heading -> number of the layer
    "attention distance (patches)": "attention_distance",
    "attention entropy (nats)": "attention_entropy",
    "bias, mean (logits)": "bias_mean",
    "bias, within rows (logits)": "bias_row_std",
    "content, within rows (logits)": "content_row_std",
    "bias, share of logit variance": "bias_variance_share",
}


def page(found: Explanation) -> str:
    """The whole page as one text."""
    return template("explain.html").render(
        found=found, opening=opening(found), figures=figures(found), table=list(_layer_table(found)), fitting=FITTING
    )


def _layer_table(found: Explanation) -> Iterator[dict[str, str]]:
    used = {heading: name for heading, name in COLUMNS.items() if found.has(name)}
    for layer in found.seen.layers:
        values = {heading: found.number(name, layer.number) for heading, name in used.items()}
        yield {"layer": str(layer.number)} | {name: "" if v is None else format_value(v) for name, v in values.items()}
