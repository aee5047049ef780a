"""Training on the device: images per second of models, eager and compiled, of the input path, and runs of the paper's table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from gpu_attention import by_mask
from gpu_case import Case, NotAvailable, autocast
from timing import Row, compare
from torch import nn

from sape2.config import RunConfig, override, with_epochs
from sape2.config.recipes import get_recipe
from sape2.data import ImageData, Splits, load_data, normalize
from sape2.machine import synchronize
from sape2.models.trained import build_model
from sape2.models.vit import create_model
from sape2.runs.run import Run
from sape2.studies.run import run_to_end
from sape2.training import record
from sape2.training.steps import ImageSteps

BASELINE, MASK = "ape", "ape+sape2, by mask"
ENCODINGS = ["none", "ape", "rope", "ape+sape2", MASK, "ape+sape2:readout=direct"]
INPUTS = ["cifar10_budget", "cifar10", "cifar10_paper"]
TABLE = [
    "ape", "ape+sape2", "rope", "none", "ape+sape2:readout=direct", "sincos", "rpe", "rpe_decomposed", "alibi", "cope", "cpe",
]  # fmt: skip
SMALL = [
    "model.dim=16",
    "model.depth=1",
    "model.num_heads=2",
    "train.batch_size=32",
    "train.warmup_epochs=0",
    "train.workers=0",
]


# --- models ----------------------------------------------------------------------------------------------------------


def eager(options: argparse.Namespace) -> Iterator[Case]:
    for name, images in options.size.models.items():
        yield Case(f"{name}, {images} images", partial(model_rows, name, images, options))


def compiled(options: argparse.Namespace) -> Iterator[Case]:
    name, images = next(iter(options.size.models.items()))
    for encoding in (encoding for encoding in ENCODINGS if encoding != MASK):
        yield Case(f"{name}, {encoding}, {images} images", partial(compiled_rows, name, encoding, images, options))


def training_step(model: nn.Module, called: nn.Module, images: int, options: argparse.Namespace) -> Callable[[], None]:
    """Forward, cross-entropy, backward and AdamW of one batch, in bf16."""
    device, pixels = options.device, options.size.pixels
    batch, labels = torch.randn(images, 3, pixels, pixels, device=device), torch.arange(images, device=device) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        with autocast(device):
            logits = called(batch)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def made(name: str, encoding: str, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    depth = {"depth": 1} if options.tiny else {}
    size = {"image_size": options.size.pixels, "patch_size": 16, "num_classes": 10}
    return create_model(name, encoding=encoding.partition(",")[0], **size, **depth).to(options.device).train()


def model_rows(name: str, images: int, options: argparse.Namespace) -> list[Row]:
    """All encodings taken in turn; those that fail, for want of memory say, have a row with their error."""
    steps, rows = {}, []
    shape = {"model": name, "images": images, "pixels": options.size.pixels}
    for encoding in ENCODINGS:
        model = made(name, encoding, options)
        step = training_step(model, model, images, options)
        step = by_mask()(step) if encoding == MASK else step
        try:
            step()
            steps[encoding] = step
        except RuntimeError as error:
            rows.append(shape | {"encoding": encoding, "error": str(error).splitlines()[0][:200]})
    found = compare(steps, options.size.rounds)
    for encoding, row in found.items():
        rate = {"images_per_s": 1e3 * images / row["ms"], "to_ape": row["ms"] / found[BASELINE]["ms"]}
        rows.append(shape | {"encoding": encoding} | row | rate)
    return rows


def compiled_rows(name: str, encoding: str, images: int, options: argparse.Namespace) -> list[Row]:
    """With and without `torch.compile`, in turn. On a CPU it is traced, and no code is made."""
    model = made(name, encoding, options)
    torch._dynamo.reset()
    backend = "inductor" if options.device.type == "cuda" else "aot_eager"
    called = torch.compile(model, dynamic=False, backend=backend)
    steps = {way: training_step(model, call, images, options) for way, call in (("eager", model), ("compiled", called))}
    began = time.perf_counter()
    steps["compiled"]()
    synchronize()
    first = time.perf_counter() - began
    found = compare(steps, options.size.rounds)
    ratio = found["compiled"]["ms"] / found["eager"]["ms"]
    rates = {f"{way}_images_per_s": 1e3 * images / row["ms"] for way, row in found.items()}
    return [{"model": name, "encoding": encoding, "images": images, "compiled_to_eager": ratio, "first_s": first} | rates]


# --- the input path --------------------------------------------------------------------------------------------------


def input_path(options: argparse.Namespace) -> Iterator[Case]:
    for recipe in INPUTS:
        yield Case(recipe, partial(input_rows, recipe, options))


def random_images(number: int, channels: int, side: int) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (number, channels, side, side), generator=generator, dtype=torch.uint8)
    return ImageData(pixels, torch.arange(number) % 10, tuple("0123456789"), (0.5,) * channels, (0.25,) * channels)


def config_of(recipe: str, options: argparse.Namespace, *settings: str) -> RunConfig:
    return override(with_epochs(get_recipe(recipe), 50), [*(SMALL if options.tiny else ()), *settings])


def input_rows(recipe: str, options: argparse.Namespace) -> list[Row]:
    """Images per second that are prepared, that are trained on when they lie ready, and of both together."""
    config, batches = config_of(recipe, options), options.size.batches
    steps = ImageSteps(build_model(config), random_images(options.size.images, 3, 32), config)
    device, stream = steps.accelerator.device, steps.stream

    def prepared() -> Iterator[list[torch.Tensor]]:
        return ([part.to(device, non_blocking=True) for part in batch] for batch in stream.batches(0))

    ready = next(prepared())
    mixed = partial(steps.mixer, places=stream.places, size=config.train.batch_size)
    ways = {
        "input": lambda batch: mixed(normalize(batch[0], stream.data.mean, stream.data.std), batch[1]),
        "step": lambda _: steps.take([part.clone() for part in ready]),
        "together": steps.take,
    }
    rates = {way: rate(work, prepared() if way != "step" else iter(int, 1), batches) for way, work in ways.items()}
    images = config.train.batch_size
    row = {f"{way}_images_per_s": images * found for way, found in rates.items()}
    where = {"augmentation": stream.where_augmented(), "workers": config.train.workers, "batch": images}
    return [
        {"recipe": recipe, "model": config.model.name} | row | {"together_to_step": rates["together"] / rates["step"]} | where
    ]


def rate(work: Callable, batches: Iterator, number: int) -> float:
    """Batches a second, after a tenth of them as warm-up."""
    for batch in islice(batches, max(1, number // 10)):
        work(batch)
    synchronize()
    began = time.perf_counter()
    for batch in islice(batches, number):
        work(batch)
    synchronize()
    return number / (time.perf_counter() - began)


# --- the paper's table -----------------------------------------------------------------------------------------------


def table(options: argparse.Namespace) -> Iterator[Case]:
    for encoding in TABLE[:2] if options.tiny else TABLE:
        yield Case(f"cifar10, {encoding}, {options.size.epochs} epochs", partial(table_rows, encoding, options))


def table_rows(encoding: str, options: argparse.Namespace) -> list[Row]:
    """One run of the recipe `cifar10` with vit_micro, in few epochs; its folder is gone on from."""
    config = override(with_epochs(get_recipe("cifar10"), options.size.epochs), [f"model.encoding={encoding}"])
    if options.tiny:
        config = override(config, SMALL)
        splits = Splits(*(random_images(number, 3, 32) for number in (64, 32, 32)))
    elif options.data is None:
        raise NotAvailable("the table needs --data with CIFAR-10")
    else:
        config = override(config, [f"data.source={options.data}"])
        splits = load_data(config.data, config.model)
    run = Run(options.runs / encoding.replace(":", "-").replace("=", "-"), config)
    no_board = patch.object(record, "open_board", MagicMock())  # so that tensorboard need not be there
    with run.hold(), no_board:
        rows = run_to_end(build_model(config), splits, run, quiet=True)
    accuracy = next(row for row in rows if row["name"] == "accuracy" and row["weights"] == "last")
    epochs = run.epochs()
    speed = {"images_per_s": epochs[-1]["images_per_s"], "seconds": sum(row["seconds"] for row in epochs)}
    values = {"value": accuracy["value"], "n": accuracy["n"], "epochs": config.train.epochs, "seed": config.seed}
    return [
        {"recipe": "cifar10", "model": config.model.name, "encoding": encoding, "measure": "test accuracy"} | values | speed
    ]
