"""The documentation site: `make docs`, offline, warnings are errors, and what is built is checked by docs/site_checks.py.

Formulas become MathML when the site is built, so that no page needs a script or a network to show them.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

import sape2

project = "sape2"
author = "The sape2 developers"
copyright = "the sape2 developers"
release = version = sape2.__version__
html_title = f"sape2 {version}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
nitpicky = False
viewcode_follow_imported_members = False

myst_enable_extensions = ["dollarmath"]
myst_update_mathjax = False  # formulas are MathML: no class of MathJax on any page
myst_heading_anchors = 4
myst_fence_as_directive = ["math"]
nb_execution_mode = "off"  # notebooks are shown as they were executed by `make notebooks`
suppress_warnings = ["misc.highlighting_failure"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
add_module_names = False
default_role = "code"


# --- navigation ------------------------------------------------------------------------------------------------------

# Pages below a page that is also read outside of the site, where a table of contents would show as a block of code.
BELOW = {
    "hosts/README": ["timm", "transformers", "torchvision", "pytorch", "trainer_accelerate_lora"],
    "evaluation/README": ["shift", "resolution", "grouping", "health"],
}


def add_pages_below(app: Any, name: str, source: list[str]) -> None:
    if name in BELOW:
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", "", *BELOW[name], "```", ""])


def link_files(app: Any, name: str, source: list[str]) -> None:
    """Markdown outside of docs/ is no page of the site: a link to it gives the file."""
    source[0] = re.sub(r"\]\(((?:\.\./)+(?:(?:benchmarks|src)/[^)]*|CONTRIBUTING)\.md)\)", r"](path:\1)", source[0])


# --- formulas --------------------------------------------------------------------------------------------------------


def inline_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def display_math(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


# --- docstrings ------------------------------------------------------------------------------------------------------


def docstring_as_rst(lines: list[str]) -> list[str]:
    """Our docstrings are plain text with `code`: marks of reStructuredText are escaped, aligned paragraphs kept as they are."""
    result: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        of_paragraph = paragraph.splitlines()
        aligned = any(re.search(r"\S {2,}\S|^\s+\S", line) for line in of_paragraph)
        if aligned:
            result += ["::", "", *(f"    {line}" for line in of_paragraph), ""]
        else:
            result += [*(escaped(line) for line in of_paragraph), ""]
    return result


def escaped(line: str) -> str:
    """The line with everything outside of `code` taken literally."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else re.sub(r"([*|_\\])", r"\\\1", part) for part in parts)


def rewrite_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = docstring_as_rst(lines)


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.connect("source-read", add_pages_below)
    app.connect("source-read", link_files)
    app.connect("autodoc-process-docstring", rewrite_docstring)
