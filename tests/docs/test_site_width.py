"""The built site at the width of a small laptop: no table and no formula has to be scrolled sideways.

SITE names the folder (default build/site, as `make docs` leaves it); skipped where there is none.
"""

import os
from pathlib import Path

import pytest

SITE = Path(os.environ.get("SITE", Path(__file__).parents[2] / "build" / "site"))
TOO_WIDE = """() => [...document.querySelectorAll('.table-wrapper, div.math')]
    .filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.innerText.slice(0, 60))"""
pytestmark = pytest.mark.browser


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    yield page
    page.close()


@pytest.mark.skipif(not SITE.is_dir(), reason="needs the site: make docs")
def test_no_table_or_formula_scrolls_sideways(page):
    found = {}
    for file in sorted(SITE.rglob("*.html")):
        if "_modules" not in file.parts:
            page.goto(file.as_uri())
            found[file.name] = page.evaluate(TOO_WIDE)
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_a_table_that_is_too_wide_is_seen(page):
    cells = "<td>word</td>" * 200
    page.set_content(f"<div class=table-wrapper style='overflow-x: auto'><table><tr>{cells}</tr></table></div>")
    assert len(page.evaluate(TOO_WIDE)) == 1
