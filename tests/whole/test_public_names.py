"""Every name that a package offers in `__all__` can be imported, in a fresh process and with no other import before it."""

import ast
import subprocess
import sys

from architecture import SOURCE

RESOLVE = """
import importlib, os, sys
failed, children = [], []
for package in sys.argv[1:]:
    child = os.fork()  # a process for each, which has the libraries already
    if child == 0:
        try:
            module = importlib.import_module(package)
            for name in module.__all__:
                getattr(module, name)
            os._exit(0)
        except BaseException as error:
            print(f"{package}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
    failed += [package] if os.waitpid(child, 0)[1] else []
sys.exit(len(failed))
"""


def packages():
    """Those whose `__init__` has an `__all__`."""
    found = []
    for path in sorted(SOURCE.rglob("__init__.py")):
        names = [
            getattr(node.targets[0], "id", None) for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)
        ]
        if "__all__" in names:
            found.append(".".join(["sape2", *path.parent.relative_to(SOURCE).parts]))
    return found


def unresolved(names, path, loaded="sys"):
    """What cannot be imported, a line each; `loaded` are libraries, not ours, that every child has from the start."""
    code = f"import sys; sys.path.insert(0, {str(path)!r}); import {loaded}\n{RESOLVE}"
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_every_name_of_every_package_is_there():
    assert {"sape2", "sape2.detection", "sape2.encodings"} <= set(packages())
    assert unresolved(packages(), SOURCE.parent, "timm, torch, torchvision") == []


def test_a_name_whose_home_moved_is_seen(tmp_path):
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "__init__.py").write_text(
        "import importlib\n__all__ = ['Thing']\n\ndef __getattr__(name):\n    importlib.import_module('moved.settings')\n"
    )
    (line,) = unresolved(["moved", "json"], tmp_path)
    assert line.startswith("moved: ModuleNotFoundError")
