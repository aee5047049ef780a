"""A folder of images of one's own, and a run on it."""

from pathlib import Path

import numpy as np
from PIL import Image

from sape2.cli import build_parser
from sape2.cli.options import resolve
from sape2.data import load_data
from sape2.models.trained import build_model
from sape2.runs.checkpoint import save_weights
from sape2.runs.run import Run


def fill(folder: Path, counts: dict[str, int], size=(30, 34), mode="RGB") -> Path:
    """Noise in `counts` images of each class, of (width, height)."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{number}.png")
    return folder


def finished_run(run: Path, data: Path, *settings: str) -> list[str]:
    """Makes a run on the folder `data` that is finished and untrained; returns the words of its `sape2 train`."""
    given = [word for setting in ("model.depth=1", *settings) for word in ("--set", setting)]
    words = ["train", "images", "--out", str(run), *given, "--data", str(data)]
    config = resolve(build_parser().parse_args(words))
    Run(run, config).start(load_data(config.data, config.model).train.fingerprint)
    for name in ("model", "best"):
        save_weights(run / f"{name}.safetensors", build_model(config))
    return words
