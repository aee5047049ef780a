"""Put it into your ViT: a notebook in cells, built by docs/notebooks/build.py."""

# %% [markdown]
# # Put it into your ViT
#
# A ViT of timm that is already trained gets SaPE2 in one line. Its answers do not change; then the encoding alone is trained, kept in a small file of its own, and taken out again.
# Everything happens on scikit-learn's handwritten digits, in seconds and without a network, so the "trained model" is a small one that we train first. With weights of your own or of
# `pretrained=True` the steps are the same; [hosts](../hosts/README.md) says which models can be used.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from sape2 import attach, detach, encoding_parameters, load_adapter, save_adapter

torch.manual_seed(0)
plt.rcParams.update({"figure.dpi": 80, "font.size": 10, "image.cmap": "cividis", "savefig.bbox": "tight"})

# %% [markdown]
# ## A trained model
#
# 8x8 digits, enlarged to 32x32 and given three channels, as a model for photographs expects.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
images = F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)

vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=2, num_classes=10)


def fit(parameters, steps, lr):
    """Loss of every step of AdamW on random batches of 64."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    vit.train()
    for _ in range(steps):
        batch = torch.randint(1400, (64,))
        loss = F.cross_entropy(vit(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    vit.eval()
    return losses


@torch.no_grad()
def accuracy():
    return (vit(images[test]).argmax(1) == labels[test]).float().mean().item()


first = fit(vit.parameters(), steps=120, lr=1e-3)
print(f"accuracy on {len(labels[test])} test images: {accuracy():.3f}")

# %% [markdown]
# ## Attach
#
# The bias enters under one learned gain per head that starts at 0, so the logits stay as they are, up to rounding. `trainable="encoding"` freezes everything else.

# %%
with torch.no_grad():
    before = vit(images[test])
    attach(vit, "sape2", trainable="encoding")
    after = vit(images[test])

print("largest difference of a logit:", (after - before).abs().max().item())
assert torch.allclose(after, before, atol=1e-4)

new = list(encoding_parameters(vit))
total = sum(parameter.numel() for parameter in vit.parameters())
print(f"new parameters: {sum(parameter.numel() for parameter in new)} of {total}")
assert {id(p) for p in vit.parameters() if p.requires_grad} == {id(p) for p in new}

# %% [markdown]
# ## Train the encoding alone

# %%
second = fit(encoding_parameters(vit), steps=60, lr=1e-2)
print(f"accuracy: {accuracy():.3f}")

plt.figure(figsize=(6, 2.6))
plt.plot(range(len(first)), first, color="#0072B2", label="the model")
plt.plot(range(len(first), len(first) + len(second)), second, color="#D55E00", label="SaPE2 alone, the rest frozen")
plt.xlabel("step")
plt.ylabel("loss of a batch")
_ = plt.legend(frameon=False)
# %% [markdown]
# These are a few seconds of training of a tiny model, to show the steps. They say nothing about whether SaPE2 helps; what has been measured about that is in
# [results](../results.md).
#
# What the gains have become, a number for each head. The last layer's stay at 0: this model answers from its class token, prefix tokens have no bias, and the patches of the last
# layer are not read.

# %%
for number, block in enumerate(vit.blocks, start=1):
    print(f"layer {number}:", [round(gain, 4) for gain in block.attn.sape2.gain.tolist()])
assert block.attn.sape2.gain.abs().max() == 0

# %% [markdown]
# ## The bias, on an image
#
# The encoding is a submodule of each attention, `sape2`. A hook catches what it sees of the layer, q and k among it; `make_bias` makes the bias of all pairs of patches from it.

# %%
encoding = vit.blocks[0].attn.sape2
caught = []
make_bias = encoding.make_bias
encoding.make_bias = lambda content: caught.append(content) or make_bias(content)
image = images[test][3:4]
with torch.no_grad():
    vit(image)
    bias = make_bias(caught[0]).dense()[0]
del encoding.make_bias

place = 3 * 8 + 4
figure, axes = plt.subplots(1, 3, figsize=(9, 2.6))
axes[0].imshow(image[0, 0], cmap="gray")
axes[0].set_title("image, patch (3, 4)")
axes[0].add_patch(plt.Rectangle((4 * 4 - 0.5, 3 * 4 - 0.5), 4, 4, fill=False, edgecolor="#D55E00", linewidth=2))
for head in range(2):
    shown = axes[head + 1].imshow(bias[head, place].view(8, 8))
    axes[head + 1].set_title(f"layer 1, head {head + 1}: bias, logits")
    figure.colorbar(shown, ax=axes[head + 1], shrink=0.8)
for axis in axes:
    axis.axis("off")

# %% [markdown]
# ## Keep it, take it out, put it back
#
# An adapter is a folder with the new parameters and what they are. `detach` gives the model back as it was.

# %%
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    save_adapter(vit, folder)
    print({file.name: f"{file.stat().st_size / 1000:.1f} kB" for file in sorted(Path(folder).iterdir())})
    trained = vit(images[test])

    detach(vit)
    assert torch.equal(vit(images[test]), before)

    load_adapter(vit, folder)
    assert torch.allclose(vit(images[test]), trained, atol=1e-5)
    print("after load_adapter:", f"{accuracy():.3f}")

# %% [markdown]
# Next: [all options of `attach`](../reference/hosts.md), [what is supported where](../hosts/README.md), [an experiment with seeds](../results.md).
