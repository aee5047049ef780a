"""The import rule of docs/decisions/0001-structure.md, read off the source."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "sape2"

# Which of our modules each module may import at the top or inside functions. A folder stands for its files, unless they
# are named themselves.
ALLOWED = {
    "__init__": {"adapters", "encodings", "export", "frozen", "vit"},  # names looked up when first used
    "config": set(),
    "grid": set(),
    "bias": {"grid"},
    "reference": set(),
    "report": set(),
    "files": set(),
    "shortage": {"config"},
    "viz": {"files", "viz"},
    "encodings": {"grid", "bias", "encodings.base"},
    "attention": {"grid", "encodings.base"},
    "vit": {"config", "grid", "encodings", "attention", "hub"},
    "hub": {"checkpoint", "config", "files"},
    "frozen": set(),
    "export": {"checkpoint", "config", "frozen", "hub", "runs", "files"},
    "adapters": {"adapters", "files", "grid", "bias", "encodings", "attention"},
    "data": {"config", "data"},
    "augment": {"config", "data"},
    "checkpoint": {"config", "files"},
    "costing": set(),
    "costing.rows": {"evaluation"},
    "costing.subjects": {"attention", "config", "encodings", "evaluation", "grid", "vit"},
    "costing.sweep": {"config", "costing.rows", "costing.subjects", "encodings", "evaluation", "files", "grid", "shortage"},
    "runs": {"augment", "config", "checkpoint", "data", "evaluation", "shortage", "vit", "viz"},
    "probing": {"augment", "checkpoint", "config", "encodings", "probes", "report", "runs", "train", "vit", "viz"},
    "probes": {"probes", "grid"},
    "explain": {"checkpoint", "config", "data", "evaluation", "grid", "report", "runs", "viz", "files"},
    "explore": {
        "attention",
        "checkpoint",
        "config",
        "data",
        "encodings",
        "evaluation",
        "explore",
        "grid",
        "runs",
        "vit",
        "viz",
    },
    "comparison": set(),
    "comparison.headlines": {"checkpoint", "config"},
    "comparison.groups": {"comparison.headlines"},
    "comparison.tables": {"comparison.groups", "comparison.headlines", "report", "viz", "files"},
    "comparison.paired": set(),
    "comparison.rawrows": {"checkpoint", "comparison.headlines", "config", "evaluation", "runs", "vit", "files"},
    "comparison.outcome": {
        "checkpoint",
        "comparison.groups",
        "comparison.paired",
        "comparison.rawrows",
        "comparison.tables",
        "report",
        "viz",
        "files",
    },
    "train": {"augment", "config", "checkpoint", "data", "encodings", "processes", "sharding"},
    "processes": set(),
    "sharding": set(),
    "claim": set(),
    "running": {
        "checkpoint",
        "claim",
        "config",
        "data",
        "evaluation",
        "files",
        "processes",
        "runs",
        "shortage",
        "train",
        "vit",
    },
    "study": set(),
    "study.plan": {"checkpoint", "comparison.rawrows", "config", "files"},
    "study.work": {"checkpoint", "claim", "comparison.rawrows", "study.plan"},
    "study.progress": {"checkpoint", "claim", "comparison.rawrows", "study.plan", "study.work"},
    "recipes": {"config", "detection.settings", "recipes"},
    "detection": {
        "augment",
        "checkpoint",
        "config",
        "detection",
        "encodings",
        "grid",
        "processes",
        "runs",
        "shortage",
        "train",
        "vit",
        "files",
    },
    "evaluation": {"evaluation", "grid", "shortage"},
    "__main__": {"cli"},
    "cli": {"commands"},
}
SHARED = {"commands.options", "commands.output"}  # by all commands
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
    "torchmetrics",
    "tensorboard",
    "transformers",
    "gradio",
    "fastapi",
    "starlette",
    "uvicorn",
    "faster_coco_eval",
}


def imports(tree: ast.AST) -> set[str]:
    """Everything imported below the package, as "encodings.base"; other packages by their first name, marked "!"."""
    found = set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "sape2":
                names = [f"sape2.{alias.name}" for alias in node.names]
        for name in names:
            inside = name == "sape2" or name.startswith("sape2.")
            found.add(name.removeprefix("sape2").removeprefix(".") if inside else "!" + name.split(".")[0])
    return found


def broken_rules(module: str, tree: ast.AST) -> set[str]:
    """Imports of ours that `module` ("encodings.sape2") must not have."""
    folder = module.split(".")[0]
    ours = {name for name in imports(tree) if name and not name.startswith("!")}
    if folder == "commands":  # they join everything but each other, which only their __init__ does
        own = {"commands"} if module == "commands" else SHARED
        return {name for name in ours if name.split(".")[0] in ("cli", "commands")} - own
    allowed = ALLOWED.get(module, ALLOWED[folder])
    if module == "encodings":  # its __init__ joins the members
        allowed = allowed | {"encodings"}
    return {name for name in ours if name not in allowed and name.split(".")[0] not in allowed}


def uses_detection_models(tree: ast.AST) -> bool:
    """Whether torchvision's detectors are imported."""
    froms = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return any(name.startswith("torchvision.models.detection") for name in froms | plain)


def modules() -> list[tuple[str, ast.AST]]:
    result = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        result.append((name, ast.parse(path.read_text())))
    return result


@pytest.mark.parametrize(("module", "tree"), modules(), ids=[name for name, _ in modules()])
def test_imports_follow_the_rule(module, tree):
    assert broken_rules(module, tree) == set()


@pytest.mark.parametrize(("module", "tree"), modules(), ids=[name for name, _ in modules()])
def test_optional_libraries_are_imported_inside_functions_only(module, tree):
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    assert {name[1:] for name in imports(top)} & OPTIONAL == set()


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("grid", "from sape2.config import RunConfig"),
        ("encodings.rotary", "from sape2.encodings.sape2 import SaPE2"),
        ("attention", "import sape2.encodings"),
        ("evaluation.shift", "from sape2.cli import main"),
        ("runs", "from sape2.commands.output import say"),
        ("commands.train", "from sape2.commands.compare import run"),
        ("commands.train", "from sape2.commands import compare"),
        ("commands.options", "from sape2.cli import main"),
        ("cli", "from sape2.train import train"),
        ("comparison.paired", "from sape2.comparison.rawrows import raw_row"),
        ("comparison.rawrows", "from sape2.study.plan import Study"),
        ("study.new", "from sape2.study.plan import Study"),
        ("costing.rows", "from sape2.vit import ViT"),
        ("reference", "def f():\n    from sape2 import grid"),
    ],
)
def test_the_checker_sees_a_broken_rule(module, code):
    assert broken_rules(module, ast.parse(code))


def test_torchvision_detectors_are_imported_in_detection_only():
    users = {name for name, tree in modules() if uses_detection_models(tree)}
    assert users == {"detection.models"}
    assert uses_detection_models(ast.parse("import torchvision.models.detection"))
