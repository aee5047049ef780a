"""What is printed and drawn: any terminal takes it, no spreadsheet computes it, and no figure decides a status."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sape2 import viz
from sape2.cli import main
from sape2.cli.output import drawn
from sape2.cli.text import NAME, print_anything
from sape2.progress import say
from sape2.runs.files import check_writable
from sape2.tables import csv_table, markdown_table, print_table


@pytest.mark.parametrize("name", ["=1+2", "+1", "-a", "@SUM(A1)", "\tx", "\n=1", " =1+2", "\uff1d1+2"])
def test_a_name_that_a_spreadsheet_would_compute_stays_text(name):
    (row,) = csv.DictReader(io.StringIO(csv_table([{"class": name, "probability": -0.5, "n": 3}])))
    assert row == {"class": f"'{name}", "probability": "-0.5", "n": "3"}


@pytest.mark.parametrize("name", ["cat", "a-b", "1+1", "x@y", "", "'=1"])
def test_other_names_stay_as_they_are(name):
    (row,) = csv.DictReader(io.StringIO(csv_table([{"class": name, name or "more": 1}])))
    assert row["class"] == name


def test_a_carriage_return_begins_no_line():
    (row,) = csv.DictReader(io.StringIO(csv_table([{"class": "a\rb"}])))
    assert row == {"class": "a\\rb"}


def test_a_name_stays_in_its_cell_of_a_page():
    assert markdown_table([{"a": "x|y\nz"}], ["a"]).splitlines()[-1] == "| x\\|y z |"


# --- terminals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_table_of_any_names_is_printed_in_any_encoding(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    print_anything()
    print_table([{"name": "猫 0.5 ± 0.1 \udce9", "µ": "x²…"}], ["name", "µ"], "95 % über", stream)
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert "\\udce9" in text
    assert ("0.5 ± 0.1" in text) == (encoding != "ascii")
    assert ("0.5 +- 0.1" in text) == (encoding == "ascii")
    assert ("\\u732b" in text) == (encoding != "utf-8")


def test_control_characters_of_a_name_are_shown_and_not_obeyed(capfd):
    """A terminal would clear itself, take a title, or show another name."""
    name = "\x1b[2Jcat\x9b1m\ndog\u2028é"
    print_table([{"class": name}], ["class"], name)
    say(name)
    assert main(["predict", name, "cat.png"]) == 2
    out, err = capfd.readouterr()
    assert out.count(r"\x1b[2Jcat\x9b1m\ndog\u2028é") == 2
    assert err.startswith(r"\x1b[2Jcat\x9b1m\ndog\u2028é")
    assert not {"\x1b", "\x9b", "\u2028"} & {*out, *err}


def test_a_stream_that_cannot_be_changed_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_anything()
    print("±")
    assert sys.stdout.getvalue() == "±\n"


@pytest.mark.parametrize("argv", [["list", "encodings"], ["list", "recipes"], ["train", "digits", "--encoding", "猫"]])
def test_commands_speak_on_an_ascii_terminal(argv):
    env = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "MPLBACKEND": "nonsense"}
    done = subprocess.run([sys.executable, "-m", "sape2", *argv], capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "train" in argv else 0)
    assert (done.stdout + done.stderr).isascii()
    assert NAME not in done.stderr


def test_names_of_classes_are_text_where_the_system_has_no_letters_for_them():
    code = "from sape2.data.base import plain_name; print(ascii(plain_name('caf\\u00e9 \\ud800')))"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == ascii("caf\u00e9 \\ud800"), done.stderr


# --- figures ---------------------------------------------------------------------------------------------------------


def failing():
    raise RuntimeError("the font\nis gone")


def test_a_figure_that_fails_is_told_and_the_others_are_drawn(capfd):
    assert drawn(lambda: Path("a.png"), failing, lambda: [Path("b.png")]) == [Path("a.png"), Path("b.png")]
    assert "a figure is missing: RuntimeError: the font is gone" in capfd.readouterr().err


def test_a_missing_figure_is_told_each_time_until_it_is_drawn(tmp_path, monkeypatch, capfd):
    """Also after the run is finished: the same command tries again."""
    quick = ["--epochs", "1", "--set", "data.train_limit=64", "--set", "model.depth=1", "--set", "train.batch_size=32"]
    argv = ["train", "digits", "--encoding", "ape", *quick, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(viz, "plot_confusion", lambda *_, **__: failing())
        for _ in range(2):
            assert main(argv) == 0
            assert "a figure is missing" in capfd.readouterr().err
    figures = tmp_path / "run" / "figures"
    assert [path.name for path in figures.iterdir()] == ["curves.png"]
    assert main(argv) == 0
    assert "a figure is missing" not in capfd.readouterr().err
    assert sorted(path.name for path in figures.iterdir()) == ["confusion.png", "curves.png"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert "data.train_limit=64" in rows[0]["changed"]
    assert rows[0]["limit"] is None
    assert main(["evaluate", str(tmp_path / "run"), "--limit", "8"]) == 0
    assert "stays in results.jsonl" in capfd.readouterr().err


# --- before the work -------------------------------------------------------------------------------------------------


def test_a_folder_that_takes_no_file_is_found_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_writable(tmp_path / "file" / "run")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(NotADirectoryError, match=r"link is a link that leads nowhere; .* --out"):
        check_writable(tmp_path / "link")
    monkeypatch.setattr(Path, "touch", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(OSError, match=r"Permission denied.* --out"):
        check_writable(tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.depth=1000000", "model.depth"),
        ("model.image_size=65536", "multiply-accumulates"),
        ("model.num_registers=16000000", "multiply-accumulates"),
    ],
)
def test_a_model_that_no_machine_trains_is_refused_at_once(capfd, setting, said):
    assert main(["train", "digits", "--dry-run", "--set", setting]) == 2
    assert said in capfd.readouterr().err
