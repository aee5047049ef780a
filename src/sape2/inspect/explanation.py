"""What is to be shown of one image under a trained model: the numbers and words of a page or picture of `explain`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from sape2.config import ModelConfig, RunConfig
from sape2.config.recipes.changed import changed_in_words
from sape2.data import normalize
from sape2.data.picture import Unlike
from sape2.encodings.grid import Grid
from sape2.evaluation import pairs
from sape2.evaluation.findings import findings
from sape2.evaluation.health import encodings_of, layer_rows
from sape2.inspect.look import LayerLook, Look, Patch, look
from sape2.models.vit import ViT
from sape2.tables import Row


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
    """Everything that a page or a picture is made of; `notes` say what the image is and what was done to it."""

    name: str
    notes: str
    config: RunConfig
    seen: Look
    choice: Choice
    classes: list[str]
    rows: list[Row]
    unlike: list[Unlike] = field(default_factory=list)

    @cached_property
    def shown(self) -> list[LayerLook]:
        """The chosen layer, or all that have what is shown."""
        layers = [layer for layer in self.seen.layers if layer.bias is not None] or self.seen.layers
        return [layer for layer in self.seen.layers if layer.number == self.choice.layer] or layers

    @property
    def heads(self) -> str:
        return "mean of heads" if self.choice.head is None else f"head {self.choice.head}"

    @property
    def quantity(self) -> str:
        """Bias where the layers shown have one, else attention."""
        return f"bias (logits, {self.heads})" if self.has_bias else f"attention weight ({self.heads})"

    @property
    def patches(self) -> dict[str, Patch]:
        return self.choice.named_patches(self.seen.grid)

    @property
    def has_bias(self) -> bool:
        return all(layer.bias is not None for layer in self.shown)

    def maps(self) -> dict[str, Tensor]:
        """Name of a layer -> (heads, N, N), the chosen head or all."""
        found = {f"layer {layer.number}": layer.bias if self.has_bias else layer.attention for layer in self.shown}
        return {name: values[0, self._chosen] for name, values in found.items() if values is not None}

    @property
    def _chosen(self) -> slice:
        return slice(None) if self.choice.head is None else slice(self.choice.head - 1, self.choice.head)

    def opening(self) -> LayerLook:
        """The layer that the page opens with: the one whose gates it shows, else the last of those shown."""
        return self.counting_layer() or self.shown[-1]

    def counting_layer(self) -> LayerLook | None:
        """The layer, of those shown that count positions, whose bias makes up the largest part of its logits."""
        counting = [layer for layer in self.shown if layer.axes]
        return max(counting, key=lambda layer: self.number("bias_variance_share", layer.number) or 0.0, default=None)

    def counts(self, layer: LayerLook) -> dict[str, dict[str, Tensor]]:
        """Axis -> gates and positions of the first patch, (heads, places)."""
        at = self.seen.token(next(iter(self.patches.values())))
        found = {axis: {kind: layer.along(axis, kind) for kind in ("gates", "positions")} for axis in sorted(layer.axes)}
        return {
            axis or "sequence": {kind: values[0, self._chosen, at] for kind, values in maps.items() if values is not None}
            for axis, maps in found.items()
        }

    def has(self, name: str) -> bool:
        return any(row["name"] == name for row in self.rows)

    def number(self, name: str, layer: int) -> float | None:
        """A value of the health rows that is not of one axis."""
        found = (r["value"] for r in self.rows if (r["name"], r.get("layer"), r.get("axis")) == (name, layer, None))
        return next(found, None)

    # --- in words ---

    @property
    def headline(self) -> str:
        answer, probability = self.seen.likely(self.classes)[0]
        return f"{self.name}: predicted {answer}, {probability:.1%}"

    @property
    def about(self) -> str:
        config, epochs, (height, width) = self.config, self.config.train.epochs, self.seen.grid
        changed = f"; {words}" if (words := changed_in_words(config)) else ""
        return (
            f"{config.model.label} with {config.model.encoding}, trained on {config.data.name} "
            f"for {epochs} epoch{'s' * (epochs != 1)} (seed {config.seed}{changed}), "
            f"a grid of {height}x{width} patches. The image: {self.notes}."
        )

    @property
    def how_unlike(self) -> str:
        return "; ".join(each.sentence for each in self.unlike) + "."

    @property
    def messages(self) -> list[str]:
        return [row["message"] for row in self.rows if "message" in row]

    # --- as rows ---

    def all_rows(self) -> Iterator[Row]:
        """The most likely classes, what is unlike the training images, and the numbers by layer."""
        about = {"unit": "fraction", "n": 1, "protocol": "softmax of the logits, one view"}
        for name, value in self.seen.likely(self.classes):
            yield {"measure": "explain", "name": "probability", **about, "class": name, "value": value}
        for each in self.unlike:
            about = {"measure": "explain", "n": 1, "protocol": f"limit: {each.limit}", "message": each.sentence}
            yield about | {"name": f"unlike_{each.name}", "value": each.value, "unit": each.unit}
        yield from self.rows


def explained(
    model: ViT, config: RunConfig, pixels: Tensor, classes: list[str], name: str, notes: str, choice: Choice | None = None
) -> Explanation:
    """What there is to show of an image, (C, height, width) uint8, that passes through the model here."""
    seen = look(model, normalize(pixels[None], config.data.mean, config.data.std), pixels)
    rows = [*_attention_rows(seen), *layer_rows([seen.layers], encodings_of(model))]
    rows += findings(rows)
    return Explanation(name, notes, config, seen, choice or Choice(), classes, rows)


def _attention_rows(seen: Look) -> Iterator[Row]:
    for layer in seen.layers:
        found = {
            "attention_distance": (pairs.attention_distance(layer.attention, seen.grid), "patches"),
            "attention_entropy": (pairs.attention_entropy(layer.attention), "nats"),
        }
        for name, (value, unit) in found.items():
            about = {"measure": "explain", "n": 1, "protocol": "grid tokens only; mean of heads"}
            yield about | {"name": name, "value": value.mean().item(), "unit": unit, "layer": layer.number}
