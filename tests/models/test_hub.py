"""A model as a folder: saved, loaded, described, and one clear line for a damaged one."""

import copy
import json
import re
import shlex
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import torch.nn.utils.prune
from export_cases import assert_same_weights, finished_run, tiny

import sape2
from sape2.cli import build_parser
from sape2.cli.options import resolve
from sape2.config import HUB_IDS, override
from sape2.config.command import command
from sape2.config.names import cell
from sape2.config.recipes import get_recipe
from sape2.data import open_sources
from sape2.models import hub
from sape2.models.card import PUBLISHED, classes_line
from sape2.models.export import export_model, export_run, load_exported
from sape2.models.hub import find_folder
from sape2.models.trained import load_run_model
from sape2.models.vit import ViT
from sape2.runs.rows import read_rows, write_rows
from sape2.runs.run import Run


@pytest.fixture
def saved(tmp_path):
    run, model = finished_run(tmp_path / "run")
    model.save_pretrained(tmp_path / "folder", run)
    return tmp_path / "folder", model


def test_a_saved_model_loads_with_the_same_logits(saved):
    folder, model = saved
    loaded, images = ViT.from_pretrained(folder), torch.randn(2, 1, 16, 12)
    assert_same_weights(loaded, model)
    assert torch.allclose(loaded(images), model(images), atol=1e-5)
    assert not loaded.training
    assert loaded.config == model.config


@pytest.mark.parametrize("encoding", ["sape2", "sincos", "rope"])
def test_a_model_loads_to_the_cpu_and_computes_under_any_default_device(encoding, tmp_path):
    model, images = tiny(encoding), torch.randn(2, 3, 16, 12)
    with torch.device("meta"):
        model.save_pretrained(tmp_path)
        found = ViT.from_pretrained(tmp_path)(images)
    assert torch.equal(found, model(images))


def test_a_model_without_a_run_is_saved_too(tmp_path):
    model = tiny("rope+sape2:count=cyclic,share=true", depth=2, layer_scale=0.1)
    model.save_pretrained(tmp_path)
    assert_same_weights(ViT.from_pretrained(str(tmp_path)), model)
    assert "Results" not in (tmp_path / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_the_config_says_all_that_is_needed(saved):
    config = json.loads((saved[0] / "config.json").read_text())
    assert config["normalization"]["mean"] == [0.3]
    assert config["normalization"]["std"] == [0.2]
    assert config["classes"] == list("abcde")
    assert config["normalization"]["resize"].startswith("grey, 8 bits; the whole image resized to 16x12 pixels")
    assert (config["encoding"], config["sape2_version"]) == ("ape+sape2", sape2.__version__)


def test_the_card_is_filled_from_the_run(saved):
    card = (saved[0] / "README.md").read_text()
    for text in (
        "library_name: sape2",
        "| accuracy | 0.8750 |  |  | fraction | 40 | test | last | top-1, one view |",
        "arXiv:2505.09466",
        "a, b, c, d, e",
        "(images - torch.tensor([0.3])",
    ):
        assert text in card


def test_the_command_of_the_card_trains_the_run_again_with_every_setting(saved):
    """The run of `export_cases` differs from its recipe in many settings."""
    said = re.search(r"^\| command \| `(.*)` \|$", (saved[0] / "README.md").read_text(), flags=re.MULTILINE)[1]
    assert "--set" in said
    words = shlex.split(said)
    assert words[:3] == ["sape2", "train", "digits"]
    assert resolve(build_parser().parse_args(words[1:])) == Run.open(saved[0].parent / "run").config


def test_the_command_of_the_card_names_no_path_of_this_machine_and_none_of_an_unknown_recipe():
    config = override(get_recipe("cifar10"), ["data.source=/home/me/photographs", "train.lr=0.5"])
    assert command(config, data="DIR") == "sape2 train cifar10 --data DIR --set train.lr=0.5"
    assert command(replace(config, recipe="mine"), data="DIR") is None


def test_the_data_set_of_a_recipe_has_its_id_on_the_card_and_in_messages():
    assert HUB_IDS["imagenet"] == "ILSVRC/imagenet-1k"
    with pytest.raises(ValueError, match=HUB_IDS["imagenet"]):
        open_sources(get_recipe("imagenet").data, get_recipe("imagenet").model)


def test_the_front_matter_of_the_card_is_read_by_the_hub_client(saved):
    from huggingface_hub import ModelCard

    data = ModelCard.load(saved[0] / "README.md").data
    assert (data.license, data.library_name) == (None, "sape2")
    assert {result.metric_value for result in data.eval_results} == {0.875}


def test_a_licence_is_written_only_where_the_owner_names_one(saved, tmp_path):
    assert "licen" not in (saved[0] / "config.json").read_text().lower()
    assert "apache" not in (saved[0] / "README.md").read_text().lower()
    saved[1].save_pretrained(tmp_path / "named", license="cc-by-4.0")
    assert json.loads((tmp_path / "named" / "config.json").read_text())["license"] == "cc-by-4.0"
    assert "license: cc-by-4.0" in (tmp_path / "named" / "README.md").read_text()
    for text in ("", "my own\nlicence", "license: x"):
        with pytest.raises(ValueError, match="license"):
            saved[1].save_pretrained(tmp_path / "other", license=text)


@pytest.mark.parametrize(
    ("seen", "public"),
    [
        ({"layout": "parquet", "train": {"labels": "x", "bytes": "y"}, "test": {"labels": "x", "bytes": "y"}}, None),
        ({"layout": "folder"}, None),
        ({}, None),
        ({"layout": "arrays"}, "uoft-cs/cifar10"),  # torchvision has checked its hashes
        ({"layout": "parquet", "hub_id": "someone/images"}, "someone/images"),
        (
            {"layout": "parquet"}
            | {
                split: dict(zip(("labels", "bytes"), found, strict=True))
                for split, found in zip(("train", "test"), PUBLISHED["cifar100"], strict=True)
            },
            "uoft-cs/cifar100",
        ),
    ],
)
def test_a_public_data_set_is_known_by_its_images_and_not_by_the_name_of_a_folder(tmp_path, seen, public):
    from huggingface_hub import ModelCard

    run, model = finished_run(tmp_path / "run", name="cifar10")
    (run / "data.json").write_text(json.dumps(seen))
    model.save_pretrained(tmp_path / "folder", run)
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert card.data.datasets == ([public] if public else None)
    assert {result.dataset_type for result in card.data.eval_results} == {public or "own-images"}


def test_a_card_claims_nothing_of_a_part_of_the_images_and_tells_changed_settings(tmp_path):
    run, model = finished_run(tmp_path / "run")
    rows = read_rows(run / "results.jsonl")
    write_rows(run / "results.jsonl", [row | {"limit": 8, "n": 8} for row in rows])
    model.save_pretrained(tmp_path / "folder", run)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "model-index" not in card
    assert "| fraction | 8 | test" in card
    assert "model.dim=8" in card


def test_names_of_classes_stay_in_their_cells(tmp_path):
    assert cell("a|b\nc <b>") == "a\\|b c &lt;b>"
    assert cell("<0.0001") == "<0.0001"


def test_names_of_classes_are_no_markdown():
    named = classes_line({"classes": ["__background__", "`a` *b*", "$x$", "&amp;", "[c](d)", "a|b <i>", 3]})
    assert named.endswith(r"logits: \_\_background\_\_, \`a\` \*b\*, \$x\$, \&amp;, \[c\](d), a\|b &lt;i>, 3." + "\n")


def test_the_example_of_the_card_runs(saved, monkeypatch):
    card = (saved[0] / "README.md").read_text()
    block = card.split("```python\n")[1].split("```")[0].replace("FOLDER_OR_ID", str(saved[0]))
    names = {}
    exec(block, names)
    assert names["logits"].shape == (1, 5)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json"),
        (lambda folder: edit(folder, {"format": 9}), "format 9"),
        (lambda folder: edit(folder, {"model": {"name": "vit_nano", "colour": 1}}), "model.colour"),
        (lambda folder: edit(folder, {"model": {"name": ["vit_nano"]}}), r"model.*vit_nano"),
        (lambda folder: edit(folder, {"model": {"name": "vit_nano"}}), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0123"), "model.safetensors"),
    ],
)
def test_a_damaged_folder_gives_one_line(saved, damage, said):
    damage(saved[0])
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        ViT.from_pretrained(saved[0])
    assert "\n" not in str(caught.value)


def edit(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../x/y", "/nowhere/at/all"])
def test_what_is_neither_a_folder_nor_an_id_is_refused_without_the_network(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="owner/name"):
        find_folder(name)


def test_an_id_is_downloaded_by_the_hub_client(saved, monkeypatch):
    asked = []

    def download(repository, **options):
        asked.append((repository, options["allow_patterns"]))
        return str(saved[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert isinstance(ViT.from_pretrained("someone/model"), ViT)
    assert asked == [("someone/model", ["config.json", "model.safetensors"])]


def test_a_hub_that_does_not_answer_gives_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no route\nto the host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match=r"no route$"):
        ViT.from_pretrained("someone/model")


def test_a_model_with_something_attached_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_adapter"):
        sape2.attach(tiny("ape"), "sape2").save_pretrained(tmp_path)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_compiled_model_is_saved_under_its_own_names(tmp_path, in_blocks):
    model = tiny("ape")
    compiled = copy.deepcopy(model) if in_blocks else torch.compile(model, backend="eager")
    if in_blocks:
        compiled.blocks = torch.nn.ModuleList(torch.compile(block, backend="eager") for block in compiled.blocks)
    hub.save_pretrained(compiled, tmp_path)
    assert_same_weights(ViT.from_pretrained(tmp_path), model)
    assert len(compiled.maps(torch.zeros(1, 3, 12, 16))) == model.config.depth


def prune(model):
    torch.nn.utils.prune.l1_unstructured(model.head, "weight", 0.5)


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda model: setattr(model, "head", torch.nn.Linear(model.config.dim, 7)), "out_features=7.*out_features=5"),
     (lambda model: setattr(model, "blocks", model.blocks[:0]), "blocks.0 is nothing"),
     (lambda model: setattr(model.blocks[0].mlp, "act", torch.nn.ReLU()), "blocks.0.mlp.act is ReLU"),
     (lambda model: setattr(model.blocks[0].norm1, "eps", 1e-5), "eps=1e-05"), (prune, "weight_orig")],
)  # fmt: skip
def test_a_part_that_the_config_does_not_say_is_told_before_anything_is_written(tmp_path, change, said):
    model = tiny("ape")
    change(model)
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_loading_draws_from_no_generator(saved):
    before = torch.get_rng_state()
    ViT.from_pretrained(saved[0])
    load_run_model(Run.open(saved[0].parent / "run"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "weights", "said"),
    [({}, "bset", "last or best; got 'bset'"), ({"depth": 2}, "last", r"model.depth \(1 there, 2 here\)"),
     ({"encoding": "rope"}, "last", "model.encoding")],
)  # fmt: skip
def test_a_card_is_not_filled_from_what_the_model_is_not(saved, tmp_path, changes, weights, said):
    config = replace(saved[1].config, **changes)
    with pytest.raises(ValueError, match=said):
        ViT(config).save_pretrained(tmp_path / "other", tmp_path / "run", weights)
    assert not (tmp_path / "other").exists()


def test_a_model_takes_the_place_of_its_like_and_of_nothing_else(saved, tmp_path):
    folder, model = saved
    model.save_pretrained(folder)
    run = Run.open(tmp_path / "run")
    before = (run.folder / "config.json").read_bytes()
    for attempt in (
        lambda: model.save_pretrained(run.folder),
        lambda: export_run(run, "hub", run.folder),
        lambda: export_run(run, "safetensors", run.weights("best")),
    ):
        with pytest.raises(ValueError, match=r"holds a run|belongs to the run"):
            attempt()
    assert (run.folder / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "changed", [lambda card: "my own words\n", lambda card: f"{card}More.\n", lambda card: f"More.\n{card}"]
)
def test_words_of_someone_else_in_a_card_are_not_lost(saved, changed):
    folder, model = saved
    card = folder / "README.md"
    text = changed(card.read_text(encoding="utf-8"))
    card.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"README.md has words of someone else.* another folder$"):
        model.save_pretrained(folder)
    assert card.read_text(encoding="utf-8") == text


def test_a_card_of_the_first_release_gives_way(saved):
    folder, model = saved
    (folder / "README.md").write_text("---\nlibrary_name: sape2\n---\n", encoding="utf-8")
    model.save_pretrained(folder)
    assert len((folder / "README.md").read_text(encoding="utf-8")) > 100


def test_a_revision_of_a_folder_is_refused(saved):
    with pytest.raises(ValueError, match="no revisions"):
        ViT.from_pretrained(saved[0], revision="v1")


def test_a_model_is_saved_and_exported_to_where_it_is_read_from(tmp_path, monkeypatch):
    """`~` was the home folder for from_pretrained, and a folder of that name for save_pretrained."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny("ape")
    model.save_pretrained("~/model")
    assert_same_weights(ViT.from_pretrained("~/model"), model)
    export_model(model, "~/model.safetensors", "safetensors")
    assert (tmp_path / "model.safetensors").exists()
    assert_same_weights(load_exported("~/model.safetensors", ViT), model)
