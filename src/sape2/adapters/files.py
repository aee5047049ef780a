"""Saves and loads an attached encoding: adapter.safetensors holds its parameters, adapter.json describes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from sape2.adapters import find_host
from sape2.adapters.attached import Model, Size, Trainable, attached_encodings, attachment_of, check_free, detach, put_in
from sape2.data.base import at_home
from sape2.runs.files import write_atomic, write_text

CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
SIZES = ("depth", "num_heads", "head_dim")
KEYS = ("format", "host", "encoding", "start", "grid", *SIZES)
FORMAT = 1
COMPUTED = re.compile(r"_(mask|orig)$|(^|\.)parametrizations\.")  # names that prune and parametrize give


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Writes the attached encodings alone, without the model; `load_adapter` puts them into another copy of it."""
    attachment, folder = attachment_of(model), at_home(folder)
    attachment.tell_if_frozen()
    encodings = _encodings(model)
    if strange := next((name for name in encodings.state_dict() if COMPUTED.search(name)), None):
        raise ValueError(
            f"the adapter has a part {strange!r} of torch.nn.utils, which load_adapter could not read; make it permanent first "
            "(prune.remove, parametrize.remove_parametrizations)"
        )
    said = {key: getattr(attachment, key) for key in ("host", "encoding", "start")}
    config = {"format": FORMAT} | said | _say(attachment.sizes)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, lambda path: save_model(encodings, str(path)))
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load_adapter(model: Model, folder: str | Path, *, trainable: Trainable = "all") -> Model:
    """Attaches what `save_adapter` wrote, in place; returns the model.

    The model may be made for another image size: tables keep the grid that they were made for, and each encoding has its
    rule for other grids. Raises ValueError if the number of layers, heads or channels differs, or a file is damaged; the
    model is then as it was.
    """
    check_free(model)
    folder = at_home(folder)
    config = _read_config(folder)
    host = find_host(model)
    here = _say(host.sizes)
    for name in SIZES:
        if config[name] != here[name]:
            raise ValueError(
                f"the adapter in {folder} was made for {name}={config[name]} ({config['host']}); this model has {here[name]}"
            )
    grids = config["grid"] if isinstance(config["grid"][0], list) else [config["grid"]] * len(host.layers)
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
        put_in(model, host, config["encoding"], trainable, config["start"], [tuple(grid) for grid in grids])
    try:
        load_model(_encodings(model), folder / WEIGHTS)
    except (OSError, RuntimeError, SafetensorError) as error:
        detach(model)
        raise ValueError(f"{folder / WEIGHTS} does not hold this adapter: {str(error).splitlines()[-1].strip()}") from error
    return model


def _say(sizes: list[Size]) -> dict[str, Any]:
    """Grids, heads and channels of the layers: one of each where all are alike, else a list."""
    columns = {"grid": [size.grid for size in sizes]} | {key: [getattr(s, key) for s in sizes] for key in SIZES[1:]}
    said = {key: values[0] if len(set(values)) == 1 else values for key, values in columns.items()}
    return {"grid": said.pop("grid"), "depth": len(sizes)} | said


def _encodings(model: nn.Module) -> nn.ModuleDict:
    """By layer, counted from 0, and behind blocks. A module that several layers share is written once."""
    layers: dict[str, Any] = {str(index): encoding for index, encoding in attached_encodings(model).items()}
    return nn.ModuleDict(layers | {f"after_{index}": block.sape2 for index, block in attachment_of(model).blocks.items()})


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no adapter: there is no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    missing = [key for key in KEYS if key not in config] if isinstance(config, dict) else list(KEYS)
    if missing:
        raise ValueError(f"{path} is damaged: it has no {missing[0]!r}")
    if config["format"] != FORMAT:
        raise ValueError(f"{path} has format {config['format']}; this version of sape2 reads format {FORMAT}")
    grid = config["grid"]
    if not _is_grid(grid) and not (isinstance(grid, list) and len(grid) == config["depth"] and all(map(_is_grid, grid))):
        raise ValueError(
            f"{path} is damaged: its grid must be (H, W), or one for each of the {config['depth']} layers; got {grid}"
        )
    return config


def _is_grid(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) for side in value)
