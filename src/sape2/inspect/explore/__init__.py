"""`sape2 explore`: a local page on which one points at patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

from sape2.data import load_data
from sape2.inspect.explore.microscope import Microscope, Subject
from sape2.inspect.explore.page import import_gradio, serve
from sape2.models.trained import load_run_model, note_of_rule, sizes_trained_on
from sape2.training.run_folder import check_images, read_config
from sape2.training.standing import check_finished

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
    microscope = open_microscope(folder, against, data, weights)
    for note in filter(None, map(note_of_rule, filter(None, (folder, against)))):
        say(note)
    serve(microscope, host, port, say)


def open_microscope(
    folder: Path | None = None, against: Path | None = None, data: str | None = None, weights: str = "last"
) -> Microscope:
    """The models of one or two finished runs, and the test images of the first."""
    subject = _subject(folder or SHIPPED, "shipped model" if folder is None else folder.name, weights)
    other = None if against is None else _subject(against, against.name, weights)
    if other is not None and other.name == subject.name:
        other = replace(other, name=f"{other.name} (2)")
    config = subject.config.data if data is None else replace(subject.config.data, source=data)
    images = load_data(config, subject.config.model).test
    for run in (folder, against):
        if run is not None:
            check_images(run, images.fingerprint, "take a run of these images")
    return Microscope(subject, images, other)


def _subject(folder: Path, name: str, weights: str) -> Subject:
    config = read_config(folder)
    check_finished(folder)
    return Subject(name, load_run_model(folder, weights), config, sizes_trained_on(folder))
