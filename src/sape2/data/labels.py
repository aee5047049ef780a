"""Labels of two files that name their classes: matched by name, never by number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sape2.data.base import Source, log


def check_names(names: Sequence[str], where: str) -> None:
    """Raises ValueError where two classes differ by nothing, or by capitals and spaces only."""
    seen: dict[str, str] = {}
    for name in names:
        if _plain(name) in seen:
            raise ValueError(f"{where} names two classes {seen[_plain(name)]!r} and {name!r}; give each a name of its own")
        seen[_plain(name)] = name


def renumber(labels: list[Any], names: Sequence[str], wanted: Sequence[str], where: str, known: str) -> list[Any]:
    """`labels` that count in `names` -> the same classes counted in `wanted`, the names of `known`. -1 and None stay."""
    if not names or not wanted or tuple(names) == tuple(wanted):
        return labels
    check_names(names, where)
    numbers = {name: number for number, name in enumerate(wanted)}
    table = {number: numbers.get(name) for number, name in enumerate(names)} | {-1: -1, None: None}
    for label in dict.fromkeys(labels):
        if label not in table:
            raise ValueError(f"{where}: label {label!r} is not in 0..{len(names) - 1}")
        if label is not None and table[label] is None:
            raise ValueError(f"{where} has the class {names[label]!r}, which {known} has not{near_name(names[label], wanted)}")
    return [table[label] for label in labels]


def near_name(name: str, wanted: Sequence[str]) -> str:
    """What an error adds where a known name differs by capitals or spaces only."""
    near = next((other for other in wanted if _plain(other) == _plain(name)), None)
    return f"; it has {near!r}: write both alike" if near is not None else ""


def first_of(names: Sequence[str], most: int = 10) -> str:
    """The names, or the first of many and an ellipsis."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def match_classes(train: Source, test: Source) -> None:
    """The test labels in the order of the training names, where both have names."""
    check_names(train.classes, train.where)
    if bool(train.classes) != bool(test.classes):
        unnamed = test if train.classes else train
        log.warning("%s has no names of classes: its labels go by number", unnamed.where)
    test.labels = renumber(test.labels, test.classes, train.classes, test.where, train.where)
    test.classes = train.classes if test.classes else ()


def match_model(sources: Iterable[Any], classes: Sequence[str]) -> None:
    """The labels of every split in the order of a model's classes; a split without names keeps its numbers.

    Raises ValueError for a class that the model has not.
    """
    run = f"the run ({first_of(classes)})"
    for source in sources:
        source.labels = renumber(source.labels, source.classes, classes, source.where, run)
        source.classes = tuple(classes) if source.classes else ()


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()
