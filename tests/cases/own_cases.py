"""A folder of images of one's own."""

from pathlib import Path

import numpy as np
from PIL import Image


def fill(folder: Path, counts: dict[str, int], size=(30, 34), mode="RGB") -> Path:
    """Noise in `counts` images of each class, of (width, height)."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{number}.png")
    return folder
