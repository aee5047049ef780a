"""The single rule for which split a file, folder or name belongs to, and checks that keep splits apart.

docs/data.md, "Which file belongs to which split", explains it to users.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sape2.data.base import NUMBERED, Source, Subset, plain_name, tell
from sape2.data.images import class_split
from sape2.data.labels import as_numbers
from sape2.data.walk import Files, is_image, listed, tell_left_out

WORDS = {"train": "train|training", "test": "test|testing|eval|evaluation", "validation": "validation|valid|val|dev"}
WHOLE = {split: re.compile(f"({words})(sets?|data|images?|imgs?|files?|splits?)?") for split, words in WORDS.items()}
KNOWN = ", ".join(WORDS.values()).replace("|", ", ")


def words_of(name: str) -> list[str]:
    """Small letters; what is no letter, and a capital after a small letter, begins another word."""
    apart = re.sub(r"([a-z])(?=[A-Z])", r"\1 ", unicodedata.normalize("NFKC", name))
    return re.findall(r"[^\W\d_]+", apart.casefold())


def splits_in(path: str) -> tuple[set[str], bool]:
    """(splits that words of the path stand for, whether a folder or the file is named by such words alone)."""
    *folders, file = path.split("/")
    numbered = NUMBERED.fullmatch(file)
    stem = numbered.group(1) if numbered else re.sub(r"\.[A-Za-z]+$", "", file)
    found, alone = set(), False
    for part in map(words_of, (*folders, stem)):
        known = [split for word in part for split, whole in WHOLE.items() if whole.fullmatch(word)]
        found |= {*known}
        alone |= bool(part) and len(known) == len(part)
    return found, alone


def split_of(path: str) -> str | None:
    """The one split that the path names, if it names one."""
    found, _ = splits_in(path)
    return found.pop() if len(found) == 1 else None


def by_split(where: str, names: Iterable[str], what: str = "file", to_draw: bool = False) -> dict[str, list[str]]:
    """Each name in the one split whose word it has; where some are of that word alone, only these.

    Other names are told and left out. Of files a split may have many; of all else ("folder", "split") one, and a name of two
    splits is left out. Raises ValueError for the path of a file that names two splits, for a second folder, and where a split
    is missing: the test set may be, if it is to be drawn (`to_draw`).
    """
    groups: dict[str, list[tuple[str, bool]]] = {}
    names = list(names)
    for name in names:
        found, alone = splits_in(name)
        if len(found) > 1 and what == "file":
            one, two = sorted(found, key=list(WORDS).index)[:2]
            raise ValueError(f"--data {where}: {plain_name(name)} names two splits, {one} and {two}; name one in its path")
        if len(found) == 1:
            groups.setdefault(found.pop(), []).append((name, alone))
    taken = {split: [name for name, alone in groups[split] if alone] or [name for name, _ in groups[split]]
             for split in WORDS if split in groups}  # fmt: skip
    for split, own in taken.items():
        if what != "file" and len(own) > 1:
            raise ValueError(
                f"--data {where} has two {what}s of the split {split}, {listed(own)}; leave one, or put them together"
            )
    unnamed = sorted(set(names).difference(*({name for name, _ in own} for own in groups.values())))
    if what != "folder" and "train" in taken and (to_draw or len(taken) > 1):
        tell_left_out(where, unnamed, f"no word of a split ({KNOWN})", what)
        for split, own in taken.items():
            more = {name for name, _ in groups[split]} - {*own}
            tell_left_out(where, more, f"of the split {split} are those named so alone, as {plain_name(own[0])}", what)
    elif what != "folder":
        others = f", and no word of a split ({KNOWN}) in {listed(unnamed)}" if unnamed else ""
        raise ValueError(f"{needs(where, taken)}{others}")
    return taken


def files_by_split(files: Files, ending: str, to_draw: bool = False) -> dict[str, list[str]]:
    """The files with this ending of each split: as a README.md with `configs:` says, else by the words of their paths."""
    where, names = plain_name(files.root), sorted(files.ending(ending), key=lambda name: name.split("/"))
    folder, wanted = _card(files)
    if wanted is None:
        inside = [name for name in names if folder == "./" or name.startswith(folder)]
        tell_left_out(where, {*names} - {*inside}, f"README.md has the folder {folder}")
        groups = by_split(where, inside, to_draw=to_draw)
        for split, own in groups.items():
            if len(folders := sorted({posixpath.dirname(name) or "." for name in own})) > 1:
                tell(f"{where}: the split {split} is what lies in {len(folders)} folders, {listed(folders)}")
        return _once(where, files, groups)
    declared = {split: _matched_by(files, folder, patterns) for split, patterns in wanted.items()}
    found: dict[str, str] = {}
    for split, own in declared.items():
        if not own:
            raise ValueError(f"--data {where}: README.md names {', '.join(wanted[split])}, and there is no such file")
        for name in own:
            if not name.lower().endswith(ending):
                raise ValueError(f"--data {where}: README.md names {plain_name(name)}, which is no {ending} file")
            if found.setdefault(name, split) != split:
                raise ValueError(f"--data {where}: README.md has {plain_name(name)} in two splits, {found[name]} and {split}")
    groups = {split: declared[own[0]] for split, own in by_split(where, declared, "split", to_draw).items()}
    tell_left_out(where, {*names} - {*found}, "README.md does not name them")
    return _once(where, files, groups)


def _once(where: str, files: Files, groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """Each file once in its split, whatever links lead there."""
    for split, own in groups.items():
        first: dict[str, str] = {}
        for name in own:
            first.setdefault(files.real[name], name)
        tell_left_out(where, {*own} - {*first.values()}, "links to files that are taken already")
        groups[split] = list(first.values())
    return groups


def check_card(files: Files, folders: dict[str, str]) -> None:
    """Raises ValueError where `configs:` of a README.md has an image in another split than its folder."""
    try:
        inside, wanted = _card(files)
    except ValueError as error:
        tell(f"{error}; folders say what the splits are")
        return
    kinds = {name: split for name in wanted or () if (split := split_of(name))}
    if not folders and {*kinds.values()} <= {"train"}:
        return
    for name, split in kinds.items():
        images = [path for path in _matched_by(files, inside, (wanted or {})[name]) if is_image(path)]
        other = next((path for path in images if path.partition("/")[0] != folders.get(split)), None)
        if other is not None:
            raise ValueError(
                f"--data {plain_name(files.root)}: README.md has {plain_name(other)} in the split {name}, and its folder says "
                "something else; put images into DIR/train/CLASS and DIR/test/CLASS as it says, or remove its configs"
            )


def _card(files: Files) -> tuple[str, dict[str, list[str]] | None]:
    """(folder of the files, patterns by split) of the one configuration in README.md, of several the default.

    None where it names no files, or there is none. Patterns without a split are the training set.
    """
    if "README.md" not in files.real:
        return "./", None
    from huggingface_hub import metadata_load

    where = f"--data {plain_name(files.root)}: README.md"
    try:
        configs = [dict(config) for config in (metadata_load(files.root / "README.md") or {}).get("configs") or []]
    except Exception as error:  # yaml raises many kinds
        raise ValueError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
    names = [str(config.get("config_name", "default")) for config in configs]
    chosen = [config for config, name in zip(configs, names, strict=True) if config.get("default") or name == "default"]
    if len(configs) > 1 and len(chosen) != 1:
        raise ValueError(f"{where} has the configs {', '.join(names)}, of which one must be the default; keep the one you mean")
    config = (chosen or configs or [{}])[0]
    folder = posixpath.join(posixpath.normpath(str(config.get("data_dir") or ".")), "")
    data_files = config.get("data_files")
    if data_files is None:
        return folder, None
    pairs: Any = [("train", data_files)]
    if isinstance(data_files, dict):
        pairs = data_files.items()
    elif isinstance(data_files, list) and data_files and all(isinstance(entry, dict) for entry in data_files):
        pairs = [(entry.get("split"), entry.get("path")) for entry in data_files]
    wanted: dict[str, list[str]] = {}
    for split, own in pairs:
        patterns = [own] if isinstance(own, str) else own
        if not isinstance(split, str) or not isinstance(patterns, list) or not all(isinstance(path, str) for path in patterns):
            raise ValueError(f"{where} needs data_files as split and path; got {split!r} and {own!r}")
        wanted[split] = wanted.get(split, []) + patterns
    return folder, wanted


def _matched_by(files: Files, folder: str, patterns: list[str]) -> list[str]:
    """Patterns are matched with what the walk found, so they lead nowhere else."""
    from fsspec.utils import glob_translate

    own: list[str] = []
    for pattern in patterns:
        path = posixpath.normpath(folder + pattern)
        whole = re.compile(glob_translate(path))
        own += [path] if path in files.real else sorted(name for name in files.real if whole.match(name))
    return list(dict.fromkeys(own))


def needs(where: str, found: Iterable[str]) -> str:
    names = [*found]
    way_out = "; data.test_fraction=0.2 draws a test set" if names == ["train"] else ""
    return f"--data {where} needs the splits train and test; found {', '.join(names) or 'none'}{way_out}"


def drawn(source: Source, fraction: float, seed: int) -> dict[str, Source]:
    """That fraction of each class as the test set, drawn with `seed`, and the others as the training set."""
    as_numbers(source)
    rest, part = class_split(torch.tensor(source.labels, dtype=torch.long), fraction, seed)
    return {"train": Subset(source, rest.tolist(), "train"), "test": Subset(source, part.tolist(), "test")}


def open_labelled(
    names: Iterable[str],
    where: str,
    open_split: Callable[[str], tuple[Source, dict[str, str]]],
    test_fraction: float | None = None,
    seed: int = 0,
) -> dict[str, Source]:
    """{"train": ..., "test": ...}: the test set is the first of test and validation that has labels.

    If there is none, `test_fraction` of each class is drawn from the training set with `seed`.

    `open_split` also gives what the files of a split are called, by their real paths. Raises ValueError if there is no test
    set, and if one file is in both.
    """
    tests = [name for name in ("test", "validation") if name in names]
    if "train" not in names or not (tests or test_fraction):
        raise ValueError(needs(where, names))
    train, of_train = open_split("train")
    for name in tests:
        test, of_test = open_split(name)
        if not test.labels:
            raise ValueError(f"{test.where} holds no rows")
        if has_labels(test):
            check_apart(train, of_train, test, of_test)
            for other in tests:
                if other != name:
                    reason = "has no labels" if other == "test" else "is not read: images to validate are drawn from train"
                    tell(f"{where}: the split {other} {reason}")
            return {"train": train, "test": test}
    if test_fraction:
        if tests:
            tell(f"{where}: {' and '.join(tests)} have no labels; the test set is drawn from train")
        return drawn(train, test_fraction, seed)
    raise ValueError(
        f"--data {where} has no labels in {' or '.join(tests)}: all are -1 or missing; data.test_fraction=0.2 draws a test set"
    )


def has_labels(source: Source) -> bool:
    """False where every label is -1 or missing: a test set whose answers are kept back, as ImageNet's on the hub."""
    return any(label not in (-1, None) for label in source.labels)


def check_apart(train: Source, of_train: dict[str, str], test: Source, of_test: dict[str, str]) -> None:
    """Raises ValueError where one file, by its real path, is of both splits."""
    both = sorted(of_train.keys() & of_test.keys())
    if both:
        raise ValueError(
            f"{test.where} and {train.where} share {len(both)} file{'s' * (len(both) > 1)}, the first: {of_test[both[0]]} is "
            f"{of_train[both[0]]}; a test image must not be trained on, so leave it in one of them"
        )
