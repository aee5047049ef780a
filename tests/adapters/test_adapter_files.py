"""What was attached, saved by itself and put into another copy, also one for another image size."""

import json

import pytest
import timm
import torch
from host_cases import TIMM, images, make, open_gains, outputs, randomised
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize, prune

from sape2 import attach, detach, encoding_parameters, load_adapter, save_adapter

CASES = [
    *((case, "sape2") for case in ("timm.vit.dinov2", "timm.eva.dinov3", "torchvision", "transformers.ViT.sdpa", "sape2.ape")),
    ("timm.vit.dinov2", "sape2:every=2,share=true+rpe_contextual"),
    ("torchvision", "rpe:every=2"),
]


@pytest.fixture
def saved(tmp_path):
    """(model with an adapter, its folder)"""
    model = attach(make("timm.vit.avg"), "sape2:count=cyclic+rpe")
    open_gains(model)
    save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize(("case", "encoding"), CASES)
def test_an_adapter_loads_onto_another_copy_of_the_model(case, encoding, tmp_path):
    model, x = attach(make(case), encoding), images(case)
    open_gains(model)
    save_adapter(model, tmp_path)
    other = load_adapter(make(case), tmp_path, trainable="encoding")
    torch.testing.assert_close(outputs(other, x), outputs(model, x), rtol=1e-6, atol=1e-6)
    theirs = {id(p) for p in encoding_parameters(other)}
    assert {id(p) for p in other.parameters() if p.requires_grad} == theirs
    assert torch.equal(outputs(detach(other), x), outputs(make(case), x))


def test_a_folder_may_be_at_home(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_adapter(saved[0], "~/at_home")
    assert (tmp_path / "at_home" / "adapter.json").exists()
    load_adapter(make("timm.vit.avg"), "~/at_home")


def test_loading_draws_no_random_numbers(saved):
    other, state = make("timm.vit.avg"), torch.get_rng_state()
    load_adapter(other, saved[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["prune", "parametrize"])
def test_what_could_not_be_loaded_is_not_saved(saved, kind, tmp_path):
    model, _ = saved
    parts = model.blocks[0].attn.sape2.modules()
    part, name = next((part, name) for part in parts for name, _ in part.named_parameters(recurse=False))
    if kind == "prune":
        prune.random_unstructured(part, name, 0.5)
    else:
        parametrize.register_parametrization(part, name, nn.Identity())
    with pytest.raises(ValueError, match=r"torch\.nn\.utils.*prune\.remove"):
        save_adapter(model, tmp_path / "other")
    prune.remove(part, name) if kind == "prune" else parametrize.remove_parametrizations(part, name)
    save_adapter(model, tmp_path / "other")
    x = images("timm.vit.avg")
    torch.testing.assert_close(outputs(load_adapter(make("timm.vit.avg"), tmp_path / "other"), x), outputs(model, x))


def test_the_file_holds_the_encoding_and_nothing_else(saved):
    model, folder = saved
    stored = load_file(folder / "adapter.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in encoding_parameters(model))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert json.loads((folder / "adapter.json").read_text()) == {
        "format": 1,
        "host": "timm VisionTransformer",
        "encoding": "sape2:count=cyclic+rpe",
        "start": "no_effect",
        "grid": [3, 4],
        "depth": 2,
        "num_heads": 2,
        "head_dim": 8,
    }


def test_shared_tables_are_written_once(tmp_path):
    model = attach(make("timm.vit.avg"), "sape2:share=true")
    save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / "adapter.safetensors")) == 3


def test_an_adapter_loads_onto_another_image_size_by_the_rule_of_its_tables(saved):
    """On a model for 48x64 the tables stay those of 24x32; the same weights on the same images give the same logits."""
    folder = saved[1]
    sizes = {"global_pool": "avg", "dynamic_img_size": True, "pos_embed": "none"}
    small, large = (timm.models.VisionTransformer(**TIMM | sizes | {"img_size": size}) for size in ((24, 32), (48, 64)))
    large.load_state_dict(randomised(small).state_dict())
    for each in (small, large):
        load_adapter(each.eval(), folder)
    assert {size.grid for size in large.sape2_attachment.sizes} == {(3, 4)}
    x = torch.randn(2, 3, 48, 64)
    assert torch.equal(small(x), large(x))
    assert (large(x) - detach(large)(x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter.json").unlink(), "adapter.json"),
        (lambda folder: (folder / "adapter.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "adapter.json").write_text('{"format": 1}'), "'host'"),
        (lambda folder: change(folder, format=2), "format 2.*format 1"),
        (lambda folder: change(folder, depth=3), "depth=3 .* 2"),
        (lambda folder: change(folder, head_dim=16), "head_dim=16 .* 8"),
        (lambda folder: change(folder, grid=[5, 5]), "adapter.safetensors.*size mismatch"),
        (lambda folder: change(folder, encoding="sape2"), "adapter.safetensors"),
        (lambda folder: change(folder, encoding=None), "an encoding is a text"),
        (lambda folder: change(folder, grid=None), "grid must be"),
        (lambda folder: change(folder, grid=[]), "grid must be"),
        (lambda folder: change(folder, grid=[[3, 4]]), "one for each of the 2 layers"),
        (lambda folder: (folder / "adapter.safetensors").write_bytes(b"no"), "adapter.safetensors"),
        (lambda folder: (folder / "adapter.safetensors").unlink(), "adapter.safetensors"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(saved, damage, message):
    damage(saved[1])
    model, x = make("timm.vit.avg"), images("timm.vit.avg")
    expected = outputs(model, x)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_adapter(model, saved[1])
    assert torch.equal(outputs(model, x), expected)
    assert not [key for key in model.state_dict() if "sape2" in key]


def change(folder, **values):
    config = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(config | values))


def test_nothing_attached_is_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="nothing is attached"):
        save_adapter(make("timm.vit.avg"), tmp_path)
    assert not list(tmp_path.iterdir())
