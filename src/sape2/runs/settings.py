"""The settings of a run folder, config.json: how they are written, read, and compared with those of another run."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sape2._version import __version__
from sape2.config import RunConfig
from sape2.config.detection import DetectionConfig
from sape2.encodings import canonical_name
from sape2.runs.files import read_text, write_text
from sape2.runs.rows import read_rows

NAME = "config.json"
FORMAT = 1  # of a run folder
Config = TypeVar("Config", RunConfig, DetectionConfig)


def canonical(config: Config) -> Config:
    """The config with the canonical name of its encoding, so that another spelling does not count as another run."""
    return replace(config, model=replace(config.model, encoding=canonical_name(config.model.encoding)))


def write_config(folder: Path, config: RunConfig | DetectionConfig) -> None:
    values = {"format": FORMAT, "sape2_version": __version__} | config.to_dict()
    write_text(folder / NAME, json.dumps(values, indent=2) + "\n")


def version_of(folder: Path) -> str | None:
    """The version of sape2 that began the run in a folder; None if that is not known."""
    try:
        return json.loads((folder / NAME).read_text(encoding="utf-8")).get("sape2_version")
    except (OSError, ValueError, AttributeError):
        return None


def read_config(folder: Path, kind: type[Config]) -> Config:
    """The settings of a run folder. Raises FileNotFoundError or ValueError if it holds no run of this kind."""
    path = folder / NAME
    if not path.exists():
        raise _no_run(folder)
    text = read_text(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    writer = ""
    try:
        if isinstance(values, dict):
            if other := _other_kind(values, kind):
                raise OtherKind(f"{folder} holds {other}")
            found, wrote = values.pop("format", None), values.pop("sape2_version", None)
            writer = f", but was written by {wrote}" if wrote else ""
            if found != FORMAT:
                raise ValueError(f"it has format {found!r}; format {FORMAT} is read here")
        return kind.from_dict(values)
    except OtherKind:
        raise
    except ValueError as error:
        raise ValueError(
            f"{path} does not fit this version of sape2, {__version__}{writer}: {error}. "
            "Use the version that wrote it, or choose another --out"
        ) from error


class OtherKind(ValueError):
    """The folder holds something else than the run that was asked for."""


def _other_kind(values: dict[str, Any], kind: type[Config]) -> str | None:
    """What the config.json of another kind of folder belongs to, in words; None if it may be that of a run of this kind."""
    if values.get("library_name") == "sape2":
        return "an exported model, not a run; ViT.from_pretrained of sape2.models.vit loads it"
    if "detector" in values and kind is RunConfig:
        return "a run of sape2 detect, which measures it itself; this takes a run of sape2 train"
    if "augment" in values and kind is DetectionConfig:
        return "a run of sape2 train, not one of sape2 detect; choose another --out"
    known = {each.name for each in fields(kind)}
    return None if known & values.keys() else "the config.json of another program, and no run"


def check_no_run(folder: Path) -> None:
    """Raises ValueError if the folder is that of a run or a model: other results would mix with what it holds."""
    if (folder / NAME).exists():
        raise ValueError(f"{folder} is the folder of a run or a model; choose another --out")


def check_own_results(folder: Path, *keys: str) -> None:
    """Raises ValueError if the folder is that of a run or a model, or if its results.jsonl is of another command.

    Its own rows have one of `keys`; others would be mixed with them, or replaced by them.
    """
    check_no_run(folder)
    path = folder / "results.jsonl"
    if any(row.keys().isdisjoint(keys) for row in read_rows(path)):
        raise ValueError(f"{path} holds the results of another command; choose another --out")


def _no_run(folder: Path) -> OSError:
    """The error for a path that holds no run: what it is, and what may have been meant."""
    if not folder.exists():
        return FileNotFoundError(f"there is no run folder {folder}")
    if not folder.is_dir():
        return NotADirectoryError(f"{folder} is a file, not a run folder")
    if (folder / "study.json").exists():
        runs = f"one of its runs, {folder}/ENCODING-sSEED; sape2 report takes {folder}/rows.jsonl too"
        return FileNotFoundError(f"{folder} is a study, not a run; give {runs}")
    runs = [str(found.parent) for found in sorted(folder.glob(f"*/{NAME}"))[:3]]
    meant = f"; did you mean {', '.join(runs)}?" if runs else ""
    return FileNotFoundError(f"{folder} is not a run folder: it has no {NAME}{meant}")


# --- comparison ------------------------------------------------------------------------------------------------------


def check_same(folder: Path, there: Config, here: Config) -> None:
    """Raises ValueError unless the settings in the folder and those given are of one run."""
    if there.identity() == here.identity():
        return
    if isinstance(there, RunConfig) and isinstance(here, RunConfig) and _differ_in_epochs_alone(there, here):
        raise ValueError(
            f"{folder} holds this run in {there.train.epochs} epochs; its learning rate falls over all of them, "
            f"so {here.train.epochs} epochs are another run, from the start: choose another --out"
        )
    raise ValueError(f"{folder} holds another run, {how_it_differs(there.identity(), here.identity())}")


def _differ_in_epochs_alone(there: RunConfig, here: RunConfig) -> bool:
    identities = [config.identity() for config in (there, here)]
    for values in identities:
        del values["train"]["epochs"], values["train"]["warmup_epochs"]
    return there.train.epochs != here.train.epochs and identities[0] == identities[1]


def how_it_differs(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Describes how two identities of configs differ, and what to do about it.

    Of the recipe `images`, which takes its mean and std from the images, other ones mean that those in the folder changed.
    """
    found = difference(there, here)
    if {there.get("recipe"), here.get("recipe")} == {"images"} and found.startswith(("data.mean", "data.std")):
        return (
            f"because the images in the folder {here['data']['name']!r} have changed since it began: {found}. "
            "Put back what was there to go on, or choose another --out to start again with what is there now"
        )
    return f"which differs in {found}; choose another --out, or give the same settings to go on"


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The first setting in which two identities of configs differ, with both values."""
    for key in old | new:
        before, now = old.get(key), new.get(key)
        if before != now:
            if isinstance(now, dict):
                return difference(before or {}, now, f"{prefix}{key}.")
            return f"{prefix}{key} ({before!r} there, {now!r} here)"
    raise AssertionError("the configs are equal")
