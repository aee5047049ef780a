"""Checks of how the pages are written: short sentences, wrapped lines, a first paragraph that says what the reader gets.

Command:  python docs/prose_checks.py [PAGE ...]      (every page if none is named; status 1 and one line for each fault)

Code, formulas, alternative texts of images and the addresses of links are no prose: `code` and a formula count as one word
each, a link as the words of its text. Titles and captions count.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
WORDS_IN_SENTENCE, WORDS_IN_CELL, CHARACTERS_IN_LINE = 30, 25, 120
# What a page under docs/ begins with, right after its title; pages of two folders have a second way.
OPENING = "After this page you"
OTHER_OPENINGS = {"reference": "Look up", "decisions": "Decision:"}
CELLS = {"th_open", "td_open"}
UNWRAPPED = {"fence", "code_block", "table_open", "html_block", "heading_open"}


def pages() -> list[Path]:
    """Every page that the rules hold for."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def faults(page: Path) -> list[str]:
    """One line for everything on a page that breaks a rule; lines are counted from 1."""
    text = without_front_matter(page.read_text(encoding="utf-8"))
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [*long_sentences(tokens), *long_cells(tokens), *long_lines(text, tokens), *bad_opening(page, tokens)]


def without_front_matter(text: str) -> str:
    """The text with the lines of its front matter emptied, so that lines keep their numbers."""
    return re.sub(r"\A---\n.*?^---$", lambda found: "\n" * found[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)


# --- sentences and cells ---------------------------------------------------------------------------------------------


def words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def sentences(prose: str) -> list[str]:
    """A sentence ends with . ! or ? before a space and anything but a small letter, which would follow an abbreviation."""
    return re.split(r"(?<=[.!?])[\"')\]]*\s+(?![a-z])", prose)


def prose_of(inline: Token) -> str:
    """The words of a paragraph or cell as a reader sees them, `code` and formulas as one word."""
    parts = []
    for child in inline.children or []:
        if child.type == "code_inline":
            parts.append("CODE")
        elif child.type == "softbreak":
            parts.append(" ")
        elif child.type == "text":
            parts.append(child.content)
    return re.sub(r"\$[^$]+\$", "FORMULA", re.sub(r"\$\$.*?\$\$", "", "".join(parts)))


def inlines(tokens: list[Token]) -> Iterator[tuple[Token, str, int]]:
    """(contents, what they are in, line) of every paragraph, title and cell."""
    line = 0
    for before, token in pairwise(tokens):
        line = token.map[0] + 1 if token.map else line
        if token.type == "inline":
            yield token, before.type, line


def long_sentences(tokens: list[Token]) -> list[str]:
    prose = [(line, prose_of(inline)) for inline, kind, line in inlines(tokens) if kind not in CELLS]
    return [
        f"line {line}: a sentence of {words(sentence)} words: {sentence[:60]}..."
        for line, paragraph in prose
        for sentence in sentences(paragraph)
        if words(sentence) > WORDS_IN_SENTENCE
    ]


def long_cells(tokens: list[Token]) -> list[str]:
    cells = [(line, prose_of(inline)) for inline, kind, line in inlines(tokens) if kind in CELLS]
    long = [(line, cell) for line, cell in cells if words(cell) > WORDS_IN_CELL]
    return [f"line {line}: a table cell of {words(cell)} words: {cell[:60]}..." for line, cell in long]


# --- lines and the opening -------------------------------------------------------------------------------------------


def long_lines(text: str, tokens: list[Token]) -> list[str]:
    """Lines that could be broken at a space and are not; tables, code and titles cannot."""
    exempt = {line for token in tokens if token.type in UNWRAPPED and token.map for line in range(*token.map)}
    lines = enumerate(text.splitlines())
    long = [(n, line) for n, line in lines if len(line) > CHARACTERS_IN_LINE and n not in exempt and can_be_broken(line)]
    return [f"line {n + 1}: {len(line)} characters: {line[:60]}..." for n, line in long]


def can_be_broken(line: str) -> bool:
    """Whether a space stands outside of images, `code`, formulas and addresses, after the mark of a list."""
    one_piece = re.sub(r"!\[[^\]]*\]\([^)]*\)|`[^`]*`|\$[^$]+\$|\]\([^)]*\)", "x", line)
    return " " in re.sub(r"^\s*([-*+>]|\d+\.)\s+", "", one_piece).strip()


def bad_opening(page: Path, tokens: list[Token]) -> list[str]:
    """A page under docs/ begins with its title and a sentence that says what the reader can do after it."""
    if "docs" not in page.parts:
        return []
    folder = page.parent.name
    allowed = (OPENING, OTHER_OPENINGS[folder]) if folder in OTHER_OPENINGS else (OPENING,)
    kinds = [token.type for token in tokens[:4]]
    if kinds == ["heading_open", "inline", "heading_close", "paragraph_open"] and prose_of(tokens[4]).startswith(allowed):
        return []
    return [f"line 1: after the title the page does not begin with {' or '.join(map(repr, allowed))}"]


def main() -> int:
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or pages()
    found = [f"{page.relative_to(ROOT)}, {fault}" for page in chosen for fault in faults(page)]
    print("\n".join(found) or f"nothing to say about {len(chosen)} pages")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
