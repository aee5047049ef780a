"""Writes the `sape2 train` command of a run from its config."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

from sape2.config import RunConfig, resized, with_epochs
from sape2.config.recipes import get_recipe


def train_command(config: RunConfig, out: Path | None = None) -> str:
    """The command with the recipe and all changed settings; raises ValueError for an unknown recipe or model."""
    base, words = get_recipe(config.recipe), ["sape2", "train", config.recipe]
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
