"""The runs of the sprint study: declared before they run, run once, and chosen on the validation split alone."""

import pytest
import sprint
import sprint_plan
import sprint_tables

from sape2.runs.rows import read_rows

TINY = (
    "train.precision=fp32",
    "train.workers=0",
    "model.dim=16",
    "model.depth=1",
    "model.num_heads=2",
    "train.warmup_epochs=0",
)


def row_of(trial, validation, test=0.5):
    """What is kept of a run, as far as choosing rates reads it."""
    curve = {"validation_accuracy": [0.9, validation]}
    return {"digest": trial.digest, "settings": trial.config.identity(), "curve": curve, "rows": [{"value": test}]}


def finished_row_of(trial, test):
    tested = [{"name": "accuracy", "weights": "last", "value": test}]
    return row_of(trial, 0.5) | {"encoding": trial.encoding, "seed": trial.seed, "rows": tested}


def test_another_spelling_of_an_encoding_is_the_same_run():
    one, other = (
        sprint_plan.Trial("cifar10_sprint", name) for name in ("rope+key_table:heads=shared", "key_table:heads=shared+rope")
    )
    assert one.digest == other.digest


def test_a_run_is_kept_under_its_digest_and_not_run_again(tmp_path):
    trial, rows = sprint_plan.Trial("digits", "none", epochs=1, settings=TINY), tmp_path / "rows.jsonl"
    sprint.train(trial, "search", None, tmp_path / "runs", rows)
    kept = read_rows(rows)
    assert [row["digest"] for row in kept] == [trial.digest]
    assert kept[0]["stage"] == "search"
    assert {"commit", "processor", "threads", "torch", "date"} <= kept[0].keys()
    sprint.train(trial, "search", None, tmp_path / "elsewhere", rows)
    assert read_rows(rows) == kept
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("stage", sprint_plan.STAGES)
def test_every_run_of_a_stage_is_another_one(stage, monkeypatch):
    monkeypatch.setattr(sprint_plan, "chosen_rates", lambda rows, encoding: ("train.muon_lr=0.02", "train.encoding_lr=0.002"))
    digests = [trial.digest for trial in sprint_plan.STAGES[stage]([])]
    assert len(set(digests)) == len(digests) > 0


def test_rates_are_chosen_on_the_validation_split_after_the_last_epoch():
    trials = list(sprint_plan.tuning(["ape"]))
    assert len(trials) >= 4
    rows = [row_of(trial, 0.5 + 0.01 * index, test=0.9 - 0.01 * index) for index, trial in enumerate(trials)]
    assert sprint_plan.chosen_rates(rows, "ape") == trials[-1].settings
    with pytest.raises(ValueError, match=r"ape.*1 runs"):
        sprint_plan.chosen_rates(rows[:-1], "ape")


def test_every_encoding_has_the_same_search():
    names = (*sprint_plan.TABLE, *sprint_plan.BEYOND)
    searched = {name: [trial.settings for trial in sprint_plan.tuning([name])] for name in names if name != "none"}
    assert len({tuple(settings) for settings in searched.values()}) == 1


@pytest.mark.parametrize("stage", ["tuning_headline", "tuning", "tuning_controls", "tuning_forms"])
def test_a_stage_of_tuning_has_every_pair_of_rates_for_every_encoding(stage):
    pairs = {}
    for trial in sprint_plan.STAGES[stage]([]):
        pairs.setdefault(trial.encoding, set()).add(trial.settings)
    assert {len(found) for name, found in pairs.items() if name != "none"} == {len(sprint_plan.RATES)}


def test_the_tables_show_what_is_kept():
    trials = list(sprint_plan.tuning(["rope"]))
    table = sprint_tables.tuning_table([row_of(trial, 0.25 + 0.01 * i) for i, trial in enumerate(trials)])
    assert all(number in table for number in ("0.2500", "0.2800", "0.01 / 0.002"))
    assert "rope" in table


def test_a_stage_is_compared_in_pairs_with_the_baseline_and_the_next_says_what_is_left():
    rows = []
    for trial in sprint_plan.STAGES["one_rate"]([]):
        accuracy = (0.52 if trial.encoding == "rope" else 0.5) + 0.001 * (trial.seed == 1 and trial.encoding == "rope")
        rows.append(finished_row_of(trial, accuracy))
    text = sprint_tables.tables(rows)
    assert "| rope | 0.5203 ± 0.0006 | 3 | +0.0203 | +0.0189 to +0.0218 | 3 | 0.0003 |" in text
    assert "runs of stage tuning are left" in text.split("### whole\n")[1]


def test_the_budget_has_a_point_for_every_length_and_its_difference_in_points(monkeypatch):
    rates = ("train.muon_lr=0.02", "train.encoding_lr=0.002")
    monkeypatch.setattr(sprint_plan, "chosen_rates", lambda rows, encoding: rates)
    rows = [
        finished_row_of(trial, 0.5 + (gain + 0.002 * trial.seed) * (trial.encoding == "rope"))
        for stage, gain in (("headline_quarter", 0.02), ("headline", 0.01))
        for trial in sprint_plan.STAGES[stage]([])
        if trial.encoding in ("ape", "rope") and trial.seed < 2
    ]
    points = sprint_tables.budget_points(rows)
    assert [point["images"] for point in points["ape"]] == [134, 539]  # thousands, without the rest of an epoch's last batch
    differences = [point for point in points["rope"] if point["name"] == "difference"]
    assert [point["value"] for point in differences] == pytest.approx([2.1, 1.1])
    assert all(point["ci_low"] < point["value"] < point["ci_high"] for point in differences)


def test_choosing_rates_shows_what_it_adds():
    trials = list(sprint_plan.tuning(["rope"]))
    rows = [row_of(trial, 0.25 + 0.01 * (i == 2)) for i, trial in enumerate(trials)]
    assert sprint_tables.tuning_table(rows).splitlines()[2].endswith("| 0.2500 | 0.2500 | **0.2600** | 0.2500 | 1.0 |  |")


@pytest.mark.parametrize("name", sprint_tables.TABLES)
def test_every_table_is_text(name):
    assert isinstance(sprint_tables.table(name, read_rows(sprint_plan.ROWS)), str)
