"""The examples of docs/hosts run as they stand, each page from its first block to its last."""

from pathlib import Path

import pytest
from site_checks import code_blocks

PAGES = sorted((Path(__file__).parents[2] / "docs" / "hosts").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    if "from peft import" in text:
        pytest.importorskip("peft")
    blocks = code_blocks(text, "python")
    assert blocks
    names = {}
    for block in blocks:
        exec(block, names)


def test_there_is_a_page_for_every_host():
    assert {page.stem for page in PAGES} == {
        "README",
        "timm",
        "transformers",
        "torchvision",
        "pytorch",
        "trainer_accelerate_lora",
    }
