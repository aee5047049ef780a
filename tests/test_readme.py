"""The README's Python blocks run, and its commands and links exist."""

import re
from pathlib import Path

import pytest

from sape2.cli import build_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["y"].shape == (2, 197, 384)
    assert names["bias"].shape == (1, 6, 64, 64)
    assert (tmp_path / "adapter" / "adapter.safetensors").exists()
    assert len(blocks("python")) == 3


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if line.startswith("sape2")])
def test_the_commands_are_ones_that_sape2_knows(line):
    build_parser().parse_args(line.partition("#")[0].split()[1:])


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make")}
    assert targets == {"demo", "test"}
    assert all(f"\n{target}:" in makefile for target in targets)


def broken_links(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    return [target for target in targets if "://" not in target and not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    assert broken_links(page) == []


def test_the_link_checker_sees_a_broken_link(tmp_path):
    (tmp_path / "page.md").write_text("[here](page.md) [nowhere](missing.md) [away](https://example.org)")
    assert broken_links(tmp_path / "page.md") == ["missing.md"]
