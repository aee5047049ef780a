"""`sape2 inspect`: what hooks note is what the host computes, positions are found where they are, no file runs code."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from host_cases import TIMM, make
from host_cases import images as images_of
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import apply_rot_embed_cat

from sape2.cli import main
from sape2.config import override
from sape2.config.recipes import get_recipe
from sape2.data import ImageData
from sape2.evaluation.layers import layers_of
from sape2.inspect.backbone import Backbone, open_backbone
from sape2.inspect.positions import attention_figure, by_line, inspected, note_of_few, read_images, table
from sape2.inspect.watched import Watched
from sape2.models.trained import build_model
from sape2.runs.checkpoint import save_weights
from sape2.runs.run import Run

pytestmark = pytest.mark.usefixtures("as_users_run_it")
SIZE = TIMM["img_size"]  # 24x32 pixels, 3x4 patches


def watched(case):
    """The model of a case and a batch that it has not seen."""
    return Watched(make(case), images_of(case)), images_of(case)


# --- what is noted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["timm.vit.class", "timm.vit.registers", "timm.vit.no_positions", "torchvision"])
def test_tokens_are_those_around_the_blocks(case):
    model, images = watched(case)
    blocks = model.model.encoder.layers if case == "torchvision" else model.model.blocks
    layers = list(layers_of(model, images))
    assert [layer.grid for layer in layers] == [(3, 3) if case == "torchvision" else (3, 4)] * 2
    x = layers[0].before
    for layer, block in zip(layers, blocks, strict=True):
        x = block(x)
        torch.testing.assert_close(layer.maps["tokens"], x)
    assert model.num_prefix_tokens == {"timm.vit.registers": 5, "timm.vit.no_positions": 0}.get(case, 1)


@pytest.mark.parametrize("case", ["timm.eva.vit_rope", "timm.eva.eva02"])
def test_attention_is_that_of_rotated_queries_and_keys(case):
    model, images = watched(case)
    block, rope = model.model.blocks[0], model.model.rope.get_embed((3, 4))
    layer = next(layers_of(model, images))
    tokens, attention = block.norm1(layer.before), block.attn
    if attention.qkv is not None:
        q, k, _ = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        q, k = (
            part(tokens).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj)
        )
    first = model.num_prefix_tokens
    rotated = [
        torch.cat([t[:, :, :first], apply_rot_embed_cat(t[:, :, first:], rope, half=attention.rotate_half)], dim=2)
        for t in (q, k)
    ]
    expected = (rotated[0] @ rotated[1].transpose(-1, -2) * attention.scale).softmax(-1)
    torch.testing.assert_close(layer.maps["attention"], expected)


@pytest.mark.parametrize("case", ["transformers.ViT.eager", "transformers.Dinov2WithRegisters.eager"])
def test_attention_and_tokens_of_transformers_are_what_it_returns(case):
    pytest.importorskip("transformers")
    model, images = watched(case)
    assert model.has_attention
    layers = list(layers_of(model, images))
    found = model.model(images, output_attentions=True, output_hidden_states=True)
    for layer, attention in zip(layers, found.attentions, strict=True):
        torch.testing.assert_close(layer.maps["attention"], attention)
    torch.testing.assert_close(layers[1].before, found.hidden_states[1])


def test_an_image_passes_a_watched_model_once():
    (model, batch), passes = watched("timm.vit.class"), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    list(layers_of(model, batch))
    assert len(passes) == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(2, 2), "no list of blocks with attention"),
        (
            torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), 1),
            "no convolution that makes patches",
        ),
    ],
)
def test_a_model_that_is_no_vision_transformer_is_told(model, message):
    with pytest.raises(ValueError, match=message):
        Watched(model, torch.zeros(1, 3, 8, 8))


def test_a_model_whose_blocks_change_the_shape_is_told():
    import timm

    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=24, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"keep \(batch, tokens, width\)"):
        Watched(swin, torch.zeros(1, 3, 64, 64))


# --- position --------------------------------------------------------------------------------------------------------


def backbone(case):
    images = images_of(case).float()
    return Backbone(case, Watched(make(case).float(), images), tuple(images.shape[-2:]), (0.5,) * 3, (0.5,) * 3)


def noise(number=60, size=SIZE):
    drawn = torch.randint(0, 256, (number, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageData(drawn, torch.zeros(number, dtype=torch.long), ("image",), (0.5,) * 3, (0.5,) * 3)


def test_position_is_found_in_a_model_that_has_it_and_not_in_one_without():
    placed, without = backbone("timm.vit.class"), backbone("timm.vit.no_positions")
    with torch.no_grad():
        placed.model.model.pos_embed.mul_(30)  # as large as the content
    lines = table(list(inspected(placed, noise(), "noise")))
    assert [line["layer"] for line in lines] == [0, 1, 2]
    assert lines[0]["row, shuffled"] > 0.5
    assert lines[0]["moved down"] > 0.1
    for line in table(list(inspected(without, noise(), "noise"))):
        assert abs(line["row, shuffled"]) < 0.1
        assert line["moved down"] < 1e-5
        assert line["moved right"] < 1e-5


def test_every_line_of_the_chart_has_a_row_for_each_layer():
    rows = list(inspected(backbone("timm.vit.registers"), noise(6), "noise"))
    assert {heading: len(some) for heading, some in by_line(rows).items()} == dict.fromkeys(by_line(rows), 3)
    assert {(row["model"], row["data"]) for row in rows} == {("timm.vit.registers", "noise")}


def test_few_images_for_many_features_are_told():
    model = backbone("timm.vit.class")  # 16 features, 12 tokens
    assert note_of_few(model, noise(10)).startswith("10 images are few for a probe of 16 features; 27 or more")
    assert note_of_few(model, noise(27)) is None


def test_attention_is_drawn_over_the_image_unless_the_model_hides_it():
    assert "Layer 2" in attention_figure(backbone("timm.vit.class"), noise(2), "").svg()
    assert attention_figure(backbone("torchvision"), noise(2, (24, 24)), "") is None


# --- which model -----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """A small timm model's weights, of seven classes."""
    import timm

    torch.manual_seed(3)
    model = timm.create_model("test_vit", num_classes=7)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return model.eval(), tmp_path / "weights.safetensors"


def test_a_timm_model_has_the_weights_of_the_file(weights):
    model, path = weights
    found = open_backbone("test_vit", str(path))
    batch = torch.randn(1, 3, *found.image_size)
    with torch.no_grad():
        torch.testing.assert_close(found.model.model(batch), model(batch), rtol=1e-4, atol=1e-5)
    assert (found.notes, found.mean) == ("weights.safetensors", tuple(model.pretrained_cfg["mean"]))


def test_a_folder_of_transformers_is_opened_unless_weights_are_missing(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **small)).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    found = open_backbone(str(tmp_path / "vit"))
    assert (found.image_size, found.mean, found.std, found.model.has_attention) == ((16, 16), (0.1,) * 3, (0.2,) * 3, True)
    parts = load_file(tmp_path / "vit" / "model.safetensors")
    parts.pop(next(name for name in parts if "layer" in name))
    save_file(parts, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 of its parameters, such as .*layer"):
        open_backbone(str(tmp_path / "vit"))


def test_a_run_is_opened_with_its_size_and_normalisation(tmp_path):
    config = override(get_recipe("digits"), ["model.depth=2"])
    Run(tmp_path / "run", config).start()
    save_weights(tmp_path / "run" / "model.safetensors", build_model(config))
    found = open_backbone(str(tmp_path / "run"))
    assert (found.name, found.image_size, found.mean) == ("run", config.model.image_size, config.data.mean)


class Dangerous:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_file_of_weights_runs_code(tmp_path, weights):
    trap, sprung = tmp_path / "trap.bin", tmp_path / "sprung"
    trap.write_bytes(pickle.dumps(Dangerous(sprung)))
    trap.rename(tmp_path / "trap.safetensors")
    with pytest.raises(ValueError, match="no file of safetensors"):
        open_backbone("test_vit", str(tmp_path / "trap.safetensors"))
    with pytest.raises(ValueError, match=r"must be a \.safetensors file, since others can run code"):
        open_backbone("test_vit", str(tmp_path / "trap.bin"))
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Dangerous(sprung)))
    pytest.importorskip("transformers")
    with pytest.raises(OSError, match="safetensors"):
        open_backbone(str(folder))
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no_such_model"], "is no run folder, no folder of transformers, no model of timm"),
        (["no.such.module:make"], "ModuleNotFoundError: No module named 'no'"),
        (["builtins:no_such"], "AttributeError: module 'builtins' has no attribute 'no_such'"),
        (["builtins:len"], "TypeError: len() takes exactly one argument (0 given)"),
        (["builtins:__name__"], "TypeError: 'str' object is not callable"),
        (["builtins:dict"], "builtins:dict must return a torch.nn.Module; got dict"),
        (["resnet18"], "no list of blocks with attention"),
        (["test_vit", "--weights", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["test_vit", "--size", "160"], "--size needs HxW in pixels"),
        (["test_vit", "--data", "nowhere"], "--data must be a folder of images"),
    ],
)
def test_what_cannot_be_inspected_is_told_in_one_line(argv, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *argv]) == 2
    out, err = capfd.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_told(weights):
    with pytest.raises(ValueError, match="timm cannot make test_vit2"):
        open_backbone("test_vit2", str(weights[1]))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_rows_and_figures_of_a_function_of_ones_own(tmp_path, monkeypatch, capfd):
    (tmp_path / "mine.py").write_text(
        "from host_cases import make\n\ndef small():\n    return make('timm.vit.class').float()\n"
    )
    monkeypatch.chdir(tmp_path)  # where modules are found, as by `python -m`
    folder = tmp_path / "photos" / "deeper"
    folder.mkdir(parents=True)
    for at in range(5):
        photo = np.random.default_rng(at).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(photo).save(folder / f"{at}.png")
    (folder / "broken.png").write_text("nothing")
    out = tmp_path / "out"
    argv = ["inspect", "mine:small", "--data", tmp_path / "photos", "--size", "24x32", "--out", out, "--json"]
    assert main([str(word) for word in argv]) == 0
    printed, err = capfd.readouterr()
    rows = [json.loads(line) for line in printed.splitlines()]
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "layers.png", "attention.png"}
    assert rows == [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["n"] for row in rows if row["name"] == "feature_equivariance_error"} == {5}
    assert "left out: " in err
    assert "broken.png" in err


def test_without_a_folder_the_images_are_digits_at_the_size_of_the_model():
    data, unreadable = read_images(backbone("timm.vit.class"), None, 3)
    assert (tuple(data.images.shape), unreadable) == ((3, 3, *SIZE), [])
