"""Matches the labels of two files that name their classes, by name, never by number. Similar names are kept apart."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from sape2.data.base import Source, tell

LARGEST = 2**31 - 1  # number of a class
NO_WIDTH = {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10)}  # beside Unicode's category Cf
# Cyrillic and Greek letters that have the shape of Latin ones.
ALIKE = str.maketrans("АВЕЗІЈКМНОРЅТХаеіјорсухѕԁΑΒΕΖΗΙΚΜΝΟΡΤΥΧοѴѵ", "ABE3IJKMHOPSTXaeijopcyxsdABEZHIKMNOPTYXoVv")  # noqa: RUF001


def check_names(names: Sequence[str], where: str) -> None:
    """Raises ValueError for an empty name, and where two classes look alike. "A" and "a" are two classes."""
    seen: dict[str, str] = {}
    for name in names:
        if not _looks(name):
            raise ValueError(f"{where} names a class {name!a}, which shows nothing; give it a name")
        if _looks(name) in seen:
            raise ValueError(f"{where} names two classes {_both(seen[_looks(name)], name)}; give each a name of its own")
        seen[_looks(name)] = name


def renumber(labels: list[Any], names: Sequence[str], wanted: Sequence[str], where: str, known: str) -> list[Any]:
    """`labels` that count in `names` -> the same classes counted in `wanted`, the names of `known`. -1 and None stay."""
    if not names or not wanted or tuple(names) == tuple(wanted):
        return labels
    check_names(names, where)
    numbers = numbers_of(wanted)
    table = {number: numbers.get(name) for number, name in enumerate(names)} | {-1: -1, None: None}
    for label in dict.fromkeys(labels):
        if label not in table:
            raise ValueError(f"{where}: label {label!r} is not in 0..{len(names) - 1}")
        if label is not None and table[label] is None:
            raise ValueError(f"{where} has the class {names[label]!r}, which {known} has not{near_name(names[label], wanted)}")
    return [table[label] for label in labels]


def numbers_of(names: Sequence[str]) -> dict[str, int]:
    """Name -> number; composed and decomposed letters are the same text, so a name is found in both forms."""
    forms = [{unicodedata.normalize(form, name): number for number, name in enumerate(names)} for form in ("NFD", "NFC")]
    return forms[0] | forms[1] | {name: number for number, name in enumerate(names)}


def near_name(name: str, wanted: Sequence[str]) -> str:
    """Hint for an error about a name that differs from a known one by capitals, spaces or invisible characters."""
    near = next((other for other in wanted if _looks(other).casefold() == _looks(name).casefold()), None)
    if near is None:
        return ""
    return (
        f"; {_both(near, name)}: write both alike" if _looks(near) == _looks(name) else f"; it has {near!r}: write both alike"
    )


def first_of(names: Sequence[str], most: int = 10) -> str:
    """The names, or the first of many and an ellipsis."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def match_classes(train: Source, test: Source) -> None:
    """The test labels in the order of the training names, where both have names."""
    check_names(train.classes, train.where)
    if bool(train.classes) != bool(test.classes):
        tell_unnamed((test if train.classes else train).where)
    test.labels = renumber(test.labels, test.classes, train.classes, test.where, train.where)
    test.classes = train.classes if test.classes else ()


def tell_unnamed(where: str) -> None:
    tell(f"{where} has no names of classes: its labels go by number")


def match_model(sources: Iterable[Any], classes: Sequence[str]) -> None:
    """The labels of every split in the order of a model's classes; a split without names keeps its numbers.

    Where the classes are called by numbers, such as the folders 0, 1, 10, 2, these numbers are the names of the split.
    Raises ValueError for a class that the model has not.
    """
    run = f"the run ({first_of(classes)})"
    places = {int(name): place for place, name in enumerate(classes) if name.isascii() and name.isdecimal()}
    for source in sources:
        if not source.classes and len(places) == len(classes):
            other = next((label for label in source.labels if label not in places), None)
            if other is not None:
                raise ValueError(f"{source.where} has the label {other}, which {run} has not")
            source.labels, source.classes = [places[label] for label in source.labels], tuple(classes)
        source.labels = renumber(source.labels, source.classes, classes, source.where, run)
        source.classes = tuple(classes) if source.classes else ()


def as_numbers(source: Any) -> None:
    """Makes the labels of a source whole numbers, whatever type its file keeps them in. Raises ValueError naming the row."""
    for row, label in enumerate(source.labels):
        if label is None:
            raise ValueError(f"{source.name(row)} has no label")
        if not isinstance(label, (int, float, Decimal)) or label != label or label % 1:
            hint = _way_out(label, source.classes)
            raise ValueError(f"{source.name(row)}: label {repr(label)[:80]} is no whole number{hint}")
        if not -LARGEST <= label <= LARGEST:
            raise ValueError(f"{source.name(row)}: label {repr(label)[:80]} is far too large for the number of a class")
        if type(label) is not int:
            source.labels[row] = int(label)


def _way_out(label: Any, classes: Sequence[str]) -> str:
    """Hint for an error about a label that is no number."""
    if not isinstance(label, str):
        return ""
    if classes:
        return f", and no class of {first_of(classes)}{near_name(label, classes)}"
    return "; classes.txt can number names in shards, ClassLabel in parquet"


def _looks(name: str) -> str:
    """A name without what does not show: marks of no width, kinds of spaces, composed or decomposed letters, the alphabet."""
    shown = (
        sign for sign in unicodedata.normalize("NFC", name) if unicodedata.category(sign) != "Cf" and ord(sign) not in NO_WIDTH
    )
    return " ".join("".join(shown).translate(ALIKE).split())


def _both(one: str, other: str) -> str:
    """Two names that look alike, with their code points where these are the difference."""
    points = f" look alike: {one!a} and {other!a}" if not (one + other).isascii() else ""
    return f"{one!r} and {other!r}{points}"
