"""What a whole ViT-Small costs with ape, and with ape+sape2 in every form: training step and inference, float32.

Command:  python benchmarks/model_cost.py        (about ten minutes on two CPU cores)
A training step is forward, cross-entropy, backward and AdamW. All models take turns in every round. Prints a Markdown
table for every shape (medians, ratios of medians to ape) and writes benchmarks/results/model_cost.jsonl.
"""

from __future__ import annotations

from functools import partial

import torch
from peers import make_straightforward
from timing import Row, compare, conditions, parser, save

from sape2 import create_model
from sape2.evaluation.cost.measure import TrainingStep, infer
from sape2.models.vit import ViT
from sape2.tables import markdown_table

SHAPES = [(16, 32, 4), (4, 224, 16)]  # images, pixels, patch: grids of 8x8 and of 14x14
BASELINE = "ape"
MODELS = ["ape", "ape+sape2", "ape+sape2:readout=squared_distance", "ape+sape2:readout=direct"]
STRAIGHTFORWARD = "ape+sape2, straightforward"
COLUMNS = ["encoding", "phase", "ms", "p10", "p90", "n", "images_per_s", "to_ape"]


def build(name: str, image_size: int, patch_size: int) -> ViT:
    torch.manual_seed(0)
    encoding = "ape+sape2" if name == STRAIGHTFORWARD else name
    model = create_model("vit_small", encoding=encoding, image_size=image_size, patch_size=patch_size, num_classes=10)
    return make_straightforward(model) if name == STRAIGHTFORWARD else model


def measure(images: int, image_size: int, patch_size: int, rounds: int) -> list[Row]:
    """One row for every model and phase."""
    models = {name: build(name, image_size, patch_size) for name in [*MODELS, STRAIGHTFORWARD]}
    torch.manual_seed(0)
    batch = torch.randn(images, 3, image_size, image_size), torch.randint(10, (images,))
    shape = {"model": "vit_small", "images": images, "grid": f"{image_size // patch_size}x{image_size // patch_size}"}
    rows = []
    phases = {
        "training_step": {name: partial(TrainingStep(model), *batch) for name, model in models.items()},
        "inference": {name: partial(infer, model, batch[0]) for name, model in models.items()},
    }
    for phase, steps in phases.items():
        results = compare(steps, rounds)
        for name, result in results.items():
            ratio = {"to_ape": result["ms"] / results[BASELINE]["ms"], "images_per_s": 1e3 * images / result["ms"]}
            rows.append({"encoding": name, "phase": phase} | shape | result | ratio)
    return rows


def main() -> None:
    arguments = parser(__doc__, "model_cost.jsonl", rounds=11).parse_args()
    torch.set_num_threads(arguments.threads)
    about = conditions() | {"dtype": "float32"}
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    everything = []
    for shape in SHAPES:
        rows = measure(*shape, arguments.rounds)
        print(f"{rows[0]['images']} images of {rows[0]['grid']} tokens\n\n{markdown_table(rows, COLUMNS)}", flush=True)
        everything += [row | about for row in rows]
    save(arguments.out, everything)


if __name__ == "__main__":
    main()
