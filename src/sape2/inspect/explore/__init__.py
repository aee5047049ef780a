"""`sape2 explore`: a local page on which one points at patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

from sape2.config import RunConfig
from sape2.data import load_data, moved
from sape2.inspect.explore.examples import examples
from sape2.inspect.explore.microscope import Microscope, Subject
from sape2.inspect.explore.page import import_gradio, serve
from sape2.models.trained import load_run_model
from sape2.runs.run import Run

SHIPPED = Path(str(resources.files("sape2.inspect.explore").joinpath("model")))  # a run folder; how it was made: its README.md


def explore(
    folder: Path | None = None,
    against: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    data: str | None = None,
    weights: str = "last",
    say: Callable[[str], None] = print,
) -> None:
    """Serves the page until it is interrupted; without a run folder that of the model that comes with the package.

    Raises ValueError, OSError or ImportError, before anything is served, for what cannot be shown.
    """
    import_gradio()
    first, second = (None if path is None else Run.open_finished(path) for path in (folder, against))
    microscope = open_microscope(first, second, data, weights)
    for run in filter(None, (first, second)):
        if run.note_of_rule:
            say(run.note_of_rule)
    serve(microscope, host, port, say)


def open_microscope(
    run: Run[RunConfig] | None = None, against: Run[RunConfig] | None = None, data: str | None = None, weights: str = "last"
) -> Microscope:
    """The models of one or two finished runs with the test images of the first, or the shipped model with examples."""
    shipped = run is None
    run = run or Run.open_finished(SHIPPED)
    subject = _subject(run, "shipped model" if shipped else run.folder.name, weights)
    other = None if against is None else _subject(against, against.folder.name, weights)
    if other is not None and other.name == subject.name:
        other = replace(other, name=f"{other.name} (2)")
    if shipped and data is None:
        return Microscope(subject, *examples(run), against=other)
    config = subject.config.data if data is None else moved(subject.config.data, data)
    images = load_data(config, subject.config.model).test
    if shipped and list(images.classes) != list(run.classes):  # else its answers would be told by other names
        raise ValueError(
            f"the shipped model tells the classes {', '.join(run.classes)}; {images.classes[0]}, ... of {data} are others. "
            "Train a run on them, and give it"
        )
    for known in filter(None, (None if shipped else run, against)):
        known.check_images(images.fingerprint, "take a run of these images")
    return Microscope(subject, images, against=other)


def _subject(run: Run[RunConfig], name: str, weights: str) -> Subject:
    return Subject(name, load_run_model(run, weights), run.config, run.image_sizes)
