"""Faults put in on purpose: kills, full and read-only disks, lost folders, no memory, clocks that jump, older run folders.

Each ends in a finished run or in one line with exit status 2, and nothing that was finished is lost. NaN, SIGTERM, damaged
checkpoints: test_train.py; locks: test_lock.py; damaged run folders: test_cli.py; damaged images: test_layouts.py.
"""

import ast
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kill_cases import half_written
from safetensors import SafetensorError
from safetensors.torch import load_file
from study_cases import TINY

import sape2
from sape2.cli import main
from sape2.config import override
from sape2.config.detection import DetectionConfig
from sape2.config.recipes import get_recipe
from sape2.data import load_data
from sape2.evaluation.accuracy import predict
from sape2.models import trained
from sape2.models.trained import build_model
from sape2.models.vit import ViT
from sape2.runs import files
from sape2.runs.checkpoint import last_checkpoint, save_weights
from sape2.runs.files import sweep, write_text
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run
from sape2.studies import run as run_study
from sape2.studies.run import help_to_train
from sape2.training import record
from sape2.training.loop import train
from sape2.training.memory_errors import OutOfMemory, memory_message, told_in_one_line, training_message
from sape2.training.processes import Processes
from sape2.training.steps import ImageSteps

SETTINGS = [text for setting in [*TINY, "train.epochs=2", "train.checkpoint_every=2"] for text in ("--set", setting)]
TRAIN = ["train", "digits", "--encoding", "ape", *SETTINGS, "--out"]
COMPARE = ["compare", "digits", "--encodings", "none,ape", "--seeds", "1", *SETTINGS, "--out"]
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def line_of(capfd):
    """The last line that a command prints when it ends with status 2; nothing on standard output, no traceback."""

    def give(*argv):
        capfd.readouterr()
        assert main(list(map(str, argv))) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert "Traceback" not in err
        lines = err.splitlines()
        assert [line for line in lines if line.startswith("sape2: ")] == lines[-1:]
        return lines[-1]

    return give


def same_weights(one, other):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def kill(folder, seed=0, **wanted):
    """Kills by kind, as tests/cases/kill_cases.py counts them; what must hold is asserted there."""
    program = Path(__file__).parents[1] / "cases" / "kill_cases.py"
    done = subprocess.run(
        [sys.executable, str(program), str(folder), json.dumps(wanted), str(seed)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_fifty_kills_lose_nothing_and_change_no_weight(tmp_path):
    kills = kill(tmp_path, train=30, evaluate=8, compare=16)
    assert sum(kills.values()) >= 50
    assert set(kills) >= {"train event", "train delay", "compare event", "compare delay", "evaluate event"}
    print(kills)


def test_what_is_half_written_is_seen(run):
    """The checker of the kills, on files that a writer without care would leave."""
    assert half_written(run) == []
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (run / "results.jsonl").write_text('{"name": "accu')
    (run / "data.json").write_text("")
    (run / "checkpoint" / "step-00000099").mkdir()
    found = ["data.json", "model.safetensors", "results.jsonl", "checkpoint/step-00000099"]
    assert [name for name in half_written(run) if "step-00000008" not in name] == found


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path):
    kept = [".lock", ".failed.json", "model.safetensors"]
    for name in [*kept, ".model.safetensors.4711-0123abcd", ".config.json.1-ffffffff"]:
        (tmp_path / name).write_text("")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("missing", ["results.jsonl", "model.safetensors"])
def test_what_a_kill_left_is_gone_after_the_same_command(run, missing, capfd):
    """A kill while a finished run was measured, and one before its weights were saved."""
    (run / missing).unlink()
    (run / f".{missing}.4711-0123abcd").write_text("")
    assert main([*TRAIN, str(run)]) == 0
    assert list(run.rglob(".*")) == []


# --- disks -----------------------------------------------------------------------------------------------------------


def full_for(monkeypatch, name, number=errno.ENOSPC):
    """The system refuses to sync whatever is to become a file of that name."""

    def refuse(path):
        if f".{name}." in path.name:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "_sync", refuse)


@pytest.mark.parametrize("name", ["config.json", "optimizer.pt", "metrics.jsonl", "best.safetensors", "results.jsonl"])
def test_a_full_disk_ends_training_with_one_line_and_the_same_command_goes_on(
    tmp_path, finished, monkeypatch, line_of, capfd, name
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_for(patch, name)
        line = line_of(*TRAIN, folder)
    assert f"{name} cannot be written: No space left on device" in line
    assert half_written(folder) == []
    assert list(tmp_path.rglob(f".{name}.*")) == []
    assert main([*TRAIN, str(folder)]) == 0
    assert same_weights(folder, finished)


def test_a_full_disk_loses_no_row_of_an_evaluation(run, monkeypatch, line_of):
    before = (run / "results.jsonl").read_text()
    full_for(monkeypatch, "results.jsonl")
    assert "No space left on device" in line_of("evaluate", run, "--split", "validation")
    assert (run / "results.jsonl").read_text() == before


def test_a_full_disk_loses_no_run_of_a_comparison(tmp_path, monkeypatch, line_of, capfd):
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        full_for(patch, "rows.jsonl")
        assert "rows.jsonl cannot be written: No space left on device" in line_of(*COMPARE, folder)
    weights = (folder / "none-s0" / "model.safetensors").read_bytes()
    assert main([*COMPARE, str(folder)]) == 0
    assert (folder / "none-s0" / "model.safetensors").read_bytes() == weights
    assert len(read_rows(folder / "rows.jsonl")) == 2


def test_writers_of_torch_and_safetensors_on_a_full_device_are_named(tmp_path, monkeypatch):
    """Their own errors, from /dev/full, which takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    for write in (
        lambda path: torch.save({"x": torch.zeros(9)}, "/dev/full"),
        lambda path: Path("/dev/full").write_text("x"),
    ):
        with pytest.raises(OSError, match="results cannot be written: "):
            files.write_atomic(tmp_path / "results", write)


@pytest.mark.parametrize("argv", [TRAIN, COMPARE])
def test_a_read_only_folder_is_named_before_anything_is_trained(tmp_path, monkeypatch, line_of, argv):
    opened = os.open

    def refuse(path, flags, *rest, **options):
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    full_for(monkeypatch, "study.json", errno.EROFS)
    monkeypatch.setattr(ImageSteps, "take", lambda *_: pytest.fail("it trains"))
    line = line_of(*argv, tmp_path / "out")
    assert "Read-only file system" in line
    assert str(tmp_path / "out") in line


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nmore"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),
        (SafetensorError(""), True),
        (RuntimeError(ALLOCATOR), False),
        (RuntimeError(""), False),
        (torch.cuda.OutOfMemoryError("CUDA out of memory while writing"), False),
        (RecursionError("maximum recursion depth exceeded while writing"), False),
    ],
    ids=lambda value: "",
)
def test_only_errors_of_writing_are_told_as_such(tmp_path, error, named):
    def write(path):
        raise error

    with pytest.raises(OSError if named else type(error)) as told:
        files.write_atomic(tmp_path / "results", write)
    if named:
        (line,) = str(told.value).splitlines()
        assert "results cannot be written: " in line
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_run_is_named_before_it_is_measured(run, monkeypatch, line_of):
    monkeypatch.setattr(Path, "touch", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    monkeypatch.setattr(Run, "load", lambda *_: pytest.fail("it measures"))
    line = line_of("evaluate", run)
    assert f"{run} cannot be written to" in line
    assert "measure a copy" in line


@pytest.mark.parametrize("argv", [TRAIN, COMPARE])
def test_a_folder_that_is_removed_in_the_middle_is_named_and_not_made_again(tmp_path, monkeypatch, line_of, argv):
    take, folder = ImageSteps.take, tmp_path / "out"

    def removing(self, batch):
        take(self, batch)
        if self.progress.step == 2:
            (config,) = folder.rglob("config.json")
            shutil.rmtree(config.parent)

    monkeypatch.setattr(ImageSteps, "take", removing)
    line = line_of(*argv, folder)
    assert str(folder) in line
    assert "was removed" in line
    assert list(tmp_path.rglob("*.safetensors")) == list(tmp_path.rglob("metrics.jsonl")) == []


@pytest.mark.parametrize("taken", [False, True], ids=["removed", "taken over"])
def test_a_folder_that_is_lost_during_validation_is_not_written_to(tmp_path, monkeypatch, line_of, taken):
    folder = tmp_path / "out"

    def losing(model, data):
        if taken:
            (folder / ".lock").rename(folder / ".old")
            (folder / ".lock").write_text("{}")
        else:
            shutil.rmtree(folder)
        return 0.5, 1.0

    monkeypatch.setattr(run_study, "quick_accuracy", losing)
    line = line_of(*TRAIN, folder)
    assert ("the lock of this process" if taken else "was removed") in line
    assert folder.exists() == taken
    assert [path for path in tmp_path.rglob("*") if path.name in ("best.safetensors", "metrics.jsonl", "step-00000004")] == []


@pytest.mark.parametrize("writer", ["save_checkpoint", "save_weights"])
def test_the_folder_is_looked_at_right_before_the_last_files_are_written(tmp_path, monkeypatch, writer):
    """`save_weights` of the end; that of the best epoch is stood in for."""
    heard = []
    config = override(get_recipe("digits"), [*TINY])
    splits = load_data(config.data, config.model)
    for name in ("save_checkpoint", "save_weights"):
        monkeypatch.setattr(record, name, lambda *a, name=name: heard.append(name))
    run = Run(tmp_path / "run", config)
    run.check_lock = lambda: heard.append("look")
    train(build_model(config), splits.train, lambda _: (-2.0, 1.0), run, True)
    assert heard[heard.index(writer) - 1] == "look"


def test_a_run_that_is_removed_while_it_is_measured_is_not_made_again(run, monkeypatch, line_of):
    add = Run.add_results

    def remove_first(self, rows):
        shutil.rmtree(run)
        add(self, rows)

    monkeypatch.setattr(Run, "add_results", remove_first)
    assert f"{run} was removed" in line_of("evaluate", run)
    assert not run.exists()


# --- memory ----------------------------------------------------------------------------------------------------------


SHORT = [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), RuntimeError(ALLOCATOR), MemoryError()]


@pytest.mark.parametrize("error", SHORT, ids=["cuda", "cpu", "python"])
def test_memory_that_ends_in_training_names_the_batch_the_tokens_and_the_ways_out(tmp_path, monkeypatch, line_of, error):
    def raising(self, batch):
        raise error

    monkeypatch.setattr(ImageSteps, "take", raising)
    line = line_of(*TRAIN, tmp_path / "run")
    wanted = ["32 images at a time", "16 tokens", "--set train.accumulation=2", "smaller --set train.batch_size", "lean path"]
    assert [text for text in wanted if text not in line] == []


def test_memory_that_ends_in_training_is_one_line_in_a_helping_process_too(monkeypatch):
    def raising(*_, **__):
        raise RuntimeError(ALLOCATOR)

    class Helper(Processes):
        rank, size = 1, 2

        def __init__(self):
            pass

    monkeypatch.setattr(run_study, "train", raising)
    config = override(get_recipe("digits"), [*TINY, "train.epochs=1"])
    with pytest.raises(OutOfMemory, match=r"16 images .*2 processes"):
        help_to_train(config, Helper())


def test_memory_that_ends_in_a_measure_names_it(run, monkeypatch, line_of):
    def raising(self, images):
        raise RuntimeError(ALLOCATOR)

    monkeypatch.setattr(ViT, "forward", raising)
    line = line_of("evaluate", run, "--limit", "40")
    wanted = [
        "in the measure accuracy of 40 images at the training size, 16 tokens each",
        "--limit",
        "CUDA_VISIBLE_DEVICES",
        "lean path",
    ]
    assert [text for text in wanted if text not in line] == []


def test_other_errors_are_not_taken_for_a_want_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), told_in_one_line(lambda: "memory"):
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(OutOfMemory, match="memory"), told_in_one_line(lambda: "memory"):
        raise SHORT[0]


def test_prediction_halves_batches_until_they_fit(finished, monkeypatch):
    from sape2.data import load_data
    from sape2.models.trained import load_run_model

    held, seen = Run.open_finished(finished), []
    model, config = load_run_model(held), held.config
    images = load_data(config.data, config.model).test[:50]
    expected = predict(model, images, 50)
    forward = ViT.forward

    def small(self, batch):
        seen.append(len(batch))
        if len(batch) > 15:
            raise RuntimeError(ALLOCATOR)
        return forward(self, batch)

    monkeypatch.setattr(ViT, "forward", small)
    torch.testing.assert_close(predict(model, images, 50), expected, rtol=1e-4, atol=1e-5)  # rounding of other products
    assert seen == [50, 25, 12, 12, 12, 12, 2]


def test_what_is_said_about_memory_follows_the_settings():
    def said(*settings, size=1):
        return training_message(override(get_recipe("digits"), list(settings)), size)

    assert "without which attention cannot take its lean path" in said("model.attention_dropout=0.1")
    assert "gradient_checkpointing" not in said("model.gradient_checkpointing=true")
    assert "train.accumulation" not in said("train.accumulation=64", "train.batch_size=64")
    assert "16 images at a time" in said("train.batch_size=64", "train.accumulation=4")
    assert "train.accumulation=8 (the same batch in 8 parts)" in said("train.batch_size=64", "train.accumulation=4")
    assert "a time in each of 8 processes" in said("train.batch_size=64", size=8)
    assert "4 images at a time" in said("train.batch_size=64", "train.accumulation=2", size=8)
    assert "train.accumulation=3 (the" in said("train.batch_size=48", "train.accumulation=2", size=8)  # 4 does not divide 6
    assert "train.accumulation=2 (the" in said("train.batch_size=72", size=4)
    assert "train.accumulation" not in said("train.batch_size=8", size=8)
    assert "sape2:readout=direct" in said("model.encoding=ape+sape2")
    assert "sape2:readout=direct" not in said("model.encoding=ape")
    model = get_recipe("digits").model
    told = memory_message("with 12 images", model, ["fewer"], "rows are kept. Try")
    assert told.startswith("out of memory with 12 images, 16 tokens each; rows are kept. Try fewer, an encoding without")
    assert ViT(model).embed(torch.zeros(1, 1, *model.image_size))[0].shape[1] == 16


def test_a_model_that_fits_nowhere_is_refused_in_one_line(tmp_path, monkeypatch, line_of):
    def raising(config):
        raise RuntimeError(ALLOCATOR)

    monkeypatch.setattr(trained, "ViT", raising)
    line = line_of(*TRAIN, tmp_path / "run")
    assert "1 layers of width 12, 16 tokens" in line
    assert not (tmp_path / "run").exists()


# --- clocks ----------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_by_a_day_changes_no_number_and_loses_nothing(tmp_path, finished, monkeypatch):
    true, jumps = time.time, itertools.cycle([0.0, -86400.0, 86400.0, -3e9])
    monkeypatch.setattr(time, "time", lambda: true() + next(jumps))
    folder = tmp_path / "run"
    assert main([*TRAIN, str(folder)]) == 0
    assert same_weights(folder, finished)
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        for name in ("seconds", "images_per_s", "wait_fraction"):
            assert 0 <= row[name] < 1e6, name
    assert read_rows(folder / "results.jsonl") == read_rows(finished / "results.jsonl")


def wall_clocks(source):
    """Calls that read a clock which can be set: time.time, datetime.now and the like."""
    settable = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [c.attr for c in calls if isinstance(c, ast.Attribute) and (getattr(c.value, "id", None), c.attr) in settable]


def test_nothing_is_timed_by_a_clock_that_can_be_set():
    source = Path(sape2.__file__).parent
    assert {path.name: wall_clocks(path.read_text()) for path in source.rglob("*.py") if wall_clocks(path.read_text())} == {}
    assert wall_clocks("import time\nstart = time.time()") == ["time"]


# --- run folders of other versions -----------------------------------------------------------------------------------


def change_config(run, change):
    values = json.loads((run / "config.json").read_text())
    change(values)
    (run / "config.json").write_text(json.dumps(values))


def test_the_format_and_the_version_are_written(run):
    values = json.loads((run / "config.json").read_text())
    assert list(values)[:2] == ["format", "sape2_version"]
    assert values["format"] == 1


OTHER = {
    "no format": (lambda values: values.pop("format"), ["it has format None; format 1 is read here"]),
    "an unknown field": (lambda values: values["train"].update(momentum=0.9), ["unknown key train.momentum"]),
    "a missing section": (lambda values: values.pop("model"), ["missing key model"]),
    "a field of another version": (
        lambda values: (values.update(sape2_version="9.1"), values["train"].update(momentum=0.9)),
        [f"of sape2, {sape2.__version__}, but was written by 9.1: unknown key train.momentum"],
    ),
    "a newer format": (
        lambda values: values.update(format=2, sape2_version="9.1"),
        ["format 2", "was written by 9.1"],
    ),
}


@pytest.mark.parametrize(("change", "named"), OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_run_folder_that_cannot_be_read_says_what_to_do(run, line_of, change, named, command):
    change_config(run, change)
    line = line_of(*({"train": [*TRAIN, run], "evaluate": ["evaluate", run]}[command]))
    wanted = [*named, str(run / "config.json"), "Use the version that wrote it, or choose another --out"]
    assert [text for text in wanted if text not in line] == []


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null"])
def test_a_config_that_is_no_object_is_one_line(run, line_of, text):
    (run / "config.json").write_text(text)
    assert "does not fit this version of sape2" in line_of("evaluate", run)


def checkpoint_without_optimizer(run):
    torch.save({"adam": {}}, last_checkpoint(run) / "optimizer.pt")


def checkpoint_of_other_groups(run):
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, last_checkpoint(run) / "optimizer.pt")


def checkpoint_with_another_progress(run):
    (last_checkpoint(run) / "progress.json").write_text('{"iteration": 3}')


def metrics_without_step(run):
    write_rows(run / "metrics.jsonl", [{"epoch": 1}])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (checkpoint_without_optimizer, ["no optimizer in it", "remove it to start again"]),
        (checkpoint_of_other_groups, ["optimiser's state", "remove it to start again"]),
        (checkpoint_with_another_progress, ["iteration", "remove it to start again"]),
        (metrics_without_step, ["metrics.jsonl", "without its step", "--out"]),
    ],
)
def test_a_checkpoint_of_another_version_says_what_to_do(run, line_of, change, named):
    (run / "model.safetensors").unlink()
    change(run)
    line = line_of(*TRAIN, run)
    assert [text for text in [str(run), *named] if text not in line] == []


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["config.json", "data.json", "metrics.jsonl", "results.jsonl", "checkpoint/progress.json"])
@pytest.mark.parametrize("text", [DEEP, "\x00\xff", "9" * 5000], ids=["deep", "bytes", "huge"])
def test_damaged_json_of_any_file_is_one_line(run, line_of, name, text):
    path = last_checkpoint(run) / "progress.json" if "/" in name else run / name
    path.write_bytes(text.encode("latin-1"))
    (run / "model.safetensors").unlink()
    assert str(run) in line_of(*TRAIN, run)


def test_a_detection_config_that_cannot_be_read_is_named(tmp_path):
    from sape2.config.recipes.coco import coco_digits

    config = coco_digits()
    assert isinstance(config, DetectionConfig)
    for text in (DEEP, '{"recipe": "coco"}', "[]"):
        write_text(tmp_path / "config.json", text)
        with pytest.raises(ValueError, match=r"config\.json (is damaged|does not fit this version)"):
            Run(tmp_path, config).check_settings()


def test_a_folder_in_which_nothing_can_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written: "):
        save_weights(tmp_path / "file" / "model.safetensors", torch.nn.Linear(2, 2))
