"""Labels that say which patches belong together, from the masks of scenes or, for photographs, from colour.

Photographs have a pseudo-mask, two clusters of patch colour. A cluster is not an object: a number measured with it says
whether attention follows colour.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sape2.encodings.grid import Grid


def patch_labels(masks: Int[Tensor, "batch height width"], grid: Grid) -> Int[Tensor, "batch tokens"]:
    """The label that more than half of the pixels of a patch carry; -1 for a patch without such a label."""
    pixels = _patches(masks[:, None], grid)[:, :, 0]  # (B, N, pixels of a patch)
    label = pixels.mode(-1).values
    clear = (pixels == label[..., None]).sum(-1) * 2 > pixels.shape[-1]
    return torch.where(clear, label, -1)


def colour_clusters(images: Float[Tensor, "batch channels height width"], grid: Grid) -> Int[Tensor, "batch tokens"]:
    """Pseudo-mask: 2-means (Lloyd) on the mean colour of the patches, started from the darkest and the brightest patch.

    Labels 0 and 1, 0 for the cluster of the darkest patch; all 0 where every patch has the same colour. Deterministic.
    """
    colours = _patches(images.double(), grid).mean(-1)  # (B, N, C)
    brightness = colours.sum(-1)
    ends = torch.stack([brightness.argmin(-1), brightness.argmax(-1)], dim=-1)  # (B, 2)
    centres = colours.gather(1, ends[..., None].expand(-1, -1, colours.shape[-1]))  # (B, 2, C)
    labels = _nearest(colours, centres)
    for _ in range(100):
        member = torch.nn.functional.one_hot(labels, 2).double()  # (B, N, 2)
        size = member.sum(1)[..., None]
        centres = torch.where(size > 0, member.transpose(1, 2) @ colours / size.clamp_min(1), centres)
        before, labels = labels, _nearest(colours, centres)
        if torch.equal(before, labels):
            break
    return labels


def _nearest(colours: Tensor, centres: Tensor) -> Int[Tensor, "batch tokens"]:
    """The nearer centre, the first one at equal distances."""
    first, second = ((colours - centre[:, None]).square().sum(-1) for centre in centres.unbind(1))
    return (second < first).long()


def _patches(images: Tensor, grid: Grid) -> Tensor:
    """(B, N, C, pixels of a patch), patches in row-major order."""
    height, width = images.shape[-2] // grid[0], images.shape[-1] // grid[1]
    return images.unfold(2, height, height).unfold(3, width, width).flatten(2, 3).flatten(3).transpose(1, 2)
