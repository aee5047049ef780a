"""Describes the options of encodings for people: their values, the default first. Needs only the type annotations."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from sape2.config.checks import in_words


def describe_option(hint: Any, default: Any) -> str:
    """ "suffix|prefix|..." for a choice, "None (a whole number)" for a number."""
    if get_origin(hint) is Literal:
        rest = [str(value) for value in get_args(hint) if value != default]
        return "|".join([str(default), *rest])
    if hint is bool:
        return "|".join([str(default).lower(), str(not default).lower()])
    return f"{default} ({type_name(hint)})"


def type_name(hint: Any) -> str:
    """ "a whole number or a number": what a value may be, in the words of `--set`, without None."""
    members = [member for member in get_args(hint) if member is not type(None)] or [hint]
    return " or ".join(map(in_words, members))
