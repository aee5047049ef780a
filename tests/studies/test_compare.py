"""`sape2 compare` and the tables it makes: real runs on digits, numbers against scipy, the raw rows alone."""

import contextlib
import csv
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from study_cases import TINY, finish, tiny_study
from torch import nn

from sape2.cli import main
from sape2.runs.checkpoint import last_checkpoint, save_weights
from sape2.runs.lock import hold
from sape2.runs.rows import read_rows, write_rows
from sape2.studies.compare.outcome import accuracy_table, outcome, page, paired_table
from sape2.studies.compare.rawrows import each_once, final_validation_accuracy, raw_row, read_raw
from sape2.studies.run import StepMemory
from sape2.training.steps import ImageSteps

GRID = ["compare", "digits", "--encodings", "none,ape", "--seeds", "2", "--baseline", "ape"]
GRID += [text for setting in TINY for text in ("--set", setting)]


pytestmark = pytest.mark.usefixtures("as_users_run_it")


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- real runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory, as_users_run_it):
    """(folder, standard output, standard error) of a real grid of four runs."""
    folder, out, err = tmp_path_factory.mktemp("compared") / "out", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([*GRID, "--out", str(folder), "--json"]) == 0
    return folder, out.getvalue(), err.getvalue()


def test_the_grid_leaves_runs_lines_tables_and_a_figure(compared):
    folder, out, err = compared
    files = {"study.json", "rows.jsonl", "results.jsonl", "comparison.csv", "comparison.md", "comparison.png"}
    assert {path.name for path in folder.iterdir()} == files | {"none-s0", "ape-s0", "none-s1", "ape-s1"}
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == read_rows(folder / "results.jsonl")
    raw = read_rows(folder / "rows.jsonl")
    assert [(row["encoding"], row["seed"]) for row in raw] == [("none", 0), ("ape", 0), ("none", 1), ("ape", 1)]
    assert "ape seed 1: accuracy 0." in err
    assert "(4 of 4 runs)" in err
    assert Image.open(folder / "comparison.png").size[0] > 800
    mean = next(row for row in rows if (row["name"], row["encoding"], row.get("weights")) == ("accuracy", "ape", "last"))
    values = [
        row["value"]
        for seed in (0, 1)
        for row in read_rows(folder / f"ape-s{seed}" / "results.jsonl")
        if (row["name"], row["weights"]) == ("accuracy", "last")
    ]
    assert (mean["mean"], mean["n"]) == (pytest.approx(sum(values) / 2), 2)


def test_the_raw_line_holds_time_memory_size_and_curve_of_the_run(compared):
    row = read_raw(compared[0] / "rows.jsonl")[1]
    (epoch,) = read_rows(compared[0] / "ape-s0" / "metrics.jsonl")
    assert row["step_ms"] == pytest.approx(1000 * 32 / epoch["images_per_s"])
    assert row["step_memory_mib"] == epoch["step_memory_mib"] > 0.1
    assert row["curve"]["validation_accuracy"] == [epoch["validation_accuracy"]]
    weights = load_file(compared[0] / "ape-s0" / "model.safetensors")
    assert row["parameters"] == sum(weight.numel() for weight in weights.values())
    assert row["macs_per_image"] > 0


def test_the_same_command_again_trains_nothing(compared, monkeypatch, capfd):
    folder = compared[0]
    monkeypatch.setattr(ImageSteps, "take", None)
    before = tree(folder)
    assert main([*GRID, "--out", str(folder)]) == 0
    assert {name: text for name, text in tree(folder).items() if not name.endswith(".png")} == {
        name: text for name, text in before.items() if not name.endswith(".png")
    }
    assert "minus ape" in capfd.readouterr().out


def test_a_report_from_the_raw_lines_alone_gives_the_same_tables(compared, tmp_path, capfd):
    shutil.copy(compared[0] / "rows.jsonl", tmp_path / "rows.jsonl")
    argv = ["report", str(tmp_path / "rows.jsonl"), "--baseline", "ape", "--out", str(tmp_path / "report"), "--json"]
    assert main(argv) == 0
    assert capfd.readouterr().out == compared[1]
    for name in ("results.jsonl", "comparison.csv", "comparison.md"):
        assert (tmp_path / "report" / name).read_text() == (compared[0] / name).read_text()


class Broken(BaseException):
    """As sudden as a kill."""


def test_a_study_that_breaks_within_a_run_ends_with_the_same_weights(compared, tmp_path, monkeypatch):
    folder, take, steps = tmp_path / "out", ImageSteps.take, []

    def breaking(self, batch):
        steps.append(self.progress.step)
        if len(steps) == 6:  # the second of four steps of the second run
            raise Broken
        take(self, batch)

    argv = [*GRID, "--set", "train.checkpoint_every=1", "--out", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(ImageSteps, "take", breaking)
        with pytest.raises(Broken):
            main(argv)
    assert len(read_raw(folder / "rows.jsonl")) == 1
    assert last_checkpoint(folder / "ape-s0").name == "step-00000001"
    assert main(argv) == 0
    for run in ("none-s0", "ape-s0", "none-s1", "ape-s1"):
        one, other = (load_file(where / run / "model.safetensors") for where in (folder, compared[0]))
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_runs_of_one_seed_see_the_same_images_and_begin_with_the_same_weights_elsewhere(tmp_path, monkeypatch):
    seen = {}

    def looking(self, batch):
        model = self.weights.model
        seen[model.config.encoding, self.seed] = (*batch, dict(model.state_dict()))
        raise ValueError("seen enough")

    monkeypatch.setattr(ImageSteps, "take", looking)
    assert main([*GRID, "--out", str(tmp_path / "out")]) == 1
    for seed in (0, 1):
        (images, labels, weights), (other_images, other_labels, others) = seen["none", seed], seen["ape", seed]
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
        shared = weights.keys() & others.keys()
        assert len(shared) > 10
        assert others.keys() - shared == {name for name in others if "pos" in name or "encoding" in name}
        assert all(torch.equal(weights[name], others[name]) for name in shared)
    assert not torch.equal(seen["ape", 0][0], seen["ape", 1][0])


def test_a_run_that_diverges_is_reported_with_status_1_and_the_rest_is_finished(tmp_path, monkeypatch, capfd):
    take = ImageSteps.take

    def diverging(self, batch):
        if (self.weights.model.config.encoding, self.seed) == ("none", 0):
            torch.nn.init.constant_(self.weights.model.head.bias, float("nan"))
        take(self, batch)

    monkeypatch.setattr(ImageSteps, "take", diverging)
    argv = [*GRID[:5], "1", *GRID[6:], "--out", str(tmp_path / "out")]
    assert main(argv) == 1
    out, err = capfd.readouterr()
    assert "failed: none seed 0: the loss is nan at step 0" in out
    assert "ape seed 0: accuracy" in err
    assert [row["reason"][:11] for row in read_rows(tmp_path / "out" / "results.jsonl") if row["name"] == "failed"] == [
        "the loss is"
    ]
    assert "the loss is nan" in (tmp_path / "out" / "comparison.md").read_text()


def test_sigterm_stops_after_the_step_and_the_same_command_goes_on(tmp_path, monkeypatch, capfd):
    take = ImageSteps.take

    def signalling(self, batch):
        take(self, batch)
        os.kill(os.getpid(), signal.SIGTERM)

    argv = [*GRID, "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(ImageSteps, "take", signalling)
        assert main(argv) == 128 + signal.SIGTERM
    assert "the same command goes on from there" in capfd.readouterr().err
    assert last_checkpoint(tmp_path / "out" / "none-s0").name == "step-00000001"
    assert list((tmp_path / "out").rglob(".lock*")) == []


def test_train_refuses_a_folder_that_another_process_holds(tmp_path, capfd):
    argv = ["train", "digits", *GRID[8:], "--out", str(tmp_path / "run")]
    with hold(tmp_path / "run"):
        assert main(argv) == 2
        out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"run is in use by process {os.getpid()} on" in err
    assert "choose another --out" in err
    assert not (tmp_path / "run").exists()


LONGER = [*GRID, "--set", "train.epochs=10", "--set", "train.checkpoint_every=1"]  # forty steps a run


@pytest.fixture
def start_compare():
    """Starts `compare` as a process, which is ended with the test."""
    started = []

    def start(folder):
        command = [sys.executable, "-m", "sape2", *LONGER, "--out", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_killed_workers_and_two_at_once_give_the_rows_of_one(tmp_path, start_compare):
    """One worker is killed in its second run; then two at once finish the study, each run once, to the same weights."""
    assert main([*LONGER, "--out", str(tmp_path / "alone")]) == 0
    folder = tmp_path / "shared"
    process = start_compare(folder)
    while not ((at := last_checkpoint(folder / "ape-s0")) and at.name > "step-00000010"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert (folder / "ape-s0" / ".lock").exists()
    workers = [start_compare(folder) for _ in range(2)]
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    for run in ("ape seed 0", "none seed 1", "ape seed 1"):
        assert sum(f"{run}: starting, or going on" in error for error in errors) == 1
        name = run.replace(" seed ", "-s")
        one, other = (load_file(where / name / "model.safetensors") for where in (folder, tmp_path / "alone"))
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert len(read_rows(folder / "rows.jsonl")) == 4


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["compare", "digits", "--seeds", "2"], "--encodings"),
        (["compare", "digits", "--encodings", "ape,sape3", "--seeds", "2"], "unknown encoding 'sape3'"),
        (["compare", "digits", "--encodings", "ape", "--seeds", "0"], "--seeds needs whole numbers from 1 on; got '0'"),
        (["compare", "digits", "--encodings", "ape", "--seeds", "2", "--baseline", "none"], "--baseline must be one of"),
        (["compare", "cifar10_budget", "--encodings", "ape", "--seeds", "2", "--data", "nowhere"], "nowhere"),
        (["compare", "digits", "--encodings", "ape,rope", "--seeds", "1", "--set", "dim=18"], "rope"),
        (["report", "nowhere.jsonl"], "there is no nowhere.jsonl"),
        (["compare", "digits", "--encodings", "ape", "--set", "model.encoding=none"], "--set cannot choose the encoding"),
        (["compare", "digits", "--encodings", "ape", "--set", "encoding=none"], "--set cannot choose the encoding"),
        (["report", "a.jsonl", "run"], "not both"),
        (["report", "a.jsonl", "--split", "test"], "--split is for run folders"),
        (["report", "a.jsonl", "--measures", "shift"], "--measures is for run folders"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capfd, argv, named):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    out, err = capfd.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["report", "probe", "inspect"])
def test_results_of_another_command_are_not_replaced(raw, tmp_path, capfd, command):
    """Rows of `sape2 probe` are hours of training; `sape2 report` wrote over them."""
    write_rows(tmp_path / "rows.jsonl", raw)
    argv = {
        "report": ["report", str(tmp_path / "rows.jsonl")],
        "probe": ["probe", "count", "--seeds", "1", "--steps", "1"],
        "inspect": ["inspect", "test_vit"],
    }[command]
    others = {"name": "accuracy", "value": 0.5, "measure": "accuracy"}
    write_rows(tmp_path / "out" / "results.jsonl", [others])
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "holds the results of another command; choose another --out" in capfd.readouterr().err
    assert read_rows(tmp_path / "out" / "results.jsonl") == [others]


# --- numbers ---------------------------------------------------------------------------------------------------------

LAST = {"ape": [0.805, 0.806, 0.811], "sape2": [0.812, 0.807, 0.821], "none": [0.7, 0.72, 0.69], "rope": [0.83]}


@pytest.fixture
def raw(tmp_path):
    """Raw rows of three seeds of three encodings, and one of a fourth."""
    study = tiny_study(tmp_path / "raw", tuple(LAST), 3)
    rows = []
    for cell in study.cells:
        values = LAST[cell.config.model.encoding]
        if cell.config.seed < len(values):
            finish(cell, values[cell.config.seed], best=values[cell.config.seed] - 0.25)
            rows.append(raw_row(cell.run))
    return rows


def of(rows, encoding, weights="last", name="accuracy"):
    return next(r for r in rows if (r["name"], r["encoding"], r.get("weights", weights)) == (name, encoding, weights))


def test_every_number_of_a_row_is_that_of_scipy(raw):
    rows = list(outcome(raw, "ape").rows())
    for encoding in ("sape2", "none"):
        for weights, shift in (("last", 0.0), ("best", 0.25)):
            row, wanted = of(rows, encoding, weights), stats.ttest_rel(LAST[encoding], LAST["ape"])
            interval = wanted.confidence_interval(0.95)
            assert row["mean"] == pytest.approx(stats.tmean(LAST[encoding]) - shift)
            assert row["std"] == pytest.approx(stats.tstd(LAST[encoding]))
            assert (row["ci_low"], row["ci_high"]) == pytest.approx((interval.low, interval.high))
            assert (row["p"], row["n"], row["pairs"]) == (pytest.approx(wanted.pvalue), 3, 3)
    assert of(rows, "none")["p_holm"] == pytest.approx(2 * of(rows, "none")["p"])  # the smaller of two
    assert of(rows, "sape2")["p_holm"] == of(rows, "sape2")["p"]
    assert (of(rows, "ape")["difference"], of(rows, "ape")["pairs"]) == (None, 0)
    assert (of(rows, "ape", name="step_ms")["mean"], of(rows, "ape", name="step_memory_mib")["mean"]) == (10.0, 1.5)


def test_one_seed_gives_no_spread_and_empty_cells(raw, tmp_path):
    found = outcome(raw, "ape")
    row = of(list(found.rows()), "rope")
    assert (row["n"], row["pairs"]) == (1, 1)
    assert row["difference"] == pytest.approx(0.83 - 0.805)
    assert [row[key] for key in ("std", "ci_low", "ci_high", "p", "p_holm")] == [None] * 5
    found.write(tmp_path / "tables")
    lines = list(csv.DictReader((tmp_path / "tables" / "comparison.csv").open()))
    line = next(line for line in lines if (line["name"], line["encoding"]) == ("accuracy", "rope"))
    assert [line[key] for key in ("std", "ci_low", "ci_high", "p")] == [""] * 4
    assert "| rope | 0.8300 | 1 | +0.0250 |  | 1 |  |  |" in (tmp_path / "tables" / "comparison.md").read_text()
    assert "0.8073 ± 0.0032" in accuracy_table(found, "last")[0][0]["accuracy"]


def test_a_run_that_is_there_twice_counts_once(raw, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*raw, raw[1], raw[0]])
    assert list(outcome(read_raw(tmp_path / "rows.jsonl")).rows()) == list(outcome(raw).rows())
    assert each_once([raw[0] | {"failed": "x"}, raw[0], raw[0]]) == [raw[0]]


def test_pairs_are_of_the_seeds_that_both_have(raw):
    rows = list(outcome([row for row in raw if (row["encoding"], row["seed"]) != ("ape", 1)], "ape").rows())
    wanted = stats.ttest_rel([0.812, 0.821], [0.805, 0.811])
    assert (of(rows, "sape2")["n"], of(rows, "sape2")["pairs"]) == (3, 2)
    assert of(rows, "sape2")["p"] == pytest.approx(wanted.pvalue)


def test_failed_runs_are_rows_of_their_own_and_count_nowhere(raw):
    failed = [row | {"failed": "the loss is nan"} for row in raw if row["encoding"] == "rope"]
    found = outcome([*(row for row in raw if row["encoding"] != "rope"), *failed], "ape")
    rows = list(found.rows())
    assert [row for row in rows if row["encoding"] == "rope"] == [
        {"name": "failed", "encoding": "rope", "seed": 0, "reason": "the loss is nan"}
    ]
    assert "| rope | 0 | the loss is nan |" in page(found)
    assert page(outcome(failed)).startswith("# No run has finished")


def test_rows_of_different_settings_are_refused(raw, tmp_path):
    other = tiny_study(tmp_path / "other", ("ape",), 1, ["train.lr=0.1"]).cells[0]
    finish(other)
    with pytest.raises(ValueError, match=r"more than encoding and seed, train.lr \(0.001 there, 0.1 here\)"):
        outcome([*raw, raw_row(other.run)])


def test_any_raw_rows_can_be_compared_in_pairs_with_a_verdict(raw, tmp_path):
    """Those of rates chosen for each encoding differ in more than the encoding and the seed."""
    changed = [row | {"settings": row["settings"] | {"train": {}}} if row["encoding"] == "none" else row for row in raw]
    lines, columns = paired_table(changed, "ape")
    assert columns == ["encoding", "accuracy", "n", "minus ape", "95 % interval", "pairs", "p", "p, Holm", "verdict"]
    (line,) = [line for line in lines if line["encoding"] == "none"]
    assert (line["accuracy"], line["n"], line["minus ape"], line["verdict"]) == ("0.7033 ± 0.0153", 3, "-0.1040", "lower")
    assert [line["verdict"] for line in lines] == ["", "unresolved", "lower", ""]
    assert {line["accuracy"] for line in paired_table(raw, "ape", final_validation_accuracy)[0]} == {
        "0.5000 (all alike)",
        "0.5000",
    }
    with pytest.raises(ValueError, match="no run of the baseline 'cpe'; there are runs of: ape, sape2, none, rope"):
        paired_table(raw, "cpe")


def test_failed_runs_have_no_place_in_pairs_and_the_baseline_may_be_written_in_any_order(raw):
    head = {key: raw[0][key] for key in ("encoding", "digest", "settings")}
    failed = head | {"seed": 9, "failed": "the loss is nan"}
    assert paired_table([*raw, failed], "sape2:sign=plus") == paired_table(raw, "sape2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"seed": 9}, "line 1 was changed"),
        (lambda row: row | {"encoding": "none"}, "line 1 was changed"),
        (lambda row: row | {"settings": row["settings"] | {"seed": 9}}, "line 1 was changed"),
        (lambda row: {"encoding": "ape"}, "line 1 is not a raw row"),
        (lambda row: row | {"rows": "0.9"}, "line 1 is not a raw row"),
        (lambda row: row | {"rows": [row["rows"][0] | {"value": "0.9"}]}, "line 1 is not a raw row"),
        (lambda row: row | {"settings": {"recipe": "x"}}, "does not fit this version"),
    ],
)
def test_a_changed_line_is_named(raw, tmp_path, change, message):
    write_rows(tmp_path / "rows.jsonl", [change(raw[0])])
    with pytest.raises(ValueError, match=message):
        read_raw(tmp_path / "rows.jsonl")


def test_costs_that_an_older_row_has_not_are_not_measured(raw):
    older = [{key: value for key, value in row.items() if key != "parameters"} for row in raw]
    assert all(row["mean"] is None for row in outcome(older, "ape").rows() if row["name"] == "parameters")


def test_a_baseline_without_runs_is_refused(raw):
    with pytest.raises(ValueError, match="no run of the baseline 'cpe'; there are runs of: ape, sape2, none, rope"):
        outcome(raw, "cpe")


# --- memory and disk -------------------------------------------------------------------------------------------------


def test_the_memory_of_a_step_is_what_it_allocated_at_its_highest():
    meter, kept = StepMemory(steps_per_epoch=4), []
    for step in range(1, 4):
        assert meter.after_step(step) == ({} if step < 3 else {"step_memory_mib": 3.0})
        first = torch.empty(2 * 2**20, dtype=torch.uint8)
        second = torch.empty(2**20, dtype=torch.uint8)
        del first
        kept.append(second)
    meter.close()


def test_the_end_of_an_epoch_is_not_measured_as_a_step():
    meter = StepMemory(steps_per_epoch=2)
    meter.after_step(1)
    meter.after_step(2)
    assert meter.meter is None
    meter.after_step(3)
    assert meter.meter is not None
    meter.close()


def test_a_file_that_does_not_fit_is_an_os_error_and_leaves_nothing_behind(tmp_path):
    """The limit on the size of a file makes the write itself fail, inside safetensors, as a full disk does."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|cannot be written"):
            save_weights(tmp_path / "model.safetensors", nn.Linear(100, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(Path(tmp_path).iterdir()) == []
