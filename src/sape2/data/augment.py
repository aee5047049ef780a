"""Training batches: the order of the images and their augmentation.

Batch number `step` of a run depends only on (seed, step), not on earlier steps. So a run that is resumed anywhere, or shared
by several processes, sees the same images. Random numbers are drawn on the CPU (`Plan`); the images are then augmented where
they are stored: in data workers, or on a device that keeps them.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sape2.config import AugmentConfig, TrainConfig
from sape2.data import ImageData, ImageFiles
from sape2.data.policies import Round, do_rounds, draw_rounds, sent

PREFETCH_BYTES = 2**28  # of prepared batches of one worker, but never fewer than two batches


def derive_seed(*parts: int | str) -> int:
    """One seed from several parts, such that different parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def epoch_order(size: int, seed: int, epoch: int, repeats: int = 1, window: int = 0) -> Int[Tensor, " size"]:
    """The order of the images in an epoch. With repeats, size/repeats distinct images, copies side by side.

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


class Draws(NamedTuple):
    """The random draws for the images of a batch, except their boxes; `augment` applies them."""

    padding: int
    corner: Int[Tensor, "2 batch"] | None  # top and left of a crop, in the padded image
    flipped: Tensor | None  # (B,) whether mirrored
    rounds: list[Round]

    def sent(self, device: torch.device) -> Draws:
        """With its tensors on a device, which is not waited for."""
        corner, flipped = (None if tensor is None else sent(tensor, device) for tensor in (self.corner, self.flipped))
        rounds = [Round(sent(order, device), sizes, operations) for order, sizes, operations in self.rounds]
        return Draws(self.padding, corner, flipped, rounds)


class Plan(NamedTuple):
    """A batch before any pixel is touched: which images, a seed for the box of each, what is drawn for them."""

    batch: Int[Tensor, " batch"]
    seeds: list[int]
    draws: Draws

    def sent(self, device: torch.device) -> Plan:
        """With its tensors on a device, which is not waited for."""
        return Plan(sent(self.batch, device), self.seeds, self.draws.sent(device))


class Plans(Dataset):
    """The plan of every step of a run on `images` images of `shape`: what data workers make for images that a device keeps.

    Of several processes, number `rank` of `world` gets the images at its `places` of the batch.
    Raises ValueError if the training set is smaller than one batch, or the processes cannot share one evenly.
    """

    def __init__(
        self, images: int, shape: tuple[int, ...], augment: AugmentConfig, train: TrainConfig, seed: int, rank: int, world: int
    ) -> None:
        if images < train.batch_size:
            raise ValueError(f"a batch of {train.batch_size} needs that many training images; there are {images}")
        if train.batch_size % (world * train.accumulation):
            raise ValueError(
                f"train.batch_size must be divisible by processes x accumulation; got {train.batch_size}, {world} and "
                f"{train.accumulation}. It counts the images of one update, over all of them"
            )
        if augment.mixes and train.batch_size // world % 2:
            raise ValueError(
                f"mixup and cutmix need an even number of images in every process; got {train.batch_size} / {world}"
            )
        self.images, self.shape, self.augment, self.train, self.seed = images, shape, augment, train, seed
        self.places, self.steps_per_epoch = share_of(train.batch_size, rank, world), images // train.batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.train.epochs * self.steps_per_epoch

    def __getitem__(self, index: int) -> Plan:
        epoch, place = divmod(index, self.steps_per_epoch)
        if epoch != self._epoch:
            window = self.train.shuffle_window
            self._epoch, self._order = epoch, epoch_order(self.images, self.seed, epoch, self.augment.repeats, window)
        size = self.train.batch_size
        batch = self._order[place * size : (place + 1) * size][self.places]
        boxes = [] if self.augment.crop_area is None else self.places.tolist()
        seeds = [derive_seed(self.seed, "box", index, image) for image in boxes]
        draws = draw(self.augment, derive_seed(self.seed, "images", index), self.places, size, self.shape)
        return Plan(batch, seeds, draws)


class TrainStream(Dataset):
    """Batch number `step` of a run: (uint8 images, labels). The last, incomplete batch of an epoch is dropped.

    Of several processes each gets its own images of a batch, and reads no other. Raises what `Plans` raises.
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
        self.data, self.augment, self.train, self.world = data, augment, train, world
        self.plans = plans = Plans(len(data), data.shape, augment, train, seed, rank, world)
        self.places, self.steps_per_epoch, self.total_steps = plans.places, plans.steps_per_epoch, len(plans)

    @property
    def device(self) -> torch.device:
        """The device on which the images are stored and augmented."""
        return self.data.images.device if isinstance(self.data, ImageData) else torch.device("cpu")

    def where_augmented(self) -> str:
        """Device or workers that augment, in words."""
        if self.device.type != "cpu":
            return f"{self.device}, which keeps the images"
        workers = self.train.workers
        return f"cpu, in {workers} data worker{'s' * (workers > 1)}" if workers else "cpu, in the training process"

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
        return self.carry_out(self.plans[index].sent(self.device))

    def carry_out(self, plan: Plan) -> tuple[UInt8[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
        images, labels = self.data.take(plan.batch, self.augment.crop_area, plan.seeds)
        return augment(images, plan.draws), labels

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches from step `start` to the end of the run, prepared ahead by worker processes.

        Workers prepare the plans alone where a device keeps the images. What a worker could not read is counted here, so
        that the limit holds for all workers together.
        """
        if self.device.type != "cpu":
            for plan in self._loader(self.plans, start):
                yield self.carry_out(plan.sent(self.device))
            return
        for batch, unreadable, error in self._loader(_Prepared(self), start):
            if isinstance(self.data, ImageFiles):
                self.data.unreadable.update(unreadable)
            if error is not None:
                raise error
            yield batch

    def _loader(self, dataset: Dataset, start: int) -> DataLoader:
        workers = self.train.workers
        ahead = PREFETCH_BYTES // (math.prod(self.data.shape) * self.train.batch_size // self.world)
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=range(start, self.total_steps),
            num_workers=workers,
            worker_init_fn=leave_signals_to_the_main_process,
            prefetch_factor=min(8, max(2, ahead)) if workers else None,
            pin_memory=torch.cuda.is_available(),
        )


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


def draw(config: AugmentConfig, seed: int, places: Int[Tensor, " batch"], size: int, shape: tuple[int, ...]) -> Draws:
    """Crop and flip drawn for every image; the policy (torchvision v2) drawn for every group of `policy_group` images.

    Draws are for the whole batch of `size`; those for the images at `places` are kept.

    To draw a policy takes 40 microseconds, more than to change an image of CIFAR. So neighbours of a shuffled batch share a
    draw; policy_group=1 is the usual form.
    """
    generator = torch.Generator().manual_seed(seed)
    corner, flipped, rounds = None, None, []
    if config.crop_padding:
        corner = torch.randint(2 * config.crop_padding + 1, (2, size), generator=generator)[:, places]
    if config.flip:
        flipped = torch.rand(size, generator=generator)[places] < 0.5
    if config.policy != "none":
        groups = -(-size // config.policy_group)
        rounds = draw_rounds(config, derive_seed(seed, "policy"), places // config.policy_group, groups, shape)
    return Draws(config.crop_padding, corner, flipped, rounds)


def augment(images: UInt8[Tensor, "batch channels height width"], draws: Draws) -> UInt8[Tensor, "batch channels height width"]:
    """Applies the draws to the images; the result is the same on every device, and no device is waited for."""
    if draws.corner is not None:
        images = crop(images, draws.padding, draws.corner)
    if draws.flipped is not None:
        images = torch.where(draws.flipped[:, None, None, None], images.flip(-1), images)
    return do_rounds(images, draws.rounds) if draws.rounds else images


def crop(
    images: UInt8[Tensor, "batch channels height width"], padding: int, corner: Int[Tensor, "2 batch"]
) -> UInt8[Tensor, "batch channels height width"]:
    """Of every image, with `padding` zeros on each side, what begins at its corner and has the size of the image."""
    height, width = images.shape[-2:]
    windows = F.pad(images, (padding, padding, padding, padding)).unfold(2, height, 1).unfold(3, width, 1)  # a view
    return windows[torch.arange(len(images), device=images.device), :, corner[0], corner[1]]
