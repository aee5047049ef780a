"""The import rule of docs/decisions/0001-structure.md: contracts in pyproject.toml, and what these cannot say."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from graphlib import CycleError
from pathlib import Path

import pytest
from architecture import direct, edges, imports, layers, modules

ROOT = Path(__file__).parents[2]
BAD = {  # file -> an import that one contract forbids
    "evaluation/runs.py": "from sape2.cli.output import say",
    "encodings/rotary.py": "from sape2.encodings.sape2 import SaPE2",
    "attention/module.py": "from sape2.encodings.cope import Cope",
    "evaluation/shift.py": "from sape2.models.vit import ViT",
    "encodings/grid.py": "def f():\n    from sape2 import reference",
    "cli/commands/train.py": "from sape2.cli.commands.compare import run",
    "studies/compare/paired.py": "from sape2.studies.compare.rawrows import raw_row",
}
OPTIONAL = {
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "accelerate",
    "datasets",
    "pyarrow",
    "sklearn",
    "matplotlib",
    "resvg_py",
    "torchmetrics",
    "tensorboard",
    "transformers",
    "gradio",
    "jinja2",
    "fastapi",
    "starlette",
    "uvicorn",
    "faster_coco_eval",
    "submitit",
}


def uses_detection_models(tree: ast.AST) -> bool:
    """Whether torchvision's detectors are imported."""
    froms = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return any(name.startswith("torchvision.models.detection") for name in froms | plain)


def broken_contracts(sources: Path) -> set[str]:
    """Ids of the contracts of pyproject.toml that the package in `sources` breaks."""
    lint = "from importlinter.cli import lint_imports as lint; raise SystemExit(lint('pyproject.toml', no_cache=True))"
    command, environment = [sys.executable, "-c", lint], os.environ | {"PYTHONPATH": str(sources)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    broken = set(re.findall(r"^(.*) BROKEN$", found.stdout, re.MULTILINE))
    assert bool(broken) == bool(found.returncode), found.stdout + found.stderr
    return {contract["id"] for contract in contracts() if contract["name"] in broken}


def contracts() -> list[dict[str, str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def test_imports_follow_the_rule():
    assert broken_contracts(ROOT / "src") == set()


def test_each_contract_sees_an_import_that_breaks_it(tmp_path):
    shutil.copytree(ROOT / "src" / "sape2", tmp_path / "sape2", ignore=shutil.ignore_patterns("__pycache__", "model"))
    for module, line in BAD.items():
        with (tmp_path / "sape2" / module).open("a") as file:
            file.write(f"\n{line}\n")
    assert broken_contracts(tmp_path) == {contract["id"] for contract in contracts()}


def optional_at_the_top(tree):
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    return {name[1:] for name in imports(top)} & OPTIONAL


def test_optional_libraries_are_imported_inside_functions_only():
    assert {module: names for module, tree in modules() if (names := optional_at_the_top(tree))} == {}


def test_an_optional_library_at_the_top_is_seen():
    assert optional_at_the_top(ast.parse("import accelerate")) == {"accelerate"}


def test_torchvision_detectors_are_imported_in_detection_only():
    users = {name for name, tree in modules() if uses_detection_models(tree)}
    assert users == {"detection.models"}
    assert uses_detection_models(ast.parse("import torchvision.models.detection"))


def bars_that_show_without_a_terminal(tree):
    """Lines of progress bars whose `disable` does not ask whether there is a terminal."""
    names = {
        a.asname or a.name
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module == "rich.progress"
        for a in n.names
    }
    bars = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in names & {"Progress", "Bar"}
    ]
    return [n.lineno for n in bars if not any(k.arg == "disable" and "is_terminal" in ast.unparse(k.value) for k in n.keywords)]


def test_progress_bars_are_for_terminals_only():
    assert {module: lines for module, tree in modules() if (lines := bars_that_show_without_a_terminal(tree))} == {}


def test_a_bar_that_is_always_shown_is_seen():
    code = "from rich.progress import Progress as Bar\nwith Bar(console=console) as bar:\n    pass"
    assert bars_that_show_without_a_terminal(ast.parse(code)) == [2]


def test_no_rooms_import_each_other_in_a_circle():
    assert layers(edges())["config"] == 0
    with pytest.raises(CycleError):
        layers({("models", "evaluation"): 1, ("evaluation", "models"): 1})


def test_imports_of_a_folder_by_its_name_count():
    assert edges()["studies", "viz"] >= 1  # written as "from sape2 import viz"


def test_an_arrow_that_others_stand_for_is_left_out_of_the_picture():
    assert direct({("cli", "data"): 1, ("data", "config"): 2, ("cli", "config"): 9}) == {
        ("cli", "data"): 1,
        ("data", "config"): 2,
    }
