"""Writes the `sape2 train` command of a run from its config."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

from sape2.config import MODELS, RunConfig, resized, with_epochs
from sape2.config.recipes import RECIPES


def command(config: RunConfig, out: Path | None = None, data: str | None = None) -> str | None:
    """The command with the recipe and all changed settings; None for a recipe or model that is not known here.

    `data` stands in place of the folder of images, as far as the recipe takes one: a path of this machine helps nobody else.
    """
    if config.recipe not in RECIPES or config.model.name not in MODELS:
        return None
    if data is not None and (config.data.source is not None or config.data.name != "digits"):
        config = replace(config, data=replace(config.data, source=data))
    base, words = RECIPES[config.recipe](), ["sape2", "train", config.recipe]
    if config.model.name != base.model.name:
        base = replace(base, model=resized(base.model, config.model.name))
        words += ["--model", config.model.name]
    if config.model.encoding != base.model.encoding:
        base = replace(base, model=replace(base.model, encoding=config.model.encoding))
        words += ["--encoding", config.model.encoding]
    if config.data.source != base.data.source:
        base = replace(base, data=replace(base.data, source=config.data.source))
        words += ["--data", config.data.source or ""]
    if config.train.epochs != base.train.epochs:
        base = with_epochs(base, config.train.epochs)
        words += ["--epochs", str(config.train.epochs)]
    if config.seed != base.seed:
        words += ["--seed", str(config.seed)]
    for setting in sorted(_settings(config) - _settings(base)):
        words += ["--set", setting]
    return shlex.join(words if out is None else [*words, "--out", str(out)])


def _settings(config: RunConfig) -> set[str]:
    sections = {name: values for name, values in config.to_dict().items() if isinstance(values, dict)}
    return {f"{name}.{key}={json.dumps(value)}" for name, values in sections.items() for key, value in values.items()}
