"""What `sape2 cost` counts, times and weighs: known cases, cases that a counter must not miss, and the command."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from sape2 import create_model
from sape2.cli import main
from sape2.cli.options import split_encodings
from sape2.config import MODELS
from sape2.evaluation import MEASURES
from sape2.evaluation.cost import memory, subjects, timing
from sape2.evaluation.cost.measure import count_parameters, growth_exponent
from sape2.evaluation.cost.memory import peak_bytes, within_available
from sape2.evaluation.cost.operations import count_macs, count_model_macs
from sape2.evaluation.cost.rows import count_table, growth_rows, lines_of_growth, time_table
from sape2.evaluation.cost.subjects import PlainAttention, Point, attention_subject, model_subject
from sape2.evaluation.cost.sweep import Sweep, attention_part, measure, parse_grid, run_sweep
from sape2.evaluation.cost.timing import alternate, spread
from sape2.runs import files
from sape2.training import memory_errors
from sape2.training.memory_errors import available_bytes

MEGA = 1_000_000
SLACK = 64  # bytes: scalars become tensors for a moment


@pytest.fixture(autouse=True, scope="module")
def a_smaller_model():
    """One block, so that what is done to models takes a second."""
    MODELS["vit_test"] = (32, 1, 2, 2.0)
    yield
    del MODELS["vit_test"]


# --- operations ------------------------------------------------------------------------------------------------------


def meta(*shape):
    return torch.empty(shape, device="meta")


def count(function, *shapes):
    return count_macs(lambda: function(*(meta(*shape) for shape in shapes)))


def test_plain_attention_counts_two_products():
    h, n, d = 3, 10, 4
    assert count(PlainAttention(), *[(1, h, n, d)] * 3) == 2 * h * n * n * d


def test_the_products_of_a_fused_kernel_are_counted():
    h, n, d = 3, 10, 4
    assert count(F.scaled_dot_product_attention, *[(1, h, n, d)] * 3) == 2 * h * n * n * d


def test_counting_leaves_the_model_alone_and_needs_no_memory():
    model = create_model("vit_nano", image_size=16, patch_size=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert peak_bytes(lambda: count_model_macs(model, 3, (16, 16))) < count_parameters(model)  # bytes, a quarter of the weights
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_tensor_of_known_size():
    assert 4 * MEGA <= peak_bytes(lambda: torch.empty(MEGA)) <= 4 * MEGA + SLACK


def test_in_a_chain_of_temporaries_two_live_at_a_time():
    x = torch.zeros(MEGA)

    def chain():
        y = x + 1
        for _ in range(5):
            y = y + 1

    assert 8 * MEGA <= peak_bytes(chain) <= 8 * MEGA + SLACK


def test_views_and_operations_in_place_take_nothing():
    x = torch.zeros(1000, 1000)
    assert peak_bytes(lambda: x.T[:10].mul_(2).add_(1)) <= SLACK


def test_gradients_of_a_product():
    x, w = torch.zeros(500, 1000, requires_grad=True), torch.zeros(1000, 1000, requires_grad=True)
    gradient = torch.ones(500, 1000)
    peak = peak_bytes(lambda: torch.autograd.grad(x @ w, [x, w], gradient))
    assert 2 * MEGA + 2 * MEGA + 4 * MEGA <= peak <= 8 * MEGA + SLACK  # the product, and both gradients


class Wasteful(torch.autograd.Function):
    """The identity, with a temporary of 40 MB in its backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        torch.empty(10 * MEGA)
        return gradient


def test_temporaries_of_an_autograd_function_are_seen():
    inputs = [torch.zeros(10, requires_grad=True), torch.ones(10)]

    def step():
        return torch.autograd.grad(Wasteful.apply(inputs[0]), inputs[:1], inputs[1])

    assert 40 * MEGA <= peak_bytes(step) <= 40 * MEGA + 1000


def test_temporaries_inside_an_operator_are_seen():
    """An operator that works on a copy of what is not contiguous: its result is 4 kB."""
    x = torch.zeros(1000, 1000).T
    assert peak_bytes(lambda: x.float().cumsum(1)[:, -1].clone()) >= 4 * MEGA
    assert peak_bytes(lambda: torch._euclidean_dist(x[:, :1], x[:, :1])) > 4 * MEGA + 1000


def test_peak_is_not_what_was_allocated_in_all():
    assert MEGA <= peak_bytes(lambda: [len(torch.zeros(MEGA, dtype=torch.uint8)) for _ in range(5)]) <= MEGA + SLACK


def test_what_was_there_before_does_not_count():
    kept = [torch.zeros(MEGA)]
    assert peak_bytes(lambda: kept.append(kept[0][:10] * 2)) <= SLACK


def test_available_memory_heeds_the_limit_of_a_container(tmp_path, monkeypatch):
    system = "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n"
    for name, text in (("MEMORY_INFO", system), ("GROUP_LIMIT", "5000000"), ("GROUP_USE", "2000000")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(memory_errors, name, tmp_path / name)
    assert available_bytes() == 3 * MEGA
    (tmp_path / "GROUP_LIMIT").write_text("max")
    assert available_bytes() == 4000 * 1024
    (tmp_path / "MEMORY_INFO").unlink()
    monkeypatch.setattr(memory_errors.os, "sysconf", {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert available_bytes() == 7 * 4096


RESIDENT = """
import torch
from sape2 import create_encoding
from sape2.evaluation.cost.subjects import PlainAttention, Point, attention_subject, model_subject
from sape2.evaluation.cost.measure import forward_backward
from sape2.evaluation.cost.memory import peak_bytes
def step(side):
    module = EncodedAttention(create_encoding("sape2", 6, 64, (side, side)), (side, side)).train()
    inputs = [torch.randn(1, 6, side * side, 64, requires_grad=i < 3) for i in range(4)]
    return lambda: forward_backward(module, inputs)
def most():  # of this process: ru_maxrss begins with that of the process that started it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
step(8)()
small, large = step(8), step(40)
before = most()
large()
resident = most() - before
print(resident, peak_bytes(large))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says how much memory a process had at most")
def test_peak_agrees_with_what_the_system_says_the_process_grew_by():
    found = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, env=os.environ)
    resident, peak = map(int, found.stdout.split())
    assert peak > 200 * MEGA
    assert 0.8 * peak < resident < 1.3 * peak  # pages, scratch of BLAS, and what malloc keeps


# --- time and growth -------------------------------------------------------------------------------------------------


def test_steps_take_turns_and_the_warm_up_is_not_kept():
    order, rounds = [], []
    times = alternate({name: lambda name=name: order.append(name) for name in "abc"}, 3, 2, lambda: rounds.append(len(order)))
    assert "".join(order) == "abc" * 5
    assert rounds == [3, 6, 9, 12, 15]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_times_are_those_between_start_and_end_of_a_step(monkeypatch):
    clock = iter([0, 5, 10, 11, 20, 23])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert alternate({"step": lambda: None}, 3, warmup=0) == {"step": [5, 1, 3]}


def test_spread_is_the_outer_deciles():
    assert spread([float(value) for value in range(11)]) == (1.0, 9.0)
    assert spread([2.0]) == (2.0, 2.0)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 1.5])
def test_growth_exponent_of_a_power(power):
    assert growth_exponent([(n, 3 * n**power) for n in (64, 196, 576)]) == pytest.approx(power)


# --- names and paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none,sape2", ("none", "sape2")),
        ("sape2:count=cyclic,sign=learned,rope", ("sape2:count=cyclic,sign=learned", "rope")),
        ("sape2:count=cyclic,every=2+ape, rpe:beyond=clamp", ("ape+sape2:count=cyclic,every=2", "rpe:beyond=clamp")),
        ("none,none", ("none",)),
    ],
)
def test_options_keep_their_commas_in_a_list_of_encodings(text, names):
    assert split_encodings(text) == names


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ape", "none"),
        ("none", "none"),
        ("ape+sape2", "sape2"),
        ("rope+ape+sape2:count=cyclic,every=2,sign=learned", "rope+sape2:count=cyclic,sign=learned"),
    ],
)
def test_attention_part(name, part):
    assert attention_part(name) == part


def test_grids_are_rows_by_columns():
    assert parse_grid(" 8x14 ") == (8, 14)
    for text in ("8by8", "8", "8x", "0x8", "-8x8", "8x8x8", "8.5x8", ""):
        with pytest.raises(ValueError, match="rows x columns"):
            parse_grid(text)


# --- the sweep -------------------------------------------------------------------------------------------------------

CONDITIONS = {"torch": torch.__version__, "hardware": "test", "threads": 1}
KEYS = {
    "measure", "name", "value", "unit", "n", "protocol", "encoding", "timed_as", "level", "model", "heads", "head_dim", "grid",
    "tokens", "batch", "dtype", "device", "path", *CONDITIONS,
}  # fmt: skip


def small_sweep(**changes):
    given = {"encodings": ("none", "ape", "ape+sape2"), "grids": ((2, 2), (2, 4)), "batches": (2,), "repeats": 2}
    return Sweep(**given | {"model": "vit_test"} | changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, a_smaller_model):
    """(points with their rows, the lines of the file) of a small sweep on both levels."""
    path, rounds = tmp_path_factory.mktemp("cost") / "new" / "results.jsonl", []
    sweep = small_sweep()
    found = [*run_sweep(sweep, path, CONDITIONS, lambda: rounds.append(1))]
    assert len(rounds) == sweep.rounds == 4 * 2 * 4
    return found, [json.loads(line) for line in path.read_text().splitlines()]


def values(rows, **wanted):
    return {row["encoding"]: row["value"] for row in rows if all(row[key] == value for key, value in wanted.items())}


def test_rows_carry_their_conditions_and_are_in_the_file(swept):
    found, written = swept
    rows = [row for _, rows in found for row in rows]
    assert rows == written
    assert all(row.keys() >= KEYS for row in rows)
    assert all(isinstance(row["value"], (int, float)) and math.isfinite(row["value"]) for row in rows)
    assert [point and (point.level, point.grid) for point, _ in found] == [
        ("attention", (2, 2)), ("attention", (2, 4)), ("model", (2, 2)), ("model", (2, 4)), None,
    ]  # fmt: skip


def test_every_quantity_is_there_for_every_encoding(swept):
    attention, model = swept[0][1][1], swept[0][3][1]
    counted = {"parameters", "macs"}
    for rows, encodings, phases, yardsticks in (
        (attention, {"plain", "none", "ape", "ape+sape2"}, ("forward", "forward_backward"), ("none", "plain")),
        (model, {"none", "ape", "ape+sape2"}, ("inference", "training_step"), ("none",)),
    ):
        timed = {f"{phase}_{what}" for phase in phases for what in ("ms", "images_per_s", "memory")}
        ratios = {f"{phase}_{what}_to_{y}" for phase in phases for what in ("ms", "memory") for y in yardsticks}
        assert {(row["encoding"], row["name"]) for row in rows} == {(e, n) for e in encodings for n in counted | timed | ratios}


def test_an_encoding_on_tokens_is_none_in_attention_and_says_so(swept):
    rows = swept[0][1][1]
    own = [{k: v for k, v in row.items() if k != "encoding"} for row in rows if row["encoding"] == "ape"]
    none = [{k: v for k, v in row.items() if k != "encoding"} for row in rows if row["encoding"] == "none"]
    assert own == none
    assert {row["timed_as"] for row in rows if row["encoding"] == "ape+sape2"} == {"sape2"}
    for table in (count_table(rows), time_table(rows)):
        assert [line["encoding"] for line in table] == ["plain", "none", "ape (= none)", "ape+sape2 (= sape2)"]
        assert len({tuple(line) for line in table}) == 1


def test_ratios_are_of_the_medians_and_1_to_oneself(swept):
    rows = swept[0][1][1]
    assert values(rows, name="forward_ms_to_none")["none"] == 1
    assert values(rows, name="forward_ms_to_plain")["plain"] == 1
    ms, ratio = values(rows, name="forward_backward_ms"), values(rows, name="forward_backward_ms_to_plain")
    assert ratio["ape+sape2"] == pytest.approx(ms["ape+sape2"] / ms["plain"])
    speed = values(rows, name="forward_backward_images_per_s")
    assert speed["ape+sape2"] == pytest.approx(2000 / ms["ape+sape2"])


def test_counts_are_those_of_the_model(swept):
    rows = swept[0][3][1]
    model = create_model("vit_test", encoding="ape+sape2", image_size=(32, 64), patch_size=16, num_classes=1000)
    assert values(rows, name="macs")["ape+sape2"] == count_model_macs(model, 3, (32, 64))
    assert values(rows, name="parameters")["ape+sape2"] == count_parameters(model)


def test_growth_is_over_the_grids(swept):
    rows = [row for _, rows in swept[0][:-1] for row in rows]
    growth = swept[0][-1][1]
    found = {(row["name"], row["encoding"]): row for row in growth}
    points = [(row["tokens"], row["value"]) for row in rows if row["name"] == "forward_ms" and row["encoding"] == "plain"]
    row = found["forward_ms_growth", "plain"]
    assert row["value"] == pytest.approx(growth_exponent(points))
    assert (row["grid"], row["n"], row["tokens"]) == ("2x2 to 2x4", 2, None)
    assert ("training_step_memory_growth", "ape+sape2") in found
    assert growth_rows([row for row in rows if row["tokens"] == 4]) == []


def test_figures_have_a_line_for_everything_that_was_timed(swept):
    panels = lines_of_growth(swept[1], "ms")
    assert {title: set(lines) for title, lines in panels.items()} == {
        "attention, forward backward, fp32, batch 2": {"plain", "none"},
        "vit_test, training step, fp32, batch 2": {"none", "ape", "ape+sape2"},
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("subject", [attention_subject, model_subject])
def test_a_step_leaves_no_memory_behind(subject, dtype):
    point = Point("", "vit_test", dtype, 2, (3, 4), torch.device("cpu"))
    made = subject("sape2", point)
    phase = "forward_backward" if subject is attention_subject else "training_step"
    made.steps[phase]()
    first, second = (peak_bytes(lambda: made.steps[phase]()) for _ in range(2))
    assert first == second
    assert all(parameter.grad is None for parameter in made.module.parameters())


def test_on_a_cpu_an_allocation_beyond_what_is_available_fails_and_is_a_note():
    """In a process of its own: what this one has freed and kept needs no allocation."""
    process = multiprocessing.get_context("spawn").Process(target=_measure_within_30_mega)
    process.start()
    process.join()
    assert process.exitcode == 0


def _measure_within_30_mega():
    memory.available_bytes = lambda: 30 * MEGA
    sweep = small_sweep(model="vit_nano", encodings=("none",), grids=((40, 40),), levels=("attention",), repeats=1)
    rows = measure(sweep.points()[0], sweep, CONDITIONS)
    plain = [row for row in rows if row["encoding"] == "plain" and row["name"].startswith("forward")]
    assert {row["value"] for row in plain} == {None}
    assert all(row["n"] == 0 and "out of memory" in row["note"] for row in plain)
    assert values(rows, name="macs")["plain"] > 0
    with within_available(torch.device("cpu")), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(200 * MEGA)
    torch.empty(200 * MEGA)  # the limit is gone


def test_running_out_of_memory_is_a_note_and_other_errors_are_not_hidden(monkeypatch):
    def run(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(subjects, "forward", run)
    monkeypatch.setattr(subjects, "forward_backward", run)
    sweep = small_sweep(encodings=("none",), grids=((2, 2),), levels=("attention",))
    message = "[enforce fail] DefaultCPUAllocator: can't allocate memory"
    rows = measure(sweep.points()[0], sweep, CONDITIONS)
    assert all("out of memory" in row["note"] for row in rows if row["name"].startswith("forward"))
    message = "unsupported memory format: shapes do not fit"
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure(sweep.points()[0], sweep, CONDITIONS)


def test_rows_that_are_there_survive_an_interruption(tmp_path):
    rounds = []

    def interrupt():
        rounds.append(1)
        if len(rounds) > 8:
            raise KeyboardInterrupt

    sweep = small_sweep(encodings=("none",), levels=("attention",))
    with pytest.raises(KeyboardInterrupt):
        list(run_sweep(sweep, tmp_path / "results.jsonl", CONDITIONS, interrupt))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["grid"] for row in rows} == {"2x2"}


@pytest.mark.parametrize("points", [0, 1])
def test_a_sweep_that_is_killed_while_it_writes_leaves_whole_cells(tmp_path, monkeypatch, points):
    """What stands there is the last whole state: that of the sweep before, until the first point is done."""
    path, sync = tmp_path / "results.jsonl", files._sync
    path.write_text('{"grid": "before"}\n')
    synced = []

    def killed(temporary):
        if len(synced) == points:
            raise KeyboardInterrupt
        synced.append(temporary)
        sync(temporary)

    monkeypatch.setattr(files, "_sync", killed)
    sweep = small_sweep(encodings=("none",), levels=("attention",))
    with pytest.raises(KeyboardInterrupt):
        list(run_sweep(sweep, path, CONDITIONS))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["grid"] for row in rows} == ({"2x2"} if points else {"before"})


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capfd, tmp_path, monkeypatch):
    """Runs `sape2 cost` in an empty folder: (status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    jaxtyping.config.update("jaxtyping_disable", True)

    def run(*argv):
        try:
            status = main(["cost", *argv])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capfd.readouterr()
        return status, out, err

    yield run
    jaxtyping.config.update("jaxtyping_disable", False)


SMALL = ("--attention-only", "--grids", "2x2,2x4", "--batches", "1", "--repeats", "1")


def test_the_command_ends_with_tables_rows_and_figures(command, tmp_path):
    status, out, err = command(*SMALL, "--encodings", "ape,sape2:count=between,readout=direct")
    assert status == 0
    assert err == "measured attention, fp32, batch 1, 2x2 tokens\nmeasured attention, fp32, batch 1, 2x4 tokens\n"
    for text in ("attention, fp32, batch 1, 2x4 tokens: measured", "ape (= none)", "plain", "growth"):
        assert text in out
    assert {path.name for path in (tmp_path / "runs/cost").iterdir()} == {
        "sweep.json",
        "results.jsonl",
        "cost_time.png",
        "cost_memory.png",
    }
    rows = [json.loads(line) for line in (tmp_path / "runs/cost/results.jsonl").read_text().splitlines()]
    assert "sape2:count=between,readout=direct" in {row["encoding"] for row in rows}


def test_json_is_the_rows_and_nothing_else(command, tmp_path):
    status, out, _ = command(*SMALL, "--encodings", "none", "--dtypes", "bf16", "--out", "here", "--json")
    assert status == 0
    assert out == (tmp_path / "here/results.jsonl").read_text()
    assert {row["dtype"] for row in map(json.loads, out.splitlines())} == {"bf16"}


def test_another_sweep_or_other_files_are_not_written_over(command, tmp_path):
    sweep, out = (*SMALL, "--encodings", "none"), tmp_path / "out"
    assert command(*sweep, "--out", "out")[0] == 0
    kept = (out / "results.jsonl").read_text()
    status, _, err = command(*SMALL, "--encodings", "ape", "--out", "out")
    assert status == 2
    assert "encodings (['none'] there, ['ape'] here)" in err
    assert "--out" in err
    assert (out / "results.jsonl").read_text() == kept
    assert command(*sweep, "--out", "out")[0] == 0  # the same is measured again
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("mine")
    status, _, err = command(*sweep, "--out", "photos")
    assert (status, "sweep.json" in err) == (2, True)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["notes.txt"]
    (out / "sweep.json").write_text("{")
    assert "sweep.json" in command(*sweep, "--out", "out")[2]
    assert "is a file" in command(*sweep, "--out", "photos/notes.txt")[2]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--encodings", "sape3"], ["unknown encoding 'sape3'", "rope_mixed"]),
        (["--encodings", "none,"], ["unknown encoding ''"]),
        (["--encodings", "sape2:every=13"], ["every=13", "12 layers"]),
        (["--grids", "8by8"], ["rows x columns", "8x8", "'8by8'"]),
        (["--grids", "8x8,0x4"], ["at least 1", "'0x4'"]),
        (["--batches", "0"], ["--batches", "from 1 on", "'0'"]),
        (["--batches", "-2"], ["--batches", "'-2'"]),
        (["--batches", "two"], ["--batches", "'two'"]),
        (["--repeats", "0"], ["--repeats", "'0'"]),
        (["--threads", "0"], ["--threads", "'0'"]),
        (["--dtypes", "fp64"], ["unknown dtype 'fp64'", "fp32, bf16"]),
        (["--model", "vit_tiny"], ["unknown model 'vit_tiny'", "vit_nano"]),
        (["--model", "vit_nano", "--attention-only"], ["not allowed with"]),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(command, tmp_path, argv, named):
    status, out, err = command(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert [text for text in named if text not in err] == []
    assert not any(tmp_path.iterdir())


class Images:
    """Four images of two classes."""

    classes = ("a", "b")
    labels = torch.tensor([0, 1, 0, 1])

    def batches(self, batch_size):
        yield from zip(torch.zeros(4, 3, 16, 16).split(batch_size), self.labels.split(batch_size), strict=True)


def test_the_measure_of_a_run():
    model = create_model("vit_nano", encoding="ape", image_size=16, patch_size=4, num_classes=2)
    rows = {row["name"]: row for row in MEASURES["cost"](model, Images())}
    assert list(rows) == ["parameters", "macs", "inference_images_per_s", "inference_memory"]
    assert rows["macs"]["value"] == count_model_macs(model, 3, (16, 16))
    speed = rows["inference_images_per_s"]
    assert speed["n"] == 7
    assert 0 < speed["p10"] <= speed["value"] <= speed["p90"]
    assert "batch of 4" in speed["protocol"]
    assert model.training
