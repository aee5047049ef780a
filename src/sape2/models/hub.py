"""Models as folders that other people load: config.json, model.safetensors and a model card, in the layout of the hub.

Nothing is unpickled. The network is used only for an id that is not a local folder.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sape2._version import __version__
from sape2.config import ModelConfig, RunConfig, model_config
from sape2.config.recipes.changed import changed_in_words
from sape2.data.base import at_home, digest
from sape2.data.decoding import in_words
from sape2.encodings import canonical_name
from sape2.machine import uncompiled, uncompiled_name
from sape2.models.card import PAPER, Description, model_card
from sape2.runs.checkpoint import load_weights, save_weights
from sape2.runs.files import read_text, write_text
from sape2.runs.run import Run
from sape2.runs.settings import difference

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")  # an identifier, as the hub and SPDX have them
FORMAT = 1
MARK = re.compile(r"\n<!-- written by sape2: ([0-9a-f]{16}) -->\n")  # last line of a card, with a digest of what stands above
Model = TypeVar("Model", bound=nn.Module)


# --- what a model is -------------------------------------------------------------------------------------------------


def describe(
    config: ModelConfig, run: Run[RunConfig] | None = None, weights: str = "last", license: str | None = None
) -> Description:
    """All that is needed to build a model and to give it images; from a run also what it was trained on.

    `license` is that of the model, which only its owner can name: without one none is written.
    """
    if license is not None and not LICENCE.fullmatch(license):
        raise ValueError(f"a license is an identifier such as apache-2.0, cc-by-4.0 or other; got {license!r}")
    description: Description = {"library_name": "sape2", "format": FORMAT, "sape2_version": __version__}
    description |= {} if license is None else {"license": license}
    description |= {"paper": PAPER, "encoding": config.encoding, "model": asdict(config)}
    if run is None:
        return description
    trained = run.config
    images = {"resize": in_words(trained.data, config)}
    images |= {"mean": list(trained.data.mean), "std": list(trained.data.std), "formula": "(pixel / 255 - mean) / std"}
    training = {"recipe": trained.recipe, "epochs": trained.train.epochs, "seed": trained.seed, "weights": weights}
    training |= {"changed settings": words} if (words := changed_in_words(trained)) else {}
    return description | {
        "data": trained.data.name, "normalization": images, "classes": run.class_names, "training": training
    }  # fmt: skip


def read_description(text: str, where: str) -> Description:
    """Parses the text that `describe` wrote; "model" becomes a ModelConfig. Raises a one-line ValueError if it is invalid."""
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("library_name") != "sape2" or "model" not in description:
        raise ValueError(f"{where} does not describe a model of sape2")
    if description.get("format") != FORMAT:
        raise ValueError(f"{where} has format {description.get('format')!r}; this version of sape2 reads format {FORMAT}")
    model = description["model"]
    try:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            raise ValueError(f'"model" must be an object with a name; got {model!r}')
        return description | {"model": model_config(**model)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} does not fit this version of sape2: {error}") from error


# --- folders ---------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    run: Run[RunConfig] | None = None,
    weights: str = "last",
    license: str | None = None,
) -> None:
    """Writes config.json, model.safetensors and a model card; `run` fills the card with what was measured.

    `weights` says which of the run the model has, "last" or "best"; the card shows what was measured with these. `license`
    is the model's, by its identifier (None: the card names none).

    Raises ValueError for a model with an encoding attached or of another kind than that of the run, and for a folder with the
    config.json of something else.
    """
    folder, config = at_home(folder), model_of(model)
    check_replaceable(folder)
    if run is not None:
        _check_from(run, config, weights)
    description = describe(config, run, weights, license)
    save_weights(folder / WEIGHTS, model)
    card = model_card(description, run)
    write_text(folder / CARD, f"{card}\n<!-- written by sape2: {digest(card.encode())} -->\n")
    write_text(folder / CONFIG, json.dumps(description, indent=2) + "\n")


def _check_from(run: Run[RunConfig], config: ModelConfig, weights: str) -> None:
    """Raises ValueError if a model of this config cannot be that of the run, whose numbers the card would show."""
    run.weights(weights)
    ours, theirs = asdict(config), asdict(run.config.model)
    ours["encoding"] = canonical_name(config.encoding)
    if ours != theirs:
        what = difference(theirs, ours, "model.")
        raise ValueError(f"the model is not that of the run in {run.folder}: {what}; give its own run, or none")


def check_replaceable(folder: Path) -> None:
    """Raises OSError or ValueError where writing a model would lose a run, another model, or a README.md of someone else."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder")
    if (folder / CARD).exists() and not _is_card(read_text(folder / CARD)):
        raise ValueError(
            f"{folder / CARD} has words of someone else, which would be lost; move it away, or choose another folder"
        )
    if not (folder / CONFIG).exists():
        return
    try:
        there = json.loads(read_text(folder / CONFIG))
    except (ValueError, RecursionError):
        there = None
    if not isinstance(there, dict) or there.get("library_name") != "sape2":
        raise ValueError(
            f"{folder} holds a run, or a model of another program, and its {CONFIG} would be lost; choose another folder"
        )


def _is_card(text: str) -> bool:
    """Whether it is a card as sape2 wrote it; those without a mark are of version 0.2.0."""
    mark = MARK.search(text)
    if mark is None:
        return "library_name: sape2" in text
    return (text[mark.end() :], mark[1]) == ("", digest(text[: mark.start()].encode()))


def model_of(model: nn.Module) -> ModelConfig:
    """The config of a ViT of this package, which says all of it; raises ValueError for anything else."""
    config: Any = getattr(model, "config", None)
    attachment: Any = getattr(model, "sape2_attachment", None)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"this is for the ViT of sape2; got {type(model).__name__}")
    if attachment is not None:
        raise ValueError(
            f"the model has an encoding attached, {attachment.encoding!r}, which its config does not say; write that by "
            "save_adapter, detach it, and save the model then"
        )
    _check_parts(uncompiled(model), config)
    return config


def _check_parts(model: nn.Module, config: ModelConfig) -> None:
    """Raises ValueError if a part is not what the config makes, so that its weights would fit no model, or another one."""
    wanted = _parts(unfilled(type(model), config, "meta"))
    there = _parts(model)
    for name in [*there, *wanted]:
        here, made = (parts.get(name, "nothing") for parts in (there, wanted))
        if here != made:
            raise ValueError(
                f"{name or 'the model'} is {here}, and by the config, which is all that a loader reads, {made}; make the model "
                "with that setting (create_model) and give it the weights, or write model.state_dict() with torch.save"
            )


def _parts(model: nn.Module) -> dict[str, str]:
    """What each part of a model says of itself, and the shapes of its tensors; of a compiled part the one inside."""
    said = {}
    for name, part in model.named_modules():
        shapes = [f" {key} {'x'.join(map(str, tensor.shape))}" for key, tensor in part.named_parameters(recurse=False)]
        said[uncompiled_name(name)] = f"{type(part).__name__}({part.extra_repr()}){','.join(shapes)}"
    return said


def load_pretrained(model_class: type[Model], source: str | Path, revision: str | None = None) -> Model:
    """The model that a folder, or a hub repository ("owner/name"), holds, in evaluation mode on the CPU.

    Raises FileNotFoundError or ValueError in one line if it is missing, damaged, or of another version.
    """
    folder = find_folder(source, revision)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{source} holds no model: there is no {name}")
    description = read_description(read_text(folder / CONFIG), str(folder / CONFIG))
    model = unfilled(model_class, description["model"])
    load_weights(folder / WEIGHTS, model)
    return model.eval()


def unfilled(model_class: type[Model], config: ModelConfig, device: str = "cpu") -> Model:
    """A new model for weights from a file, whatever the default device; the generator of the caller is left as it was."""
    make: Any = model_class
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return make(config)


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; the files of a hub repository downloaded. Raises OSError, or ValueError for an idle revision."""
    folder = at_home(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a folder here, which has no revisions; leave out revision={revision!r}")
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{source} is a file; give the folder that holds it")
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise FileNotFoundError(f'there is no folder {source}, and a hub id looks like "owner/name"')
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the client raises what its http library raises, too
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(f"there is no folder {source}, and the hub did not give it: {reason}") from error
