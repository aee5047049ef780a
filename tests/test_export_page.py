"""The examples of docs/export.md run as they stand, from the first block to the last, and its commands exist."""

import re
from pathlib import Path

import pytest

from sape2.cli import build_parser

TEXT = (Path(__file__).parent.parent / "docs" / "export.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch, as_users_call_it):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["logits"].shape == (2, 10)


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines()])
def test_the_commands_are_ones_that_sape2_knows(line):
    build_parser().parse_args(line.partition("#")[0].split()[1:])
