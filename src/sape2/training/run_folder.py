"""The run folder: its settings, images, rows and lock. Every file appears complete or not at all.

config.json, data.json (which images, see data/fingerprint.py), model.safetensors (last epoch; its presence says that the
run is finished), best.safetensors (best epoch on the validation set), checkpoint/step-N/ (resume), metrics.jsonl (a line per
epoch), results.jsonl, figures/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import sape2
from sape2.config import RunConfig
from sape2.config.detection import DetectionConfig
from sape2.encodings import canonical_name
from sape2.tables import Row
from sape2.training.checkpoint import keep_only, last_checkpoint
from sape2.training.files import holds_files, write_text

Config = TypeVar("Config", RunConfig, DetectionConfig)
FORMAT = 1  # of a run folder, written into its config.json; those that do not say have this one


# --- files -----------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The objects of a .jsonl file; [] if there is none. Raises ValueError for a line that is not one."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not a JSON object: {line[:50]}")
        rows.append(row)
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def update_results(folder: Path, rows: list[Row]) -> None:
    """Puts rows into results.jsonl in place of what the same measures gave on the same split and weights before.

    Rows over more images than these stay: a measurement on a few images never replaces one on all (`own_results` returns
    the latter). Raises FileNotFoundError if the folder is gone.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} was removed while it was being measured; nothing is written there")
    before, reach = read_rows(folder / "results.jsonl"), _reaches(rows)
    kept = [row for part in _parts(before).values() if _reach(part) > reach.get(_measured(part[0]), -1) for row in part]
    write_rows(folder / "results.jsonl", [*kept, *rows])


def _measured(row: Row) -> tuple:
    return row.get("measure"), row.get("split"), row.get("weights"), row.get("other_data")


def _parts(rows: list[Row]) -> dict[tuple, list[Row]]:
    """The rows of each measurement: of one measure, split, set of weights, set of images and limit."""
    parts: dict[tuple, list[Row]] = {}
    for row in rows:
        parts.setdefault((*_measured(row), row.get("limit"), "limit" in row), []).append(row)
    return parts


def _reach(rows: list[Row]) -> float:
    """Number of images of a measurement; infinite for all images. Older rows give it by the n of their first number."""
    first = rows[0]
    if "limit" in first:
        return math.inf if first["limit"] is None else first["limit"]
    return first.get("n", 0)


def _reaches(rows: list[Row]) -> dict[tuple, float]:
    """The widest reach of each measurement."""
    found: dict[tuple, float] = {}
    for part in _parts(rows).values():
        found[_measured(part[0])] = max(_reach(part), found.get(_measured(part[0]), -1))
    return found


def own_results(folder: Path) -> list[Row]:
    """The rows of results.jsonl on the run's own images, not on --other-data; of each measurement those over most images."""
    rows = [row for row in read_rows(folder / "results.jsonl") if row.get("other_data") is None]
    reach = _reaches(rows)
    return [row for part in _parts(rows).values() if _reach(part) == reach[_measured(part[0])] for row in part]


def is_whole(folder: Path, row: Row) -> bool:
    """True if a row covers all images of its split rather than a part chosen by --limit."""
    if "limit" in row:
        return row["limit"] is None
    known = read_seen(folder).get(row.get("split", ""))  # an older row says it by its n
    return not isinstance(known, dict) or row.get("n") == known.get("images")


def class_names(folder: Path, num_classes: int) -> list[str] | None:
    """Class names in the order of the logits, from data.json or from results that measured every class; None if unknown."""
    known = read_seen(folder).get("classes")
    if isinstance(known, list) and len(known) == num_classes:
        return list(map(str, known))
    measured: dict[tuple, list[str]] = {}
    for row in own_results(folder):
        if row.get("name") == "class_accuracy" and "class" in row:
            measured.setdefault(_measured(row), []).append(str(row["class"]))
    return next((names for names in measured.values() if len(names) == num_classes), None)


# --- run folder ------------------------------------------------------------------------------------------------------


def canonical(config: Config) -> Config:
    """The config with the canonical name of its encoding, so that another spelling does not count as another run."""
    return replace(config, model=replace(config.model, encoding=canonical_name(config.model.encoding)))


def check_run(folder: Path, config: RunConfig) -> None:
    """Raises ValueError if the folder holds another run, or something that is not a run. Changes nothing."""
    if not holds_files(folder) and (folder.is_dir() or not folder.exists()):
        return
    existing, config = read_config(folder), canonical(config)
    if existing.train.epochs != config.train.epochs and _but_for_epochs(existing) == _but_for_epochs(config):
        raise ValueError(
            f"{folder} holds this run in {existing.train.epochs} epochs; its learning rate falls over all of them, "
            f"so {config.train.epochs} epochs are another run, from the start: choose another --out"
        )
    if existing.identity() != config.identity():
        raise ValueError(f"{folder} holds another run, {how_it_differs(existing.identity(), config.identity())}")


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


def _but_for_epochs(config: RunConfig) -> dict[str, Any]:
    values = config.identity()
    del values["train"]["epochs"], values["train"]["warmup_epochs"]
    return values


def start_run(folder: Path, config: RunConfig, fingerprint: Row | None = None) -> None:
    """Creates the run folder, or checks that it holds this run on these images (see `check_run`, `check_data`)."""
    check_run(folder, config)
    check_data(folder, fingerprint)
    if last := last_checkpoint(folder):
        keep_only(last)
    if not (folder / "config.json").exists():
        values = {"format": FORMAT, "sape2_version": sape2.__version__} | canonical(config).to_dict()
        write_text(folder / "config.json", json.dumps(values, indent=2) + "\n")
    if fingerprint is not None:
        keep_fingerprint(folder, fingerprint)


def keep_fingerprint(folder: Path, fingerprint: Row) -> None:
    """Writes data.json, the fingerprint of the images, unless it exists."""
    if not (folder / "data.json").exists():
        write_text(folder / "data.json", json.dumps(fingerprint, indent=2) + "\n")


def read_seen(folder: Path) -> Row:
    """Reads data.json; {} if there is none or it is damaged, which `check_images` reports."""
    try:
        seen = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # an older run, or one that was copied in parts
        return {}
    return seen if isinstance(seen, dict) else {}


NEW_RUN = "choose another --out for a new run"


def check_data(folder: Path, fingerprint: Row | None) -> None:
    """Runs `check_images` before a run resumes; raises ValueError if it read its images by another rule than now.

    A finished run of another rule may still be measured, with a note (`models.trained.note_of_rule`).
    """
    before = check_images(folder, fingerprint)
    if before is None or fingerprint is None:
        return
    if (rule := other_rule(before, fingerprint.get("reading_rule"))) is not None:
        raise ValueError(
            f"{folder} read its images by rule {rule}, now it is rule {fingerprint['reading_rule']} (docs/data.md), which "
            "can give other pixels. Finish it with the version that began it, choose another --out, or, if every image "
            f"is opaque, upright and of 8 bits, remove {folder / 'data.json'}"
        )


def check_images(folder: Path, fingerprint: Row | None, way_out: str = NEW_RUN) -> Row | None:
    """Raises ValueError if the run in the folder saw other images, as far as `data.fingerprint` can tell.

    Returns what its data.json holds, None if nothing could be compared.
    Another layout of the same files is no difference: names and sizes are compared only within one layout.
    """
    path = folder / "data.json"
    if fingerprint is None or not path.exists():
        return None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        found = _other_images(before, fingerprint)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it if you know that --data holds the images of this run"
        ) from error
    if found is not None:
        raise ValueError(f"{folder} saw other images: {found}. Give the --data it began with, or {way_out}")
    return before


def other_rule(before: Row, now: int | None) -> int | None:
    """The rule by which the images of a data.json were read, if it is not `now`; None too where nothing was decoded."""
    rule = before.get("reading_rule", 1)
    return None if now is None or before.get("layout") == "arrays" or rule == now else rule


def how_images_differ(first: Row, second: Row) -> str | None:
    """Describes how the images of two runs differ, by their data.json (`read_seen`); None if equal or unknown."""
    try:
        found = _other_images(first, second)
        rule = None if second.get("layout") == "arrays" else second.get("reading_rule", 1)
        other = None if found else other_rule(first, rule)
    except (ValueError, TypeError, AttributeError, KeyError):  # one of them is missing or damaged
        return None
    return found if other is None else f"the rule by which they were read ({other} there, {rule} here)"


def _other_images(before: Row, now: Row) -> str | None:
    what = {"images": "the number", "labels": "the labels", "bytes": "the content", "pixels": "the content"}
    if before["layout"] == now["layout"]:
        what["names"] = "the names or sizes"
    for split in ("train", "test"):
        for key, words in what.items():
            old, new = before[split].get(key), now[split].get(key)
            if old is not None and new is not None and old != new:
                return f"{words} of its {split} images ({old} there, {new} here)"
    if before.get("classes") and now.get("classes") and before["classes"] != now["classes"]:
        return "the names of its classes, or their order"
    return None


def read_config(folder: Path) -> RunConfig:
    """The settings, with the encoding under its one name (`canonical`).

    Raises FileNotFoundError or ValueError if the folder is not a run folder.
    """
    path = folder / "config.json"
    if not folder.exists():
        raise FileNotFoundError(f"there is no run folder {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a run folder")
    if not path.exists():
        if (folder / "study.json").exists():
            runs = f"one of its runs, {folder}/ENCODING-sSEED; sape2 report takes {folder}/rows.jsonl too"
            raise FileNotFoundError(f"{folder} is a study, not a run; give {runs}")
        runs = [str(found.parent) for found in sorted(folder.glob("*/config.json"))[:3]]
        meant = f"; did you mean {', '.join(runs)}?" if runs else ""
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.json{meant}")
    text = _read_text(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    try:
        return canonical(RunConfig.from_dict(_without_format(values)))
    except ValueError as error:
        raise ValueError(
            f"{path} does not fit this version of sape2, {sape2.__version__}{_writer(values)}: {error}. "
            "Use the version that wrote it, or choose another --out"
        ) from error


def _without_format(values: Any) -> Any:
    """The config that `start_run` wrote, without the fields before it. Raises ValueError for another format."""
    if not isinstance(values, dict):
        return values
    number = values.get("format", FORMAT)
    if number != FORMAT:
        wrote = values.get("sape2_version", "an unknown version")
        raise ValueError(f"it has format {number!r}, of sape2 {wrote}; format {FORMAT} is read here")
    return {key: value for key, value in values.items() if key not in ("format", "sape2_version")}


def _writer(values: Any) -> str:
    version = values.get("sape2_version") if isinstance(values, dict) else None
    return f", but was written by {version}" if version else ""


def is_finished(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The first setting in which two identities of configs differ, with both values."""
    for key in old | new:
        before, now = old.get(key), new.get(key)
        if before != now:
            if isinstance(now, dict):
                return difference(before or {}, now, f"{prefix}{key}.")
            return f"{prefix}{key} ({before!r} there, {now!r} here)"
    raise AssertionError("the configs are equal")
