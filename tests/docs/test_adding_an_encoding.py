"""docs/adding_an_encoding.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding_an_encoding.md"


def blocks() -> list[tuple[str, list[str], str]]:
    """(language, further words, text) of every code block of the page."""
    found = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [(language, words.split(), text) for language, words, text in found]


def apply(root: Path, language: str, words: list[str], text: str) -> None:
    """Does to the copy what a block says: a new file, text at the end of a file, or lines after a line that is there."""
    path = root / words[-1]
    if language == "diff":
        place, *added = text.splitlines()
        assert place.startswith(" ")
        assert all(line.startswith("+") for line in added)
        assert path.read_text().splitlines().count(place[1:]) == 1, f"{place[1:]!r} stands once in {words[-1]}"
        new = "\n".join([place[1:], *(line[1:] for line in added)])
        path.write_text(path.read_text().replace(f"{place[1:]}\n", f"{new}\n"))
    elif words[0] == "new":
        assert not path.exists()
        path.write_text(text)
    else:
        assert words[0] == "append"
        path.write_text(path.read_text() + text)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in ("src", "tests", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


ONLY = """
from importlib.machinery import PathFinder

class Find:  # no function, which pytest would make a method of its own finder
    find_spec = PathFinder.find_spec

    def __call__(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked} else self.find_spec(name, path, target)

PathFinder.find_spec = Find()
"""


def with_pytest_alone(root: Path) -> None:
    """From here on the copy runs as after the `pip install -e . pytest` of the page: without any extra."""
    assert "`pip install -e . pytest`" in PAGE.read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = {
        re.split(r"[<>=\[ ]", line)[0] for extra in project["project"]["optional-dependencies"].values() for line in extra
    }
    tests = {re.split(r"[<>=\[ ]", line)[0] for line in project["dependency-groups"]["test"]} - {"pytest", "pytest-xdist"}
    names = {name.replace("-", "_") for name in extras | tests} - {"pillow"} | {"sklearn"}
    (root / "src" / "sitecustomize.py").write_text(ONLY.replace("{blocked}", repr(sorted(names))))


def run(command: str, root: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(root / "src"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # those of other test libraries, which are here by chance
    }
    return subprocess.run(command, shell=True, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_page_leads_to_an_encoding_that_passes_every_check(copy: Path) -> None:
    edits = [block for block in blocks() if block[0] in ("python", "diff")]
    assert [words[-1] for _, words, _ in edits] == [
        "src/sape2/encodings/gravity.py",
        "src/sape2/encodings/__init__.py",  # its import
        "src/sape2/encodings/__init__.py",  # its line
        "src/sape2/reference.py",
        "docs/method.md",
    ]
    for block in edits:
        apply(copy, *block)
    with_pytest_alone(copy)
    (check,) = [text for language, _, text in blocks() if language == "bash"]
    tests, example = (run(command, copy) for command in check.splitlines())
    assert tests.returncode == 0, tests.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", tests.stdout)[1]) > 15 + len(blocks())
    assert example.stdout.strip() == "Gravity(scale=2.0)", example.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("Facts(translation=True, flip=True)", "Facts(translation=True)", "flip is declared False"),
        ("full_precision(self.weight)[:", "(full_precision(self.weight) * q.mean())[:", "content_dependent"),
    ],
)
def test_a_wrong_fact_on_the_page_would_be_found(copy: Path, right: str, wrong: str, said: str) -> None:
    """The same steps with `flip` not declared, or with content read and not declared, fail: the check means something."""
    assert PAGE.read_text().count(right) == 1
    for language, words, text in blocks():
        if language in ("python", "diff"):
            apply(copy, language, words, text.replace(right, wrong))
    tests = run("python -m pytest tests/encodings/test_encoding_facts.py -q -k gravity", copy)
    assert tests.returncode == 1
    assert said in tests.stdout
