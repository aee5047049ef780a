"""The examples of docs/hosts run as they stand, each page from its first block to its last."""

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parent.parent / "docs" / "hosts").glob("*.md"))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert blocks(page)
    names = {}
    for block in blocks(page):
        exec(block, names)


def test_there_is_a_page_for_every_host():
    assert {page.stem for page in PAGES} == {"README", "timm", "transformers", "torchvision", "pytorch"}
