"""The import rule of docs/decisions/0001-structure.md, read off the source."""

import ast
from graphlib import CycleError

import pytest
from architecture import direct, edges, imports, layers, modules

# Which of our modules each module may import at the top or inside functions. A folder stands for its files, unless they
# are named themselves.
ALLOWED = {
    "__init__": {"adapters", "encodings", "models.export", "models.frozen", "models.vit"},  # names looked up when first used
    "config": {"config"},
    "reference": set(),
    "machine": set(),
    "progress": set(),
    "encodings": {
        "config.names", "encodings.base", "encodings.bias", "encodings.content", "encodings.counting", "encodings.derivatives",
        "encodings.distances", "encodings.grid", "encodings.names", "encodings.options", "encodings.precision",
        "encodings.resample",
    },
    "encodings.sape2": {
        "encodings.base", "encodings.bias", "encodings.content", "encodings.counting", "encodings.distances", "encodings.grid",
        "encodings.options", "encodings.precision", "encodings.sape2_options",
    },
    "encodings.sape2_options": {"encodings.base", "encodings.counting"},
    "encodings.content": {"encodings.grid", "encodings.precision"},
    "encodings.counting": {"encodings.counting", "encodings.derivatives", "encodings.precision"},
    "encodings.derivatives": set(),
    "encodings.distances": {"encodings.bias", "encodings.derivatives"},
    "encodings.grid": set(),
    "encodings.names": set(),
    "encodings.options": {"config.names", "config.options"},
    "encodings.precision": set(),
    "encodings.resample": {"encodings.grid", "encodings.precision"},
    "encodings.bias": {"encodings.grid", "encodings.precision"},
    "attention": {
        "attention", "encodings.base", "encodings.bias", "encodings.content", "encodings.derivatives", "encodings.grid",
        "encodings.precision",
    },
    "attention.kernels": {
        "attention.kernels", "attention.paths", "attention.products", "encodings.bias", "encodings.content",
        "encodings.distances", "encodings.grid", "encodings.precision",
    },
    "models": set(),
    "models.vit": {"attention", "config", "encodings", "models"},
    "models.hub": {"config", "data.decoding", "training.checkpoint", "training.run_folder", "training.files"},
    "models.frozen": set(),
    "models.trained": {"config", "data", "machine", "models.vit", "training"},
    "models.export": {
        "config", "models.trained", "models.frozen", "models.hub", "tables", "training.run_folder", "training.files",
    },
    "adapters": {"adapters", "attention", "encodings", "training.files"},
    "data": {"config", "data"},
    "training": set(),
    "training.files": set(),
    "training.processes": {"machine"},
    "training.sharding": set(),
    "training.lock": set(),
    "training.memory_errors": {"config"},
    "training.checkpoint": {"training.files"},
    "training.run_folder": {"config", "encodings", "tables", "training.checkpoint", "training.files"},
    "training.accelerator": {"machine", "training.processes"},
    "training.optimisation": {"config", "encodings.base"},
    "training.interruption": {"progress", "training.checkpoint"},
    "training.weights": {
        "config", "training.accelerator", "training.checkpoint", "training.optimisation", "training.processes",
        "training.sharding",
    },
    "training.record": {"config", "training.checkpoint", "training.run_folder"},
    "training.loop": {"config", "data", "encodings", "machine", "training"},
    "training.standing": {"config", "training.checkpoint", "training.run_folder"},
    "evaluation": {"data.images", "encodings.grid", "evaluation", "tables", "training.memory_errors"},
    "evaluation.predictions": {
        "data", "evaluation", "models.trained", "training.run_folder", "training.memory_errors",
    },
    "tables": {"config.names"},
    "evaluation.runs": {
        "config", "data", "evaluation", "machine", "models.trained", "tables", "training.run_folder",
        "training.memory_errors",
    },
    "evaluation.cost.subjects": {"attention", "config", "encodings", "evaluation", "models.vit"},
    "evaluation.cost.sweep": {
        "config", "encodings", "evaluation", "training.files", "training.memory_errors",
    },
    "studies": set(),
    "studies.run": {"config", "data", "evaluation", "machine", "models", "training"},
    "studies.probing": {
        "config", "data.augment", "encodings", "evaluation", "machine", "models.vit", "studies.compare.summary",
        "studies.probes", "tables", "training", "viz",
    },
    "studies.probes": {"config.names", "encodings.grid", "studies.probes"},
    "studies.compare": set(),
    "studies.compare.headlines": {"config", "tables", "training.run_folder"},
    "studies.compare.groups": {"config", "studies.compare.headlines", "studies.compare.summary", "training.run_folder"},
    "studies.compare.report": {
        "studies.compare.groups", "studies.compare.headlines", "studies.compare.summary", "tables", "training.files",
        "training.run_folder", "viz",
    },
    "studies.compare.paired": set(),
    "studies.compare.summary": {"studies.compare.paired", "tables"},
    "studies.compare.rawrows": {
        "config", "evaluation", "models.vit", "studies.compare.headlines", "training.run_folder", "training.files",
    },
    "studies.compare.outcome": {
        "studies.compare.paired", "studies.compare.rawrows", "studies.compare.summary", "studies.compare.report", "tables",
        "training.run_folder", "training.files", "viz",
    },
    "studies.compare.plan": {"config", "encodings", "studies.compare.rawrows", "training.run_folder", "training.files"},
    "studies.compare.work": {"studies.compare.plan", "studies.compare.rawrows", "training.checkpoint", "training.lock"},
    "studies.compare.runner": {
        "data", "models.trained", "studies.compare.plan", "studies.compare.work", "studies.run", "training.checkpoint",
        "training.lock", "training.loop",
    },
    "studies.compare.launch": {
        "data", "studies.compare.plan", "studies.compare.rawrows", "studies.compare.runner", "studies.compare.work",
        "training.checkpoint", "training.files", "training.interruption", "training.lock",
    },
    "studies.compare.progress": {
        "progress", "studies.compare.plan", "studies.compare.rawrows", "studies.compare.work", "training.checkpoint",
        "training.lock",
    },
    "detection": {
        "config", "data", "detection", "encodings", "machine", "models.vit", "progress", "tables", "training",
    },
    "viz": {"training.files", "viz"},
    "inspect": {"encodings.grid", "inspect", "training.files", "viz.base"},
    "inspect.look": {"attention", "encodings", "evaluation.base", "evaluation.layers", "models.vit"},
    "inspect.explanation": {"config", "data", "encodings.grid", "evaluation", "inspect.look", "models.vit", "tables"},
    "inspect.explain": {
        "data", "tables", "inspect", "models.trained", "training.files", "training.run_folder", "training.standing",
        "viz.base",
    },
    "inspect.pictures": {
        "data", "evaluation", "inspect", "models", "training.files", "training.run_folder", "viz",
    },
    "inspect.watched": {"encodings.grid"},
    "inspect.backbone": {"config", "evaluation.base", "inspect.watched", "machine", "models.trained", "training.run_folder"},
    "inspect.positions": {"config", "data", "evaluation", "inspect", "viz.curves"},
    "inspect.explore": {
        "config", "data", "encodings.grid", "evaluation.translation", "evaluation.views", "inspect", "models",
        "training.run_folder", "training.standing",
    },
    "__main__": {"cli"},
    "cli": {"cli.commands", "cli.text", "config.names"},
    "cli.text": set(),
    "cli.catalogue": {"config.options", "tables"},
    "cli.options": {"*"},
    "cli.output": {"*"},
    "cli.commands": {"*"},
}  # fmt: skip
SHARED = {"cli.catalogue", "cli.options", "cli.output"}  # by all commands
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


def within(name: str, rooms: set[str]) -> bool:
    """Whether a module is one of these, or lies in one of them."""
    return any(name == room or name.startswith(room + ".") for room in rooms)


def rule_of(module: str) -> set[str]:
    """What the module itself may import, else what the folder around it may."""
    parts = module.split(".")
    return next(ALLOWED[name] for size in range(len(parts), 0, -1) if (name := ".".join(parts[:size])) in ALLOWED)


def broken_rules(module: str, tree: ast.AST) -> set[str]:
    """Imports of ours that `module` ("encodings.sape2") must not have."""
    ours = {name for name in imports(tree) if name and not name.startswith("!")}
    allowed = rule_of(module)
    if "*" in allowed:  # commands join everything but each other, which only their __init__ does
        own = {"cli.commands"} if module == "cli.commands" else SHARED
        return {name for name in ours if within(name, {"cli"}) and not within(name, own)}
    if module == "encodings":  # its __init__ joins the members
        allowed = allowed | {"encodings"}
    return {name for name in ours if not within(name, allowed)}


def uses_detection_models(tree: ast.AST) -> bool:
    """Whether torchvision's detectors are imported."""
    froms = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return any(name.startswith("torchvision.models.detection") for name in froms | plain)


def test_imports_follow_the_rule():
    assert {module: broken for module, tree in modules() if (broken := broken_rules(module, tree))} == {}


def optional_at_the_top(tree):
    top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    return {name[1:] for name in imports(top)} & OPTIONAL


def test_optional_libraries_are_imported_inside_functions_only():
    assert {module: names for module, tree in modules() if (names := optional_at_the_top(tree))} == {}


def test_an_optional_library_at_the_top_is_seen():
    assert optional_at_the_top(ast.parse("import accelerate")) == {"accelerate"}


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("encodings.grid", "from sape2.config import RunConfig"),
        ("encodings.rotary", "from sape2.encodings.sape2 import SaPE2"),
        ("attention.module", "import sape2.encodings"),
        ("evaluation.shift", "from sape2.cli import main"),
        ("evaluation.runs", "from sape2.cli.output import say"),
        ("cli.commands.train", "from sape2.cli.commands.compare import run"),
        ("cli.commands.train", "from sape2.cli.commands import compare"),
        ("cli.options", "from sape2.cli.commands import train"),
        ("cli", "from sape2.training.loop import train"),
        ("studies.compare.paired", "from sape2.studies.compare.rawrows import raw_row"),
        ("studies.compare.rawrows", "from sape2.studies.compare.plan import Study"),
        ("studies.compare.work", "from sape2.studies.compare.launch import launch"),
        ("studies.compare.new", "from sape2.studies.compare.plan import Study"),
        ("evaluation.cost.rows", "from sape2.models.vit import ViT"),
        ("viz.curves", "from sape2.inspect.explain import explain"),
        ("evaluation.runs", "from sape2 import viz"),
        ("evaluation.layers", "from sape2.inspect.look import look"),
        ("inspect.panels", "from sape2.evaluation.base import Row"),
        ("viz.curves", "from sape2.evaluation.base import Row"),
        ("reference", "def f():\n    from sape2.encodings import grid"),
    ],
)
def test_the_checker_sees_a_broken_rule(module, code):
    assert broken_rules(module, ast.parse(code))


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
