"""Augmentation in its plain form, group by group and image by image: what `sape2.data` must give, and is timed against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from sape2.config import AugmentConfig
from sape2.data.augment import augment, derive_seed, draw


def augment_images(images: Tensor, config: AugmentConfig, seed: int) -> Tensor:
    """Crop and flip of a whole batch (uint8), then the policy of every group of neighbours by torchvision itself."""
    generator = torch.Generator().manual_seed(seed)
    if config.crop_padding:
        images = random_crop(images, config.crop_padding, generator)
    if config.flip:
        flipped = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    if config.policy == "none":
        return images
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "policy"))
        return torch.cat([policy_of(config)(group) for group in images.split(config.policy_group)])


def ours(images: Tensor, config: AugmentConfig, seed: int) -> Tensor:
    """The same by `sape2.data`."""
    return augment(images, draw(config, seed, torch.arange(len(images)), len(images), tuple(images.shape[1:])))


def policy_of(config: AugmentConfig) -> v2.Transform:
    if config.policy == "randaugment":
        return v2.RandAugment(num_ops=2, magnitude=config.policy_magnitude)
    return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Every image shifted by -padding..padding pixels in y and x, zeros drawn in."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, len(images)), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    index = torch.arange(len(images))[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]  # (B, height, width, C)
    return cropped.permute(0, 3, 1, 2).contiguous()


def erase(images: Tensor, probability: float) -> Tensor:
    """Random erasing of a normalised batch, in place."""
    return RandomErasing(probability, mode="pixel", max_area=0.4, device=str(images.device))(images)
