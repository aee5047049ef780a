"""The README's Python blocks run, and what it says of make and of the tree is so. Links and commands: test_docs.py."""

import subprocess
from pathlib import Path

from site_checks import code_blocks

from sape2.runs.rows import read_rows

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


def times_the_memory_of_ape(rows, encoding, precision):
    """Of a training step, from the rows of a study."""
    memory = {(row["encoding"], row["precision"]): row["step_memory_mib"] for row in rows if row["step_memory_mib"]}
    return f"{memory[encoding, precision] / memory['ape', precision]:.2f}"


def test_the_memory_of_a_training_step_is_that_of_the_rows():
    short, glance = (read_rows(ROOT / "benchmarks" / "results" / f"cifar10_{name}.jsonl") for name in ("short", "glance"))
    columns = [(short, "bf16"), (short, "fp32"), (glance, "fp32")]
    page = (ROOT / "docs" / "cost.md").read_text().split("### Memory of a training step")[1]
    for encoding in ("ape+sape2", "ape+sape2:readout=direct"):
        cells = " | ".join(times_the_memory_of_ape(rows, encoding, precision) for rows, precision in columns)
        assert f"| {encoding} | {cells} |" in page
    bf16, fp32 = (round(float(times_the_memory_of_ape(rows, "ape+sape2", precision)), 1) for rows, precision in columns[:2])
    (row,) = [line for line in README.splitlines() if line.startswith("| What does a training step cost?")]
    assert f"memory {fp32} times, in bf16 {bf16}" in row


def test_make_demo_says_what_it_fetches_and_lets_pip_show_how_far_it_is(tmp_path):
    planned = subprocess.run(
        ["make", "-n", "demo", f"VENV={tmp_path / 'environment'}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    installs = [line for line in planned.splitlines() if "pip install" in line and "--upgrade pip" not in line]
    assert len(installs) == 2
    assert not any(" -q" in line for line in installs)
    said = [line for line in planned.splitlines() if line.startswith("echo")]
    assert any("torch" in line and "environment" in line for line in said)
    assert any("6 GB" in line for line in said)
    assert planned.index(said[0]) < planned.index(installs[0])


def test_the_two_commands():
    lines = [line for block in code_blocks(README, "bash") for line in block.splitlines() if line.startswith("make")]
    assert {line.split()[1] for line in lines} == {"demo", "test"}


def test_the_tree_has_every_file_of_the_package():
    """Files by name, folders with a slash; those of `__init__` and the version are left out."""
    (tree,) = [block for block in code_blocks(README, "") if block.startswith("src/sape2/")]
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "src" / "sape2").iterdir() if not path.name.startswith("_")}
    named = {line.split()[0] for line in tree.splitlines()[1:]}
    assert there - named == set()
    assert named - there == set()
