"""Names in figures are text: no formulas, no LaTeX, nothing left out of a legend, however long they are."""

import warnings

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from sape2 import viz
from sape2.inspect.figures import answer_figure, as_one
from sape2.viz import base, confusion, curves
from sape2.viz.base import as_text

NAMES = ("A$^$B", "$a$", "_hidden", "x^2_1", r"\frac{1}{2}", "100 %", "{", "#&~", "\udce9", "a\nb\tc", "猫", "w" * 300)
EPOCHS = [{"epoch": n, "loss": 1.0, "accuracy": 0.5, "validation_loss": 1.0, "validation_accuracy": 0.5} for n in (1, 2)]
ROWS = [{"name": "shift_accuracy", "value": 0.5, "shift_px": px, "axis": "x", "border": "circular"} for px in (0, 1)]


@pytest.fixture
def texts(monkeypatch):
    """All texts of the figures that were saved."""
    found = []

    def save(figure, path):
        base.save(figure, path)
        found.extend(text.get_text() for text in figure.findobj(mpl.text.Text))

    for module in (confusion, curves):
        monkeypatch.setattr(module, "save", save)
    yield found
    plt.close("all")


@pytest.mark.parametrize("settings", [{}, {"text.usetex": True}, {"axes.formatter.use_mathtext": True}])
def test_every_picture_takes_every_name(tmp_path, settings):
    points = {name: {"a": [0.5], "b": [0.6]} for name in NAMES}
    by_seed = {name: {0: 0.5, 1: 0.6} for name in NAMES}
    answer = answer_figure(np.zeros((1, 8, 8), np.uint8), (4, 4), [], {}, [(name, 0.5) for name in NAMES])
    draws = {
        "curves": lambda path: viz.plot_curves(dict.fromkeys(NAMES, EPOCHS), path, NAMES[0]),
        "confusion": lambda path: viz.plot_confusion(torch.eye(len(NAMES), dtype=torch.long), NAMES, path),
        "shift": lambda path: viz.plot_shift(dict.fromkeys(NAMES, ROWS), path, notes=viz.Notes(about=NAMES[0])),
        "seeds": lambda path: viz.plot_seeds(by_seed, {}, {}, NAMES[0], path, NAMES[-1]),
        "answer": lambda path: as_one(" ".join(NAMES), "", answer, answer).save(path),
        "probe": lambda path: viz.plot_probe(points, {"a": 0.1, "b": 0.1}, path),
        "growth": lambda path: viz.plot_growth({NAMES[0]: {name: [(4, 1.0), (16, 2.0)] for name in NAMES}}, path, "ms"),
    }
    before = {key: mpl.rcParams[key] for key in base.PLAIN_TEXT}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, draw in draws.items():
            draw(tmp_path / f"{name}.png")
            with Image.open(tmp_path / f"{name}.png") as shown:
                assert max(shown.size) < 4000, name
    assert {key: mpl.rcParams[key] for key in base.PLAIN_TEXT} == before


def test_without_that_a_name_with_two_dollars_stops_a_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "PLAIN_TEXT", {})
    with pytest.raises(ValueError, match=r"ParseException|ParseSyntaxException|Expected"):
        viz.plot_confusion(torch.eye(2, dtype=torch.long), ("A$^$B", "tea"), tmp_path / "confusion.png")


def test_names_stand_in_figures_as_they_are(texts, tmp_path):
    viz.plot_confusion(torch.eye(len(NAMES), dtype=torch.long), NAMES, tmp_path / "confusion.png")
    assert {"A$^$B", "$a$", " _hidden", "x^2_1", r"\frac{1}{2}", "\\udce9", "a b c", "猫"} <= set(texts)
    viz.plot_shift({"_ape": ROWS, "$a$": ROWS}, tmp_path / "shift.png")
    assert {" _ape", "$a$"} <= set(texts)


def test_text_of_a_name_is_one_line_that_a_legend_shows():
    assert [as_text(name) for name in ("ape", "_x", "a\r\nb", "\udcff")] == ["ape", " _x", "a b", "\\udcff"]


def test_a_picture_leaves_the_callers_matplotlib_alone_and_does_not_depend_on_it(tmp_path):
    mine = plt.figure()
    backend = mpl.get_backend()
    viz.plot_curves({"ape": EPOCHS}, tmp_path / "plain.png")
    with mpl.rc_context({"savefig.transparent": True, "axes.facecolor": "black", "font.size": 30}):
        viz.plot_curves({"ape": EPOCHS}, tmp_path / "styled.png")
        assert mpl.rcParams["font.size"] == 30
    assert plt.get_fignums() == [mine.number]
    assert mpl.get_backend() == backend
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()
    plt.close("all")


def test_an_epoch_without_a_finite_loss_is_a_gap(tmp_path):
    viz.plot_curves({"ape": [EPOCHS[0] | {"validation_loss": None}, EPOCHS[1]]}, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").exists()
