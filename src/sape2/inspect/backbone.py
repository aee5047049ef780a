"""A trained backbone, ours or of another library, whose layers can be looked into.

A model is named by a run folder, a timm name with a file of weights, a folder of transformers, or a function of one's own.
Nothing is downloaded, and weights are read from safetensors only, so no file can run code.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sape2.config import ModelConfig
from sape2.config.extras import from_extra
from sape2.evaluation.base import as_mapped
from sape2.inspect.watched import Watched
from sape2.machine import find_device
from sape2.models.trained import load_run_model
from sape2.runs.run import Run

IMAGE_TOWERS = ("vision_model", "vision_encoder")  # of CLIP and what is made like it, and of SAM
STANDARD = (0.5, 0.5, 0.5)  # mean and standard deviation where the model does not tell


@dataclass(frozen=True)
class Backbone:
    """A model that can be looked into, and the images it takes: their size, channels and normalisation."""

    name: str
    model: nn.Module
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: str = ""

    @property
    def reading(self) -> ModelConfig:
        """Size and channels, as the readers of images want them."""
        return ModelConfig(image_size=self.image_size, in_channels=len(self.mean), patch_size=math.gcd(*self.image_size))


def open_backbone(name: str, weights: str | None = None, size: tuple[int, int] | None = None) -> Backbone:
    """The model that `name` names. `weights`: last or best of a run, else a .safetensors file for a timm model.

    Raises ValueError, OSError or ImportError for what is no such model.
    """
    folder = Path(name)
    if folder.is_dir():
        kind = _kind_of(folder)
        if weights is not None and kind is not _run:
            raise ValueError(f"{folder} holds its own weights; --weights FILE is for a timm model")
        return kind(folder, weights, size)
    if ":" in name:
        return _own(name, weights, size)
    return _timm(name, weights, size)


def _kind_of(folder: Path) -> Callable[[Path, str | None, tuple[int, int] | None], Backbone]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        values = {}
    return _transformers if isinstance(values, dict) and "model_type" in values else _run


def _run(folder: Path, weights: str | None, size: tuple[int, int] | None) -> Backbone:
    run = Run.open_finished(folder)
    config = run.config
    if weights not in (None, "last", "best"):
        raise ValueError(f"--weights of a run are last or best; got {weights!r}")
    data, model = config.data, load_run_model(run, weights or "last")
    notes = f"{config.model.label} with {config.model.encoding}, {weights or 'last'} weights"
    return Backbone(folder.name, model, size or config.model.image_size, data.mean, data.std, notes)


def _transformers(folder: Path, _: str | None, size: tuple[int, int] | None) -> Backbone:
    transformers = from_extra("hosts", "transformers", f"{folder} is a folder of transformers")
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "attn_implementation": "eager"}
    model, loaded = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    missing = [*(key for key in loaded["missing_keys"] if "pooler" not in key), *loaded["mismatched_keys"]]
    if missing:
        raise ValueError(f"the weights of {folder} lack {len(missing)} of its parameters, such as {missing[0]}")
    model = next((getattr(model, name) for name in IMAGE_TOWERS if hasattr(model, name)), model)
    path = folder / "preprocessor_config.json"
    read = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    mean, std = (tuple(read.get(key, STANDARD)) for key in ("image_mean", "image_std"))
    return _watched(folder.name, model, size, mean, std, type(model).__name__)


def _timm(name: str, weights: str | None, size: tuple[int, int] | None) -> Backbone:
    import timm

    if not timm.is_model(name):
        raise ValueError(
            f"{name!r} is no run folder, no folder of transformers, no model of timm {timm.__version__}, and no "
            "package.module:function that makes one"
        )
    options: dict[str, Any] = {} if weights is None else _timm_weights(name, weights)
    options |= {} if size is None else {"img_size": size}
    try:
        model = timm.create_model(name, **options)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"timm cannot make {name} with {weights or 'new weights'} and these options: {reason}") from error
    notes = "untrained, no --weights FILE.safetensors" if weights is None else Path(weights).name
    found: Any = model.pretrained_cfg
    return _watched(name, model, size, tuple(found["mean"]), tuple(found["std"]), notes)


def _timm_weights(name: str, weights: str) -> dict[str, Any]:
    """Arguments of `create_model` that load a file with nothing missing and nothing over; its classes are counted."""
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not weights.endswith(".safetensors"):
        raise ValueError(f"--weights must be a .safetensors file, since others can run code when they are read; got {weights}")
    if not Path(weights).is_file():
        raise FileNotFoundError(f"there is no file {weights}")
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is no file of safetensors: {error}") from error
    found: Any = timm.get_pretrained_cfg(name)
    head = found.classifier if isinstance(found.classifier, str) else next(iter(found.classifier or ("head",)))
    classes = len(state[f"{head}.weight"]) if f"{head}.weight" in state else 0
    overlay = {"state_dict": state, "num_classes": classes, "custom_load": False}
    return {"pretrained": True, "num_classes": classes, "pretrained_cfg_overlay": overlay}


def _own(name: str, weights: str | None, size: tuple[int, int] | None) -> Backbone:
    """What a function of the user's own returns, by its import path."""
    module, _, function = name.partition(":")
    if weights is not None:
        raise ValueError("--weights FILE is for a timm model; a function of your own loads its own")
    try:
        model = _imported(module, function)()
    except Exception as error:  # of code that is not ours
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"{name!r} makes no model: {reason}. It must be a function without arguments in a module that can be imported, "
            "from here too; SAPE2_DEBUG=1 shows where it failed"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module; got {type(model).__name__}")
    told: Any = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (tuple(told.get(key, STANDARD)) for key in ("mean", "std"))
    return _watched(name, model, size, mean, std, type(model).__name__)


def _imported(module: str, name: str) -> Any:
    """What a module holds by this name. Modules of the present folder are found, too, as by `python -m`."""
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        sys.path.pop()


def _watched(
    name: str, model: Any, size: tuple[int, int] | None, mean: tuple[float, ...], std: tuple[float, ...], notes: str
) -> Backbone:
    size = size or _size_of(model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # the others do not show weights
    device = find_device()
    model = model.to(device).eval()
    try:
        shown = model if as_mapped(model) else Watched(model, torch.zeros(1, len(mean), *size, device=device))
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} takes no images of {len(mean)} channels and {size[0]}x{size[1]} pixels: {reason}") from error
    return Backbone(name, shown, size, mean, std, notes)


def _size_of(model: Any) -> tuple[int, int]:
    """(height, width) that a model says it is made for."""
    told = getattr(model, "pretrained_cfg", None) or {}
    embedded = getattr(getattr(model, "patch_embed", None), "img_size", None)
    found = embedded or (told.get("input_size") or (None,))[1:] or getattr(getattr(model, "config", None), "image_size", None)
    config = getattr(model, "config", None)
    if not found and hasattr(config, "num_patches") and hasattr(config, "patch_size"):  # SigLIP 2: a square of positions
        found = int(config.num_patches**0.5) * config.patch_size
    if not found:
        raise ValueError(f"{type(model).__name__} does not tell the size of its images; give --size HxW")
    height, width = found if isinstance(found, (tuple, list)) else (found, found)
    return int(height), int(width)
