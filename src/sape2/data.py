"""Images: decoded once into uint8 memory, split with a seed, augmented in batches, in an order that a step alone decides.

`load_data` reads scikit-learn's digits, a folder or hub data set in parquet layout, or torchvision's CIFAR files.
`TrainStream` gives batch number `step` of a run: which images, and what is done to them, follow from (seed, step), not
from what ran before. So a run that is resumed anywhere, or shared by several processes, sees the same images.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sape2.config import AugmentConfig, DataConfig, ModelConfig, TrainConfig

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
TORCHVISION_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


@dataclass(frozen=True)
class ImageData:
    """Decoded images with their labels, and how they are normalised for a model."""

    images: UInt8[Tensor, "images channels height width"]
    labels: Int[Tensor, " images"]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> ImageData:
        return replace(self, images=self.images[index], labels=self.labels[index])

    def batches(self, batch_size: int) -> Iterator[tuple[Float[Tensor, "batch channels height width"], Tensor]]:
        """Normalised images and their labels, in order."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield normalize(images, self.mean, self.std), labels


@dataclass(frozen=True)
class Splits:
    train: ImageData
    validation: ImageData
    test: ImageData


def normalize(
    images: UInt8[Tensor, "batch channels height width"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "batch channels height width"]:
    """(x / 255 - mean) / std per channel, in float32."""
    mean_, std_ = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images / 255 - mean_) / std_


# --- reading ---------------------------------------------------------------------------------------------------------


def load_data(config: DataConfig, model: ModelConfig) -> Splits:
    """The three splits, as the model takes them. Raises ValueError or FileNotFoundError naming file, row and reason."""
    train, test = (_checked(raw, config, model) for raw in _read(config, model).values())
    train, validation = split_by_class(train, config.validation_fraction, config.split_seed)
    if config.train_limit is not None and config.train_limit < len(train):
        train = limit_by_class(train, config.train_limit, config.split_seed)
    return Splits(train, validation, test)


@dataclass(frozen=True)
class _Raw:
    """What a source holds before it is checked; `where` names it in errors."""

    where: str
    images: np.ndarray  # (n, height, width, C) uint8
    labels: list[Any]
    classes: tuple[str, ...]


def _read(config: DataConfig, model: ModelConfig) -> dict[str, _Raw]:
    """{"train": ..., "test": ...} from wherever the config points."""
    if config.name == "digits":
        if config.source is not None:
            raise ValueError(f"digits come with scikit-learn and need no --data; got {config.source!r}")
        return _read_digits(model)
    if config.source is None:
        raise ValueError(
            f"{config.name} needs --data: a folder in hub parquet layout, a folder that holds torchvision's "
            f"{TORCHVISION_FOLDERS.get(config.name, 'files')}, or a hub id such as uoft-cs/{config.name}"
        )
    folder = Path(config.source).expanduser()
    if folder.is_file():
        raise NotADirectoryError(f"--data {config.source} is a file; give the folder that holds it")
    if not folder.is_dir():
        return _read_hub(config, model, config.source)
    if (folder / TORCHVISION_FOLDERS.get(config.name, "-")).is_dir():
        return _read_torchvision(config, model, folder)
    if any(folder.rglob("*.parquet")):
        return _read_hub(config, model, str(folder))
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    wanted = f"parquet file and no {TORCHVISION_FOLDERS[config.name]}" if config.name in TORCHVISION_FOLDERS else "parquet file"
    raise FileNotFoundError(f"--data {config.source} holds no {wanted}; found {found}")


def _read_digits(model: ModelConfig) -> dict[str, _Raw]:
    """1,797 grey 8x8 images; every fifth of each class (seed 0) is the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'sape2[data]'") from error
    digits: Any = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = np.stack([_to_array(Image.fromarray(image), model) for image in images])
    labels = torch.from_numpy(digits.target)
    first, second = _class_split(labels, 0.2, seed=0)
    classes = tuple(str(name) for name in digits.target_names)
    return {
        split: _Raw(f"digits {split}", images[index.numpy()], labels[index].tolist(), classes)
        for split, index in (("train", first), ("test", second))
    }


def _read_torchvision(config: DataConfig, model: ModelConfig, folder: Path) -> dict[str, _Raw]:
    """CIFAR's original files; torchvision checks their published hashes before it unpickles them."""
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.name]
    result = {}
    for split in ("train", "test"):
        try:
            read = reader(str(folder), train=split == "train")
        except RuntimeError as error:
            raise ValueError(
                f"{folder / TORCHVISION_FOLDERS[config.name]} is not the published {config.name}: a file is missing or its MD5 "
                f"sum differs; fetch it again, for example with torchvision.datasets.{reader.__name__}"
            ) from error
        images = np.stack([_to_array(Image.fromarray(image), model) for image in read.data])
        result[split] = _Raw(f"{folder} {split}", images, list(read.targets), tuple(read.classes))
    return result


def _read_hub(config: DataConfig, model: ModelConfig, source: str) -> dict[str, _Raw]:
    """Parquet files in hub layout: a local folder is streamed, a hub id goes through the cache of `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading parquet needs datasets: pip install 'sape2[train]'") from error
    local = Path(source).expanduser().is_dir()
    if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise FileNotFoundError(f"--data {source} is neither a folder nor a hub id (owner/name)")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs every error that it also raises
    try:
        found: Any = datasets.load_dataset(source, streaming=local)
    except Exception as error:  # datasets raises many kinds; all mean that the source cannot be read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "the folder" if local else "no such folder here, and the hub data set"
        raise ValueError(f"--data {source}: {kind} cannot be read: {reason}") from error
    test = next((name for name in ("test", "validation", "valid") if name in found), None)
    if "train" not in found or test is None:
        raise ValueError(f"--data {source} needs the splits train and test; found {', '.join(found) or 'none'}")
    return {
        split: _read_rows(found[name], f"{source} {name}", config, model)
        for split, name in (("train", "train"), ("test", test))
    }


def _read_rows(rows: Any, where: str, config: DataConfig, model: ModelConfig) -> _Raw:
    import datasets

    image_column = _column(rows.features, config.image_column, IMAGE_COLUMNS, where, "image")
    label_column = _column(rows.features, config.label_column, LABEL_COLUMNS, where, "label")
    classes = tuple(getattr(rows.features[label_column], "names", None) or ())
    rows = rows.select_columns([image_column, label_column]).cast_column(image_column, datasets.Image(decode=False))
    images, labels = [], []
    for batch in _in_batches(rows, where):
        for entry, label in zip(batch[image_column], batch[label_column], strict=True):
            images.append(decode(entry, model, f"{where} row {len(images)}"))
            labels.append(label)
    if not images:
        raise ValueError(f"{where} holds no rows")
    return _Raw(where, np.stack(images), labels, classes)


def _in_batches(rows: Any, where: str) -> Iterator[dict[str, list[Any]]]:
    """Columns of up to 1000 rows at a time. A file that is damaged, or a column of another type, shows only here."""
    done = 0
    try:
        for batch in rows.iter(batch_size=1000):
            yield batch
            done += 1000
    except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{where} cannot be read after row {done}: {error}") from error


def _column(features: Any, wanted: str | None, usual: Iterable[str], where: str, what: str) -> str:
    known = list(features or {})
    name = wanted or next((candidate for candidate in usual if candidate in known), None)
    if name is None or name not in known:
        asked = f"no column {wanted!r}" if wanted else f"no {what} column ({' or '.join(usual)})"
        raise ValueError(f"{where} has {asked}; its columns: {', '.join(known)}. Use --set data.{what}_column=NAME")
    return name


def decode(entry: Any, model: ModelConfig, where: str) -> np.ndarray:
    """One image file as (height, width, C) uint8; raises ValueError that names it if it is missing or damaged."""
    data = entry.get("bytes") if isinstance(entry, dict) else None
    path = entry.get("path") if isinstance(entry, dict) else None
    file = path if data is None else io.BytesIO(data)
    if file is None:
        raise ValueError(f"{where}: there is no image in it")
    try:
        with Image.open(file) as image:
            return _to_array(image, model)
    except (OSError, SyntaxError, ValueError, NotImplementedError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: the image cannot be decoded: {error}") from error


def _to_array(image: Image.Image, model: ModelConfig) -> np.ndarray:
    """In the model's channels and size (bicubic where the size differs)."""
    if model.in_channels not in (1, 3):
        raise ValueError(f"images are read with 1 or 3 channels; the model takes {model.in_channels}")
    height, width = model.image_size
    image = image.convert("RGB" if model.in_channels == 3 else "L")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, model.in_channels)


def _checked(raw: _Raw, config: DataConfig, model: ModelConfig) -> ImageData:
    if raw.classes and len(raw.classes) != model.num_classes:
        raise ValueError(
            f"{raw.where} has {len(raw.classes)} classes but the model has {model.num_classes}; "
            f"use --set model.num_classes={len(raw.classes)}"
        )
    for row, label in enumerate(raw.labels):
        if not isinstance(label, int) or not 0 <= label < model.num_classes:
            raise ValueError(f"{raw.where} row {row}: label {label!r} is not in 0..{model.num_classes - 1}")
    images = torch.from_numpy(raw.images).permute(0, 3, 1, 2).contiguous()
    classes = raw.classes or tuple(str(label) for label in range(model.num_classes))
    return ImageData(images, torch.tensor(raw.labels), classes, config.mean, config.std)


def split_by_class(data: ImageData, fraction: float, seed: int) -> tuple[ImageData, ImageData]:
    """(rest, part): `part` holds `fraction` of every class, at least one image of each, drawn with `seed`."""
    rest, part = _class_split(data.labels, fraction, seed)
    return data[rest], data[part]


def limit_by_class(data: ImageData, size: int, seed: int) -> ImageData:
    """`size` images, drawn with `seed`, with the classes in the shares that they have in `data`."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(data), dtype=torch.float64)  # of an image in a random order of its class, from 0 to 1
    for label in data.labels.unique().tolist():
        members = (data.labels == label).nonzero().squeeze(1)
        place[members[torch.randperm(len(members), generator=generator)]] = (
            torch.arange(len(members), dtype=torch.float64) + 0.5
        ) / len(members)
    return data[place.argsort(stable=True)[:size].sort().values]


def _class_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rest, part = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        size = max(1, round(fraction * len(members)))
        part.append(members[:size])
        rest.append(members[size:])
    return torch.cat(rest).sort().values, torch.cat(part).sort().values


# --- training batches ------------------------------------------------------------------------------------------------


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
