"""The bias of one patch of one image in every layer, drawn by matplotlib; `viz.figures` has figures with more content."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from jaxtyping import Float, UInt8
from torch import Tensor

from sape2.viz.base import LINES, MAP_COLOURS, as_text, picture, pyplot, save


@picture
def plot_bias(
    image: UInt8[Tensor, "channels height width"],
    layers: list[Float[Tensor, "heads tokens tokens"]],
    grid: tuple[int, int],
    patch: tuple[int, int],
    path: Path,
    titles: list[str],
    about: str = "",
) -> None:
    """The bias of one patch (y, x) against all others, mean over heads, for every given layer, on one colour scale.

    `about` is said first in the title: what the image is, and what the model took it for.
    """
    plt = pyplot()
    height, width = grid
    figure, axes = plt.subplots(1, len(layers) + 1, figsize=(2.2 * (len(layers) + 1) + 0.8, 2.9), layout="constrained")
    axes[0].imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
    size = image.shape[-2] // height, image.shape[-1] // width
    corner = patch[1] * size[1] - 0.5, patch[0] * size[0] - 0.5
    axes[0].add_patch(plt.Rectangle(corner, size[1], size[0], fill=False, edgecolor=LINES[1], linewidth=2))
    axes[0].set_title("image and patch", fontsize=9)
    maps = [bias.mean(0)[patch[0] * width + patch[1]].view(height, width).numpy() for bias in layers]
    low, high = min(values.min() for values in maps), max(values.max() for values in maps)
    shown = [panel.imshow(values, cmap=MAP_COLOURS, vmin=low, vmax=high) for panel, values in zip(axes[1:], maps, strict=True)]
    for panel, title in zip(axes[1:], titles, strict=True):
        panel.plot(patch[1], patch[0], "s", color=LINES[1], markersize=5)
        panel.set_title(title, fontsize=9)
    figure.colorbar(shown[0], ax=list(axes), fraction=0.03, label="bias (logits)")
    for panel in axes:
        panel.set_xticks([])
        panel.set_yticks([])
    about = fill(as_text(about), int(11 * figure.get_size_inches()[0]))
    title = "bias of the marked patch against all patches, mean over heads"
    figure.suptitle(f"{about}\n{title}" if about else title, fontsize=10)
    save(figure, path)
