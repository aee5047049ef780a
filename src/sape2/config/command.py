"""Writes the `sape2 train` command of a run from its config."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

from sape2.config import MODELS, RunConfig, resized, with_epochs
from sape2.config.checks import by_name
from sape2.config.recipes import RECIPES


def command(config: RunConfig, out: Path | None = None, data: str | None = None) -> str | None:
    """The command with the recipe and all changed settings; None for a recipe or model that is not known here.

    `data` stands in place of the folder of images, as far as the recipe takes one: a path of this machine helps nobody else.
    """
    if config.recipe not in RECIPES or config.model.name not in MODELS:
        return None
    if data is not None and (config.data.source is not None or config.data.name != "digits"):
        config = replace(config, data=replace(config.data, source=data))
    usual = RECIPES[config.recipe]()
    options = {
        "--model": (config.model.name, usual.model.name),
        "--encoding": (config.model.encoding, usual.model.encoding),
        "--data": (config.data.source or "", usual.data.source or ""),
        "--epochs": (str(config.train.epochs), str(usual.train.epochs)),
        "--seed": (str(config.seed), str(usual.seed)),
    }
    given = {option: value for option, (value, before) in options.items() if value != before}
    words = ["sape2", "train", config.recipe, *(word for option in given.items() for word in option)]
    base = with_epochs(usual, config.train.epochs)
    model = replace(resized(base.model, config.model.name), encoding=config.model.encoding)
    base = replace(base, model=model, data=replace(base.data, source=config.data.source))
    for setting in sorted(_settings(config) - _settings(base)):
        words += ["--set", setting]
    return shlex.join(words if out is None else [*words, "--out", str(out)])


def _settings(config: RunConfig) -> set[str]:
    return {f"{name}={json.dumps(value)}" for name, value in by_name(config.to_dict()).items()}
