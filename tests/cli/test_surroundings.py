"""What surrounds a command: closed streams, readers that go away, variables of other programs, words that shells leave."""

import json
import os
import signal
import subprocess
import sys

import pytest

from sape2.cli import build_parser, main, with_home
from sape2.cli.options import resolve, say_once
from sape2.progress import bars, say
from sape2.tables import json_text, print_json
from sape2.training.interruption import catch_signals
from sape2.training.processes import launched


def shell(script):
    return subprocess.run(["bash", "-c", f"set -o pipefail; {script}", sys.executable], capture_output=True, text=True)


@pytest.mark.parametrize(
    "script",
    [
        '"$0" -m sape2 list models 2>&-',
        '"$0" -m sape2 list models >&-',
        '"$0" -m sape2 list encodings | true',
        'env -u PYTHONUNBUFFERED "$0" -m sape2 list models | true',  # little enough to be written at the end
        'env -u PYTHONUNBUFFERED "$0" -m sape2 --help | true',
    ],
)
def test_a_closed_stream_and_a_reader_that_has_gone_are_no_failure(script):
    done = shell(script)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("argv", ["list models", "list encodings --json", "--help"])
def test_a_full_disk_behind_standard_output_is_told_in_one_line(argv):
    done = shell(f'env -u PYTHONUNBUFFERED "$0" -m sape2 {argv} >/dev/full')
    assert done.returncode == 2
    assert done.stderr.startswith("sape2: ")
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1


def test_rows_stay_apart_from_messages_where_there_is_no_standard_error():
    done = shell('"$0" -m sape2 train digits --dry-run --json --encoding "sape2 + ape" 2>&-')
    assert [json.loads(line)["config"]["recipe"] for line in done.stdout.splitlines()] == ["digits"]


def test_a_home_is_expanded_behind_an_equals_sign_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert with_home("--out=~/runs") == "--out=/home/me/runs"
    for word in ("--out=runs~/x", "~/runs", "--set=data.name=~/x", "--out=~not a user"):
        assert with_home(word) == word


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["predict", "run", ""], "PATH"),
        (["report", "run", "--out", ""], "--out"),
        (["inspect", "run", "--data", ""], "--data"),
        (["train", "digits", "--set", ""], "--set"),
        (["explore", ""], "RUN"),
    ],
)
def test_an_empty_path_is_refused_and_not_the_present_folder(argv, name, capfd):
    assert main(argv) == 2
    assert capfd.readouterr().err == f"sape2: {name} is empty, as a variable of the shell that is not set leaves it\n"


@pytest.mark.parametrize("text", ["two", "0", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_named(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ValueError, match=f"WORLD_SIZE must be the number .* got '{text}'"):
        launched()


def test_empty_variables_of_a_launcher_are_as_none(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("RANK", "")
    assert launched() == 1
    say_once("heard")
    monkeypatch.setenv("RANK", "3")  # left over, alone
    say_once("heard")
    monkeypatch.setenv("WORLD_SIZE", "4")
    say_once("not heard")
    assert capfd.readouterr().err == "heard\nheard\n"


def test_float32_is_float32_whatever_a_container_set(monkeypatch, capfd):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    assert main(["list", "models"]) == 0
    assert "ONEDNN_DEFAULT_FPMATH_MODE" not in os.environ


def test_an_option_is_not_abbreviated(capfd):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["compare", "digits", "--encodings", "ape", "--seed", "3"])
    assert "--seed" in capfd.readouterr().err


def test_a_signal_that_is_ignored_stays_so():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_signals() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_work_goes_on_when_nobody_reads_its_messages(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1, encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        for line in ("epoch 1/2", "epoch 2/2"):
            say(line)
        stream.flush()
        monkeypatch.undo()


def test_a_path_in_brackets_is_no_markup_in_a_bar(monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bars() as progress:
        progress.add_task("reading the images of [/data/cats]", total=1)
        progress.refresh()
    assert "[/data/cats]" in capfd.readouterr().err


def test_what_is_not_finite_is_null_in_json(capfd):
    row = {"value": float("nan"), "text": "NaN", "curve": [1.0, float("-inf")], "n": 3}
    print_json([row])
    assert json.loads(capfd.readouterr().out) == {"value": None, "text": "NaN", "curve": [1.0, None], "n": 3}
    assert json_text({"value": 0.5}) == '{"value": 0.5}'


def test_a_run_keeps_the_whole_path_of_its_images(tmp_path, monkeypatch):
    """So that a command in another folder finds them; what is no folder may be an id of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    parsed = {data: build_parser().parse_args(["train", "cifar10", "--data", data]) for data in ("own", "uoft-cs/cifar10")}
    assert {resolve(arguments).data.source for arguments in parsed.values()} == {str(tmp_path / "own"), "uoft-cs/cifar10"}
