"""Parquet files in the layout of the Hugging Face hub: an image column (bytes, or a path in the folder) and a label column.

A local folder is read by row group, each kept in memory only while it is needed; a hub id uses the cache of `datasets`.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from sape2.config import DataConfig
from sape2.config.extras import from_extra
from sape2.data.base import Source, plain_name, tell, tell_missing, waiting_for
from sape2.data.labels import numbers_of, renumber, tell_unnamed
from sape2.data.splits import by_split, files_by_split, open_labelled
from sape2.data.walk import Files, listed, lying, tell_left_out

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
CACHE_BYTES = 512 * 2**20  # row groups kept by one process
READING = threading.Lock()  # row groups are kept and left by one thread at a time
FEWEST_BYTES = 40  # of an image; smaller columns of bytes hold none
LONGEST_PATH = 1000  # characters; longer texts are something else, such as base64
AT_ONCE = 256  # rows; pyarrow reads no more than 2 GiB of bytes as one array, and row groups may hold more


class Outline(NamedTuple):
    """What a parquet file holds besides images."""

    columns: tuple[str, str | None]  # of the images, of the labels
    groups: list[tuple[int, int]]  # rows and bytes of each row group
    labels: list[Any]
    names: tuple[str, ...]  # of the classes
    paths: list[str]  # of images that rows name


def outlines_of(where: str, files: list[Path], config: DataConfig, may_lack_labels: bool) -> list[Outline]:
    """Raises ValueError for a file that cannot be read, or has other columns than the first."""
    found: list[Outline] = []
    for file in files:
        try:
            outline = _outline(file, where, config, may_lack_labels)
        except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
            if str(error).startswith(where):
                raise
            rows = sum(len(each.labels) for each in found)
            raise ValueError(f"{where} cannot be read after row {rows}: {_first_line(error)}") from error
        if found and outline.columns != found[0].columns:
            others = " and ".join(filter(None, outline.columns))
            raise ValueError(f"{where} {plain_name(file.name)} has other columns, {others}")
        found.append(outline)
    return found


def _outline(file: Path, where: str, config: DataConfig, may_lack_labels: bool) -> Outline:
    with waiting_for(plain_name(file), lambda: file.open("rb")) as stream, opened(stream) as found:
        image, label = columns = _columns(found.schema_arrow, where, config, may_lack_labels)
        groups = [found.metadata.row_group(group) for group in range(found.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        return Outline(columns, sizes, *_labels_in(found, label), paths_in(found, image))


class ParquetImages:
    """The rows of some parquet files, in the order of the files."""

    layout = "parquet"

    def __init__(self, where: str, root: Path, files: list[Path], config: DataConfig, may_lack_labels: bool = False) -> None:
        self.where, self.root, self.files = where, root, files
        tell_missing(where, files)
        outlines = outlines_of(where, files, config, may_lack_labels)
        self._image = outlines[0].columns[0]
        self.labels, self.classes = self._numbered(outlines)
        self.paths = [path for outline in outlines for path in outline.paths]
        if again := [path for path, times in Counter(map(posixpath.normpath, self.paths)).items() if times > 1]:
            tell(f"{where}: {len(again)} image{'s' * (len(again) > 1)} named by more than one row, {listed(sorted(again))}")
        groups = [(file, group, *sizes) for file, each in enumerate(outlines) for group, sizes in enumerate(each.groups)]
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 4)  # file, row group, rows, bytes
        self._starts = np.concatenate([[0], self._groups[:, 2].cumsum()])
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def _numbered(self, outlines: list[Outline]) -> tuple[list[Any], tuple[str, ...]]:
        """The labels of all files, counted in the names of the first that has names; and these."""
        places = [f"{self.where} {plain_name(file.name)}" for file in self.files]
        names = [outline.names for outline in outlines]
        first = next((number for number, found in enumerate(names) if found), 0)
        labels = []
        for place, outline in zip(places, outlines, strict=True):
            if not outline.labels:
                tell(f"{place} holds no rows")
            labels += renumber(outline.labels, outline.names, names[first], place, places[first])
            if names[first] and not outline.names:
                tell_unnamed(place)
        return labels, names[first]

    def name(self, index: int) -> str:
        if len(self.files) == 1:
            return f"{self.where} row {index}"
        group = self._group(index)
        file = int(self._groups[group, 0])
        first = int(self._starts[int((self._groups[:, 0] < file).sum())])
        return f"{self.where} row {index} ({plain_name(self.files[file].name)} row {index - first})"

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def read(self, index: int) -> Any:
        group = self._group(index)
        rows = waiting_for(plain_name(self.files[int(self._groups[group, 0])]), lambda: self._rows(group))
        value = rows[index - int(self._starts[group])].as_py()
        if isinstance(value, bytes):
            return {"bytes": value}
        if isinstance(value, str):
            value = {"path": value}
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path") is not None:
            return {"path": str(inside(self.root, value["path"], self.name(index)))}
        return value

    def _rows(self, group: int) -> Any:
        """The image column of a row group, from memory if it is there."""
        with READING:
            if group not in self._cache:
                size = int(self._groups[group, 3])
                while self._cache and size + sum(int(self._groups[held, 3]) for held in self._cache) > CACHE_BYTES:
                    self._cache.popitem(last=False)
                self._cache[group] = self._load(group)
            self._cache.move_to_end(group)
            return self._cache[group]

    def _load(self, group: int) -> Any:
        file, number = self._groups[group, :2].tolist()
        try:
            with self.files[file].open("rb") as stream, opened(stream) as found:
                import pyarrow

                batches = found.iter_batches(AT_ONCE, row_groups=[number], columns=[self._image])
                return pyarrow.chunked_array([batch.column(self._image) for batch in batches])
        except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise OSError(f"{self.where} cannot be read after row {self._starts[group]}: {_first_line(error)}") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict()}

    def contents(self) -> Any:
        return [[file.name for file in self.files], self._groups.tolist()]


def opened(stream: IO[bytes]) -> Any:
    """A parquet file that is open already: of paths, pyarrow takes some for addresses, and none that is not UTF-8."""
    return from_extra("train", "pyarrow.parquet", "reading parquet needs pyarrow").ParquetFile(stream)


def inside(root: Path, path: str, where: str) -> Path:
    """A path that a data file names, which must lie in the folder of the data."""
    found = (root / path).resolve()
    if not found.is_relative_to(root.resolve()):
        raise ValueError(f"{where}: its path {path!r} leads out of {plain_name(root)}")
    return found


def paths_in(found: Any, column: str) -> list[str]:
    """The paths that stand in the place of images; those beside bytes are names only. Raises ValueError for other texts."""
    paths = _texts_in(found, column)
    if (longest := max(map(len, paths), default=0)) > LONGEST_PATH:
        raise ValueError(
            f"column {column!r} holds texts of up to {longest} characters, which are no paths; it needs the bytes of images, "
            "not base64 or another text made of them"
        )
    return paths


def _texts_in(found: Any, column: str) -> list[str]:
    if _holds(found.schema_arrow.field(column).type, "string"):
        return [path for path in found.read(columns=[column]).column(column).to_pylist() if path is not None]
    groups = [group for group in range(found.num_row_groups) if _lacks_bytes(found.metadata.row_group(group), column)]
    batches = found.iter_batches(AT_ONCE, row_groups=groups, columns=[column])
    rows = (row for batch in batches for row in batch.column(column).to_pylist())
    return [row["path"] for row in rows if isinstance(row, dict) and row.get("bytes") is None and row.get("path")]


def _lacks_bytes(group: Any, column: str) -> bool:
    """True if rows of a row group have no bytes, according to its metadata."""
    chunks = {chunk.path_in_schema: chunk for chunk in map(group.column, range(group.num_columns))}
    chunk = chunks.get(f"{column}.bytes")
    if chunk is None:
        return f"{column}.path" in chunks
    missing = chunk.statistics.null_count if chunk.is_stats_set and chunk.statistics.has_null_count else 0
    return bool(missing) or chunk.total_uncompressed_size < FEWEST_BYTES * group.num_rows


def _labels_in(found: Any, column: str | None) -> tuple[list[Any], tuple[str, ...]]:
    """The labels of a parquet file and the names of their classes, by which text is numbered.

    None for every row where it has no such column.
    """
    if column is None:
        return [None] * found.metadata.num_rows, ()
    labels, names = found.read(columns=[column]).column(column).to_pylist(), _class_names(found.schema_arrow, column)
    numbers = numbers_of(names)
    return [numbers.get(label, label) if isinstance(label, str) else label for label in labels], names


def _columns(schema: Any, where: str, config: DataConfig, may_lack_labels: bool = False) -> tuple[str, str | None]:
    """(image column, label column); raises ValueError if one is missing or holds something else."""
    image = _column(schema.names, config.image_column, IMAGE_COLUMNS, where, "image")
    label = _label_column(schema.names, where, config, may_lack_labels)
    kind = schema.field(image).type
    if not (_holds(kind, "binary", "string") or _is_image(kind)):
        raise ValueError(f"{where} column {image!r} holds {kind}, not images; use --set data.image_column=NAME")
    return image, label


def _holds(kind: Any, *wanted: str) -> bool:
    """True if a pyarrow type is one of `wanted` ("string", "binary") in any storage: large, view, fixed size, dictionary."""
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return any(re.fullmatch(rf"(large_|fixed_size_)?{name}(_view)?(\[\d+\])?", str(kind)) for name in wanted)


def _is_image(kind: Any) -> bool:
    """True if the type is a struct of bytes, a path, or both."""
    import pyarrow

    fields = {each.name: each.type for each in kind} if pyarrow.types.is_struct(kind) else {}
    wanted = {"bytes": "binary", "path": "string"}
    return bool(wanted.keys() & fields) and all(_holds(fields[name], wanted[name], "null") for name in wanted.keys() & fields)


def _label_column(known: Iterable[str], where: str, config: DataConfig, may_lack: bool) -> str | None:
    """None for a test set whose labels are kept back by leaving the column out."""
    names = list(known)
    if may_lack and not {config.label_column, *LABEL_COLUMNS} & {*names}:
        return None
    return _column(names, config.label_column, LABEL_COLUMNS, where, "label")


def _column(known: Iterable[str], wanted: str | None, usual: Iterable[str], where: str, what: str) -> str:
    known = list(known)
    there = [candidate for candidate in usual if candidate in known]
    name = wanted or next(iter(there), None)
    if wanted is None and len(there) > 1:
        tell(f"{where} has several {what} columns, {listed(there)}; {name} is taken, or --set data.{what}_column=NAME")
    if name is None or name not in known:
        asked = f"no column {wanted!r}" if wanted else f"no {what} column ({' or '.join(usual)})"
        raise ValueError(f"{where} has {asked}; its columns: {', '.join(known)}. Use --set data.{what}_column=NAME")
    if known.count(name) > 1:
        raise ValueError(f"{where} has {known.count(name)} columns called {name!r}; leave one, or give each a name of its own")
    return name


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The names that `datasets` keeps in the metadata of the file."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label]["names"] if features[label]["_type"] == "ClassLabel" else ()
        return tuple("" if name is None else str(name) for name in names)
    except (ValueError, KeyError, TypeError):
        return ()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class HubImages:
    """The rows of a data set in the cache of `datasets`: memory-mapped, any row by number."""

    layout = "hub"

    def __init__(self, where: str, rows: Any, config: DataConfig, may_lack_labels: bool = False) -> None:
        import datasets

        self._image = _column(rows.features, config.image_column, IMAGE_COLUMNS, where, "image")
        label = _label_column(rows.features, where, config, may_lack_labels)
        self.where = where
        self.classes = tuple(getattr(rows.features.get(label), "names", None) or ())
        self.labels = [None] * len(rows) if label is None else rows.with_format(None)[label][:]
        try:
            self._rows = rows.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))
        except Exception as error:  # datasets and pyarrow raise many kinds for what holds no images
            kind = " ".join(str(rows.features[self._image]).split())[:80]
            raise ValueError(
                f"{where} column {self._image!r} holds {kind}, not images; use --set data.image_column=NAME"
            ) from error

    def name(self, index: int) -> str:
        return f"{self.where} row {index}"

    def read(self, index: int) -> Any:
        return self._rows[index][self._image]

    def contents(self) -> Any:
        return [len(self.labels)]


# --- a folder, or a hub id -------------------------------------------------------------------------------------------


def find(files: Files) -> bool:
    return bool(files.ending(".parquet"))


def holds_paths(files: Files, config: DataConfig) -> bool:
    """True if rows of the first file name image files, which then belong to the data set."""
    first = next(iter(files.ending(".parquet")), None)
    try:
        with (files.root / str(first)).open("rb") as stream, opened(stream) as found:
            return bool(paths_in(found, _columns(found.schema_arrow, "", config, may_lack_labels=True)[0]))
    except (OSError, RuntimeError, TypeError, ValueError, KeyError):
        return False


def read(files: Files, config: DataConfig) -> dict[str, Source]:
    """The split of a file is a word of its path, or told by a README.md with `configs:`."""
    where, seen = plain_name(files.root), set()
    fraction, seed = config.test_fraction, config.split_seed
    groups = files_by_split(files, ".parquet", fraction is not None)

    def open_split(split: str) -> tuple[ParquetImages, dict[str, str]]:
        paths = [files.root / name for name in groups[split]]
        source = ParquetImages(f"{where} {split}", files.root, paths, config, may_lack_labels=split != "train")
        by_path = lying(files, source.paths)
        lies = {files.real[name]: name for name in groups[split]} | by_path
        seen.update(by_path)
        source.paths = []
        return source, lies

    sources = open_labelled(groups, where, open_split, fraction, seed)
    others = [name for name, lies in files.real.items() if lies not in seen and not name.lower().endswith(".parquet")]
    tell_left_out(where, others, "rows of parquet files are taken")
    return sources


def is_hub_id(source: str) -> bool:
    """True if the text has the form owner/name and no such path exists here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).exists()


def read_hub(source: str, config: DataConfig) -> dict[str, Source]:
    if not is_hub_id(source):
        raise FileNotFoundError(f"--data {source} is neither a folder nor a hub id (owner/name)")
    found = _load_quietly(source)
    groups = by_split(source, map(str, found), "split", config.test_fraction is not None)

    def open_split(split: str) -> tuple[HubImages, dict[str, str]]:
        [name] = groups[split]
        return HubImages(f"{source} {name}", found[name], config, may_lack_labels=split != "train"), {}

    return open_labelled(groups, source, open_split, config.test_fraction, config.split_seed)


def _load_quietly(source: str) -> Any:
    datasets = from_extra("train", "datasets", "reading hub data sets needs datasets")
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs every error that it also raises
    try:
        return datasets.load_dataset(source)
    except Exception as error:  # datasets raises many kinds; all mean that the source cannot be read
        raise ValueError(
            f"--data {source}: no such folder here, and the hub data set cannot be read: {_first_line(error)}"
        ) from error
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
