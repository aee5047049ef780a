"""Training batches: which images, in which order, and what is done to them.

Batch number `step` of a run follows from (seed, step), not from what ran before. So a run that is resumed anywhere, or
shared by several processes, sees the same images.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sape2.config import AugmentConfig, TrainConfig
from sape2.data import ImageData, ImageFiles

PREFETCH_BYTES = 2**28  # of prepared batches of one worker, but never fewer than two batches


def derive_seed(*parts: int | str) -> int:
    """One seed from several parts, such that different parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def epoch_order(size: int, seed: int, epoch: int, repeats: int = 1, window: int = 0) -> Int[Tensor, " size"]:
    """Which image stands where in an epoch. With repeats, size/repeats distinct images, copies side by side.

    With a window, blocks of window/16 neighbours are put in random order, then images are shuffled within windows.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    if window and window < size:
        blocks = torch.arange(size).split(max(1, window // 16))
        order = torch.cat([blocks[block] for block in torch.randperm(len(blocks), generator=generator).tolist()])
        order = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in order.split(window)])
    else:
        order = torch.randperm(size, generator=generator)
    return order.repeat_interleave(repeats)[:size]


def share_of(size: int, rank: int, world: int) -> Int[Tensor, " places"]:
    """The places in a batch of `size` that process `rank` of `world` takes, ascending: from both ends inwards.

    Mixing pairs place i with place size - 1 - i. So both of a pair are in one process, and mirrored there as in the batch.
    """
    ascending = torch.arange(size)
    inwards = torch.stack([ascending, ascending.flip(0)], 1).flatten()[:size]
    return inwards.view(world, -1)[rank].sort().values


class TrainStream(Dataset):
    """Batch number `step` of a run: (uint8 images, labels). The last, incomplete batch of an epoch is dropped.

    Of several processes, number `rank` of `world` gets the images at its `places` of the batch, and reads no other.
    Raises ValueError if the training set is smaller than one batch, or the processes cannot share one evenly.
    """

    def __init__(
        self,
        data: ImageData | ImageFiles,
        augment: AugmentConfig,
        train: TrainConfig,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(data) < train.batch_size:
            raise ValueError(f"a batch of {train.batch_size} needs that many training images; there are {len(data)}")
        if train.batch_size % (world * train.accumulation):
            raise ValueError(
                f"train.batch_size must be divisible by processes x accumulation; got {train.batch_size}, {world} and "
                f"{train.accumulation}. It counts the images of one update, over all of them"
            )
        if augment.mixes and train.batch_size // world % 2:
            raise ValueError(
                f"mixup and cutmix need an even number of images in every process; got {train.batch_size} / {world}"
            )
        self.data, self.augment, self.train, self.seed, self.world = data, augment, train, seed, world
        self.places = share_of(train.batch_size, rank, world)
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
            window = self.train.shuffle_window
            self._epoch, self._order = epoch, epoch_order(len(self.data), self.seed, epoch, self.augment.repeats, window)
        size = self.train.batch_size
        batch = self._order[place * size : (place + 1) * size][self.places]
        seeds = [derive_seed(self.seed, "box", index, image) for image in self.places.tolist()]
        images, labels = self.data.take(batch, self.augment.crop_area, seeds)
        return augment_images(images, self.augment, derive_seed(self.seed, "images", index), self.places, size), labels

    def __len__(self) -> int:
        return self.total_steps

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches from step `start` to the end of the run, prepared ahead by worker processes.

        What a worker could not read is counted here, so that the limit holds for all workers together.
        """
        workers = self.train.workers
        ahead = PREFETCH_BYTES // (self.data.image_bytes * self.train.batch_size // self.world)
        loader = DataLoader(
            _Prepared(self),
            batch_size=None,
            sampler=range(start, self.total_steps),
            num_workers=workers,
            worker_init_fn=leave_signals_to_the_main_process,
            prefetch_factor=min(8, max(2, ahead)) if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        for batch, unreadable, error in loader:
            if isinstance(self.data, ImageFiles):
                self.data.unreadable.update(unreadable)
            if error is not None:
                raise error
            yield batch


class _Prepared(Dataset):
    """The batches of a stream as (batch, images found unreadable, error): an error raised in a worker would reach the user
    as a traceback of that worker.
    """

    def __init__(self, stream: TrainStream) -> None:
        self.stream = stream

    def __getitem__(self, index: int) -> tuple[Any, dict[str, str], Exception | None]:
        batch, error = (), None
        try:
            batch = self.stream[index]
        except (ValueError, OSError) as problem:
            error = (ValueError if isinstance(problem, ValueError) else OSError)(str(problem))
        data = self.stream.data
        return batch, dict(data.unreadable.reasons) if isinstance(data, ImageFiles) else {}, error


def leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C reaches the whole process group; a worker that died of it would break the step that saves the run."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def augment_images(
    images: UInt8[Tensor, "batch channels height width"],
    config: AugmentConfig,
    seed: int,
    places: Int[Tensor, " batch"] | None = None,
    size: int | None = None,
) -> UInt8[Tensor, "batch channels height width"]:
    """Crop and flip drawn for every image; the policy (torchvision v2) drawn for every group of `policy_group` images.

    The images may be those at some `places`, ascending, of a batch of `size`; draws are for the whole batch.

    The policies of torchvision change a whole batch alike. Drawing once per image would cost more than the training
    step of a small model, so neighbours of a shuffled batch share a draw; policy_group=1 is the usual form.
    """
    places, size = _whole(images) if places is None or size is None else (places, size)
    generator = torch.Generator().manual_seed(seed)
    if config.crop_padding:
        images = random_crop(images, config.crop_padding, generator, places, size)
    if config.flip:
        flipped = torch.rand(size, generator=generator)[places] < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    if config.policy != "none":
        images = _apply_policy(images, config, derive_seed(seed, "policy"), places, size)
    return images


def _whole(images: Tensor) -> tuple[Tensor, int]:
    return torch.arange(len(images)), len(images)


def random_crop(
    images: UInt8[Tensor, "batch channels height width"],
    padding: int,
    generator: torch.Generator,
    places: Int[Tensor, " batch"] | None = None,
    size: int | None = None,
) -> UInt8[Tensor, "batch channels height width"]:
    """Every image shifted by -padding..padding pixels in y and x, zeros drawn in; drawn as in `augment_images`."""
    places, size = _whole(images) if places is None or size is None else (places, size)
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, size), generator=generator)[:, places]
    rows = top[:, None] + torch.arange(height)  # (B, height)
    columns = left[:, None] + torch.arange(width)  # (B, width)
    index = torch.arange(len(images))[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]  # (B, height, width, C)
    return cropped.permute(0, 3, 1, 2).contiguous()


def _apply_policy(images: Tensor, config: AugmentConfig, seed: int, places: Tensor, size: int) -> Tensor:
    """Every group of the whole batch draws, also one of which no image is here: a black image stands in for it."""
    from torchvision.transforms import v2

    if config.policy == "randaugment":
        policy = v2.RandAugment(num_ops=2, magnitude=config.policy_magnitude)
    else:
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        groups = places // config.policy_group
        sizes = groups.bincount(minlength=-(-size // config.policy_group)).tolist()
        stand_in = images.new_zeros(1, *images.shape[1:])
        done = [policy(group if len(group) else stand_in) for group in images.split(sizes)]
        return torch.cat([group for group, size in zip(done, sizes, strict=True) if size])


class BatchMixer:
    """What is done to a normalised batch on its device: random erasing, mixup, cutmix (timm), and soft targets.

    Draws from the global generators of torch, numpy and random; the training loop seeds them before every step. Given the
    share of a process (see `share_of`) and the size of the whole batch, it draws for the whole batch.
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
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        places: Int[Tensor, " batch"] | None = None,
        size: int | None = None,
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]:
        if self.erase is not None:
            places_, size_ = _whole(images) if places is None or size is None else (places, size)
            erase_in_order(self.erase, images, places_, size_)
        if self.mix is not None:
            return self.mix(images, labels)
        targets = torch.full((len(labels), self.num_classes), self.label_smoothing / self.num_classes, device=labels.device)
        return images, targets.scatter_(1, labels[:, None], 1 - self.label_smoothing + self.label_smoothing / self.num_classes)


def erase_in_order(erase: Any, images: Tensor, places: Tensor, size: int) -> None:
    """In place, one image after the other; what is drawn for an image of another process goes onto a stand-in."""
    erase.device = images.device
    here = dict(zip(places.tolist(), images, strict=True))
    stand_in = torch.empty_like(images[0])
    for place in range(size):
        erase(here.get(place, stand_in))
