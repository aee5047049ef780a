"""Checked options of encodings: one frozen dataclass each, created from text or from values."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from sape2.config.checks import describe_option, type_name
from sape2.config.names import did_you_mean

Options = TypeVar("Options")


def make_options(options_class: type[Options], encoding: str, given: dict[str, Any], *further: str) -> Options:
    """`options_class(**given)` with every name and value checked; raises ValueError that lists what is known.

    Values may be strings, as they come from the command line ("sape2:count=cyclic,num_positions=10"). `further` names
    what the encoding takes besides.
    """
    hints = get_type_hints(options_class)
    check_options(encoding, given, [*further, *hints])
    return options_class(**{name: _convert(f"{encoding}:{name}", hints[name], value) for name, value in given.items()})


def check_options(encoding: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError for the first option that is not known, with those that are."""
    for name in sorted(set(given) - set(known)):
        told = f"{did_you_mean(name, known)}known options: {', '.join(known) or 'none'}"
        raise ValueError(f"{encoding} has no option {name!r}; {told}")


def describe_options(options_class: type) -> dict[str, str]:
    """Option name to its values, the default first: {"count": "suffix|prefix|...", "num_positions": "None|int"}."""
    hints = get_type_hints(options_class)
    return {field.name: describe_option(hints[field.name], field.default) for field in dataclasses.fields(options_class)}


def changed_options(options: Any, default: Any) -> dict[str, Any]:
    """The options that differ from those of `default`."""
    return {name: value for name, value in vars(options).items() if value != getattr(default, name)}


def check_positive(what: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{what} must be above 0; got {value}")


def _convert(what: str, hint: Any, value: Any) -> Any:
    """`value` as the annotated type; text is parsed, everything else must already fit."""
    if get_origin(hint) is Literal:
        return _convert_choice(what, get_args(hint), value)
    members = get_args(hint) or (hint,)
    for member in members:
        with contextlib.suppress(ValueError, KeyError):
            return _parse(member, value)
    raise ValueError(f"{what} needs {type_name(hint)}{' or none' * (type(None) in members)}; got {repr(value)[:100]}")


def _convert_choice(what: str, choices: tuple, value: Any) -> Any:
    for choice in choices:
        if value == choice or str(value) == str(choice):
            return choice
    raise ValueError(f"{what} must be one of {', '.join(map(str, choices))}; got {repr(value)[:100]}")


def _parse(kind: type, value: Any) -> Any:
    if kind is type(None):
        if value not in (None, "none", "None"):
            raise ValueError
        return None
    if kind is bool:
        return {"true": True, "false": False}[str(value).lower()]
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        raise ValueError
    parsed = kind(value)
    if kind is float and not math.isfinite(parsed):
        raise ValueError
    return parsed
