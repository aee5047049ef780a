"""Explains the prediction of a trained model for one image: bias or attention, gates and positions, as page or picture.

The page is a single, self-contained HTML file: figures are embedded as SVG, and it has no script and links to no
other address. Its panels are those of `sape2 explore`.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sape2 import viz
from sape2.config import ModelConfig, RunConfig
from sape2.config.recipes.changed import changed_in_words
from sape2.data import ImageData
from sape2.data.decoding import evaluation_crop
from sape2.data.picture import Picture, Unlike, read_picture, unlike
from sape2.encodings.grid import Grid
from sape2.evaluation import pairs
from sape2.evaluation.findings import findings
from sape2.evaluation.health import layer_rows
from sape2.evaluation.layers import Layer, layers_of
from sape2.models.trained import load_run_model, names_of_classes, sizes_trained_on
from sape2.tables import Row, format_value
from sape2.training.files import write_text
from sape2.training.run_folder import read_config
from sape2.training.standing import check_finished
from sape2.viz.drawing import Drawing
from sape2.viz.figures import LETTERS, even_columns, named_marks, overlay_figure
from sape2.viz.panels import Over
from sape2.viz.plots import bars_panel

Patch = tuple[int, int]


# --- what is shown ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The chosen layer and head (both from 1, None for all or their mean) and patches (None: the centre and a corner)."""

    layer: int | None = None
    head: int | None = None
    patches: tuple[Patch, ...] = ()

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError for a layer, head or patch that the model does not have."""
        for name, value, number in (("layer", self.layer, config.depth), ("head", self.head, config.num_heads)):
            if value is not None and not 1 <= value <= number:
                raise ValueError(f"--{name} must be from 1 to {number}, which the model has; got {value}")
        height, width = config.grid
        for y, x in self.patches:
            if not (0 <= y < height and 0 <= x < width):
                raise ValueError(f"--patch is ROW,COLUMN from 0,0 to {height - 1},{width - 1}; got {y},{x}")

    def named_patches(self, grid: Grid) -> dict[str, Patch]:
        """The chosen patches by name; by default the one in the middle, where photographs have their object, and the first."""
        if not self.patches:
            return {"the centre": (grid[0] // 2, grid[1] // 2), "the corner": (0, 0)}
        return {f"row {y}, column {x}": (y, x) for y, x in self.patches}


@dataclass(frozen=True)
class Explanation:
    """Everything that a page or a picture is made of."""

    image_path: Path
    config: RunConfig
    picture: Picture
    choice: Choice
    probabilities: list[Row]
    layers: list[Layer]
    rows: list[Row]
    unlike: list[Unlike] = field(default_factory=list)

    @property
    def shown(self) -> list[Layer]:
        """The chosen layer, or all that have what is shown."""
        layers = [layer for layer in self.layers if layer.bias is not None] or self.layers
        return [layer for layer in self.layers if layer.number == self.choice.layer] or layers

    @property
    def heads(self) -> str:
        return "mean of heads" if self.choice.head is None else f"head {self.choice.head}"

    @property
    def quantity(self) -> str:
        """Bias where the layers shown have one, else attention."""
        return f"bias (logits, {self.heads})" if self.has_bias else f"attention weight ({self.heads})"

    @property
    def patches(self) -> dict[str, Patch]:
        return self.choice.named_patches(self.config.model.grid)

    @property
    def has_bias(self) -> bool:
        return all(layer.bias is not None for layer in self.shown)

    def maps(self) -> dict[str, Tensor]:
        """Name of a layer -> (heads, N, N), the chosen head or all."""
        found = {f"layer {layer.number}": layer.bias if self.has_bias else layer.attention for layer in self.shown}
        head = slice(None) if self.choice.head is None else slice(self.choice.head - 1, self.choice.head)
        return {name: values[0, head].cpu() for name, values in found.items() if values is not None}

    def opening(self) -> Layer:
        """The layer that the page opens with: the one whose gates it shows, else the last of those shown."""
        return self.counting_layer() or self.shown[-1]

    def of_heads(self, values: Tensor) -> Tensor:
        """(batch, heads, ...) -> the chosen head of the one image, or the mean of all."""
        return values[0].mean(0).cpu() if self.choice.head is None else values[0, self.choice.head - 1].cpu()

    def counting_layer(self) -> Layer | None:
        """The layer, of those shown that count positions, whose bias makes up the largest part of its logits."""
        counting = [layer for layer in self.shown if any(name.startswith("positions") for name in layer.maps)]
        return max(counting, key=lambda layer: self.number("bias_variance_share", layer.number) or 0.0, default=None)

    def number(self, name: str, layer: int, axis: str | None = None) -> float | None:
        """A value of the health rows."""
        found = (r["value"] for r in self.rows if (r["name"], r.get("layer"), r.get("axis")) == (name, layer, axis))
        return next(found, None)


def explain(
    folder: Path, image_path: Path, out: Path | None = None, choice: Choice | None = None, weights: str = "last"
) -> tuple[Path, list[Row]]:
    """Writes the page (.html) or the picture (.png); returns where, and the numbers on it as rows.

    Raises ValueError or OSError, before anything is written, for a run, an image or a choice that cannot be.
    """
    config = read_config(folder)
    check_finished(folder)
    out = out or folder / "figures" / f"explain-{image_path.stem}.html"
    if out.suffix.lower() not in (".html", ".png"):
        raise ValueError(f"--out must end in .html or .png; got {out}")
    choice = choice or Choice()
    choice.check(config.model)
    picture = read_picture(image_path, config.model, evaluation_crop(config.data))
    found = look(load_run_model(folder, weights), config, picture, image_path, choice, names_of_classes(folder))
    found = replace(found, unlike=unlike(picture, config.data, sizes_trained_on(folder)))
    if out.suffix.lower() == ".png":
        shown = f"{_about(found)} {UNLIKE} {_how_unlike(found)}" if found.unlike else _about(found)
        viz.as_one(_headline(found), f"{shown} {_opening_words(found)}", _opening(found), _pairs(found)).save(out)
    else:
        write_text(out, page(found))
    about = {"image": str(image_path), "encoding": config.model.encoding, "model": config.model.label, "weights": weights}
    return out, [row | about for row in [*found.probabilities, *_unlike_rows(found.unlike), *found.rows]]


def look(
    model: nn.Module, config: RunConfig, picture: Picture, image_path: Path, choice: Choice, classes: list[str]
) -> Explanation:
    """Runs the model on the picture and records its layers."""
    one = ImageData(picture.pixels[None], torch.zeros(1, dtype=torch.long), tuple(classes), config.data.mean, config.data.std)
    images, _ = next(one.batches(1))
    device = next(model.parameters()).device
    with torch.no_grad():
        probabilities = model(images.to(device))[0].double().softmax(-1).cpu()
    layers = list(layers_of(model, images))
    rows = [*_attention_rows(layers, config.model.grid), *layer_rows(model, one, 1, 1)]
    rows += findings(rows)
    return Explanation(image_path, config, picture, choice, _predictions(probabilities, classes), layers, rows)


def _predictions(probabilities: Tensor, classes: list[str]) -> list[Row]:
    """The five most likely classes, or all if there are fewer."""
    top = probabilities.topk(min(5, len(classes)))
    about = {
        "measure": "explain",
        "name": "probability",
        "unit": "fraction",
        "n": 1,
        "protocol": "softmax of the logits, one view",
    }
    return [about | {"class": classes[c], "value": p} for p, c in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


def _unlike_rows(found: list[Unlike]) -> Iterator[Row]:
    for each in found:
        about = {"measure": "explain", "n": 1, "protocol": f"limit: {each.limit}", "message": each.sentence}
        yield about | {"name": f"unlike_{each.name}", "value": each.value, "unit": each.unit}


def _attention_rows(layers: list[Layer], grid: Grid) -> Iterator[Row]:
    for layer in layers:
        found = {
            "attention_distance": (pairs.attention_distance(layer.attention, grid), "patches"),
            "attention_entropy": (pairs.attention_entropy(layer.attention), "nats"),
        }
        for name, (value, unit) in found.items():
            about = {"measure": "explain", "n": 1, "protocol": "grid tokens only; mean of heads"}
            yield about | {"name": name, "value": value.mean().item(), "unit": unit, "layer": layer.number}


# --- figures ---------------------------------------------------------------------------------------------------------


def _opening(found: Explanation) -> list[Drawing]:
    """The image, bias and attention of the first patch over it, and the prediction."""
    grid, layer = found.config.model.grid, found.opening()
    marks, _ = named_marks(found.patches)
    (y, x), letter = marks[0].patch, LETTERS[0]
    maps = {
        f"{name} from patch {letter}": Over(found.of_heads(values)[y * grid[1] + x].reshape(grid).numpy(), unit)
        for name, values, unit in (("Bias", layer.bias, "logits"), ("Attention", layer.attention, "attention weight"))
        if values is not None
    }
    names, values = zip(*((str(row["class"]), row["value"]) for row in found.probabilities), strict=True)
    overlaid = overlay_figure(found.picture.pixels.numpy(), grid, marks[:1], maps)
    return [*overlaid, bars_panel(names, values, "Prediction", "class probability")]


def _opening_words(found: Explanation) -> str:
    layer, letter, patch = found.opening(), LETTERS[0], next(iter(found.patches))
    shown = f"Layer {layer.number}, {found.heads}, patch {letter} ({patch})."
    attention = f"how much patch {letter} attends to each patch"
    if layer.bias is None:
        return f"{shown} The attention is {attention}."
    return (
        f"{shown} The bias is what the encoding {found.config.model.encoding} adds to the attention logits of patch {letter}; "
        f"the attention, {attention}, is the softmax of content and bias."
    )


def _pairs(found: Explanation) -> list[Drawing]:
    means = {name: values.mean(0) for name, values in found.maps().items()}
    return viz.pairs_figure(means, found.config.model.grid, found.patches, found.quantity)


def _distance(found: Explanation) -> list[Drawing]:
    quantity = found.quantity.replace("mean of heads", "all heads")  # the band is over heads, too
    return viz.distance_figure(found.maps(), found.config.model.grid, quantity)


def _counts(found: Explanation, layer: Layer) -> list[Drawing]:
    """Gates and positions of the first patch."""
    grid = found.config.model.grid
    y, x = next(iter(found.patches.values()))
    heads = slice(None) if found.choice.head is None else slice(found.choice.head - 1, found.choice.head)
    axes = {key.removeprefix("positions").removeprefix("_") for key in layer.maps if key.startswith("positions")}
    maps = {
        axis or "sequence": {
            kind: layer.maps["_".join(filter(None, (kind, axis)))][0, heads, y * grid[1] + x].cpu()
            for kind in ("gates", "positions")
        }
        for axis in sorted(axes)
    }
    return viz.counts_figure(found.picture.pixels, maps, grid, (y, x))


# --- page ------------------------------------------------------------------------------------------------------------

META = "<meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
STYLE = "explain.css"  # beside this file


def page(found: Explanation) -> str:
    """The whole page as one text."""
    sections = [
        f"<h1>{_text(_headline(found))}</h1>",
        f"<p class=about>{_text(_about(found))}</p>",
        *_unlike(found),
        _figure(_opening(found), _opening_words(found)),
        "<h2>Checks of the encoding on this image</h2>",
        _health(found),
        *_figures(found),
        "<h2>Numbers by layer</h2>",
        _layer_table(found),
    ]
    style = resources.files("sape2.viz").joinpath(STYLE).read_text(encoding="utf-8")
    head = f"{META}<title>{_text(found.image_path.name)}</title>"
    return (
        f"<!doctype html>\n<html lang=en>\n<head>{head}<style>{style}{COLUMNS_THAT_FIT}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _headline(found: Explanation) -> str:
    best = found.probabilities[0]
    return f"{found.image_path.name}: predicted {best['class']}, {best['value']:.1%}"


def _about(found: Explanation) -> str:
    config, epochs = found.config, found.config.train.epochs
    changed = f"; {words}" if (words := changed_in_words(config)) else ""
    return (
        f"{config.model.label} with {config.model.encoding}, trained on {config.data.name} "
        f"for {epochs} epoch{'s' * (epochs != 1)} (seed {config.seed}{changed}), "
        f"a grid of {config.model.grid[0]}x{config.model.grid[1]} patches. The image: {found.picture.notes}."
    )


def _unlike(found: Explanation) -> Iterator[str]:
    """Warnings that a reader should see before the prediction."""
    if found.unlike:
        yield f"<p><strong>{UNLIKE}</strong> {_text(_how_unlike(found))}</p>"


UNLIKE = "This image is unlike the training images:"


def _how_unlike(found: Explanation) -> str:
    return "; ".join(each.sentence for each in found.unlike) + "."


def _figures(found: Explanation) -> Iterator[str]:
    what = "bias" if found.has_bias else "attention"
    yield f"<h2>{what.capitalize()} between patches</h2>"
    if found.has_bias:
        about = "A high bias raises the attention from the query patch to the key patch, a low one lowers it."
    else:
        about = f"The encoding {found.config.model.encoding} adds no bias in these layers, so the attention is shown."
    named = named_marks(found.patches)[1]
    yield _figure(
        _pairs(found),
        f"{what.capitalize()} by layer, each layer on a scale of its own. Above: all pairs, queries down, keys across. Below: "
        f"from one query patch to all keys ({named}). {about}",
    )
    layer = found.counting_layer()
    if layer is not None:
        share = found.number("bias_variance_share", layer.number)
        y, x = next(iter(found.patches.values()))
        why = f", the layer in which the bias has the largest share of the variance of the logits ({share:.0%})"
        about = f"Gates and positions of patch a (row {y}, column {x}) in layer {layer.number}"
        about += (why if share is not None and not found.choice.layer else "") + ", by head. "
        about += "A gate, from 0 to 1, is how much patch a counts the patch in this place; a position is a sum of gates along "
        about += "the line, in the direction in which the encoding counts."
        yield "<h2>Gates and positions</h2>"
        yield _figure(_counts(found, layer), about)
    yield f"<h2>{what.capitalize()} against distance</h2>"
    about = (
        "Line: mean over all pairs at that distance; band: one standard deviation. A flat line means no dependence on distance."
    )
    yield _figure(_distance(found), f"{what.capitalize()} against the distance between two patches, by layer. {about}")


def _figure(panels: list[Drawing], caption: str) -> str:
    """The panels in rows that are full or nearly full; the page chooses the number of columns by its width."""
    shown = "".join(f"<div>{panel.svg()}</div>" for panel in panels)
    kind = "wide" if panels[0].width > 300 else "narrow"
    columns = "; ".join(f"--{most}: {even_columns(len(panels), most)}" for most in FITTING[kind])
    rows = f"<div class='panels {kind}' style='{columns}'>{shown}</div>"
    return f"<figure>{rows}<figcaption>{_text(caption)}</figcaption></figure>"


FITTING = {"narrow": {2: 19, 3: 33, 4: 43, 5: 54, 6: 66}, "wide": {2: 38, 3: 66}}  # most columns -> from this width (rem)
COLUMNS_THAT_FIT = "".join(
    f"@container (min-width: {width}rem) {{ .{kind} {{ grid-template-columns: repeat(var(--{most}), minmax(0, 1fr)) }} }}\n"
    for kind, fitting in FITTING.items()
    for most, width in fitting.items()
)
COLUMNS = {  # heading -> number of the layer
    "attention distance (patches)": "attention_distance",
    "attention entropy (nats)": "attention_entropy",
    "bias, mean (logits)": "bias_mean",
    "bias, within rows (logits)": "bias_row_std",
    "content, within rows (logits)": "content_row_std",
    "bias, share of logit variance": "bias_variance_share",
}


def _layer_table(found: Explanation) -> str:
    used = {head: name for head, name in COLUMNS.items() if any(row["name"] == name for row in found.rows)}
    lines = [[layer.number, *(found.number(name, layer.number) for name in used.values())] for layer in found.layers]
    return _table(["layer", *used], lines)


def _health(found: Explanation) -> str:
    messages = [row["message"] for row in found.rows if "message" in row]
    if not any(row["name"] == "bias_mean" for row in found.rows):
        return "<p>The encoding has no bias, gates or positions, so there is nothing to check.</p>"
    if not messages:
        return "<p>No warnings: gates, positions and bias are within the limits of docs/evaluation/health.md.</p>"
    return "<ul>" + "".join(f"<li>{_text(message)}</li>" for message in messages) + "</ul>"


def _table(headings: list[str], lines: list[list[Any]]) -> str:
    top = "".join(f"<th scope=col>{_text(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text('' if v is None else format_value(v))}</td>" for v in line) + "</tr>" for line in lines
    )
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
