"""RandAugment and AutoAugment by torchvision: drawn on the CPU for each group, applied on the device of the images.

torchvision draws one policy for a whole batch. Here the draws of all groups are recorded first. Then every operation is
applied once, to all images that drew it, whatever their group: the same pixels as group by group, in a tenth of the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sape2.config import AugmentConfig

NOTHING = ("Identity", 0.0)


class Round(NamedTuple):
    """One operation for every image: the images in the order of their operations, and how many have each."""

    order: Int[Tensor, " batch"]
    sizes: list[int]
    operations: list[tuple[str, float]]  # torchvision's name, signed magnitude


def draw_rounds(
    config: AugmentConfig, seed: int, groups: Int[Tensor, " batch"], size: int, shape: tuple[int, ...]
) -> list[Round]:
    """The operations of the policy for images of `shape`; `groups` is the group of each, of `size` groups in a batch.

    Draws are made for every group of the whole batch, even if none of its images is here. The global generators are unchanged.
    """
    drawn = _note_draws(make_policy(config), seed, size, shape)
    return [_round([of[i] if i < len(of) else NOTHING for of in drawn], groups) for i in range(max(map(len, drawn)))]


def make_policy(config: AugmentConfig) -> Any:
    from torchvision.transforms import v2

    if config.policy == "randaugment":
        return v2.RandAugment(num_ops=2, magnitude=config.policy_magnitude)
    return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)


def _note_draws(policy: Any, seed: int, groups: int, shape: tuple[int, ...]) -> list[list[tuple[str, float]]]:
    """The operations of every group in the order of torchvision's draws, which do not depend on what an image shows."""
    noted: list[list[tuple[str, float]]] = []

    def note(image: Tensor, name: str, magnitude: float, **_: Any) -> Tensor:
        noted[-1].append((name, magnitude))
        return image

    policy._apply_image_or_video_transform = note
    blank = torch.empty(shape, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for _ in range(groups):
            noted.append([])
            policy(blank)
    return noted


def _round(operations: list[tuple[str, float]], groups: Tensor) -> Round:
    known = sorted(set(operations))
    which = torch.tensor([known.index(operation) for operation in operations])[groups]
    return Round(which.argsort(stable=True), which.bincount(minlength=len(known)).tolist(), known)


def do_rounds(
    images: UInt8[Tensor, "batch channels height width"], rounds: list[Round]
) -> UInt8[Tensor, "batch channels height width"]:
    """The images after all rounds. Waits for no device."""
    operate, images = _operate(), images.clone()
    with nullcontext() if images.device.type == "cpu" else WithoutWaiting():
        for order, sizes, operations in rounds:
            for part, (name, magnitude) in zip(order.split(sizes), operations, strict=True):
                if len(part) and name != NOTHING[0]:
                    images.index_copy_(0, part, operate(images[part], name, magnitude))
    return images


@cache
def _operate() -> Callable[[Tensor, str, float], Any]:
    """torchvision's operations by name: those of both policies."""
    from torchvision.transforms import v2

    policy = v2.RandAugment()
    settings = {"interpolation": policy.interpolation, "fill": policy._fill}
    return lambda images, name, magnitude: policy._apply_image_or_video_transform(images, name, magnitude, **settings)


class WithoutWaiting(TorchFunctionMode):
    """Sends the small tensors that torchvision makes on a device without waiting for it, as `torch.tensor` would."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is not torch.tensor or device is None:
            return func(*args, **kwargs)
        return sent(func(*args, **kwargs | {"device": "cpu"}), torch.device(device))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what that does just now: this needs memory that is not paged."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
