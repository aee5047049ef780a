"""Names that people write: suggests the known name closest to an unknown one, and formats names as text for tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

LIKENESS = 0.7  # of `difflib`: "trane" is 0.8 like "train", "vit_tiny" 0.6 like "vit_nano"


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """At most `count` of the known names that look like it or begin with it, the best first; case does not matter."""
    spelled = {other.lower(): other for other in known}
    begun = [other for other in spelled if name and other.startswith(name.lower())]
    close = get_close_matches(name.lower(), spelled, n=count, cutoff=LIKENESS)
    return [spelled[other] for other in dict.fromkeys([*close, *begun])][:count]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to put before the known names, with a space after it; "" if none is near."""
    near = nearest(name, known)
    return f"did you mean {near[0]}? " if near else ""


def unknown(what: str, name: str, known: Iterable[str], note: str = "") -> ValueError:
    """The error of a name that is not known: what was meant, what is known, and a note behind that."""
    known = list(known)
    return ValueError(f"unknown {what} {name!r}; {did_you_mean(name, known)}known {what}s: {', '.join(known)}{note}")


def cell(value: object) -> str:
    """Text that stays in its cell of a Markdown table: one line, without a bar that ends it or a tag."""
    text = re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(value).split()))
    return re.sub(r"<(?=[A-Za-z/!])", "&lt;", text)
