"""The worked examples run, and go on where they stopped."""

import importlib.util
import json
import shutil
from pathlib import Path

from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.models.trained import build_model
from sape2.runs.checkpoint import save_weights
from sape2.runs.run import Run

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_attach_to_a_trained_vit(tmp_path, capsys):
    small = ["model.encoding=ape", "model.dim=12", "model.depth=1", "train_limit=128", "train.precision=fp32", "mixup=0"]
    config = override(get_recipe("digits"), small)
    Run(tmp_path / "run", config).start()
    save_weights(tmp_path / "run" / "model.safetensors", build_model(config))
    example, out = load("attach_to_a_trained_vit"), tmp_path / "out"
    arguments = [str(tmp_path / "run"), "--epochs", "1", "--seeds", "1", "--out", str(out)]
    assert example.main(arguments) == 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["without", "encoding", "all"]
    parameters = {row["arm"]: row["trained_parameters"] for row in rows}
    assert parameters["encoding"] == parameters["all"] - parameters["without"] == 3 + 2 * 5 * 4  # a gain per head, two tables
    assert (out / "run-all-s0" / "adapter" / "adapter.safetensors").exists()
    assert "difference to without" in capsys.readouterr().out

    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))  # as if stopped before the last arm
    shutil.rmtree(out / "run-all-s0" / "adapter")
    assert example.main(arguments) == 0
    again = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert again == rows
