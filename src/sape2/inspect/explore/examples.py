"""Images to open the microscope with: scikit-learn's two photographs, whole and in parts, and four drawings."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from sape2.config import RunConfig
from sape2.config.extras import from_extra
from sape2.data import ImageData
from sape2.runs.run import Run

# photograph, then top, left and side of a square in its 427x640 pixels
PARTS = {
    "a temple": ("china.jpg", 0, 0, 300),
    "walls of the temple": ("china.jpg", 120, 130, 200),
    "temple and water": ("china.jpg", 0, 107, 427),
    "water and trees": ("china.jpg", 0, 213, 427),
    "flowers": ("flower.jpg", 0, 107, 427),
    "petals": ("flower.jpg", 90, 210, 220),
    "leaves": ("flower.jpg", 180, 0, 247),
}
SKY, RED, BLUE = (150, 190, 230), (200, 60, 50), (40, 70, 160)


def examples(run: Run[RunConfig]) -> tuple[ImageData, list[str]]:
    """The images at the size of the run's model, and their names; they have no label of their own, and get class 0.

    Raises ImportError without scikit-learn.
    """
    photograph = from_extra("explore", "sklearn.datasets", "the photographs need scikit-learn").load_sample_image
    height, width = run.config.model.image_size
    scenes = {name: photograph(file)[top : top + side, left : left + side] for name, (file, top, left, side) in PARTS.items()}
    scenes |= drawings()
    images = [Image.fromarray(scene).resize((width, height), Image.Resampling.BICUBIC) for scene in scenes.values()]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    labels, norm = torch.zeros(len(images), dtype=torch.long), run.config.data
    return ImageData(pixels, labels, tuple(run.classes), norm.mean, norm.std), list(scenes)


def drawings() -> dict[str, UInt8[np.ndarray, "height width 3"]]:
    """Scenes in which it is plain what belongs together."""
    y, x = np.mgrid[:256, :256]

    def painted(shapes: dict[tuple[int, int, int], np.ndarray]) -> np.ndarray:
        image = np.full((256, 256, 3), SKY, np.uint8)
        for colour, inside in shapes.items():
            image[inside] = colour
        return image

    def disc(row: int, column: int, radius: int) -> np.ndarray:
        return (y - row) ** 2 + (x - column) ** 2 < radius**2

    return {
        "a disc": painted({RED: disc(128, 128, 70)}),
        "two discs": painted({RED: disc(80, 70, 50), BLUE: disc(180, 185, 50)}),
        "a tower before the sky": painted({RED: (abs(x - 128) < 30) & (y > 50)}),
        "stripes": painted({BLUE: (x // 32) % 2 == 0}),
    }
