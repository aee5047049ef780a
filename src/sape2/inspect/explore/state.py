"""The state of the page, which decides what it shows, and its form in the address."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from sape2.evaluation.translation import Border
from sape2.inspect.look import Patch


@dataclass(frozen=True)
class State:
    """Everything that decides what is shown; it stands in the address of the page.

    `image` is test:NUMBER or upload:KEY; `size` HxW in pixels; `shift` (dy, dx) in pixels, positive down and to the right;
    `opacity` of the maps over the image is in percent; `beside` is what stands in a second column: nothing, head:N,
    layer:N, before (the image before the shift) or run (the other run).
    """

    image: str = "test:0"
    layer: int = 1
    head: int = 1
    patch: Patch = (0, 0)
    other: Patch | None = None
    size: tuple[int, int] = (1, 1)
    shift: tuple[int, int] = (0, 0)
    border: Border = "circular"
    beside: str = "nothing"
    opacity: int = 60

    def query(self) -> str:
        """The state as a query string for the address."""
        return urlencode({name: _text(name, value) for name, value in asdict(self).items()}, safe=":,")


PAIRS = {"patch": ",", "other": ",", "size": "x", "shift": ","}


def _text(name: str, value: Any) -> str:
    """A field as it stands in the address; `_parse` reads it again."""
    if value is None:
        return "none"
    return PAIRS[name].join(map(str, value)) if name in PAIRS else str(value)


def parse_state(query: str, default: State) -> State:
    """The state that an address asks for, `default` where it says nothing. Raises ValueError for what it cannot mean."""
    known = {field.name for field in fields(State)}
    values: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise ValueError(f"the address asks for {name!r}; known: {', '.join(sorted(known))}")
        values[name] = _parse(name, text)
    return replace(default, **values)


def _parse(name: str, text: str) -> Any:
    if name in ("layer", "head", "opacity"):
        return whole_number(name, text)
    if name == "other" and text == "none":
        return None
    if name in PAIRS:
        found = re.fullmatch(rf"(-?\d{{1,5}}){PAIRS[name]}(-?\d{{1,5}})", text, re.ASCII)
        if not found:
            raise ValueError(f"{name} needs two whole numbers such as 3{PAIRS[name]}5; got {text!r}")
        return int(found[1]), int(found[2])
    return text


def whole_number(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII):
        raise ValueError(f"{name} needs a whole number; got {text!r}")
    return int(text)
