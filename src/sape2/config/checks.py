"""Checks settings against the annotations of their dataclasses (type and range) and writes the error messages."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from sape2.config.names import did_you_mean

LARGEST = 2**24  # of a size of a model: more is a slip of the hand
LARGEST_REAL = 1e18  # the product of two is still a number in float32, in which an optimiser computes
DEEPEST = 1000  # layers, as many as the deepest transformers have; to make each takes its time


@dataclass(frozen=True)
class Range:
    """The numbers that a setting accepts, in words that follow "must be"; for `Annotated`, read by `check_types`."""

    words: str
    holds: Callable[[Any], bool]


AT_LEAST_0 = Range("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)

Real = int | float  # an int is accepted, and kept as a float
Positive = Annotated[Real, Range("above 0", lambda value: value > 0)]
NotNegative = Annotated[Real, AT_LEAST_0]
Share = Annotated[Real, Range("in [0, 1]", lambda value: 0 <= value <= 1)]
ShareBelow1 = Annotated[Real, Range("in [0, 1)", lambda value: 0 <= value < 1)]
PartOf1 = Annotated[Real, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]
Inside01 = Annotated[Real, Range("in (0, 1)", lambda value: 0 < value < 1)]
Number = Annotated[int, AT_LEAST_0]
Count = Annotated[int, AT_LEAST_1]
Size = Annotated[int, Range(f"from 1 to {LARGEST}", lambda value: 1 <= value <= LARGEST)]
Layers = Annotated[int, Range(f"from 1 to {DEEPEST}", lambda value: 1 <= value <= DEEPEST)]
SizeOr0 = Annotated[int, Range(f"from 0 to {LARGEST}", lambda value: 0 <= value <= LARGEST)]
Magnitude = Annotated[int, Range("from 0 to 30", lambda value: 0 <= value <= 30)]
SplitSeed = Annotated[int, Range("in 0..2**63 - 1", lambda value: 0 <= value < 2**63)]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def make_config(cls: type, values: Any, prefix: str) -> Any:
    """A dataclass from plain JSON values; nested dataclasses and tuples are made, everything else must already fit."""
    require(isinstance(values, dict), f"{prefix.rstrip('.') or 'the config'} must be an object; got {shown(values)}")
    known = hints(cls)
    others = sorted(set(values) - set(known), key=str)
    if others:
        meant = did_you_mean(str(others[0])[:100], known)
        raise ValueError(f"unknown key {prefix}{_key(others[0])}; {meant}known keys: {', '.join(known)}")
    for each in dataclasses.fields(cls):
        needed = each.default is each.default_factory is dataclasses.MISSING
        require(not needed or each.name in values, f"missing key {prefix}{each.name}")
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(known[name]) and not dataclasses.is_dataclass(value):
            value = make_config(known[name], value, f"{prefix}{name}.")
        elif get_origin(known[name]) is tuple and isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return cls(**made)


class Sections:
    """The settings of a run as a dataclass of sections, to and from plain JSON values."""

    def __post_init__(self) -> None:
        check_types(self)

    def to_dict(self) -> dict[str, Any]:
        whole: Any = self
        return dataclasses.asdict(whole)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError that names the field for anything unknown, missing or of another type."""
        return make_config(cls, values, "")


def by_name(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of sections by their names in full: {"model.depth": 1}."""
    sections = {name: section for name, section in values.items() if isinstance(section, dict)}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def _key(name: Any) -> str:
    return name if isinstance(name, str) and name.isidentifier() and len(name) <= 100 else shown(name)


@cache
def hints(cls: type, ranges: bool = False) -> dict[str, Any]:
    """The annotation of every field, with or without its range."""
    return get_type_hints(cls, include_extras=ranges)


def check_types(config: Any) -> None:
    """Raises ValueError that says what was required and what came; an int where a float is meant becomes one."""
    of_sections = any(map(dataclasses.is_dataclass, hints(type(config)).values()))
    section = "" if of_sections else f"{type(config).__name__.removesuffix('Config').lower()}."
    for name, hint in hints(type(config), ranges=True).items():
        value, plain, where = of_python(getattr(config, name)), hints(type(config))[name], f"{section}{name}"
        if not fits(value, plain):
            raise ValueError(f"{where} must be {in_words(hint)}; got {shown(value)}")
        if float in (plain, *get_args(plain)):
            value = _as_float(value, where)
        object.__setattr__(config, name, value)
        range_ = _range_of(hint)
        if range_ is not None and value is not None and not range_.holds(value):
            raise ValueError(f"{where} must be {range_.words}; got {shown(value)}")


def of_python(value: Any) -> Any:
    """Numbers of NumPy and of tensors, alone, in a tuple or in an array, as those of Python; everything else unchanged."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    is_several = isinstance(plain, tuple) or (plain is not value and isinstance(plain, list))
    return tuple(map(of_python, plain)) if is_several else plain


def _as_float(value: Any, where: str) -> Any:
    """A number as float; other values, such as None or a tuple of numbers, unchanged."""
    for number in value if isinstance(value, tuple) else (value,):
        small = not isinstance(number, (int, float)) or abs(number) <= LARGEST_REAL
        require(small, f"{where} must be at most {LARGEST_REAL:.0e}; got {shown(number)}")
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def shown(value: Any) -> str:
    """The value as text, at most 100 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python writes, or too deep
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 100 else f"{text[:97]}…"


def fits(value: Any, hint: Any) -> bool:
    """True if a value is of the type that an annotation (without its range) says."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in get_args(hint))
    if origin is tuple:
        members = get_args(hint)
        length_fits = members[-1] is Ellipsis or (isinstance(value, tuple) and len(value) == len(members))
        return isinstance(value, tuple) and length_fits and all(fits(item, members[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf")
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _range_of(hint: Any) -> Range | None:
    members = get_args(hint) if get_origin(hint) in (Annotated, Union, types.UnionType) else ()
    return next((found for m in members if (found := m if isinstance(m, Range) else _range_of(m)) is not None), None)


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def in_words(hint: Any) -> str:
    """Describes the accepted values of a setting: "a number above 0", "one of ddp, fsdp", "2 whole numbers, [a,b]"."""
    origin, members = get_origin(hint), get_args(hint)
    if origin is Annotated:
        words = members[1].words
        return f"{in_words(members[0])} {'of ' * words.startswith('at least')}{words}"
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if origin in (Union, types.UnionType):
        given = [member for member in members if not (member is int and float in members)]  # an int is a number
        return " or ".join(map(in_words, given))
    if origin is tuple:
        several = in_words(members[0]).removeprefix("a ") + "s"
        return f"a list of {several}, [a,b,...]" if members[-1] is Ellipsis else f"{len(members)} {several}, [a,b]"
    return KINDS.get(hint, hint.__name__)


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
