"""What the tests of export, freeze and hub share: tiny models and a finished run folder made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from host_cases import randomised
from torch import Tensor, nn

from sape2 import create_model
from sape2.config import DataConfig, ModelConfig, RunConfig
from sape2.models.vit import ViT
from sape2.runs.checkpoint import save_weights
from sape2.runs.rows import write_rows
from sape2.runs.run import Run

# Mean pooling: prefix tokens have no bias, so a class token would not see the bias of the last layer.
SIZES: dict[str, Any] = {"dim": 8, "depth": 1, "num_heads": 2, "num_classes": 5, "pool": "mean"}
# Every encoding in as few graphs as names can join.
EVERYTHING = ["ape+cpe+rope+rpe+rpe_contextual+rpe_decomposed+alibi+cope+sape2", "sincos+rope_mixed+sape2:count=cyclic"]


def tiny(encoding: str, **changes: Any) -> ViT:
    """Random weights, so large that every position shows in the logits."""
    model = create_model("vit_nano", encoding=encoding, **{"image_size": (12, 16), "patch_size": 4} | SIZES | changes)
    return randomised(model, std=0.5).eval()


def finished_run(folder: Path, encoding: str = "ape+sape2", name: str = "digits") -> tuple[Path, ViT]:
    """What `train` leaves, with random weights and made-up results; and the model of the last epoch."""
    size = ModelConfig(name="vit_nano", encoding=encoding, image_size=(12, 16), patch_size=4, in_channels=1, **SIZES)
    config = RunConfig("digits", size, DataConfig(name, mean=(0.3,), std=(0.2,)), seed=3)
    model = randomised(ViT(size), std=0.5).eval()
    images = {"images": 40}
    Run(folder, config).start({"layout": "arrays", "classes": list("abcde"), "train": images, "test": images})
    save_weights(folder / "best.safetensors", randomised(ViT(size), std=0.5))
    save_weights(folder / "model.safetensors", model)
    write_rows(folder / "metrics.jsonl", [{"epoch": 1, "precision": "fp32"}])
    about = {"measure": "accuracy", "unit": "fraction", "split": "test", "protocol": "top-1, one view", "data": "digits"}
    rows = [about | {"name": "accuracy", "value": value, "n": 40, "weights": weights}
            for weights, value in (("last", 0.875), ("best", 0.75))]  # fmt: skip
    write_rows(folder / "results.jsonl", rows)
    return folder, model


def largest(difference: Tensor) -> float:
    return difference.detach().abs().max().item()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]
