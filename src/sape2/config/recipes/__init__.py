"""Recipes by name: functions without arguments that return a complete config."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sape2.config import RunConfig
from sape2.config.detection import DetectionConfig
from sape2.config.names import did_you_mean
from sape2.config.recipes import cifar, digits, imagenet, images
from sape2.config.recipes.coco import DETECTION_RECIPES

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits": digits.digits,
    "images": images.images,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "cifar10_paper": cifar.cifar10_paper,
    "cifar100_paper": cifar.cifar100_paper,
    "cifar10_budget": cifar.cifar10_budget,
    "cifar10_short": cifar.cifar10_short,
    "cifar10_glance": cifar.cifar10_glance,
    "cifar10_sprint": cifar.cifar10_sprint,
    "cifar100_sprint": cifar.cifar100_sprint,
    "cifar10_sprint_micro": cifar.cifar10_sprint_micro,
    "imagenet": imagenet.imagenet,
    "imagenet_base": imagenet.imagenet_base,
    "imagenet_plain": imagenet.imagenet_plain,
}


def get_recipe(name: str) -> RunConfig:
    """Raises ValueError that lists the known recipes."""
    if name in DETECTION_RECIPES:
        raise ValueError(f"{name} is a recipe for detection: sape2 detect {name}")
    if name not in RECIPES:
        raise _unknown("recipe", name, RECIPES, f"sape2 detect knows {', '.join(DETECTION_RECIPES)}")
    return RECIPES[name]()


def get_detection_recipe(name: str) -> DetectionConfig:
    """Raises ValueError that lists the known recipes."""
    if name in RECIPES:
        raise ValueError(f"{name} is a recipe for classification: sape2 train {name}")
    if name not in DETECTION_RECIPES:
        raise _unknown("detection recipe", name, DETECTION_RECIPES, f"sape2 train knows {', '.join(RECIPES)}")
    return DETECTION_RECIPES[name]()


def _unknown(what: str, name: str, known: Iterable[str], others: str) -> ValueError:
    """The error for an unknown recipe; its suggestion is taken from the recipes of both kinds."""
    meant = did_you_mean(name, [*RECIPES, *DETECTION_RECIPES])
    return ValueError(f"unknown {what} {name!r}; {meant}known {what}s: {', '.join(known)}; {others}")
