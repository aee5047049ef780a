"""Images per second of every recipe's augmentation on the CPU: ours in one pass, and group by group, image by image.

Command:  python benchmarks/augmentation.py [--rounds 11]     (about a minute on one core)

Two parts: crop, flip and policy of pixels (`augment`), and erasing, mixup and cutmix of the normalised batch (`mix`). Boxes,
which are cut as files are decoded, are not in it. Both forms take turns in every round, one thread, in processor time, so
that other programs on the machine disturb little; medians. Writes benchmarks/results/augmentation.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import plain_augmentation
import torch
from timing import Row, conditions, parser, save, summary

from sape2.config import RunConfig
from sape2.config.recipes import RECIPES, get_recipe
from sape2.data import normalize
from sape2.data.mixing import BatchMixer
from sape2.tables import markdown_table
from sape2.training.optimisation import set_seeds

LARGEST = 2**25  # bytes of a batch: of images of 224x224 fewer are taken
COLUMNS = ["recipe", "part", "images", "pixels", "plain_images_per_s", "ours_images_per_s", "times_faster"]


def measure(name: str, rounds: int) -> list[Row]:
    """A row for each part that the recipe has."""
    config = get_recipe(name)
    height, width = config.model.image_size
    shape = (config.model.in_channels, height, width)
    images = min(config.train.batch_size, LARGEST // (height * width * config.model.in_channels) // 2 * 2)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, *shape), generator=generator, dtype=torch.uint8)
    rows = []
    for part, forms in parts(config, pixels).items():
        found = in_turn(forms, rounds)
        rate = {f"{form}_images_per_s": 1e3 * images / row["ms"] for form, row in found.items()}
        spread = {f"{form}_{key}": row[key] for form, row in found.items() for key in ("ms", "p10", "p90")}
        ratio = {"times_faster": found["plain"]["ms"] / found["ours"]["ms"]}
        rows.append({"recipe": name, "part": part, "images": images, "pixels": height, "n": rounds} | rate | ratio | spread)
    return rows


def parts(config: RunConfig, pixels: torch.Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    augment = replace(config.augment, crop_area=None)
    found = {}
    if augment.crop_padding or augment.flip or augment.policy != "none":
        forms = {"plain": plain_augmentation.augment_images, "ours": plain_augmentation.ours}
        found["augment"] = {form: partial(function, pixels, augment, 0) for form, function in forms.items()}
    if augment.erase or augment.mixes:
        batch, labels = normalize(pixels, config.data.mean, config.data.std), torch.arange(len(pixels)) % 10
        ours = BatchMixer(augment, config.train.label_smoothing, config.model.num_classes)
        plain = BatchMixer(replace(augment, erase=0.0), config.train.label_smoothing, config.model.num_classes)

        def plain_mix() -> object:
            set_seeds(0, batch.device)
            return plain(plain_augmentation.erase(batch, augment.erase) if augment.erase else batch, labels)

        def our_mix() -> object:
            set_seeds(0, batch.device)
            return ours(batch, labels)

        found["mix"] = {"plain": plain_mix, "ours": our_mix}
    return found


def in_turn(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, Row]:
    """Milliseconds of processor time of each form, after a round of warm-up."""
    times: dict[str, list[float]] = {form: [] for form in forms}
    for round_ in range(rounds + 1):
        for form, work in forms.items():
            began = time.process_time()
            work()
            if round_:
                times[form].append(1e3 * (time.process_time() - began))
    return {form: summary(values) for form, values in times.items()}


def main() -> None:
    arguments = parser(__doc__, "augmentation.jsonl", rounds=11).parse_args()
    torch.set_num_threads(arguments.threads)
    about = conditions() | {"clock": "processor time"}
    rows = [row | about for name in RECIPES for row in measure(name, arguments.rounds)]
    print(markdown_table(rows, COLUMNS))
    save(arguments.out, rows)


if __name__ == "__main__":
    main()
