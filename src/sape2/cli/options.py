"""Options that several commands share, and the recipes, measures and run folders that they name."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from typing import Any

from sape2.cli.output import say
from sape2.config import SEE, RunConfig, override, resized, with_epochs
from sape2.config.detection import DetectionConfig
from sape2.config.names import unknown
from sape2.config.recipes import get_recipe
from sape2.runs.files import safe_name

READERS = ("layout", "image_column", "label_column", "split_seed", "test_fraction", "validation_fraction")
READ_BY = tuple(prefix + key for prefix in ("data.", "") for key in READERS)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="rows as JSON on standard output instead of a table")


def whole_path(source: str) -> str:
    """--data as a run keeps it: a folder by its whole path, so that a command in another folder finds it; an id as it is."""
    folder = os.path.abspath(os.path.expanduser(source))
    return folder if source.strip() and os.path.isdir(folder) else source


def resolve(arguments: argparse.Namespace) -> RunConfig:
    """The recipe with the options of the command applied, --set last."""
    config = get_recipe(arguments.recipe)
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, source=whole_path(arguments.data)))
    if config.recipe == "images":
        from sape2.data.own import fit

        config, lines = fit(override(config, [setting for setting in arguments.set if setting.partition("=")[0] in READ_BY]))
        for line in lines:
            say_once(line)
    if arguments.epochs is not None:
        config = with_epochs(config, arguments.epochs)
    config = with_options(config, arguments)
    if config.recipe == "images":
        from sape2.data.own import settings_in_words

        say_once(settings_in_words(config))
    return config


def with_options(config: Any, arguments: argparse.Namespace, see: str = SEE) -> Any:
    """The config with --model, --encoding, --seed and --set applied, and the one name of its encoding."""
    if arguments.model is not None:
        config = replace(config, model=resized(config.model, arguments.model))
    if arguments.encoding is not None:
        config = replace(config, model=replace(config.model, encoding=arguments.encoding))
    if arguments.seed is not None:
        config = replace(config, seed=arguments.seed)
    config = override(config, arguments.set, see)
    return replace(config, model=replace(config.model, encoding=one_name(config.model.encoding)))


def say_once(line: str) -> None:
    """Prints a line from the first of the processes that torchrun started; a RANK without others is no reason for silence."""
    if os.environ.get("WORLD_SIZE", "") in ("", "1") or os.environ.get("RANK", "") in ("", "0"):
        say(line)


def default_name(config: RunConfig | DetectionConfig) -> str:
    """The name of the run folder that a command makes where no --out is given."""
    return f"{recipe_name(config)}-{config.model.name}-{safe_name(config.model.encoding)}-s{config.seed}"


def recipe_name(config: RunConfig | DetectionConfig) -> str:
    """Name of the recipe for a path; for the recipe `images` also the name of the data."""
    if isinstance(config, RunConfig) and config.recipe == "images":
        return f"images-{safe_name(config.data.name)}"
    return config.recipe


def split_encodings(text: str) -> tuple[str, ...]:
    """ "a,b:x=1,y=2,c" -> a, b:x=1,y=2, c: what has an "=" before any ":" belongs to the options before it.

    Each encoding once, under its one name; where that is not what was written, it is told.
    """
    names: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if names and "=" in piece and ":" not in piece.partition("=")[0]:
            names[-1] += f",{piece}"
        else:
            names.append(piece)
    return tuple(dict.fromkeys(map(one_name, names)))


def one_name(encoding: str) -> str:
    """The one name of an encoding, by which it is written and compared; told where it was written otherwise."""
    from sape2.encodings import canonical_name

    name = canonical_name(encoding)
    if name != encoding.strip():
        say_once(f"{encoding.strip()} is the encoding {name}")
    return name


def whole_number(option: str, text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit() and int(text) > 0):
        raise ValueError(f"{option} needs whole numbers from 1 on; got {text.strip()!r}")
    return int(text)


def pixel_size(text: str) -> tuple[int, int]:
    """(height, width) of --size."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip(), re.ASCII)
    if found is None:
        raise ValueError(f"--size needs HxW in pixels, for example 224x224; got {text!r}")
    return int(found[1]), int(found[2])


def chosen_measures(text: str) -> list[str]:
    from sape2.evaluation import MEASURES

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in MEASURES:
            raise unknown("measure", name, MEASURES)
    return list(dict.fromkeys(names))
