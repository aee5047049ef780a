"""Images: read from scikit-learn's digits, from parquet in hub layout or from torchvision's CIFAR files, decoded once into
uint8 memory, and split with a seed.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from sape2.config import DataConfig, ModelConfig

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
