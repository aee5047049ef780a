"""Processes that are killed (SIGKILL) at random moments of training, evaluation and comparison, and what must hold after each.

Run as a program: it imports everything once, and forks a child for each attempt. A child is killed from inside, just before
the k-th time that it opens, renames or removes something in its folder, or from outside, after a random time.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.data import load_data
from sape2.evaluation.runs import measure
from sape2.models.trained import build_model
from sape2.runs.rows import read_rows
from sape2.runs.run import Run
from sape2.studies.compare.plan import Study
from sape2.studies.compare.rawrows import read_raw
from sape2.studies.compare.work import forget_failures, work
from sape2.studies.run import StepMemory, run_to_end

SETTINGS = [
    "model.dim=12", "model.depth=1", "model.drop_path=0.2", "train.epochs=3", "train.warmup_epochs=1", "train.batch_size=32",
    "train.precision=fp32", "train.workers=0", "train.checkpoint_every=2", "train.ema_decay=0.9", "data.train_limit=96",
]  # fmt: skip
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.utime", "os.chmod"}
OF_A_CHECKPOINT = {"model.safetensors", "optimizer.pt", "progress.json"}
TIMES = {"images_per_s", "wait_fraction", "seconds", "step_memory_mib", "training_s", "step_ms"}


def config_of():
    return override(get_recipe("digits"), [*SETTINGS, "model.encoding=ape+sape2"])


class Tasks:
    """What is killed, each a function of the folder that goes on from where that stands."""

    def __init__(self):
        self.config = config_of()
        self.splits = load_data(self.config.data, self.config.model)

    def train(self, folder):
        run = Run(folder, self.config)
        with run.hold():
            run_to_end(build_model(self.config), self.splits, run, quiet=True)

    def evaluate(self, folder):
        for split in ("test", "validation"):
            measure(Run.open_finished(folder), self.splits, ["accuracy"], split, ["last", "best"])

    def compare(self, folder):
        study = Study(self.config, ("none", "ape"), 1, folder)
        study.start()
        forget_failures(study)  # three kills at one place are taken for a fault of the run; as `--retry-failed`

        def run(cell):
            run_to_end(build_model(cell.config), self.splits, cell.run, quiet=True)

        work(study, run)


# --- children --------------------------------------------------------------------------------------------------------


def count_down(folder, number, counter):
    """Kills this process just before event `number` (never for None); the events so far are written into the pipe `counter`."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS and any(isinstance(part, (str, os.PathLike)) and str(folder) in str(part) for part in arguments):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if counter is not None:
                os.write(counter, b".")

    sys.addaudithook(hook)


def attempt(task, folder, event=None, delay=None, counter=None):
    """Forks a child that does the task; its exit status, negative if it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            count_down(folder, event, counter)
            task(folder)
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_run(task, folder):
    """(events, seconds) of a run that nobody kills."""
    reader, writer = os.pipe()
    start = time.monotonic()
    assert attempt(task, folder, counter=writer) == 0
    seconds = time.monotonic() - start
    os.close(writer)
    events = len(os.read(reader, 2**16))
    os.close(reader)
    return events, seconds


# --- what must hold --------------------------------------------------------------------------------------------------


def half_written(folder):
    """The files below a folder that have their name but not their whole content."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or "tensorboard" in path.parts:
            continue
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                read_rows(path)
                assert path.read_text().endswith("\n")
            elif path.suffix == ".pt":
                torch.load(path, weights_only=True)
        except Exception:
            found.append(str(path.relative_to(folder)))
    checkpoints = folder.rglob("checkpoint/step-*")
    return found + [
        str(c.relative_to(folder)) for c in checkpoints if not {path.name for path in c.iterdir()} >= OF_A_CHECKPOINT
    ]


def left_behind(folder):
    """Hidden files that no running process needs."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".lock"]


def content(folder):
    """Everything that a finished folder holds, times aside: weights as bytes, rows in order.

    Lines of a study stand as its runs ended: one that a dying process still holds waits until the others are done.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = {key: value.numpy().tobytes() for key, value in load_file(path).items()}
        elif path.suffix == ".jsonl":
            is_study = path.name == "rows.jsonl"
            rows = sorted(read_raw(path), key=lambda row: (row["encoding"], row["seed"])) if is_study else read_rows(path)
            found[name] = [without_times(row) for row in rows]
        elif path.name == "config.json":
            found[name] = Run.open(path.parent).config
    return found


def without_times(row):
    kept = {key: value for key, value in row.items() if key not in TIMES}
    if "curve" in kept:
        kept["curve"] = without_times(kept["curve"])
    return kept


# --- rounds ----------------------------------------------------------------------------------------------------------


def kill_until_done(task, folder, draw, events, seconds, most):
    """Kills the task again and again, at most `most` times, and lets it finish then; how often it was killed, by kind."""
    kills = Counter()
    while sum(kills.values()) < most:
        kind = draw.choice(["event", "delay"])
        if kind == "event":
            status = attempt(task, folder, event=draw.randint(1, max(2, events)))
        else:
            status = attempt(task, folder, delay=draw.uniform(0.02, seconds))
        assert status in (0, -signal.SIGKILL), f"exit status {status}"
        assert half_written(folder) == []
        if status == 0:
            break
        kills[kind] += 1
    assert attempt(task, folder) == 0
    return kills


def main(folder, wanted, seed):
    """`wanted` names how many kills of each task there must be; prints the counts as JSON."""
    torch.set_num_threads(1)
    StepMemory.after_step = lambda self, step: {}  # a second of each child, and no file
    tasks, draw, kills = Tasks(), random.Random(seed), Counter()
    for name, number in wanted.items():
        task, whole = getattr(tasks, name), folder / f"{name}-whole"
        start = whole_folder(tasks, name, folder)
        events, seconds = whole_run(task, start(whole))
        expected = content(whole)
        for turn in range(1000):
            done = sum(count for key, count in kills.items() if key.startswith(name))
            if done >= number:
                break
            killed = start(folder / f"{name}-{turn}")
            found = kill_until_done(task, killed, draw, events, seconds, min(8, number - done))
            kills.update({f"{name} {kind}": count for kind, count in found.items()})
            assert content(killed) == expected, f"{killed} differs from a run that was never killed"
            if name == "train":
                assert left_behind(killed) == []
        print(f"{name}: {events} events, {seconds:.2f} s", file=sys.stderr)
    print(json.dumps(kills))


def whole_folder(tasks, name, folder):
    """A function that gives the folder a task begins with: a finished run for evaluate, else none."""
    if name != "evaluate":
        return lambda path: path
    finished = folder / "finished"
    assert attempt(tasks.train, finished) == 0

    def copy(path):
        return Path(shutil.copytree(finished, path))

    return copy


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
