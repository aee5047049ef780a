"""The examples of docs/export.md run as they stand, from the first block to the last."""

from pathlib import Path

import pytest
from site_checks import code_blocks

TEXT = (Path(__file__).parents[2] / "docs" / "export.md").read_text()


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch, as_users_call_it):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in code_blocks(TEXT, "python"):
        exec(block, names)
    assert names["logits"].shape == (2, 10)
