"""The model card: README.md of a folder that other people load."""

from __future__ import annotations

import re
from typing import Any

from sape2._version import __version__
from sape2.config import HUB_IDS, RunConfig
from sape2.config.command import command
from sape2.config.names import cell
from sape2.runs.run import Run

Description = dict[str, Any]  # what `hub.describe` says of a model
PAPER = "arXiv:2505.09466"
PUBLISHED = {  # (digest of the labels, of 16 files) of train and test, as `data.fingerprint` makes them of the hub's parquet
    "cifar10": (("bc2ff81ebef0d2dd", "5692447a32dd2a92"), ("e16dfec55051bd9d", "aebdb231b6ff266b")),
    "cifar100": (("ef0f898c2e92de00", "322ff9eb14e62002"), ("3aa55bf030a3db23", "4d01c9610860f048")),
}
SHOWN = ("accuracy", "top5_accuracy", "loss", "calibration_error")


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
        parts += [_table("Training", training), _results(rows), classes_line(description)]
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


def classes_line(description: Description) -> str:
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
