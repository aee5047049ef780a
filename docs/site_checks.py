"""Checks of pages: links of Markdown files, and of the site that is built from them.

Command:  python docs/site_checks.py build/site      (status 1 and one line for each fault)

A built page must lead nowhere that is not there, and must load nothing from another host: no script, style, font, image or
frame. Links that a reader may follow to other hosts are fine and not followed.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# --- Markdown --------------------------------------------------------------------------------------------------------


def code_blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    """The text without fenced blocks and without `code`."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as GitHub and MyST make them."""
    fenced = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6}\s+(.*?)\s*$", fenced, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links, anchors and images of a Markdown page that lead nowhere."""
    text = without_code(page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in targets if not urlsplit(target).scheme and not _leads_somewhere(page, target)]


def _leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = unquote(target).partition("#")
    goal = page.parent / path if path else page
    if not goal.exists():
        return False
    return not anchor or goal.suffix != ".md" or anchor in anchors(goal.read_text(encoding="utf-8"))


# --- the built site --------------------------------------------------------------------------------------------------

LOADED = {"src", "srcset", "data", "poster", "background"}  # attributes whose address a browser fetches by itself
HARMLESS_LINKS = {"canonical", "license", "search", "prev", "next", "author", "help", "index"}  # relations that load nothing


@dataclass
class Page(HTMLParser):
    """What a built page loads, where it leads, and which anchors it has."""

    loads: list[str] = field(default_factory=list)
    leads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    style: list[str] = field(default_factory=list)
    tag: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.tag = tag
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.style.append(given.get("style", ""))
        for name in LOADED & given.keys():
            self.loads += [each.split()[0] for each in given[name].split(",")] if name == "srcset" else [given[name]]
        if tag == "link" and given.get("rel", "").lower() not in HARMLESS_LINKS:
            self.loads.append(given.get("href", ""))
        if tag == "a" and "href" in given:
            self.leads.append(given["href"])

    def handle_data(self, data: str) -> None:
        if self.tag == "style":
            self.style.append(data)


def addresses_in_css(css: str) -> list[str]:
    """What a style sheet loads."""
    bare = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    found = re.findall(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""", bare)
    return [first or second for first, second in found]


def is_elsewhere(address: str) -> bool:
    """Whether loading the address would ask another host."""
    parts = urlsplit(address.strip())
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp", "ws", "wss")


def faults(site: Path) -> list[str]:
    """One line for everything that a built site loads from elsewhere, and for every link within it that leads nowhere."""
    pages = {path.resolve(): read_page(path) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site} holds no page"]
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        css = [address for style in page.style for address in addresses_in_css(style)]
        found += [f"{name} loads {address} from elsewhere" for address in [*page.loads, *css] if is_elsewhere(address)]
        here = [address for address in page.loads if address and not is_elsewhere(address)]
        found += [
            f"{name} leads to {address}, which is not there"
            for address in [*page.leads, *here]
            if _missing(path, address, pages)
        ]
    for path in sorted(site.rglob("*.css")):
        loaded = addresses_in_css(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site)} loads {address} from elsewhere" for address in loaded if is_elsewhere(address)]
    return found


def read_page(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def _missing(path: Path, address: str, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return False
    goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    goal = goal / "index.html" if goal.is_dir() else goal
    if not goal.exists():
        return True
    return bool(parts.fragment) and goal in pages and unquote(parts.fragment) not in pages[goal].anchors


def main() -> int:
    found = faults(Path(sys.argv[1]))
    print("\n".join(found) or "every link leads somewhere, and nothing is loaded from elsewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
