"""Text for terminals and files with limited character sets: printing never fails and replaces unknown characters legibly."""

from __future__ import annotations

import codecs
import os
import sys

NAME = "sape2_plain"
PLAIN = {
    "±": "+-", "…": "...", "·": ".", "²": "^2", "√": "sqrt", "≤": "<=", "≥": ">=", "→": "->", "“": '"', "”": '"', "•": "*",
    "\N{EN DASH}": "-", "\N{EM DASH}": "-", "\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "x",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{NO-BREAK SPACE}": " ", "━": "-", "─": "-",
}  # fmt: skip


def plainly(error: UnicodeError) -> tuple[str, int]:
    """Error handler for characters that an encoding lacks: a replacement, else their code as "\\u732b"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    text = "".join(PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode("ascii") for letter in lost)
    return text, error.end


def print_anything() -> None:
    """Standard output and error of this process take any text from now on, in whatever encoding they have.

    A closed one (2>&-, a service without a console) takes it too and keeps nothing: `print` would give it to the other.
    """
    codecs.register_error(NAME, plainly)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:  # a notebook's stream has none, and takes all
            reconfigure(errors=NAME)
