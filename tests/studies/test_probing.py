"""Training and measuring on the controlled tasks, with tiny settings; what the numbers are is not tested here."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_probes import count_label

from sape2.cli import main
from sape2.encodings import list_encodings
from sape2.studies import probing
from sape2.studies.probes import NOT_ASKED, TASKS, TRAIN
from sape2.studies.probes.base import Task
from sape2.studies.probing import Cell, answer, build_model, finished, measure, measured_splits, run_cells, table

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """Small enough for a test; everything else as it is."""
    monkeypatch.setattr(Task, "batch_size", 4)
    monkeypatch.setattr(probing, "TOKENS_MEASURED", 64)
    monkeypatch.setattr(probing, "FEWEST_SCENES", 4)
    monkeypatch.setattr(probing, "DIM", 16)


@pytest.mark.parametrize("encoding", [*list_encodings(), "ape+sape2:readout=direct,count=both", "rope+cope"])
def test_every_encoding_answers_per_token_and_takes_larger_grids(encoding, tiny):
    task = TASKS["count"]
    model = build_model(Cell("count", encoding))
    for split in (TRAIN, "12x12"):
        scenes = task.sample(split, 2, torch.Generator().manual_seed(0))
        logits = answer(model, scenes.cells, task)
        assert logits.shape == (*scenes.labels.shape, task.num_classes)
    F.cross_entropy(logits.flatten(0, 1), scenes.labels.flatten(), ignore_index=NOT_ASKED).backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert dead == []


def test_the_answer_of_a_scene_is_one(tiny):
    task = TASKS["scenes"]
    scenes = task.sample(TRAIN, 2, torch.Generator().manual_seed(0))
    assert answer(build_model(Cell("scenes", "ape")), scenes.cells, task).shape == (2, 10)


def test_encodings_of_a_seed_share_all_other_weights_and_the_batches(tiny):
    ape, rpe = (dict(build_model(Cell("count", name)).named_parameters()) for name in ("ape", "rpe"))
    shared = ape.keys() & rpe.keys()
    assert {"patch_embed.proj.weight", "blocks.1.mlp.fc2.weight", "head.weight"} <= shared
    assert all(torch.equal(ape[name], rpe[name]) for name in shared)
    first, again = (probing.training_batch(TASKS["count"], "count", 0, 3) for _ in range(2))
    assert torch.equal(first.cells, again.cells)
    assert not torch.equal(first.cells, probing.training_batch(TASKS["count"], "count", 1, 3).cells)
    assert not torch.equal(first.cells, probing.training_batch(TASKS["count"], "count", 0, 4).cells)


def oracle(model, cells, task):
    """Right by construction: the labels of the slow loops as logits."""
    width = cells.shape[3]
    labels = [[max(0, count_label(board, t // width, t % width, "")) for t in range(width * cells.shape[2])] for board in cells]
    return F.one_hot(torch.tensor(labels), task.num_classes).float()


def constant(model, cells, task):
    return torch.eye(task.num_classes)[0].expand(len(cells), cells[0, 0].numel(), -1)


@pytest.mark.parametrize("split", TASKS["count"].splits)
def test_a_model_that_is_right_scores_1_and_a_constant_one_chance(split, monkeypatch):
    monkeypatch.setattr(probing, "FEWEST_SCENES", 64)
    monkeypatch.setattr(probing, "TOKENS_MEASURED", 64)
    task, model = TASKS["count"], build_model(Cell("count", "none"))
    monkeypatch.setattr(probing, "answer", oracle)
    row = measure(model, task, "count", split, CPU)
    assert (row["value"], row["n"]) == (1.0, 4 * 64)
    monkeypatch.setattr(probing, "answer", constant)
    row = measure(model, task, "count", split, CPU)
    assert row["value"] == pytest.approx(row["chance"], abs=0.09)  # 4 standard deviations of 256 answers


def test_training_lowers_the_loss(tiny):
    cell = Cell("distant", "none", steps=30)
    model = build_model(cell)
    start = probing.training_batch(TASKS["distant"], "distant", 0, 0)
    before = F.cross_entropy(
        answer(model, start.cells, TASKS["distant"]).flatten(0, 1), start.labels.flatten(), ignore_index=NOT_ASKED
    )
    assert probing.train(model, TASKS["distant"], cell) < before.item() - 0.02


def test_a_finished_cell_is_read_and_an_incomplete_one_is_trained_again(tiny, tmp_path, monkeypatch):
    cell = Cell("count", "none", steps=1)
    ((_, rows),) = run_cells([cell], tmp_path)
    assert {row["split"] for row in rows} == set(measured_splits(TASKS["count"]))
    assert finished(rows, cell) == rows
    assert finished(rows[:-1], cell) == []
    assert finished(rows, Cell("count", "none", steps=2)) == []
    assert finished(rows, Cell("count", "none", seed=1, steps=1)) == []
    monkeypatch.setattr(probing, "run_cell", lambda *_: pytest.fail("trained again"))
    ((_, again),) = run_cells([cell], tmp_path)
    assert again == rows


def test_rows_name_the_rule_for_larger_grids(tiny):
    model = build_model(Cell("count", "sape2"))
    same = measure(model, TASKS["count"], "count", TRAIN, CPU)
    larger = measure(model, TASKS["count"], "count", "12x12", CPU)
    assert "the training grid" in same["protocol"]
    assert "SaPE2 clamp" in larger["protocol"]


def test_the_table_has_mean_and_spread_over_seeds_and_chance_in_the_heading():
    about = {"name": "accuracy", "encoding": "ape", "layers": 2}
    rows = [about | {"split": TRAIN, "seed": seed, "value": value} for seed, value in enumerate((0.5, 0.7))]
    ((line,), columns) = table(rows, TASKS["count"])
    assert line["train (0.125)"] == "0.600 ± 0.141"
    assert line["seeds"] == 2
    assert "16x16 (0.125)" in columns


def test_the_command_writes_rows_a_figure_and_json(tiny, tmp_path, capsys):
    command = ["probe", "count", "--encodings", "none,ape", "--seeds", "1", "--steps", "1", "--out", str(tmp_path), "--json"]
    assert main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 * len(TASKS["count"].splits)
    assert rows == [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (tmp_path / "figures" / "probe.png").stat().st_size > 1000
    assert main(command[:-1]) == 0
    shown = capsys.readouterr().out  # headings may take two lines
    assert "train" in shown
    assert "(0.125)" in shown


@pytest.mark.parametrize("task", [task if task == "distant" else pytest.param(task, marks=pytest.mark.slow) for task in TASKS])
def test_examples_are_drawn(task, tmp_path, capsys):
    path = tmp_path / "examples.png"
    assert main(["probe", task, "--examples", str(path)]) == 0
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["counting"], "unknown task 'counting'"),
        (["count", "--encodings", "apex"], "unknown encoding 'apex'"),
        (["count", "--encodings", "sape2:every=3"], "all 2 layers"),
        (["count", "--steps", "0"], "--steps"),
        (["count", "--examples", "picture.txt"], ".png, .svg or .pdf"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, tmp_path, capsys):
    assert main(["probe", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
