"""One name for an encoding, however it was written, in files of before too."""

import json

import pytest

from sape2.cli.options import split_encodings
from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.encodings import canonical_name, create_encodings, find_encoding, list_encodings
from sape2.evaluation.cost.sweep import Sweep
from sape2.machine import precision_of
from sape2.runs.files import digest_of
from sape2.runs.run import Run
from sape2.studies.compare.plan import Study
from sape2.studies.compare.rawrows import note_failure, read_raw
from sape2.studies.probes import find_task
from sape2.studies.probing import Cell, finished, measured_splits


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("sape2+ape", "ape+sape2"),
        (" ape + sape2 ", "ape+sape2"),
        ("ape+sape2:sign=plus", "ape+sape2"),
        ("sape2:", "sape2"),
        ("sape2:every=1,share=false", "sape2"),
        ("sape2:readout=direct,count=between", "sape2:count=between,readout=direct"),
        ("sape2:preset=listing", "sape2"),
        ("sape2:gate_scale=none,divide_bias=true", "sape2:preset=equations"),
        ("sape2:divide_bias=True,preset=equations", "sape2:preset=equations"),
        ("sape2:preset=equations,divide_bias=false", "sape2:gate_scale=none"),
        ("sape2:preset=equations,count=cyclic", "sape2:count=cyclic,preset=equations"),
        ("sape2:num_positions=None,table_std=0.020", "sape2"),
        ("sape2:table_std=5e-2", "sape2:table_std=0.05"),
        ("sape2:num_positions=010", "sape2:num_positions=10"),
        ("rope:temperature=50", "rope:temperature=50"),
        ("rope:temperature=5.0e1", "rope:temperature=50"),
        ("sape2:share=true,every=2+rope", "rope+sape2:every=2,share=true"),
    ],
)
def test_every_spelling_has_one_name(written, name):
    assert canonical_name(written) == name
    assert canonical_name(name) == name


@pytest.mark.parametrize("name", [f"{n}:{v}" for n in list_encodings() for v in ["", *find_encoding(n).variants]])
def test_the_one_name_makes_the_same_encoding(name):
    tokens, layers = create_encodings(name, 2, 16, (4, 4), 2)
    ours, theirs = create_encodings(canonical_name(name), 2, 16, (4, 4), 2)
    assert repr((tokens, layers)) == repr((ours, theirs))
    assert [options_of(layer) for layer in layers] == [options_of(layer) for layer in theirs]


def options_of(layer):
    return [vars(part.options) for part in layer.modules() if hasattr(part, "options")]


@pytest.mark.parametrize("wrong", ["sape2:preset=paper", "sape2:gain_init=1", "sape2:count=round", "apee", "sape2:sine=plus"])
def test_what_is_no_encoding_has_no_name(wrong):
    with pytest.raises(ValueError, match=r"sape2|unknown encoding"):
        canonical_name(wrong)


def test_a_command_takes_each_encoding_once_and_tells_its_name(capfd):
    assert split_encodings("sape2+ape,ape+sape2,ape+sape2:sign=plus,ape") == ("ape+sape2", "ape")
    err = capfd.readouterr().err
    assert "sape2+ape is the encoding ape+sape2" in err
    assert len(err.splitlines()) == 2


def test_a_study_refuses_one_encoding_under_two_names(tmp_path):
    with pytest.raises(ValueError, match="ape\\+sape2, ape\\+sape2"):
        Study(get_recipe("digits"), ("ape+sape2", "sape2+ape"), 1, tmp_path)


def test_a_sweep_and_a_probe_know_it_under_one_name():
    assert Sweep(("sape2+ape", "ape+sape2", "none"), ((2, 2),)).encodings == ("ape+sape2", "none")
    cell = Cell("count", "sape2:sign=plus+ape", steps=1)
    assert cell.encoding == "ape+sape2"
    splits = measured_splits(find_task("count"))
    rows = [cell.key | {"split": split, "precision": precision_of("auto")} for split in splits]
    assert [row["encoding"] for row in finished(rows, cell)] == ["ape+sape2"] * len(splits)
    assert finished([row | {"precision": "another"} for row in rows], cell) == []


def test_a_run_written_under_another_spelling_is_the_same_run(tmp_path):
    spelled, named = (override(get_recipe("digits"), [f"model.encoding={name}"]) for name in ("sape2+ape", "ape+sape2"))
    Run(tmp_path / "run", spelled).start()
    for config in (spelled, named):
        Run(tmp_path / "run", config).check_settings()
    assert Run.open(tmp_path / "run").config.model.encoding == "ape+sape2"


def test_a_raw_row_of_before_has_the_digest_of_the_one_name(tmp_path):
    spelled, named = (override(get_recipe("digits"), [f"model.encoding={name}"]) for name in ("sape2+ape", "ape+sape2"))
    (tmp_path / "new").mkdir()
    note_failure(Run(tmp_path / "new", named), "reason")
    new = json.loads((tmp_path / "new" / ".failed.json").read_text())
    settings = json.loads(json.dumps(spelled.identity()))
    old = {"encoding": "sape2+ape", "seed": 0, "settings": settings, "digest": digest_of(settings), "failed": "reason"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(old)}\n{json.dumps(new)}\n")
    assert [row["encoding"] for row in read_raw(tmp_path / "rows.jsonl")] == ["ape+sape2"]
