"""The simple feature pyramid of ViTDet (arXiv:2203.16527, section 3): all levels are made from the last feature map."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from sape2.config.detection import SCALES
from sape2.detection.backbone import WindowedViT


class SimpleFeaturePyramid(nn.Module):
    """A map (B, D, H, W) -> maps "0", "1", ... of H * scale x W * scale with `out_channels` channels, finest first.

    Per level: a change of scale (two transposed convolutions, one, nothing, or max pooling), 1x1 convolution, LayerNorm,
    3x3 convolution, LayerNorm. `extra_level` adds "pool", every second place of the last level, for large proposals.
    """

    def __init__(self, dim: int, out_channels: int = 256, scales: tuple[float, ...] = SCALES, extra_level: bool = True) -> None:
        super().__init__()
        self.out_channels, self.extra_level = out_channels, extra_level
        self.levels = nn.ModuleList(_level(dim, out_channels, scale) for scale in scales)

    @property
    def names(self) -> list[str]:
        """Names of the levels that boxes are read from; "pool" serves proposals only."""
        return [str(index) for index in range(len(self.levels))]

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> OrderedDict[str, Tensor]:
        maps = OrderedDict((name, level(x)) for name, level in zip(self.names, self.levels, strict=True))
        if self.extra_level:
            maps["pool"] = F.max_pool2d(maps[self.names[-1]], kernel_size=1, stride=2)
        return maps


class PyramidBackbone(nn.Module):
    """Backbone in the form that torchvision's detectors expect: images -> named maps, and `out_channels`."""

    def __init__(self, body: WindowedViT, pyramid: SimpleFeaturePyramid) -> None:
        super().__init__()
        self.body, self.pyramid, self.out_channels = body, pyramid, pyramid.out_channels

    def no_weight_decay(self) -> set[str]:
        return {f"body.{name}" for name in self.body.no_weight_decay()}

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> OrderedDict[str, Tensor]:
        return self.pyramid(self.body(images))


def strides(patch_size: int, scales: tuple[float, ...], extra_level: bool) -> list[int]:
    """Pixels between neighbours in each map. Raises ValueError where a level would be finer than pixels."""
    found = [patch_size / scale for scale in scales]
    if any(stride != int(stride) for stride in found):
        raise ValueError(
            f"a pyramid of scales {scales} needs patches of a multiple of {int(max(scales))} pixels; got {patch_size}"
        )
    return [int(stride) for stride in (*found, *([2 * found[-1]] if extra_level else []))]


def _level(dim: int, out_channels: int, scale: float) -> nn.Sequential:
    change, channels = _change_of_scale(dim, scale)
    return nn.Sequential(
        change,
        nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


def _change_of_scale(dim: int, scale: float) -> tuple[nn.Module, int]:
    """The module and the channels that leave it."""
    if scale == 4.0:
        first = nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2)
        second = nn.ConvTranspose2d(dim // 2, dim // 4, kernel_size=2, stride=2)
        return nn.Sequential(first, LayerNorm2d(dim // 2), nn.GELU(), second), dim // 4
    if scale == 2.0:
        return nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2), dim // 2
    if scale == 1.0:
        return nn.Identity(), dim
    if scale == 0.5:
        return nn.MaxPool2d(kernel_size=2, stride=2), dim
    raise ValueError(f"a level of the pyramid has one of the scales {', '.join(map(str, SCALES))}; got {scale}")
