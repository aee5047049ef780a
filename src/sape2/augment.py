"""Training batches: which images, in which order, and what is done to them.

Batch number `step` of a run follows from (seed, step), not from what ran before. So a run that is resumed anywhere, or
shared by several processes, sees the same images.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sape2.config import AugmentConfig, TrainConfig
from sape2.data import ImageData


def derive_seed(*parts: int | str) -> int:
    """One seed from several parts, such that different parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def epoch_order(size: int, seed: int, epoch: int, repeats: int = 1) -> Int[Tensor, " size"]:
    """Which image stands where in an epoch. With repeats, size/repeats distinct images, copies side by side."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(size, generator=generator).repeat_interleave(repeats)[:size]


class TrainStream(Dataset):
    """Batch number `step` of a run: (uint8 images, labels). The last, incomplete batch of an epoch is dropped.

    Of several processes, number `rank` of `world` gets every world-th image of the batch. Raises ValueError if the
    training set is smaller than one batch.
    """

    def __init__(
        self, data: ImageData, augment: AugmentConfig, train: TrainConfig, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if len(data) < train.batch_size:
            raise ValueError(f"a batch of {train.batch_size} needs that many training images; there are {len(data)}")
        if train.batch_size % (world * train.accumulation):
            raise ValueError(
                f"train.batch_size must be divisible by processes x accumulation; got {train.batch_size}, {world} and "
                f"{train.accumulation}"
            )
        if augment.mixes and train.batch_size // world % 2:
            raise ValueError(
                f"mixup and cutmix need an even number of images in every process; got {train.batch_size} / {world}"
            )
        self.data, self.augment, self.train, self.seed, self.rank, self.world = data, augment, train, seed, rank, world
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data) // self.train.batch_size

    @property
    def total_steps(self) -> int:
        return self.train.epochs * self.steps_per_epoch

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
        epoch, place = divmod(index, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.data), self.seed, epoch, self.augment.repeats)
        batch = self._order[place * self.train.batch_size : (place + 1) * self.train.batch_size]
        images = augment_images(self.data.images[batch], self.augment, derive_seed(self.seed, "images", index))
        mine = slice(self.rank, None, self.world)
        return images[mine], self.data.labels[batch][mine]

    def __len__(self) -> int:
        return self.total_steps

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches from step `start` to the end of the run, prepared ahead by worker processes."""
        workers = self.train.workers
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, self.total_steps),
            num_workers=workers,
            worker_init_fn=_leave_signals_to_the_main_process,
            prefetch_factor=8 if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C reaches the whole process group; a worker that died of it would break the step that saves the run."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def augment_images(
    images: UInt8[Tensor, "batch channels height width"], config: AugmentConfig, seed: int
) -> UInt8[Tensor, "batch channels height width"]:
    """Crop and flip drawn for every image; the policy (torchvision v2) drawn for every group of `policy_group` images.

    The policies of torchvision change a whole batch alike. Drawing once per image would cost more than the training
    step of a small model, so neighbours of a shuffled batch share a draw; policy_group=1 is the usual form.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.crop_padding:
        images = random_crop(images, config.crop_padding, generator)
    if config.flip:
        flipped = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    if config.policy != "none":
        images = _apply_policy(images, config, derive_seed(seed, "policy"))
    return images


def random_crop(
    images: UInt8[Tensor, "batch channels height width"], padding: int, generator: torch.Generator
) -> UInt8[Tensor, "batch channels height width"]:
    """Every image shifted by -padding..padding pixels in y and x, zeros drawn in."""
    size, _, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, size), generator=generator)
    rows = top[:, None] + torch.arange(height)  # (B, height)
    columns = left[:, None] + torch.arange(width)  # (B, width)
    index = torch.arange(size)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]  # (B, height, width, C)
    return cropped.permute(0, 3, 1, 2).contiguous()


def _apply_policy(images: Tensor, config: AugmentConfig, seed: int) -> Tensor:
    from torchvision.transforms import v2

    if config.policy == "randaugment":
        policy = v2.RandAugment(num_ops=2, magnitude=config.policy_magnitude)
    else:
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torch.cat([policy(group) for group in images.split(config.policy_group)])


class BatchMixer:
    """What is done to a normalised batch on its device: random erasing, mixup, cutmix (timm), and soft targets.

    Draws from the global generators of torch, numpy and random; the training loop seeds them before every step.
    """

    def __init__(self, config: AugmentConfig, label_smoothing: float, num_classes: int) -> None:
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        self.erase = RandomErasing(config.erase, mode="pixel", max_area=0.4, device="cpu") if config.erase else None
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.mix = (
            Mixup(
                config.mixup,
                config.cutmix,
                prob=config.mix_probability,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
            if config.mixes
            else None
        )

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]:
        if self.erase is not None:
            self.erase.device = images.device
            images = self.erase(images)
        if self.mix is not None:
            return self.mix(images, labels)
        targets = torch.full((len(labels), self.num_classes), self.label_smoothing / self.num_classes, device=labels.device)
        return images, targets.scatter_(1, labels[:, None], 1 - self.label_smoothing + self.label_smoothing / self.num_classes)
