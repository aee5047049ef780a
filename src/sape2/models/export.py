"""Writes a model to a file: ONNX, PyTorch's .pt2, or safetensors with its config. Each file is checked when written.

The check runs the written file on images that the graph was not traced with: other batch sizes and, unless one size was
chosen, other image sizes. It compares the logits with those of the model in eager mode, which computes attention by another
path (`attention.choose_path`). A file that fails the check is deleted.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.export import ExportedProgram

from sape2.config import ModelConfig, RunConfig
from sape2.config.extras import from_extra
from sape2.data.base import at_home
from sape2.machine import evaluating, uncompiled
from sape2.models.frozen import Size, as_size, example, freeze, patch_projection, trace
from sape2.models.hub import (
    CARD,
    CONFIG,
    WEIGHTS,
    Description,
    check_replaceable,
    describe,
    load_pretrained,
    model_of,
    read_description,
    save_pretrained,
    unfilled,
)
from sape2.models.trained import load_run_model
from sape2.runs.files import write_atomic
from sape2.runs.run import Run, check_output
from sape2.tables import Row

Format = Literal["onnx", "pt2", "safetensors", "hub"]
Computed = Callable[[Tensor], Tensor]  # images -> logits
Model = TypeVar("Model", bound=nn.Module)

TOLERANCE = 1e-4  # of the largest logit, or of 1 if that is smaller; float32 differences are about 1e-6
OPSET = 20
NORMALIZED = "images as float32, (pixel / 255 - mean) / std"
PIXELS = "images as float32, pixel / 255; the graph normalises them itself"
METADATA_FILE = "sape2.json"  # inside a .pt2 archive
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


class ParityError(ValueError):
    """An exported file does not compute what the model does; `rows` are what was compared."""

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


class Normalized(nn.Module):
    """A model that takes pixels / 255 and normalises them itself: model((images - mean) / std)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        like = patch_projection(model).weight
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None])

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        return self.model((images - self.mean) / self.std)


# --- the calls -------------------------------------------------------------------------------------------------------


def export_model(
    model: nn.Module,
    path: str | Path,
    format: Literal["onnx", "pt2", "safetensors"],
    *,
    size: Size | None = None,
    metadata: Description | None = None,
    train_size: Size | None = None,
) -> list[Row]:
    """Writes a model to `path` as "onnx", "pt2" or "safetensors", and checks the file; returns what was compared.

    With `size`, (height, width), the graph is for that size alone (`freeze`); else for any size of whole patches: from one
    patch on in ONNX, from two along each side in a .pt2 file and for models of other libraries. The batch is open in both.
    `metadata` goes into the file, as JSON texts. `train_size` is where the check looks first, by default that of a ViT of
    this package, and 8 x 8 patches for others. The model is exported as in evaluation, and stays in the mode that it is in.

    Raises ValueError for what cannot be exported, ParityError if the file computes something else (it is then not left
    behind), ImportError that names the extra if a library is missing.
    """
    if format not in ("onnx", "pt2", "safetensors"):
        raise ValueError(f"format must be onnx, pt2 or safetensors; got {format!r}")
    needed(format)
    path = at_home(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    model = uncompiled(model)
    size = None if size is None else as_size(size)
    with evaluating(model) as device, torch.autocast(device.type, enabled=False):
        if format == "safetensors":
            _refuse_size(format, size)
            return _write_safetensors(model, path, metadata)
        return _write_graph(model, path, format, size, metadata, train_size)


def _write_graph(
    model: nn.Module,
    path: Path,
    format: Literal["onnx", "pt2"],
    size: Size | None,
    metadata: Description | None,
    train_size: Size | None,
) -> list[Row]:
    if metadata is None and isinstance(model_config := getattr(model, "config", None), ModelConfig):
        metadata = describe(model_config)
    start = size or train_size or _train_size(model)
    graph = _graph(model, start, frozen=size is not None)
    write = _write_onnx if format == "onnx" else _write_pt2
    described = (metadata or {}) | {"image_size": list(size) if size else "any", "patch_size": _patch_size(model)[0]}
    cases = _cases(model, start, size, _fewest(model, format))
    described |= {} if size else {"smallest_image": [min(case[1][side] for case in cases) for side in (0, 1)]}
    return write_checked(path, lambda file: write(graph, file, described), RUNNERS[format], model, cases)


def export_run(
    run: Run[RunConfig],
    format: Format,
    out: Path | None = None,
    *,
    size: Size | None = None,
    weights: str = "last",
    normalize: bool = False,
    license: str | None = None,
) -> tuple[Path, list[Row]]:
    """The model of a run as a file (default RUN/export/NAME.onnx) or, for "hub", as a folder: (path, comparison).

    `normalize` puts the mean and standard deviation of the training images into the graph. `license` is the model's, written
    into the file; None writes none. Raises as `export_model`.
    """
    config, model = run.config, load_run_model(run, weights).cpu()
    described = describe(config.model, run, weights, license)
    name = run.folder.resolve().name
    path = out or run.folder / "export" / (f"{name}.{format}" if format != "hub" else f"{name}-hub")
    if normalize and format not in RUNNERS:
        raise ValueError(f"normalisation goes into a graph, and {format} has none; its config says what to do with images")
    if format == "hub":
        _refuse_size(format, size)
        check_replaceable(path)
        return path, _write_hub(model, path, run, weights, license)
    check_output(path)
    described |= {"input": f"{described['normalization']['resize']}; {PIXELS if normalize else NORMALIZED}"}
    module = Normalized(model, config.data.mean, config.data.std).eval() if normalize else model
    return path, export_model(module, path, format, size=size, metadata=described, train_size=config.model.image_size)


def _refuse_size(format: Format, size: Size | None) -> None:
    if size is not None:
        raise ValueError(f"a size has no effect on {format}, which holds weights and no graph; leave it out")


def write_checked(path: Path, write: Callable[[Path], None], run: Callable[[Path], Computed], model: nn.Module,
                  cases: list[tuple[int, Size]]) -> list[Row]:  # fmt: skip
    """`write` to a file beside `path`, compare what `run` makes of it, and only then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        file = Path(scratch) / path.name
        write(file)
        rows = compare(model, run(file), cases)
        _check_rows(path, rows)
        write_atomic(path, lambda temporary: os.replace(file, temporary))
    return rows


def _check_rows(path: Path, rows: list[Row]) -> None:
    wrong = [row for row in rows if not row["agrees"]]
    if wrong:
        raise ParityError(
            "{} was not written: on {batch} images of {height}x{width} its logits differ by {max_abs_difference:.2g} from "
            "those of the model, more than {tolerance:.2g}".format(path, **wrong[0]),
            rows,
        )


def compare(model: nn.Module, run: Computed, cases: list[tuple[int, Size]]) -> list[Row]:
    """The largest difference of any logit between the model and `run`, for every case (number of images, their size)."""
    rows = []
    for number, (batch, size) in enumerate(cases, start=1):
        images = example(model, size, batch, seed=number)
        with torch.no_grad():
            expected = logits_of(model(images)).float()
            found = run(images).to(expected)
        same_shape = found.shape == expected.shape
        difference = (found - expected).abs().max().item() if same_shape else float("inf")
        tolerance = TOLERANCE * max(1.0, expected.abs().max().item())
        agrees = difference <= tolerance  # false for NaN
        rows.append({"batch": batch, "height": size[0], "width": size[1], "max_abs_difference": difference,
                     "largest_logit": expected.abs().max().item(), "tolerance": tolerance, "agrees": agrees})  # fmt: skip
    return rows


def logits_of(output: Any) -> Tensor:
    """The tensor that a model returns, or the `logits` of what a model of transformers returns."""
    return output if isinstance(output, Tensor) else output.logits


def load_exported(path: str | Path, model_class: type[Model]) -> Model:
    """The ViT in a .safetensors file of `export_model`, in evaluation mode. Raises ValueError if it is something else."""
    path = at_home(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("sape2")
        if text is None:
            raise ValueError(f"{path} does not say which model it holds; it was not written by sape2 export")
        model = unfilled(model_class, read_description(text, str(path))["model"])
        load_model(model, path)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[-1].strip()}") from error
    return model.eval()


# --- graphs ----------------------------------------------------------------------------------------------------------


def _graph(model: nn.Module, size: Size, *, frozen: bool) -> ExportedProgram:
    if frozen:
        return trace(freeze(model, size), example(model, size))
    height, width = _patch_size(model)
    other = (size[0] + height, size[1] + 2 * width)  # not the size of training, where tables need no resampling
    return trace(model, example(model, other), (height, width))


def _patch_size(model: nn.Module) -> tuple[int, int]:
    height, width = patch_projection(model).stride
    return int(height), int(width)


def _train_size(model: nn.Module) -> Size:
    config = getattr(model, "config", None)
    height, width = _patch_size(model)
    return config.image_size if isinstance(config, ModelConfig) else (8 * height, 8 * width)


def _fewest(model: nn.Module, format: Format) -> int:
    """Patches along the smallest side that a file takes.

    Two in a traced graph of PyTorch, which guards it, and for models of other libraries: their tables are resampled by
    PyTorch, which does it wrongly on one column (`encodings.resample`), and a file for other runtimes would differ.
    """
    config = getattr(getattr(model, "model", model), "config", None)  # of a model that normalises, the one inside
    return 1 if format != "pt2" and isinstance(config, ModelConfig) else 2


def _cases(model: nn.Module, start: Size, size: Size | None, fewest: int = 1) -> list[tuple[int, Size]]:
    """Numbers of images and sizes to compare: at one size, or at that of training, the traced one and the extremes."""
    if size is not None:
        return [(1, size), (3, size)]
    height, width = _patch_size(model)
    rows, columns = max(2, start[0] // height), max(2, start[1] // width)
    grids = [
        (3, (rows, columns)),
        (1, (rows + 1, columns + 2)),
        (2, (fewest, columns + 3)),
        (4, (rows + 3, fewest)),
        (1, (fewest, fewest)),
        (2, (2 * rows + 1, 2 * columns)),
    ]
    return [(batch, (height * grid[0], width * grid[1])) for batch, grid in grids]


# --- formats ---------------------------------------------------------------------------------------------------------


def _write_pt2(program: ExportedProgram, file: Path, metadata: Description) -> None:
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata, indent=2)})


def _run_pt2(file: Path) -> Computed:
    module = torch.export.load(file).module()
    return lambda images: logits_of(module(images))


def _write_onnx(program: ExportedProgram, file: Path, metadata: Description) -> None:
    ir = importlib.import_module("onnx_ir")
    with quiet():
        onnx_program: Any = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False)
    graph = onnx_program.model.graph
    images = graph.inputs[0]
    height, width = (
        side if isinstance(side, int) else name for side, name in zip(images.shape[2:], ("height", "width"), strict=True)
    )
    images.shape = ir.Shape(["batch", images.shape[1], height, width])
    images.name, graph.outputs[0].name = "images", "logits"
    onnx_program.model.metadata_props.update(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    )
    onnx_program.save(file, external_data=False)


def _run_onnx(file: Path) -> Computed:
    onnxruntime = importlib.import_module("onnxruntime")
    importlib.import_module("onnx").checker.check_model(str(file))
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # of classes that onnxruntime keeps to itself
        reason = " ".join(str(error).split())
        raise ValueError(
            f"onnxruntime cannot run the graph, so no file was written: {reason}. Weights in float32 it can"
        ) from error
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.cpu().numpy()})[0])


def _write_safetensors(model: nn.Module, path: Path, metadata: Description | None) -> list[Row]:
    config = model_of(model)
    text = json.dumps(metadata or describe(config))
    return write_checked(
        path,
        lambda file: save_model(model, str(file), {"format": "pt", "sape2": text}),
        lambda file: load_exported(file, type(model)).to(patch_projection(model).weight),
        model,
        _cases(model, config.image_size, None),
    )


def _write_hub(model: nn.Module, folder: Path, run: Run[RunConfig], weights: str, license: str | None) -> list[Row]:
    """Writes to a temporary folder first and moves config.json last, because nothing is loaded without it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        save_pretrained(model, scratch, run, weights, license)
        rows = compare(model, load_pretrained(type(model), scratch), _cases(model, model_of(model).image_size, None))
        _check_rows(folder, rows)
        folder.mkdir(exist_ok=True)
        for name in (WEIGHTS, CARD, CONFIG):
            write_atomic(folder / name, partial(os.replace, Path(scratch) / name))  # open to whom the folder is
    return rows


RUNNERS: dict[str, Callable[[Path], Computed]] = {"onnx": _run_onnx, "pt2": _run_pt2}


def needed(format: Format) -> None:
    """Raises ImportError naming the extra if a library that the format needs is missing."""
    for library in NEEDED.get(format, ()):
        from_extra("export", library, f"export to {format} needs {library}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the progress output and warnings of the exporter, which are meant for its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
