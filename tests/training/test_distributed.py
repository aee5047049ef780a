"""Several processes train one run as one process does; the fast tests are about the parts, the slow ones about real groups."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import process_cases
import pytest
import torch
from process_cases import free_port, in_processes, writes_are_refused_below
from safetensors.torch import load_file
from test_train import images, same, tiny
from torch import nn

import sape2.data.augment
from sape2.cli import main
from sape2.config import AugmentConfig
from sape2.data.augment import share_of
from sape2.data.mixing import BatchMixer
from sape2.evaluation.accuracy import quick_accuracy
from sape2.models.trained import build_model
from sape2.runs.checkpoint import Progress, last_checkpoint
from sape2.runs.lock import hold
from sape2.runs.rows import read_rows
from sape2.runs.run import Run
from sape2.studies.run import NOWHERE, shared_accuracy
from sape2.training import processes
from sape2.training.accelerator import make_accelerator
from sape2.training.loop import check_same_run, train
from sape2.training.processes import ALONE, Processes, joined
from sape2.training.steps import ImageSteps, Steps
from sape2.training.weights import Weights

# Everything that is drawn for a batch as a whole; without drop path, which each process draws for its own images.
MIXED = ("model.drop_path=0", "augment.mixup=0.8", "augment.cutmix=1", "augment.flip=true", "train.ema_decay=0.9")
MIXED += ("train.clip_grad=1", "augment.policy=randaugment", "augment.policy_group=2")
# Sums of gradients in another order differ by 1e-7 of them. Adam divides by their size, so that a weight whose gradient is
# almost 0 can move by another part of its step, of 1e-3 at most here; over 15 steps weights of 0.02 differ in the fifth digit.
CLOSE = {"rtol": 1e-3, "atol": 2e-5}
TIMING = {"images_per_s", "wait_fraction", "seconds", "processes"}
CLI = ["train", "digits", "--model", "vit_nano", "--epochs", "2", "--set", "data.train_limit=128", "--set", "train.workers=0"]
UNMIXED = ["--set", "augment.mixup=0", "--set", "augment.cutmix=0"]
CLI += ["--set", "train.precision=fp32", "--set", "train.batch_size=32", "--set", "train.checkpoint_every=1"]


# --- what runs in each process ---------------------------------------------------------------------------------------


def run(folder, assignments=(), sabotage=None):
    """A tiny run on 80 images; `sabotage` may change things for one process before it begins."""
    config, data = tiny(*assignments), images()
    with joined() as processes:
        if sabotage is not None:
            sabotage(processes.rank)
        if not processes.is_main:
            writes_are_refused_below(folder.parent)
        where = folder if processes.is_main else NOWHERE
        model = build_model(config)
        train(model, data, lambda m: shared_accuracy(m, data, processes), Run(where, config), quiet=True, processes=processes)


def command(arguments, sabotage=None):
    """`sape2 …` as a user starts it."""
    if sabotage is not None:
        sabotage(int(os.environ["RANK"]))
    return main(arguments)


def weights(folder):
    return load_file(folder / "model.safetensors")


def largest_difference(one, other):
    return max((one[key] - other[key]).abs().max().item() for key in one)


def assert_same_run(one, other, **tolerance):
    torch.testing.assert_close(weights(one), weights(other), **tolerance)
    for mine, theirs in zip(*(read_rows(folder / "metrics.jsonl") for folder in (one, other)), strict=True):
        for key in mine.keys() - TIMING:
            exact = key not in ("loss", "validation_loss")
            assert mine[key] == (theirs[key] if exact else pytest.approx(theirs[key], rel=1e-4)), key


# --- shares of a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_shares_are_all_places_once_and_hold_both_images_of_a_pair_mirrored(world):
    shares = [share_of(16, rank, world) for rank in range(world)]
    assert torch.cat(shares).sort().values.tolist() == list(range(16))
    for share in shares:
        assert torch.equal(share.flip(0), 15 - share)


def test_shares_of_an_odd_number_are_all_places_once():
    assert torch.cat([share_of(9, rank, 3) for rank in range(3)]).sort().values.tolist() == list(range(9))


def mixed(share, size=16):
    from accelerate.utils import set_seed

    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 10
    set_seed(0)
    mixer = BatchMixer(AugmentConfig(mixup=0.8, cutmix=1.0, erase=0.5), 0.1, 10)
    return mixer(pixels[share], labels[share], share, size)


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_drawn_for_a_batch_does_not_depend_on_who_holds_which_part(world):
    whole = mixed(torch.arange(16))
    for rank in range(world):
        share = share_of(16, rank, world)
        for part, all_ in zip(mixed(share), whole, strict=True):
            assert torch.equal(part, all_[share])


def test_shares_that_break_pairs_would_be_seen():
    share = torch.arange(0, 16, 2)
    assert not torch.equal(mixed(share)[0], mixed(torch.arange(16))[0][share])


# --- several processes in one, by hand -------------------------------------------------------------------------------


class Told(Processes):
    """Process `rank` of several, with what the others say given."""

    def __init__(self, rank, said):
        super().__init__()
        self.rank, self.size, self.said = rank, len(said), said

    def gather(self, value):
        return [value if rank == self.rank else other for rank, other in enumerate(self.said)]


def test_validation_images_are_counted_once_however_they_are_shared():
    data, model = images(25), build_model(tiny())
    accuracy, loss = quick_accuracy(model, data)
    for size in (2, 3, 26):  # of 26 processes one has no image
        parts = [None] * size
        for rank in range(size):
            shared_accuracy(model, data, Noting(rank, parts))
        got = shared_accuracy(model, data, Told(0, parts))
        assert got[0] == accuracy
        assert got[1] == pytest.approx(loss, rel=1e-6)


class Noting(Told):
    def gather(self, value):
        self.said[self.rank] = value
        return [(0, 0.0)]


def test_processes_with_other_settings_or_images_are_refused_by_name():
    check_same_run(tiny(), {"train": {"images": 5}}, ALONE)
    other = tiny("train.lr=0.5")
    theirs = other.identity() | {"images": None, "checkpoint_every": 0, "parallel": "ddp", "compile": False}
    with pytest.raises(ValueError, match=r"process 1 was started with .* train.lr \(0.5 there, 0.001 here\)"):
        check_same_run(tiny(), None, Told(0, [None, theirs]))


def test_what_does_not_join_is_refused_under_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE .*2"):
        make_accelerator("fp32")


@pytest.mark.parametrize(
    "argv",
    [
        ["compare", "digits", "--encodings", "none,ape", "--seeds", "1"],
        ["detect", "coco_digits"],
        ["train", "digits", "--dry-run"],
    ],
    ids=lambda argv: argv[0],
)
def test_commands_of_one_process_refuse_a_launcher_before_anything_is_made(tmp_path, monkeypatch, capfd, argv):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "connect", lambda: pytest.fail("it joins the others"))
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"sape2: sape2 {argv[0]}")
    assert "WORLD_SIZE" in line
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_divided_weights_is_refused_before_anything_is_made(tmp_path, capfd):
    argv = ["compare", "digits", "--encodings", "none,ape", "--seeds", "1", "--set", "train.parallel=fsdp"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "leave it out" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


class Sending(Processes):
    """Process `rank` of two; what it gives to be sent is kept, and what the main one sends is given."""

    def __init__(self, rank, sent):
        super().__init__()
        self.rank, self.size, self.sent, self.given = rank, 2, iter(sent), []

    def gather(self, value):
        return [value, value]

    def from_main(self, value):
        self.given.append(value)
        return value if self.is_main else next(self.sent)


def test_the_weights_of_a_checkpoint_are_sent_by_the_main_process_alone_and_from_the_cpu(tmp_path):
    run(tmp_path / "run", ("train.ema_decay=0.9", "train.epochs=1", "train.warmup_epochs=0"))
    config = tiny("train.ema_decay=0.9")
    main_one = Weights(build_model(config), config.train, Sending(0, ()))
    main_one.take_up(last_checkpoint(tmp_path / "run"))
    taken, *sent = main_one.processes.given
    assert [value.device.type for weights in sent for value in weights.values()] == ["cpu"] * 2 * len(sent[0])
    helper = Weights(build_model(config), config.train, Sending(1, [taken, *sent]))
    helper.take_up(None)
    assert helper.processes.given[1:] == [None, None]
    for mine, theirs in zip(helper.whole(), main_one.whole(), strict=True):
        assert same(mine.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_state_of_another_version_is_named_with_its_place_where_there_is_one(tmp_path, rank):
    run(tmp_path / "run", ["train.epochs=1", "train.warmup_epochs=0"])
    checkpoint, other = last_checkpoint(tmp_path / "run"), {"optimizer": {"state": {}, "param_groups": []}}
    torch.save(other, checkpoint / "optimizer.pt")
    config, accelerator = tiny(), make_accelerator("fp32")
    model = build_model(config)
    processes = Sending(rank, [(Progress(), other), model.state_dict()])
    with pytest.raises(ValueError, match="version of sape2") as refused:
        Steps(model, config.train, lambda _: None, accelerator, None if rank else checkpoint, processes)
    assert ("step-00000005" in str(refused.value)) == (rank == 0)
    assert "None" not in str(refused.value)


def test_processes_that_do_not_come_together_are_told_in_one_line(monkeypatch):
    def late(*_, timeout):
        assert timeout.total_seconds() == 7
        raise torch.distributed.DistStoreError("Timed out after 8 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SAPE2_JOIN_SECONDS", "7")
    monkeypatch.setattr(torch.distributed, "rendezvous", late)
    with pytest.raises(ConnectionError, match="7 s: Timed out after 8 seconds") as told, joined():
        pass
    assert "unset WORLD_SIZE" in str(told.value)


@pytest.mark.parametrize(("name", "value"), [("RANK", None), ("RANK", "first"), ("MASTER_ADDR", None), ("MASTER_PORT", "none")])
def test_a_world_size_without_the_rest_of_a_launcher_is_told_with_what_to_do(monkeypatch, name, value):
    for known, usual in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(known, usual)
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"2 processes were started, but: .*{value or name}.* unset WORLD_SIZE"), joined():
        pass


def test_a_process_that_waits_for_others_says_so(monkeypatch, capfd):
    waiting = threading.Event()

    def late(*_, **__):
        waiting.wait(30)
        raise torch.distributed.DistStoreError("Timed out")

    def tell(seconds):
        told(seconds)
        waiting.set()

    told = processes._tell_that_it_waits
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "TOLD_AFTER_S", 0.01)
    monkeypatch.setattr(processes, "_tell_that_it_waits", tell)
    monkeypatch.setattr(torch.distributed, "rendezvous", late)
    with pytest.raises(ConnectionError), joined():
        pass
    assert "60 s at most: WORLD_SIZE" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_no_time_is_refused(monkeypatch, text):
    monkeypatch.setenv("SAPE2_JOIN_SECONDS", text)
    with pytest.raises(ValueError, match="SAPE2_JOIN_SECONDS"):
        processes.join_seconds()


# --- groups of processes ---------------------------------------------------------------------------------------------


def test_two_processes_give_the_weights_and_rows_of_one(tmp_path):
    settings = (*MIXED, "train.accumulation=2", "train.epochs=2")
    run(tmp_path / "one", settings)
    for ended in in_processes(tmp_path / "logs", 2, run, tmp_path / "run" / "two", settings):
        assert ended == type(ended)(0, "")  # nothing to say, no warning either
    assert_same_run(tmp_path / "run" / "two", tmp_path / "one", **CLOSE)
    for name, size in (("one", 1), ("run/two", 2)):
        assert [row["processes"] for row in read_rows(tmp_path / name / "metrics.jsonl")] == [size] * 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_give_the_weights_of_one_without_accumulation(tmp_path, size):
    run(tmp_path / "one", MIXED)
    assert [ended.status for ended in in_processes(tmp_path / "logs", size, run, tmp_path / "run" / "two", MIXED)] == [0] * size
    assert_same_run(tmp_path / "run" / "two", tmp_path / "one", **CLOSE)


def same_images_everywhere(rank):
    sape2.data.augment.share_of = lambda size, rank, world: share_of(size, 0, world)


def every_other_image(rank):
    """All images once, but pairs for mixing are not those of one process."""
    sape2.data.augment.share_of = lambda size, rank, world: torch.arange(rank, size, world)


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", [same_images_everywhere, every_other_image])
def test_other_images_or_other_pairs_are_noticed(tmp_path, sabotage):
    run(tmp_path / "one", MIXED)
    for ended in in_processes(tmp_path / "logs", 2, run, tmp_path / "run" / "two", MIXED, sabotage):
        assert ended.status == 0, ended.said
    assert largest_difference(weights(tmp_path / "run" / "two"), weights(tmp_path / "one")) > 100 * CLOSE["atol"]


@pytest.mark.slow
def test_the_watch_over_writing_sees_a_process_that_writes(tmp_path):
    (ended,) = in_processes(tmp_path / "logs", 1, write_below, tmp_path / "run")
    assert ended.status == 77
    assert "os.mkdir" in ended.said


def write_below(folder):
    writes_are_refused_below(folder)
    run(folder)


# --- resume ----------------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def break_at_step_7(rank):
    take = ImageSteps.take

    def breaking(self, batch):
        if self.progress.step == 7:
            raise Broken
        take(self, batch)

    ImageSteps.take = breaking


EVERY_STEP = "train.checkpoint_every=1"


def broken_run(folder, size, settings):
    for ended in in_processes(folder.parent.parent / "logs", size, run, folder, settings, break_at_step_7):
        assert "Broken" in ended.said
        assert ended.status == 1
    assert last_checkpoint(folder).name == "step-00000007"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_same_number_of_processes_goes_on_exactly(tmp_path, optimizer):
    """With drop path too. Two addends have one sum; of more than two the order, and with it the rounding, may differ."""
    settings = (EVERY_STEP, "augment.mixup=0.8", "train.ema_decay=0.9", f"train.optimizer={optimizer}")
    whole, broken = tmp_path / "a" / "whole", tmp_path / "b" / "broken"
    assert [ended.status for ended in in_processes(tmp_path / "logs", 2, run, whole, settings)] == [0, 0]
    broken_run(broken, 2, settings)
    assert [ended.status for ended in in_processes(tmp_path / "logs", 2, run, broken, settings)] == [0, 0]
    assert same(weights(broken), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_processes_goes_on_as_one_process_would(tmp_path, before, after):
    settings = (EVERY_STEP, *MIXED)
    run(tmp_path / "one", settings)
    broken = tmp_path / "b" / "broken"
    broken_run(broken, before, settings)
    assert [ended.status for ended in in_processes(tmp_path / "logs", after, run, broken, settings)] == [0] * after
    assert_same_run(broken, tmp_path / "one", **CLOSE)


# --- divided weights ---------------------------------------------------------------------------------------------------

FSDP = "train.parallel=fsdp"


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_divided_weights_are_those_of_one_process(tmp_path, size):
    settings = (*MIXED, "train.accumulation=2")
    run(tmp_path / "one", settings)
    for ended in in_processes(tmp_path / "logs", size, run, tmp_path / "run" / "two", (*settings, FSDP)):
        assert (ended.status, ended.said) == (0, "")
    assert_same_run(tmp_path / "run" / "two", tmp_path / "one", **CLOSE)
    one, two = (last_checkpoint(tmp_path / name) for name in ("one", "run/two"))
    for name in ("model", "ema"):
        torch.testing.assert_close(load_file(two / f"{name}.safetensors"), load_file(one / f"{name}.safetensors"), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(("2", FSDP), ("1",)), (("1",), ("2", FSDP)), (("2", FSDP), ("2",))])
def test_a_checkpoint_of_divided_weights_is_one_like_any_other(tmp_path, before, after):
    settings = (EVERY_STEP, *MIXED)
    run(tmp_path / "one", settings)
    broken = tmp_path / "b" / "broken"
    broken_run(broken, int(before[0]), (*settings, *before[1:]))
    ended = in_processes(tmp_path / "logs", int(after[0]), run, broken, (*settings, *after[1:]))
    assert {process.status for process in ended} == {0}
    assert_same_run(broken, tmp_path / "one", **CLOSE)


def test_dividing_among_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fsdp"):
        run(tmp_path / "one", [FSDP])


# --- what goes wrong in one process is known in all -------------------------------------------------------------------


def nothing_finite_on_process_1(rank):
    take = ImageSteps.take

    def poisoned(self, batch):
        if self.progress.step == 7 and rank == 1:
            self.mixer = lambda images, labels, *_: (images * float("nan"), nn.functional.one_hot(labels, 10).float())
        take(self, batch)

    ImageSteps.take = poisoned


def no_data_on_process_1(rank):
    batch = sape2.data.augment.TrainStream.__getitem__

    def lost(self, index):
        if index == 7 and rank == 1:
            raise OSError("shard 3 cannot be read")
        return batch(self, index)

    sape2.data.augment.TrainStream.__getitem__ = lost


def full_disk_on_process_0(rank):
    def full(*_):
        raise OSError("no space left on device")

    if rank == 0:
        sape2.training.record.save_checkpoint = full


def full_disk_at_the_end_of_an_epoch(rank):
    def full(*_):
        raise OSError("no space left on device")

    if rank == 0:
        sape2.training.record.write_rows = full


def break_process_1_before_backward(rank):
    """The other one is in the middle of exchanging gradients then."""

    def broken(*_):
        raise Broken("lost in the middle of a step")

    if rank == 1:
        sape2.training.steps.F.cross_entropy = broken


def stop_process_1(rank):
    """It alone gets the signal."""
    take = ImageSteps.take

    def signalling(self, batch):
        take(self, batch)
        if self.progress.step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    ImageSteps.take = signalling


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "line", "step"),
    [
        (nothing_finite_on_process_1, "the loss is nan at step 7", 5),
        (no_data_on_process_1, "shard 3 cannot be read", 5),
        (full_disk_on_process_0, "no space left on device", None),
    ],
)
def test_a_failure_in_one_process_ends_all_with_its_reason(tmp_path, sabotage, line, step):
    folder = tmp_path / "run" / "two"
    first, second = in_processes(tmp_path / "logs", 2, run, folder, (), sabotage)
    assert (first.status, second.status) == (1, 1)
    said = first.said.splitlines()[-1].partition(": ")[2]
    assert line in said
    assert second.said.splitlines()[-1].endswith(said)
    kept = last_checkpoint(folder)
    assert (kept and kept.name) == (step and f"step-{step:08d}")


@pytest.mark.slow
def test_a_failure_of_the_main_process_reaches_those_that_put_divided_weights_together(tmp_path, monkeypatch):
    monkeypatch.setattr(process_cases, "LIMIT_S", 120)
    settings = ("train.parallel=fsdp", "train.ema_decay=0.9")
    ended = in_processes(tmp_path / "logs", 2, run, tmp_path / "run" / "two", settings, full_disk_at_the_end_of_an_epoch)
    for process in ended:
        assert process.status == 1
        assert process.said.splitlines()[-1].endswith("no space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_process_that_fails_within_a_step_ends_all_and_soon(tmp_path, monkeypatch, parallel):
    monkeypatch.setattr(process_cases, "LIMIT_S", 120)
    settings = (f"train.parallel={parallel}",)
    ended = in_processes(tmp_path / "logs", 2, run, tmp_path / "run" / "two", settings, break_process_1_before_backward)
    assert [process.status for process in ended] == [1, 1]
    assert "another process of this run is gone" in ended[0].said.splitlines()[-1]
    assert "lost in the middle of a step" in ended[1].said.splitlines()[-1]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "run"
    ended = in_processes(tmp_path / "logs", 2, command, [*CLI, "--out", str(folder)], stop_process_1)
    assert [process.status for process in ended] == [128 + signal.SIGTERM] * 2
    assert "stopped at step 4" in ended[0].said
    assert ended[1].said == ""
    assert last_checkpoint(folder).name == "step-00000004"
    assert [process.status for process in in_processes(tmp_path / "logs", 2, command, [*CLI, "--out", str(folder)])] == [0, 0]
    assert (folder / "model.safetensors").exists()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_measures_and_draws_once_and_knows_a_finished_run(tmp_path):
    folder = tmp_path / "run"
    for said in ("accuracy", "is finished"):
        ended = in_processes(tmp_path / "logs", 2, command, [*CLI, "--out", str(folder)])
        assert [process.status for process in ended] == [0, 0]
        assert said in ended[0].said
        assert "calibration_error" in ended[0].said
        assert ended[1].said == ""
    assert (folder / "figures" / "curves.png").exists()
    assert {row["weights"] for row in read_rows(folder / "results.jsonl")} == {"last", "best"}
    assert not (folder / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ([], "is in use by process"),
        (["--set", "train.batch_size=33", *UNMIXED], "33, 2 and 1"),
        (["--dry-run"], "WORLD_SIZE"),
    ],
    ids=["held", "batch", "dry-run"],
)
def test_a_refusal_is_one_line_and_status_2_in_every_process(tmp_path, extra, line):
    folder = tmp_path / "run"
    with hold(folder) if not extra else open(os.devnull):
        ended = in_processes(tmp_path / "logs", 2, command, [*CLI, "--out", str(folder), *extra])
    for process in ended:
        assert process.status == 2, process.said
        (said,) = process.said.splitlines()
        assert line in said
    assert not (folder / "config.json").exists()


@pytest.mark.slow
def test_a_killed_process_ends_all_under_torchrun_and_leaves_a_checkpoint_to_go_on_from(tmp_path):
    folder = tmp_path / "run"
    settings = [*CLI, "--set", "train.epochs=300", "--out", str(folder)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m"]
    with subprocess.Popen([*launcher, "sape2", *settings], stderr=subprocess.PIPE, text=True) as process:
        at = wait_for_checkpoint(process, folder)
        helper = next(child for child in children_of(process.pid) if environment_of(child).get("RANK") == "1")
        os.kill(helper, signal.SIGKILL)
        said = process.communicate(timeout=240)[1]
    assert process.returncode == 1
    assert f"(pid: {helper})" in said
    kept = last_checkpoint(folder)
    assert int(kept.name.removeprefix("step-")) >= at
    (ended,) = in_processes(tmp_path / "logs", 1, command, settings, stop_soon)
    assert f"going on from step {int(kept.name.removeprefix('step-'))}" in ended.said
    assert ended.status == 128 + signal.SIGTERM


def stop_soon(rank):
    take = ImageSteps.take

    def signalling(self, batch):
        take(self, batch)
        os.kill(os.getpid(), signal.SIGTERM)

    ImageSteps.take = signalling


def wait_for_checkpoint(process, folder):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        found = last_checkpoint(folder)
        if found is not None and int(found.name.removeprefix("step-")) >= 3:
            return int(found.name.removeprefix("step-"))
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no checkpoint came: {process.communicate()[1]}")


def children_of(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def environment_of(pid):
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
