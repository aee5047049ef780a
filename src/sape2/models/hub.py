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
from sape2.config import HUB_IDS, ModelConfig, RunConfig, model_config
from sape2.config.command import command
from sape2.config.names import cell
from sape2.config.recipes.changed import changed_in_words
from sape2.data.base import at_home
from sape2.data.decoding import in_words
from sape2.encodings import canonical_name
from sape2.machine import uncompiled, uncompiled_name
from sape2.runs.checkpoint import load_weights, save_weights
from sape2.runs.files import read_text, write_text
from sape2.runs.run import Run
from sape2.runs.settings import difference

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PAPER = "arXiv:2505.09466"
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")  # an identifier, as the hub and SPDX have them
FORMAT = 1
Description = dict[str, Any]
Model = TypeVar("Model", bound=nn.Module)
PUBLISHED = {  # (digest of the labels, of 16 files) of train and test, as `data.fingerprint` makes them of the hub's parquet
    "cifar10": (("bc2ff81ebef0d2dd", "5692447a32dd2a92"), ("e16dfec55051bd9d", "aebdb231b6ff266b")),
    "cifar100": (("ef0f898c2e92de00", "322ff9eb14e62002"), ("3aa55bf030a3db23", "4d01c9610860f048")),
}
SHOWN = ("accuracy", "top5_accuracy", "loss", "calibration_error")


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
    folder, config = Path(folder), model_of(model)
    check_replaceable(folder)
    if run is not None:
        _check_from(run, config, weights)
    description = describe(config, run, weights, license)
    save_weights(folder / WEIGHTS, model)
    write_text(folder / CARD, model_card(description, run))
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
    """Raises OSError or ValueError unless a model can be written there without taking the place of a run or another model."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder")
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
    folder = at_home(str(source))
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


# --- the card --------------------------------------------------------------------------------------------------------


def model_card(description: Description, run: Run[RunConfig] | None) -> str:
    """README.md of a model: front matter for the hub, use, what it is, what was measured, licence, citation."""
    rows = [] if run is None else _shown_rows(run, description["training"]["weights"])
    parts = [
        _front_matter(description, rows, public_dataset(run)),
        f"# {description['model']['name']} with {description['encoding']}\n",
        _use(description),
        _table("Model", description["model"]),
    ]
    if run is not None:
        words = command(run.config, data="DIR")
        training = {"data": run.config.data.name} | description["training"] | {"command": words and f"`{words}`"}
        parts += [_table("Training", training), _results(rows), _classes(description)]
    return "\n".join([*parts, _licence(description), _CITATION])


def public_dataset(run: Run[RunConfig] | None) -> str | None:
    """The hub id of the data set that a run saw: by what its images are, never by the name of their folder. None for others.

    The files of the hub by their digests, torchvision's by the hashes that it checks, others by the id they were loaded by.
    """
    seen = {} if run is None else run.seen
    if isinstance(seen.get("hub_id"), str):
        return seen["hub_id"]
    name = None if run is None else run.config.data.name
    if seen.get("layout") == "arrays":
        return HUB_IDS.get(str(name))
    splits = [seen.get(split) for split in ("train", "test")]
    digests = tuple((split.get("labels"), split.get("bytes")) for split in splits if isinstance(split, dict))
    return next((HUB_IDS[known] for known, there in PUBLISHED.items() if there == digests), None)


def _shown_rows(run: Run[RunConfig], weights: str) -> list[dict[str, Any]]:
    return [row for row in run.results() if row.get("name") in SHOWN and row.get("weights") == weights]


def _front_matter(description: Description, rows: list[dict[str, Any]], public: str | None) -> str:
    """Metadata of the model card, which the hub shows. It marks private images, and results on part of the images."""
    from huggingface_hub import EvalResult, ModelCardData

    data = str(description.get("data"))
    kind, name = (public, data) if public else ("own-images", f"{data} (images that are not a data set of the hub)")
    results = [
        EvalResult("image-classification", kind, name, row["name"], row["value"], dataset_split=row.get("split"))
        for row in rows
        if row.get("limit") is None
    ]
    card = ModelCardData(
        license=description.get("license"),
        library_name="sape2",
        pipeline_tag="image-classification",
        tags=["vision-transformer", "position-encoding", "sape2", f"arxiv:{PAPER.removeprefix('arXiv:')}"],
        datasets=[public] if public else None,
        model_name=f"{description['model']['name']}-{description['encoding']}" if results else None,
        eval_results=results or None,
    )
    return f"---\n{card.to_yaml()}\n---\n"


def _use(description: Description) -> str:
    height, width = description["model"]["image_size"]
    channels, patch = description["model"]["in_channels"], description["model"]["patch_size"]
    lines = [
        "```python",
        "import torch",
        "from sape2.models.vit import ViT",
        "",
        'model = ViT.from_pretrained("FOLDER_OR_ID")',
        f"images = torch.rand(1, {channels}, {height}, {width})  # pixels / 255; sides are multiples of {patch}",
    ]
    if "normalization" in description:
        mean, std = (description["normalization"][key] for key in ("mean", "std"))
        lines.append(f"images = (images - torch.tensor({mean})[:, None, None]) / torch.tensor({std})[:, None, None]")
    return "\n".join([*lines, "logits = model(images)", "```", ""])


def _table(title: str, values: dict[str, Any]) -> str:
    rows = [f"| {key} | {cell(value)} |" for key, value in values.items() if value is not None]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *rows, ""])


def _results(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "## Results\n\nNot measured.\n"
    columns = ("name", "value", "ci_low", "ci_high", "unit", "n",
               "split", "weights", "protocol", "precision", "hardware", "torch")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        texts = (f"{row[c]:.4f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns)
        lines.append("| " + " | ".join(map(cell, texts)) + " |")
    note = (
        "One run, one seed: there is no spread over seeds here. `ci_low` and `ci_high` are the ends of the 95 % interval over "
        "images (Wilson's, for shares); `n` is the number of images.\n"
    )
    return "\n".join(["## Results\n", note, *lines, ""])


def _classes(description: Description) -> str:
    """The names with a backslash before each sign of Markdown: __background__ would be shown as another name, in bold."""
    names = [cell(re.sub(r"([\\`*_~$&\[\]])", r"\\\1", str(name))) for name in description["classes"] or ()]
    return f"Classes, in the order of the logits: {', '.join(names)}.\n" if names else ""


def _licence(description: Description) -> str:
    license = description.get("license")
    named = f"Licence of the model: {license}." if license else "The owner of the model has named no licence for it."
    return f"## Licence\n\n{named}\n"


_CITATION = f"""## Citation

Made with sape2 {__version__}, which is not by the authors of the paper.

```bibtex
@article{{sape2_2025,
  title   = {{A 2D Semantic-Aware Position Encoding for Vision Transformers}},
  journal = {{arXiv preprint {PAPER}}},
  year    = {{2025}}
}}
@software{{sape2_software,
  title   = {{sape2: position encodings for vision transformers}},
  author  = {{The sape2 developers}},
  version = {{{__version__}}}
}}
```
"""
