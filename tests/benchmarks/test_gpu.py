"""The command for a GPU runs in full on a CPU, goes on where it was, and goes on past what fails."""

import sys

import gpu
import pytest
import torch
from gpu_case import Case, NotAvailable

from sape2.runs.rows import read_rows

ABOUT = {"device": "one", "torch": "2", "tiny": True}
CONDITIONS = {"date", "hardware", "torch", "torchvision", "timm", "accelerate", "triton", "device", "threads", "commit", "tiny"}


def run(tmp_path, *arguments):
    """The rows after the command."""
    assert gpu.main([*arguments, "--tiny", "--out", str(tmp_path / "rows.jsonl"), "--runs", str(tmp_path / "runs")]) == 0
    return read_rows(tmp_path / "rows.jsonl")


def failures(rows):
    return [(row["case"], row["error"]) for row in rows if "error" in row] + [
        row["case"] for row in rows if row.get("ok") is False
    ]


@pytest.mark.parametrize(("part", "cases"), [("attention", 2), ("training", 1), ("input", 3), ("table", 2)])
def test_a_part_runs_on_a_cpu_without_a_download(tmp_path, capsys, monkeypatch, part, cases):
    for name in ("datasets", "pyarrow", "sklearn", "tensorboard", "matplotlib"):  # docs/gpu.md: not needed
        monkeypatch.setitem(sys.modules, name, None)
    rows = run(tmp_path, part)
    assert failures(rows) == []
    assert len({row["case"] for row in rows}) == cases
    assert all(row.keys() >= CONDITIONS for row in rows)
    assert f"{part}: {len(rows)} new rows of {cases} cases" in capsys.readouterr().out


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path):
    rows = run(tmp_path)
    assert failures(rows) == []
    assert {row["part"] for row in rows} == set(gpu.PARTS)
    assert run(tmp_path) == rows  # nothing is left


def test_the_table_without_data_is_said_to_be_not_available(tmp_path):
    case = next(iter(gpu.PARTS["table"](arguments(data=None))))
    (row,) = gpu.attempt(case)
    assert row.keys() == {"note"}
    assert "--data" in row["note"]


def arguments(**values):
    return gpu.argparse.Namespace(**({"size": gpu.FULL, "tiny": False, "device": torch.device("cpu"), "runs": None} | values))


# --- rows ------------------------------------------------------------------------------------------------------------


def cases(ran, broken=True):
    def fail():
        raise NotAvailable("no kernel") if broken is None else RuntimeError("out of\nmemory")

    good = [Case(name, lambda name=name: ran.append(name) or [{"value": 1}, {"value": 2}]) for name in "ac"]
    return [good[0], Case("b", fail if broken is not False else lambda: [{"value": 3}]), good[1]]


def part(path, ran, again=False, broken=True, about=ABOUT, seconds=100):
    assert gpu.run_part("some", cases(ran, broken), path, about, seconds, again)
    return [(row["case"], row.get("value", row.get("error", row.get("note")))) for row in read_rows(path)]


def test_a_case_that_fails_leaves_a_row_and_the_others_follow(tmp_path, capsys):
    ran = []
    rows = part(tmp_path / "rows.jsonl", ran)
    assert rows == [("a", 1), ("a", 2), ("b", "RuntimeError: out of memory"), ("c", 1), ("c", 2)]
    assert "NOT OK: b" in capsys.readouterr().err


def test_what_is_done_is_not_done_again_unless_it_failed_and_that_is_wanted(tmp_path):
    ran, path = [], tmp_path / "rows.jsonl"
    first = part(path, ran, broken=None)
    assert first[2] == ("b", "not available: no kernel")
    assert part(path, ran) == first
    assert part(path, ran, again=True, broken=False) == [("a", 1), ("a", 2), ("c", 1), ("c", 2), ("b", 3)]
    assert ran == ["a", "c"]


def test_rows_of_another_device_do_not_count(tmp_path):
    ran, path = [], tmp_path / "rows.jsonl"
    part(path, ran)
    assert len(part(path, ran, about=ABOUT | {"device": "two"})) == 10


def test_no_case_begins_when_the_time_of_a_part_is_over(tmp_path, capsys):
    assert part(tmp_path / "rows.jsonl", [], seconds=-1) == []
    assert "3 cases left" in capsys.readouterr().out


def test_a_device_that_is_lost_ends_the_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "answers", lambda: False)
    assert not gpu.run_part("some", cases([]), tmp_path / "rows.jsonl", ABOUT, 100, False)
    assert [row["case"] for row in read_rows(tmp_path / "rows.jsonl")] == ["a", "a"]


@pytest.mark.parametrize(("argv", "told"), [(["speed"], "unknown part 'speed'"), ([], "--tiny")])
def test_what_cannot_run_is_refused_in_one_line(capsys, monkeypatch, argv, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refused:
        gpu.main(argv)
    assert refused.value.code == 2
    assert told in capsys.readouterr().err
