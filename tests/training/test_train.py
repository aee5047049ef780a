"""The loop: exact resume after a kill, averages, accumulation, schedules, and runs that go wrong."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import nn

from sape2.config import override
from sape2.config.recipes import RECIPES, get_recipe
from sape2.data import ImageData
from sape2.data.augment import TrainStream, derive_seed, epoch_order
from sape2.evaluation.accuracy import accuracy, confusion, predict, quick_accuracy
from sape2.evaluation.cost.measure import count_parameters
from sape2.evaluation.cost.operations import count_model_macs
from sape2.machine import precision_of
from sape2.models.trained import build_model
from sape2.models.vit import ViT, create_model
from sape2.runs.checkpoint import Progress, keep_only, last_checkpoint, load_weights, save_checkpoint, save_weights
from sape2.runs.rows import read_rows
from sape2.runs.run import Run
from sape2.training.interruption import Stopped
from sape2.training.loop import train
from sape2.training.optimisation import make_optimizer, make_schedule, set_seeds

TINY = [
    "model.dim=16", "model.depth=1", "model.num_heads=2", "train.epochs=3", "train.warmup_epochs=1", "train.batch_size=16",
    "train.precision=fp32", "train.workers=0", "model.drop_path=0.2", "augment.crop_padding=1", "augment.erase=0.3",
    "model.encoding=ape+sape2",
]  # fmt: skip


def tiny(*assignments):
    return override(get_recipe("digits"), [*TINY, *assignments])


def images(count=80):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 10
    return ImageData(pixels, labels, tuple("0123456789"), (0.3,), (0.4,))


def run(folder, config, evaluate=None, watch=lambda progress: None, model=None):
    data = images()
    model, evaluate = model or build_model(config), evaluate or (lambda trained: quick_accuracy(trained, data))
    train(model, data, evaluate, Run(folder, config), quiet=True, watch=watch)
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- resume ----------------------------------------------------------------------------------------------------------


class StopAt(Exception):
    pass


@pytest.fixture(
    scope="module",
    params=[(), ("train.ema_decay=0.9",), ("train.optimizer=muon", "train.ema_decay=0.9"), ("train.optimizer=nadamuon",)],
    ids=["plain", "ema", "muon", "nadamuon"],
)
def unbroken(tmp_path_factory, request):
    """(settings, folder, weights) of a run of 15 steps, with and without an average of its weights."""
    config = tiny("train.checkpoint_every=1", *request.param)
    folder = tmp_path_factory.mktemp("unbroken")
    return config, folder, run(folder, config)


@pytest.mark.parametrize("stop", [2, 5, 8, 13], ids=lambda s: f"step{s}")
def test_a_run_that_breaks_at_any_step_ends_with_the_weights_of_one_that_did_not(tmp_path, stop, unbroken):
    """Steps 5 and 10 end an epoch; 13 lies within the last one."""
    config, whole_folder, expected = unbroken

    def breaking(progress):
        if progress.step > stop:
            raise StopAt

    with pytest.raises(StopAt):
        run(tmp_path / "broken", config, watch=breaking)
    assert last_checkpoint(tmp_path / "broken").name == f"step-{stop:08d}"
    assert same(run(tmp_path / "broken", config), expected)
    whole, broken = (read_rows(folder / "metrics.jsonl") for folder in (whole_folder, tmp_path / "broken"))
    timing = ("images_per_s", "wait_fraction", "seconds", "precision", "device")
    for one, other in zip(whole, broken, strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == pytest.approx(
            {k: v for k, v in other.items() if k not in timing}, rel=1e-6
        )


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train import run, tiny
run(Path({folder!r}), tiny("train.epochs={epochs}", "train.checkpoint_every=3"))
"""


def start_process(folder, epochs):
    code = KILLED.format(tests=os.path.dirname(__file__), folder=str(folder), epochs=epochs)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(process, folder, step):
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        checkpoint = last_checkpoint(folder) if folder.exists() else None
        if checkpoint and int(checkpoint.name.removeprefix("step-")) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"the run did not reach step {step}: {process.communicate()[1]}")


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "steps"), [(8, (30,)), (40, (3, 150))])
def test_a_killed_process_resumes_exactly_early_and_in_a_late_epoch(tmp_path, epochs, steps):
    """Five steps an epoch."""
    assert start_process(tmp_path / "whole", epochs).wait(timeout=120) == 0
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    folder = tmp_path / "killed"
    for step in steps:
        process = start_process(folder, epochs)
        wait_for_step(process, folder, step)
        process.kill()
        process.communicate()
        assert not (folder / "model.safetensors").exists()
    assert start_process(folder, epochs).wait(timeout=120) == 0
    assert same(load_file(folder / "model.safetensors"), expected)
    assert [row["epoch"] for row in read_rows(folder / "metrics.jsonl")] == list(range(1, epochs + 1))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_group_saves_a_checkpoint_though_data_workers_get_it_too(tmp_path, number):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "sape2", "train", "digits", "--out", str(folder), "--epochs", "400"]
    command += ["--set", "train.workers=1", "--set", "train.precision=fp32", "--set", "train.checkpoint_every=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    wait_for_step(process, folder, 5)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    assert "same command" in errors
    stopped = int(errors.split("stopped at step ")[1].split(";")[0])
    assert last_checkpoint(folder).name == f"step-{stopped:08d}"


def test_sigterm_saves_a_checkpoint_and_stops(tmp_path):
    def signalling(progress):
        if progress.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped at step 7") as stopped:
        run(tmp_path / "run", tiny(), watch=signalling)
    assert stopped.value.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert last_checkpoint(tmp_path / "run").name == "step-00000007"
    assert same(run(tmp_path / "run", tiny()), run(tmp_path / "whole", tiny()))


def test_workers_end_with_the_training_even_while_its_error_is_kept(tmp_path):
    """They ignore the signals that end a process, so one that is left would hold up the end of the program."""

    def failing(progress):
        if progress.step == 2:
            raise RuntimeError("as a program may")

    with pytest.raises(RuntimeError) as kept:
        run(tmp_path / "run", tiny("train.workers=1"), watch=failing)
    assert multiprocessing.active_children() == []
    assert kept.tb is not None


# --- what a step does ------------------------------------------------------------------------------------------------


def test_a_run_is_not_continued_with_another_optimiser(tmp_path):
    run(tmp_path, tiny("train.optimizer=muon"))
    with pytest.raises(ValueError, match=r"train\.optimizer"):
        Run(tmp_path, tiny()).check_settings()


def test_the_seed_decides_and_another_seed_differs(tmp_path):
    first, again = run(tmp_path / "a", tiny()), run(tmp_path / "b", tiny())
    other = run(tmp_path / "c", replace(tiny(), seed=1))
    assert same(first, again)
    assert not same(first, other)


def test_workers_change_nothing(tmp_path):
    assert same(run(tmp_path / "a", tiny()), run(tmp_path / "b", tiny("train.workers=1")))


def test_accumulation_changes_rounding_only(tmp_path):
    settings = ("model.drop_path=0", "model.encoding=ape")
    whole, parts = run(tmp_path / "a", tiny(*settings)), run(tmp_path / "b", tiny(*settings, "train.accumulation=4"))
    for key, value in whole.items():
        torch.testing.assert_close(value, parts[key], rtol=1e-3, atol=2e-5)


def test_the_moving_average_is_what_is_kept(tmp_path):
    plain, averaged = run(tmp_path / "a", tiny()), run(tmp_path / "b", tiny("train.ema_decay=0.9"))
    assert not same(plain, averaged)
    weights = load_file(last_checkpoint(tmp_path / "b") / "model.safetensors")
    assert same(weights, plain)  # averaging does not change the training itself
    assert same(load_file(last_checkpoint(tmp_path / "b") / "ema.safetensors"), averaged)


def test_seeds_of_a_step_are_those_of_accelerate():
    def draws():
        return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002 - the global one

    set_seed(5)
    expected = draws()
    set_seeds(5, torch.device("cpu"))
    assert draws() == expected


def test_it_learns(tmp_path):
    data = images()
    data = replace(data, images=(data.labels * 25)[:, None, None, None].expand(-1, 1, 8, 8).to(torch.uint8).clone())
    config = tiny("train.epochs=30", "augment.mixup=0", "augment.erase=0", "train.lr=0.02", "model.drop_path=0")
    model = build_model(config)
    train(model, data, lambda trained: quick_accuracy(trained, data), Run(tmp_path, config), quiet=True)
    assert quick_accuracy(model, data)[0] > 0.8


def test_clipping_bounds_the_gradient(tmp_path, monkeypatch):
    norms = []
    config = tiny("train.clip_grad=0.01", "train.epochs=2")
    step = torch.optim.AdamW.step

    def remember(self, *arguments, **keywords):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    run(tmp_path, config)
    assert len(norms) == 10
    assert max(norms) < 0.0101


def test_the_schedule_warms_up_and_falls_to_the_minimum():
    config = tiny("train.epochs=10", "train.warmup_epochs=2", "train.lr=0.01", "train.min_lr=0.0001").train
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    schedule = make_schedule(optimizer, config.schedule, steps=50, warmup=10, min_lr=config.min_lr)
    rates = [float(schedule._get_lr(step)[0]) for step in range(51)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[5] == pytest.approx((1e-4 + 1e-2) / 2)
    assert rates[10] == max(rates) == pytest.approx(0.01)
    assert all(one >= other for one, other in itertools.pairwise(rates[10:]))
    assert rates[50] == pytest.approx(1e-4)


def test_precision_auto_is_bf16_or_fp32():
    assert precision_of("auto") in ("bf16", "fp32")
    assert [precision_of(name) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works on an accelerator")
def test_fp16_without_an_accelerator_is_refused_rather_than_ignored():
    with pytest.raises(ValueError, match="needs an accelerator"):
        precision_of("fp16")


@pytest.mark.parametrize("ema", [False, True], ids=["plain", "ema"])
def test_validation_is_in_the_precision_of_the_training(tmp_path, ema):
    """Also that of an average, which is a copy of the model from before accelerate wrapped it."""
    seen = []

    def evaluate(trained):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return quick_accuracy(trained, images())

    run(tmp_path / "run", tiny("train.precision=bf16", "train.epochs=2", *["train.ema_decay=0.9"] * ema), evaluate)
    assert seen == [(True, torch.bfloat16)] * 2
    assert not torch.is_autocast_enabled("cpu")


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE .*2"):
        run(tmp_path, tiny())


# --- runs that go wrong ----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    model = build_model(tiny())

    def poison(progress):
        if progress.step == 7:
            nn.init.constant_(model.head.bias, float("nan"))

    with pytest.raises(ValueError, match=r"nan at step 7 \(epoch 2, .*step-00000005") as error:
        run(tmp_path, tiny(), watch=poison, model=model)
    assert "--set train.lr" in str(error.value)
    weights = load_file(last_checkpoint(tmp_path) / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("step", [4, 14], ids=["end of an epoch", "end of the run"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, step):
    """The loss of the step is finite; its gradient is not."""
    model, steps = build_model(tiny()), itertools.count()
    model.head.bias.register_hook(lambda gradient: gradient * (float("nan") if next(steps) == step else 1))
    with pytest.raises(ValueError, match=f"weights .*step {step}"):
        run(tmp_path, tiny(), model=model)
    for path in tmp_path.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path
    assert not (tmp_path / "model.safetensors").exists()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == (0 if step == 4 else 2)


def test_a_dead_table_is_refused_before_the_first_step(tmp_path):
    config = tiny()
    model = build_model(config)
    nn.init.zeros_(model.blocks[0].attn.encoding.table_y)
    with pytest.raises(ValueError, match="table_y is all zero"):
        train(model, images(), lambda _: (0.0, 0.0), Run(tmp_path, config), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_training_set_smaller_than_a_batch_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"16 .*10"):
        TrainStream(images(10), tiny().augment, tiny().train, seed=0)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, nn.Linear(2, 2))
    before = path.read_bytes()

    class Unwritable(nn.Linear):
        def state_dict(self, *_, **__):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_weights(path, Unwritable(2, 2))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_checkpoint_half_removed_is_never_taken_for_one(tmp_path, monkeypatch):
    """Killed while the one before is removed: what is left of it has no name that counts."""
    run(tmp_path, tiny("train.epochs=1", "train.warmup_epochs=0"))
    (checkpoint,) = (tmp_path / "checkpoint").iterdir()
    (tmp_path / "checkpoint" / "step-00000001").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    keep_only(checkpoint)
    assert last_checkpoint(tmp_path) == checkpoint
    assert [path.name for path in (tmp_path / "checkpoint").iterdir() if not path.name.startswith(".")] == [checkpoint.name]


def test_a_half_written_checkpoint_is_never_the_last_one(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, Progress(step=3), model, None, {"optimizer": {}})
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, Progress(step=4), model, None, {"optimizer": {}})
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000003"]
    assert last_checkpoint(tmp_path).name == "step-00000003"


def test_weights_of_another_model_are_named(tmp_path):
    save_weights(tmp_path / "a.safetensors", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"a\.safetensors .*weight"):
        load_weights(tmp_path / "a.safetensors", nn.Linear(3, 2))
    (tmp_path / "b.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="does not hold"):
        load_weights(tmp_path / "b.safetensors", nn.Linear(2, 2))


# --- what is measured ------------------------------------------------------------------------------------------------


class Answers(nn.Module):
    """Gives fixed logits, image by image."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.at = nn.Parameter(logits), 0

    def forward(self, pixels):
        self.at += len(pixels)
        return self.logits[self.at - len(pixels) : self.at]


def test_accuracy_per_class_top5_loss_and_calibration_of_known_answers():
    data = images(20)
    logits = torch.zeros(20, 10)
    logits[torch.arange(20), data.labels] = 100.0
    logits[:5] = logits[:5].roll(1, dims=1)  # classes 0 to 4 wrong once, sure of it
    rows = {(row["name"], row.get("class")): row for row in accuracy(Answers(logits), data, batch_size=7)}
    assert rows["accuracy", None]["value"] == 0.75
    assert rows["accuracy", None]["n"] == 20
    assert rows["loss", None]["value"] == pytest.approx(25.0)
    assert rows["calibration_error", None]["value"] == pytest.approx(0.25, abs=1e-6)
    assert [rows["class_accuracy", str(c)]["value"] for c in range(10)] == [0.5] * 5 + [1.0] * 5
    assert 0.75 <= rows["top5_accuracy", None]["value"] <= 1


def test_confusion_counts_answers_by_true_class():
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 2, 2])]
    counts = confusion(logits, torch.tensor([0, 1, 1, 2, 0]))
    assert counts.tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 1]]


def test_prediction_leaves_the_model_in_its_mode():
    model = create_model("vit_nano", image_size=8, patch_size=2, in_channels=1).train()
    predict(model, images(4), 2)
    assert model.training


def test_macs_count_attention():
    model = create_model("vit_nano", encoding="none", image_size=32, patch_size=4, pool="mean")
    dim, depth, tokens = 96, 4, 64
    linear = tokens * dim * (3 * 16 + depth * (3 * dim + dim + 8 * dim)) + dim * 10
    attention = depth * 2 * tokens**2 * dim
    assert count_model_macs(model, 3, (32, 32)) == linear + attention
    assert count_parameters(model) == 453_226


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_model_and_says_where_it_comes_from(name):
    config = get_recipe(name)
    assert config.recipe == name
    with torch.device("meta"):
        ViT(config.model)
    assert "Command:" in RECIPES[name].__doc__


def test_derived_seeds_differ_with_every_part_and_their_number():
    parts = [(0,), (0, 0), (0, 1), (1, 0), (0, "a"), (0, "a", 0), (2**32, 1), (0, 1, 1)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert seeds == [derive_seed(*part) for part in parts]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_epoch_order_is_a_permutation_that_changes_with_epoch_and_seed():
    first = epoch_order(100, seed=0, epoch=0)
    assert first.sort().values.tolist() == list(range(100))
    assert not torch.equal(first, epoch_order(100, seed=0, epoch=1))
    assert not torch.equal(first, epoch_order(100, seed=1, epoch=0))
