"""Parquet files in the layout of the Hugging Face hub: an image column (bytes, or a path in the folder) and a label column.

A local folder is read by row group, each held in memory only while it is of use; a hub id goes through the cache of `datasets`.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sape2.config import DataConfig
from sape2.data.base import READING, Source, open_labelled, tell_missing, waiting_for
from sape2.data.labels import renumber

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
CACHE_BYTES = 512 * 2**20  # row groups kept by one process


class ParquetImages:
    """The rows of some parquet files, in the order of the files."""

    layout = "parquet"

    def __init__(self, where: str, root: Path, files: list[Path], config: DataConfig) -> None:
        import pyarrow.parquet

        self.where, self.root, self.files = where, root, files
        tell_missing(where, files)
        self.labels: list[Any] = []
        self.classes: tuple[str, ...] = ()
        groups: list[tuple[int, int, int, int]] = []  # file, row group, rows, bytes
        label = ""
        for number, file in enumerate(files):
            try:
                opened = waiting_for(str(file), lambda file=file: pyarrow.parquet.ParquetFile(file))
                if not number:
                    self._image, label = _columns(opened.schema_arrow, where, config)
                    self.classes = _class_names(opened.schema_arrow, label)
                for group in range(opened.num_row_groups):
                    metadata = opened.metadata.row_group(group)
                    groups.append((number, group, metadata.num_rows, metadata.total_byte_size))
                labels = opened.read(columns=[label]).column(label).to_pylist()
                names = _class_names(opened.schema_arrow, label)
                self.labels += renumber(labels, names, self.classes, f"{where} {file.name}", f"{where} {files[0].name}")
            except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
                if str(error).startswith(where):
                    raise
                raise ValueError(f"{where} cannot be read after row {len(self.labels)}: {_first_line(error)}") from error
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self._starts = np.concatenate([[0], self._groups[:, 2].cumsum()])
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def name(self, index: int) -> str:
        if len(self.files) == 1:
            return f"{self.where} row {index}"
        group = self._group(index)
        file = int(self._groups[group, 0])
        first = int(self._starts[int((self._groups[:, 0] < file).sum())])
        return f"{self.where} row {index} ({self.files[file].name} row {index - first})"

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def read(self, index: int) -> Any:
        group = self._group(index)
        rows = waiting_for(str(self.files[int(self._groups[group, 0])]), lambda: self._rows(group))
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
        import pyarrow.parquet

        file, number = self._groups[group, :2].tolist()
        try:
            with pyarrow.parquet.ParquetFile(self.files[file]) as opened:
                return opened.read_row_group(number, columns=[self._image]).column(self._image).combine_chunks()
        except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise OSError(f"{self.where} cannot be read after row {self._starts[group]}: {_first_line(error)}") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict()}

    def contents(self) -> Any:
        return [[file.name for file in self.files], self._groups.tolist()]


def inside(root: Path, path: str, where: str) -> Path:
    """A path that a data file names, which must lie in the folder of the data."""
    found = (root / path).resolve()
    if not found.is_relative_to(root.resolve()):
        raise ValueError(f"{where}: its path {path!r} leads out of {root}")
    return found


def _columns(schema: Any, where: str, config: DataConfig) -> tuple[str, str]:
    """(image column, label column); raises ValueError if one is missing or holds something else."""
    import pyarrow

    image = _column(schema.names, config.image_column, IMAGE_COLUMNS, where, "image")
    label = _column(schema.names, config.label_column, LABEL_COLUMNS, where, "label")
    kind = schema.field(image).type
    types = pyarrow.types
    fits = types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind) or types.is_string(kind)
    if not fits:
        raise ValueError(f"{where} column {image!r} holds {kind}, not images; use --set data.image_column=NAME")
    return image, label


def _column(known: Iterable[str], wanted: str | None, usual: Iterable[str], where: str, what: str) -> str:
    known = list(known)
    name = wanted or next((candidate for candidate in usual if candidate in known), None)
    if name is None or name not in known:
        asked = f"no column {wanted!r}" if wanted else f"no {what} column ({' or '.join(usual)})"
        raise ValueError(f"{where} has {asked}; its columns: {', '.join(known)}. Use --set data.{what}_column=NAME")
    return name


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The names that `datasets` keeps in the metadata of the file."""
    import datasets

    return tuple(getattr(datasets.Features.from_arrow_schema(schema)[label], "names", None) or ())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class HubImages:
    """The rows of a data set in the cache of `datasets`: memory-mapped, any row by number."""

    layout = "hub"

    def __init__(self, where: str, rows: Any, config: DataConfig) -> None:
        import datasets

        self._image = _column(rows.features, config.image_column, IMAGE_COLUMNS, where, "image")
        label = _column(rows.features, config.label_column, LABEL_COLUMNS, where, "label")
        self.where = where
        self.classes = tuple(getattr(rows.features[label], "names", None) or ())
        self.labels = rows.with_format(None)[label][:]
        self._rows = rows.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))

    def name(self, index: int) -> str:
        return f"{self.where} row {index}"

    def read(self, index: int) -> Any:
        return self._rows[index][self._image]

    def contents(self) -> Any:
        return [len(self.labels)]


# --- a folder, or a hub id -------------------------------------------------------------------------------------------


def find(folder: Path) -> bool:
    return next(folder.rglob("*.parquet"), None) is not None


def read(folder: Path, config: DataConfig) -> dict[str, Source]:
    """Which files are which split is told by `datasets`: from names, folders, or a README.md with `configs:`."""
    builder = _quietly("load_dataset_builder", str(folder), str(folder), "the folder")
    files = {str(name): [Path(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
    others = [file for found in files.values() for file in found if file.suffix != ".parquet"]
    if others:
        raise ValueError(f"--data {folder}: the folder cannot be read: {others[0].name} is not a parquet file")
    return open_labelled(files, str(folder), lambda name: ParquetImages(f"{folder} {name}", folder, files[name], config))


def is_hub_id(source: str) -> bool:
    """Whether it is written as owner/name, and nothing of that path is here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not Path(source).exists()


def read_hub(source: str, config: DataConfig) -> dict[str, Source]:
    if not is_hub_id(source):
        raise FileNotFoundError(f"--data {source} is neither a folder nor a hub id (owner/name)")
    found = _quietly("load_dataset", source, source, "no such folder here, and the hub data set")
    return open_labelled(found, source, lambda name: HubImages(f"{source} {name}", found[name], config))


def _quietly(function: str, source: str, where: str, kind: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading parquet needs datasets: pip install 'sape2[train]'") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs every error that it also raises
    try:
        return getattr(datasets, function)(source)
    except Exception as error:  # datasets raises many kinds; all mean that the source cannot be read
        raise ValueError(f"--data {where}: {kind} cannot be read: {_first_line(error)}") from error
