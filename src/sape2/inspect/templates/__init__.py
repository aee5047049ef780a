"""The HTML of explain and explore, as templates of Jinja; every value is escaped but the SVG of drawings."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from sape2.viz.base import import_optional


@cache
def template(name: str) -> Any:
    """A template of this folder; raises ImportError that says how to get Jinja."""
    jinja2 = import_optional("jinja2")
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).get_template(name)
