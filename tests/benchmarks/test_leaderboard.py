"""Entries of the leaderboard: what is counted, and what keeps a file of rows from being one."""

import copy
import json

import leaderboard
import pytest
import speedrun
import sprint_plan

from sape2.runs.files import digest_of

TINY = (
    "train.precision=fp32",
    "train.workers=0",
    "train.warmup_epochs=0",
    "model.dim=16",
    "model.depth=1",
    "model.num_heads=2",
)


def row_of(seed, accuracy=0.8, **changes):
    """A raw row as far as the leaderboard reads it, of a run of `cifar10_sprint`."""
    config = sprint_plan.Trial("cifar10_sprint", "ape", seed).config
    settings = json.loads(json.dumps(config.identity()))
    epochs = config.train.epochs
    tested = [{"name": "accuracy", "weights": weights, "value": accuracy, "n": 10_000} for weights in ("last", "best")]
    curve = {
        "epoch": list(range(1, epochs + 1)),
        "validation_accuracy": [0.1 * min(8, epoch) for epoch in range(1, epochs + 1)],
        "seconds": [10.0] * epochs,
    }
    about = {"command": "c", "processor": "p", "threads": 2, "commit": "abc", "torch": "2", "precision": "bf16"}
    sizes = {"training_s": 10.0 * epochs, "macs_per_image": 30_000_000, "data": "cifar10", "recipe": "cifar10_sprint"}
    head = {"encoding": "ape", "seed": seed, "digest": digest_of(settings), "settings": settings}
    return head | about | sizes | {"rows": tested, "curve": curve} | changes


def entry(**changes):
    return [row_of(seed, 0.79 + 0.01 * seed, **changes) for seed in range(3)]


def test_three_seeds_of_the_whole_recipe_are_an_entry():
    assert list(leaderboard.problems(entry())) == []


def without(key):
    return [{name: value for name, value in row.items() if name != key} for row in entry()]


def with_settings(section, key, value):
    rows = copy.deepcopy(entry())
    for row in rows:
        row["settings"][section][key] = value
    return rows


def of_fewer_images():
    rows = copy.deepcopy(entry())
    rows[1]["rows"][0]["n"] = 8
    return rows


def stopped_early():
    rows = copy.deepcopy(entry())
    rows[2]["curve"]["epoch"].pop()
    return rows


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (entry()[:2], "3 different seeds"),
        ([*entry()[:2], entry()[1]], "3 different seeds"),
        (without("command"), "command"),
        (without("processor"), "processor"),
        (entry(data="digits"), "digits"),
        (with_settings("data", "train_limit", 1000), "training images"),
        ([*entry()[:2], *with_settings("train", "lr", 0.5)[2:]], "train.lr"),
        (of_fewer_images(), "10000 test images"),
        (stopped_early(), "12 epochs"),
    ],
)
def test_what_is_no_entry_is_told(rows, said):
    assert any(said in problem for problem in leaderboard.problems(rows))
    with pytest.raises(ValueError, match="mine"):
        leaderboard.table({"mine": rows})


def test_images_operations_and_times_are_those_of_the_rows():
    row = row_of(0)
    steps = 45_000 // 128
    assert leaderboard.images_seen(row) == 12 * steps * 128
    assert leaderboard.petaflop(row, 1_000_000) == pytest.approx(6 * 30e6 * 1e6 / 1e15)
    assert [leaderboard.seconds_to(row, target) for target in (0.05, 0.55, 0.8, 0.81)] == [10.0, 60.0, 80.0, None]


def test_the_best_stands_first_and_the_page_keeps_its_text():
    better = [row | {"rows": [r | {"value": 0.9} for r in row["rows"]]} for row in entry(recipe="mine")]
    page = f"before\n{leaderboard.START}old{leaderboard.END}after\n"
    written = leaderboard.written(page, {"one": entry(), "two": better})
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "old" not in written
    assert written.index("`mine`") < written.index("`cifar10_sprint`")
    assert leaderboard.written(written, {"one": entry(), "two": better}) == written


def test_the_page_is_made_from_the_entries():
    page = leaderboard.PAGE.read_text(encoding="utf-8")
    assert leaderboard.written(page, leaderboard.kept()) == page


def test_a_speedrun_keeps_a_row_a_seed_and_says_what_is_missing(tmp_path):
    rows = tmp_path / "entry.jsonl"
    trials = [sprint_plan.Trial("digits", "none", seed, 1, TINY) for seed in range(2)]
    speedrun.run(trials, None, rows, 1)
    speedrun.run(trials, None, rows, 1)  # nothing is left
    said = speedrun.report(rows, 0.99)
    assert "0.99 missed" in said
    assert "2 seeds" in said
    assert "not an entry yet" in said
