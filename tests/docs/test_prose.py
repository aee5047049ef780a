"""How the pages are written: the rules of docs/prose_checks.py on every page, and on pages that are known to break them."""

from pathlib import Path
from textwrap import fill

import pytest
from prose_checks import faults, pages

ROOT = Path(__file__).parents[2]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_a_page_is_written_by_the_rules(page):
    assert faults(page) == []


def written(folder: Path, body: str, name: str = "docs/page.md") -> Path:
    page = folder / name
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(body)
    return page


GOOD = "# Title\n\nAfter this page you can read.\n\n"
THIRTY = " ".join(["word"] * 30)
LONG = " ".join(["word"] * 31)


@pytest.mark.parametrize(
    "body",
    [
        fill(f"{THIRTY.capitalize()}. {THIRTY.capitalize()}."),
        "`" + LONG.replace(" word word word", "\nword word word") + "` is one word.",
        fill("[one](https://example.org/a-long-address) " + " ".join(["word"] * 28) + " end."),
        "![" + LONG + "](image.png)",
        "```bash\n" + LONG + "\n```",
        "| head |\n|---|\n| " + " ".join(["word"] * 25) + " |",
        "- [" + "x" * 60 + "](" + "y" * 80 + ".md)",
        "$" + LONG + "$",
    ],
    ids=["two sentences", "code", "link", "alternative text", "block", "cell", "link that cannot be broken", "formula"],
)
def test_the_checker_has_nothing_to_say_about_what_keeps_the_rules(tmp_path, body):
    assert faults(written(tmp_path, GOOD + body + "\n")) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (fill(f"{LONG}."), "a sentence of 31 words"),
        (fill(f"*{LONG}.*"), "a sentence of 31 words"),
        (fill(f"- {LONG}."), "a sentence of 31 words"),
        (fill(f"Some e.g. {LONG}."), "a sentence of 33 words"),
        (fill(f"[{LONG}](page.md)"), "a sentence of 31 words"),
        ("| head |\n|---|\n| " + " ".join(["word"] * 26) + " |", "a table cell of 26 words"),
        ("Word. " * 30, "characters"),
    ],
    ids=["sentence", "caption", "item", "abbreviation", "text of a link", "cell", "line"],
)
def test_the_checker_finds_what_breaks_a_rule(tmp_path, body, fault):
    (found,) = faults(written(tmp_path, GOOD + body + "\n"))
    assert fault in found


def test_the_checker_names_the_line(tmp_path):
    (found,) = faults(written(tmp_path, "---\nkey: value\n---\n" + GOOD + "Word. " * 30 + "\n"))
    assert found.startswith("line 8:")


@pytest.mark.parametrize(
    ("name", "body", "is_right"),
    [
        ("docs/page.md", "# Title\n\nAfter this page you can read.\n", True),
        ("docs/page.md", "# Title\n\nThis page is about reading.\n", False),
        ("docs/page.md", "# Title\n\n## Another\n\nAfter this page you can read.\n", False),
        ("docs/page.md", "After this page you can read.\n", False),
        ("docs/page.md", "# Title\n", False),
        ("docs/page.md", "# Title\n\nLook up a function.\n", False),
        ("docs/reference/page.md", "# Title\n\nLook up a function.\n", True),
        ("docs/decisions/page.md", "# Title\n\nDecision: one block.\n", True),
        ("README.md", "# Title\n\nAnything.\n", True),
    ],
)
def test_a_page_under_docs_begins_with_what_the_reader_can_do_after_it(tmp_path, name, body, is_right):
    assert (faults(written(tmp_path, body, name)) == []) is is_right
