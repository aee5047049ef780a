"""Data sets that are stored as arrays: scikit-learn's digits, and CIFAR in torchvision's files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sape2.config import DataConfig, ModelConfig
from sape2.config.extras import from_extra
from sape2.data.base import plain_name
from sape2.data.decoding import to_array
from sape2.data.images import class_split
from sape2.data.pixels import to_8_bits
from sape2.data.walk import Files, tell_left_out

TORCHVISION_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


@dataclass(frozen=True)
class ArrayImages:
    """Images of one split as the model takes them; `where` names it in errors."""

    layout = "arrays"
    where: str
    images: np.ndarray  # (n, height, width, C) uint8
    labels: list[Any]
    classes: tuple[str, ...]

    def name(self, index: int) -> str:
        return f"{self.where} row {index}"


def read_digits(model: ModelConfig) -> dict[str, ArrayImages]:
    """1,797 grey 8x8 images; every fifth of each class (seed 0) is the test set."""
    digits = from_extra("data", "sklearn.datasets", "the digits need scikit-learn").load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    images = np.stack([to_array(to_8_bits(Image.fromarray(image), model.in_channels), model) for image in images])
    labels = torch.from_numpy(digits.target)
    first, second = class_split(labels, 0.2, seed=0)
    classes = tuple(str(name) for name in digits.target_names)
    return {
        split: ArrayImages(f"digits {split}", images[index.numpy()], labels[index].tolist(), classes)
        for split, index in (("train", first), ("test", second))
    }


def read_torchvision(config: DataConfig, model: ModelConfig, files: Files) -> dict[str, ArrayImages]:
    """CIFAR's original files; torchvision checks their published hashes before it unpickles them."""
    from torchvision import datasets

    folder, own = files.root, TORCHVISION_FOLDERS[config.name]
    others = [name for name in files.real if not name.startswith((f"{own}/", "cifar-"))]
    tell_left_out(plain_name(folder), others, f"the files in {own} are taken")
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
        images = np.stack([to_array(to_8_bits(Image.fromarray(image), model.in_channels), model) for image in read.data])
        result[split] = ArrayImages(f"{folder} {split}", images, list(read.targets), tuple(read.classes))
    return result
