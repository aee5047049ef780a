"""Exported files: right on images, batches and sizes that they were not traced with, whole or absent, and described."""

import importlib
import json
import os

import jaxtyping
import pytest
import timm
import torch
from encoding_cases import VARIANTS
from export_cases import EVERYTHING, assert_same_weights, finished_run, largest, rows_of, tiny
from host_cases import TIMM, open_gains, randomised
from torch import nn

import sape2
import sape2.models.export as module
from sape2.cli import main
from sape2.encodings import list_encodings
from sape2.models.export import ParityError, compare, export_model, load_exported, write_checked
from sape2.models.vit import ViT
from sape2.runs.run import Run


@pytest.fixture(autouse=True, scope="module")
def _as_users_call_it():
    """Without the type checks of the tests: the sizes of a graph that is being traced are no ints."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def sizes(rows):
    return {(row["height"], row["width"]) for row in rows}


def session(path):
    return pytest.importorskip("onnxruntime").InferenceSession(str(path))


def run_onnx(path, images):
    return torch.from_numpy(session(path).run(["logits"], {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory, _as_users_call_it):
    return finished_run(tmp_path_factory.mktemp("runs") / "mine", "ape+sape2:axes=x")  # one axis traces in half the time


@pytest.fixture(scope="module")
def onnx_file(run):
    """(file, rows) of the command with --normalize."""
    pytest.importorskip("onnxscript")
    return module.export_run(Run.open_finished(run[0]), "onnx", normalize=True)


# --- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_onnx_agrees_on_other_batches_and_sizes(onnx_file):
    _, rows = onnx_file
    assert {(4, 4), (4, 28), (24, 4)} <= sizes(rows)  # one patch, one row, one column
    assert max(row["height"] for row in rows) > 2 * 12
    assert max(row["max_abs_difference"] for row in rows) < 1e-4


@pytest.mark.slow
def test_onnx_has_open_dimensions_and_real_numbers_only(onnx_file):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file[0])
    shape = [side.dim_param or side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 1, "height", "width"]
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert kinds & {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128} == set()
    assert {node.domain for node in model.graph.node} <= {"", "pkg.onnxscript.torch_lib"}


@pytest.mark.slow
def test_onnx_says_what_its_input_is(onnx_file):
    metadata = session(onnx_file[0]).get_modelmeta().custom_metadata_map
    assert metadata["encoding"] == "ape+sape2:axes=x"
    assert not {"license", "licence"} & metadata.keys()
    assert metadata["sape2_version"] == sape2.__version__
    assert json.loads(metadata["classes"]) == list("abcde")
    assert json.loads(metadata["normalization"])["mean"] == [0.3]
    assert "resized to 16x12 pixels (width x height), bicubic" in metadata["input"]
    assert metadata["input"].endswith("images as float32, pixel / 255; the graph normalises them itself")


@pytest.mark.slow
def test_a_graph_with_normalisation_takes_pixels(run, onnx_file):
    pixels = torch.rand(2, 1, 16, 12)
    assert largest(run_onnx(onnx_file[0], pixels) - run[1]((pixels - 0.3) / 0.2)) < 1e-4


# --- pt2 -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pt2_agrees_on_other_batches_and_sizes(tmp_path):
    rows = export_model(tiny("rope+rpe_decomposed"), tmp_path / "model.pt2", "pt2")
    assert len(sizes(rows)) == len(rows) == 6
    assert {(8, 8), (8, 28), (24, 8)} <= sizes(rows)  # the smallest that the graph's guards let in
    assert max(row["max_abs_difference"] for row in rows) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_pt2_of_one_size_is_described_and_refuses_others(run, tmp_path):
    path, rows = module.export_run(
        Run.open_finished(run[0]), "pt2", tmp_path / "new" / "fixed.pt2", size=(8, 20), weights="best"
    )
    assert sizes(rows) == {(8, 20)}
    extra = {"sape2.json": ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    described = json.loads(extra["sape2.json"])
    assert (described["image_size"], described["training"]["weights"]) == ([8, 20], "best")
    assert described["input"].startswith("grey, 8 bits; the whole image resized to 16x12 pixels")
    assert described["input"].endswith("images as float32, (pixel / 255 - mean) / std")
    with pytest.raises(AssertionError, match="Guard failed"):
        loaded(torch.randn(1, 1, 20, 8))


@pytest.mark.slow
def test_an_attached_host_model_exports(tmp_path):
    model = randomised(
        timm.models.VisionTransformer(**TIMM | {"depth": 1, "dynamic_img_size": True, "global_pool": "avg"})
    ).eval()
    sape2.attach(model, "sape2")
    open_gains(model, std=0.3)
    rows = export_model(model, tmp_path / "timm.pt2", "pt2", train_size=(24, 32))
    assert len(sizes(rows)) == 6


def test_a_host_model_for_one_size_says_so(tmp_path):
    model = timm.models.VisionTransformer(**TIMM | {"depth": 1})
    with pytest.raises(ValueError, match="one size") as caught:
        export_model(model, tmp_path / "timm.pt2", "pt2", train_size=(24, 32))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_lora_exports_as_it_is_and_is_not_taken_for_its_config(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("rpe"), peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))
    export_model(model, tmp_path / "model.pt2", "pt2", size=(12, 16))
    images = torch.randn(2, 3, 12, 16)
    found = torch.export.load(tmp_path / "model.pt2").module()(images)
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="by the config, which is all that a loader reads"):
        export_model(model, tmp_path / "model.safetensors", "safetensors")


def test_a_model_in_training_stays_in_training(tmp_path):
    model = tiny("ape").train()
    model.norm.eval()
    modes = [part.training for part in model.modules()]
    export_model(torch.compile(model, backend="eager"), tmp_path / "model.safetensors", "safetensors")
    assert [part.training for part in model.modules()] == modes
    assert load_exported(tmp_path / "model.safetensors", ViT).state_dict().keys() == model.state_dict().keys()


def test_a_region_of_autocast_does_not_reach_into_an_export(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        rows = export_model(tiny("ape"), tmp_path / "model.pt2", "pt2")
    assert all(row["agrees"] for row in rows)


def test_a_model_in_a_half_type_is_written_too(tmp_path):
    rows = export_model(tiny("rope").bfloat16(), tmp_path / "model.safetensors", "safetensors")
    assert all(row["agrees"] for row in rows)


@pytest.mark.slow
def test_what_onnxruntime_cannot_run_is_refused_in_one_line(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="onnxruntime cannot run the graph") as caught:
        export_model(tiny("ape").double(), tmp_path / "model.onnx", "onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- safetensors -----------------------------------------------------------------------------------------------------


def test_safetensors_holds_the_model_and_how_to_build_it(run, tmp_path):
    path, rows = module.export_run(Run.open_finished(run[0]), "safetensors", tmp_path / "model.safetensors")
    assert max(row["max_abs_difference"] for row in rows) < 1e-6  # not 0: rounding depends on where tensors lie in memory
    loaded = load_exported(path, ViT)
    assert loaded.config == run[1].config
    assert_same_weights(loaded, run[1])


def test_safetensors_of_something_else_is_refused_in_one_line(run, tmp_path):
    with pytest.raises(ValueError, match="sape2 export"):
        load_exported(run[0] / "model.safetensors", ViT)
    (tmp_path / "cut.safetensors").write_bytes((run[0] / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged") as caught:
        load_exported(tmp_path / "cut.safetensors", ViT)
    assert "\n" not in str(caught.value)


# --- the check -------------------------------------------------------------------------------------------------------


class Baked(nn.Module):
    """Wrong as an index is that was fixed when it was traced: right for the first image only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images[:1]).expand(len(images), -1)


def test_the_check_finds_a_wrong_file_and_leaves_none(tmp_path):
    model = tiny("ape")
    wrong = Baked(model)
    path = tmp_path / "model.pt2"
    path.write_text("the file before")
    cases = [(1, (12, 16)), (3, (12, 16))]
    with pytest.raises(ParityError, match=r"on 3 images of 12x16") as caught:
        write_checked(path, lambda file: file.write_text("new"), lambda file: wrong, model, cases)
    assert [row["agrees"] for row in caught.value.rows] == [True, False]
    assert path.read_text() == "the file before"
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_check_is_not_passed_by_nan(value):
    model = tiny("none")
    rows = compare(model, lambda images: model(images).detach() * value, [(2, (12, 16))])
    assert not rows[0]["agrees"]


def test_the_check_is_not_passed_by_another_shape():
    model = tiny("none")
    assert not compare(model, lambda images: model(images).detach()[:1], [(2, (12, 16))])[0]["agrees"]


def test_the_command_ends_with_status_1_if_the_file_is_wrong(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "load_exported", lambda path, model_class: Baked(run[1]))
    monkeypatch.setattr(Baked, "to", lambda self, _: self)
    assert main(["export", str(run[0]), "--format", "safetensors", "--out", str(tmp_path / "x.safetensors")]) == 1
    out, err = capsys.readouterr()
    assert "max_abs_difference" in out
    assert "was not written" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_into_the_run_and_prints_rows(run, capsys):
    assert main(["export", str(run[0]), "--format", "safetensors", "--json"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert {row["file"] for row in rows} == {str(run[0] / "export" / "mine.safetensors")}
    assert (run[0] / "export" / "mine.safetensors").exists()
    assert all(row["agrees"] and row["format"] == "safetensors" for row in rows)


def test_the_command_writes_a_hub_folder(run, tmp_path, capsys):
    assert main(["export", str(run[0]), "--format", "hub", "--weights", "best", "--out", str(tmp_path / "hub")]) == 0
    assert "written" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert "| accuracy | 0.7500 |" in (tmp_path / "hub" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_a_hub_folder_is_open_to_those_that_the_folder_around_it_is(run, tmp_path):
    before = os.umask(0o022)
    try:
        assert main(["export", str(run[0]), "--format", "hub", "--out", str(tmp_path / "hub")]) == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "hub").iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors", "README.md"], 0o644)
    assert (tmp_path / "hub").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "onxx"], "onnx, pt2, safetensors, hub"),
        (["--format", "pt2", "--size", "12"], "--size"),
        (["--format", "pt2", "--size", "10x12"], "10x12"),
        (["--format", "safetensors", "--size", "12x12"], "safetensors"),
        (["--format", "hub", "--normalize"], "normalis"),
        (["--format", "pt2", "--out", "."], "is a folder"),
    ],
)
def test_a_mistake_gives_one_line(run, options, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["export", str(run[0]), *options])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_refused(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((run[0] / "config.json").read_text())
    assert main(["export", str(tmp_path), "--format", "pt2"]) == 2
    assert "not finished" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_names_the_extra(run, library, monkeypatch, capsys):
    real = importlib.import_module

    def without(name, *rest):
        if name == library:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(module.importlib, "import_module", without)
    assert main(["export", str(run[0]), "--format", "onnx"]) == 2
    assert f"needs {library}: pip install 'sape2[export]'" in capsys.readouterr().err


# --- one by one ------------------------------------------------------------------------------------------------------

LAYERS = [
    "ape+sape2",
    "cope:beyond=rescale",
    "sape2:beyond=rescale",
    "ape:resize=bilinear",
    "rpe_contextual:beyond=resize",
    *list_encodings(),
    *(name for name in VARIANTS if name not in list_encodings()),
]


@pytest.mark.parametrize(
    "encoding",
    ["pope+key_table+log_cpb+fire+pape+forget+lookhere+sape2:readout=direct", "sape2:readout=direct,gates=none,count=between"],
)
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_direct_read_outs_and_the_encodings_of_rivals_export_for_any_size(format, encoding, tmp_path):
    assert len(sizes(export_model(tiny(encoding), tmp_path / f"model.{format}", format))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("encoding", LAYERS)
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_every_encoding_and_variant_exports(format, encoding, tmp_path):
    wide = {"dim": 16} if "directions" in encoding or "spiral" in encoding else {}  # more directions need wider heads
    rows = export_model(tiny(encoding, **wide), tmp_path / f"model.{format}", format)
    assert len(sizes(rows)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("encoding", EVERYTHING)
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_every_encoding_exports_for_one_size(format, encoding, tmp_path):
    assert len(export_model(tiny(encoding), tmp_path / f"model.{format}", format, size=(8, 20))) == 2
