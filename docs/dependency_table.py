"""The table of dependencies in security.md: python docs/dependency_table.py, run where all extras are installed."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WHY = {
    "torch": "everything",
    "torchvision": "transforms, its ViT as a host, detectors",
    "timm": "optimiser groups, schedules, moving average, its ViTs as hosts",
    "numpy": "arrays of decoded images",
    "scipy": "Student's t in comparisons",
    "safetensors": "weights that cannot hold code",
    "jaxtyping": "shapes as types",
    "rich": "tables and progress in a terminal",
    "filelock": "one process a run folder",
    "submitit": "a study as jobs, here or on Slurm",
    "accelerate": "devices, mixed precision",
    "datasets": "hub data sets, parquet",
    "torchmetrics": "COCO metrics",
    "tensorboard": "curves while a run goes on",
    "scikit-learn": "the digits and two photographs that come with it",
    "matplotlib": "figures",
    "resvg-py": "pixels of SVG",
    "jinja2": "HTML of explain and explore",
    "transformers": "its ViTs as hosts",
    "faster-coco-eval": "COCO masks and metrics",
    "gradio": "the page of sape2 explore",
    "pillow": "decoding images (also a dependency of torchvision)",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "checks an exported file",
}


def dependencies(project: dict[str, Any]) -> dict[str, list[str]]:
    """Name to the extras that need it ("always" without one), as pyproject.toml lists them."""
    groups = {"always": project["dependencies"]} | project["optional-dependencies"]
    found: dict[str, list[str]] = {}
    for group, requirements in groups.items():
        for requirement in requirements:
            name = re.match(r"[\w.-]+", requirement)
            assert name is not None, requirement
            found.setdefault(name[0].lower(), []).append(group)
    return found


def licence(name: str) -> str:
    """What the installed package says of itself: its SPDX expression, else its field, its classifiers, its file."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return "not installed where this table was made"
    field = (about.get("License") or "").strip()
    classifiers = [text.split(" :: ")[-1] for text in about.get_all("Classifier") or [] if text.startswith("License")]
    short = field if field and "\n" not in field and len(field) < 60 else ""
    return about.get("License-Expression") or short or ", ".join(classifiers) or licence_file(name) or "not stated"


def licence_file(name: str) -> str:
    """The title of the licence that comes with a package that says nothing else; that of the MIT licence often has none."""
    files = [file for file in metadata.files(name) or [] if file.name.upper().startswith("LICEN")]
    if files and "Permission is hereby granted, free of charge, to any person" in files[0].read_text():
        return "MIT"
    lines = [line.strip() for line in files[0].read_text().splitlines() if line.strip()] if files else []
    return ", ".join(lines[:2]) if lines and len(lines[0]) < 40 else ""


def table(project: dict[str, Any]) -> str:
    lines = ["| package | licence | what for | extra |", "|---|---|---|---|"]
    for name, groups in dependencies(project).items():
        why = WHY[name]
        lines.append(f"| `{name}` | {licence(name)} | {why} | {', '.join(groups)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]))
