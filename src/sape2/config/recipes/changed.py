"""The settings of a run that differ from its recipe, for the head of every table, figure and file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from sape2.config import MODELS, RunConfig, resized, with_epochs
from sape2.config.checks import by_name
from sape2.config.detection import DetectionConfig
from sape2.config.recipes import RECIPES
from sape2.config.recipes.coco import DETECTION_RECIPES

TOLD_ANYWAY = ("model.encoding", "train.epochs", "training.epochs", "detector.masks")
OF_THE_FOLDER = (  # what the recipe `images` takes from the images, and tells by `data.own.fit`
    "data.name", "data.mean", "data.std", "data.test_fraction", "model.in_channels", "model.num_classes",
    "augment.crop_padding", "train.batch_size", "model.image_size", "model.patch_size",
)  # fmt: skip
FITTED = ("model.image_size", "model.patch_size", "train.batch_size")


def changed_settings(config: RunConfig | DetectionConfig) -> dict[str, Any]:
    """The settings that are not those of the recipe under the same model size and number of epochs: {"model.depth": 1}.

    Encoding, model, epochs and seed are told by themselves. Of the recipe `images`, which fits itself to a folder, size,
    patch and batch are among them. Empty for a recipe that is not known here.
    """
    recipe = (RECIPES | DETECTION_RECIPES).get(config.recipe)
    if recipe is None:
        return {}
    usual: Any = recipe()
    if config.model.name in MODELS:
        usual = replace(usual, model=resized(usual.model, config.model.name))
    if isinstance(config, RunConfig):
        usual = with_epochs(usual, config.train.epochs)
    without = TOLD_ANYWAY + (OF_THE_FOLDER if config.recipe == "images" else ())
    before, now = by_name(usual.identity()), by_name(config.identity())
    found = {key: value for key, value in now.items() if key not in without and before.get(key) != value}
    return found | ({key: now[key] for key in FITTED} if config.recipe == "images" else {})


def changed_in_words(config: RunConfig | DetectionConfig) -> str:
    """ "model.depth=1, data.train_limit=256", as --set takes them; "" if nothing was changed."""
    return ", ".join(f"{key}={value_in_words(value)}" for key, value in changed_settings(config).items())


def value_in_words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
