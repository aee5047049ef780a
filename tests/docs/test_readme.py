"""The README's Python blocks run, and what it says of make and of the tree is so. Links and commands: test_docs.py."""

from pathlib import Path

from site_checks import code_blocks

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in code_blocks(README, "python"):
        exec(block, names)
    assert names["y"].shape == (2, 197, 384)
    assert names["bias"].shape == (1, 6, 64, 64)
    assert (tmp_path / "adapter" / "adapter.safetensors").exists()
    assert len(code_blocks(README, "python")) == 2


def test_the_two_commands():
    lines = [line for block in code_blocks(README, "bash") for line in block.splitlines() if line.startswith("make")]
    assert {line.split()[1] for line in lines} == {"demo", "test"}


def test_the_tree_has_every_file_of_the_package():
    """Files by name, folders with a slash; those of `__init__` and the version are left out."""
    (tree,) = [block for block in code_blocks(README, "") if block.startswith("src/sape2/")]
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "src" / "sape2").iterdir() if not path.name.startswith("__")}
    named = {line.split()[0] for line in tree.splitlines()[1:]}
    assert there - named == set()
    assert named - there == set()
