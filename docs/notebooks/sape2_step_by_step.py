"""SaPE2 step by step: a notebook in cells, built by docs/notebooks/build.py."""

# %% [markdown]
# # SaPE2 step by step
#
# Every equation of [arXiv:2505.09466](https://arxiv.org/abs/2505.09466) on one photograph, one line of code each, and each number compared with
# [the package's literal loops](../method.md), which share nothing with the code here nor with the fast code of `SaPE2`.
#
# One head, one layer; H rows and W columns of patches, patch $i$ in row $y_i$ and column $x_i$. This is the reading of the paper's listing
# (appendix D); where its equations differ, it is said.

# %%
import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image

from sape2 import reference
from sape2.encodings import SaPE2

torch.manual_seed(0)
plt.rcParams.update({"figure.dpi": 80, "font.size": 10, "image.cmap": "cividis", "savefig.bbox": "tight"})

# %% [markdown]
# ## A photograph in patches
#
# The photograph is `china.jpg` of scikit-learn (danielbuechele, CC BY 2.0). It is cut into patches of 50 pixels, 8 rows of 12.

# %%
P, H, W = 50, 8, 12
pixels = torch.tensor(load_sample_image("china.jpg")[: H * P, : W * P]).double() / 255
patches = pixels.view(H, P, W, P, 3).transpose(1, 2).reshape(H * W, P * P, 3)  # row by row
i, n = 2 * W + 8, 2 * W + 4  # sky, and the tower in the same row


def show_photograph():
    plt.imshow(pixels)
    for x in range(W + 1):
        plt.axvline(x * P - 0.5, color="white", linewidth=0.5)
    for y in range(H + 1):
        plt.axhline(y * P - 0.5, color="white", linewidth=0.5)
    for patch, letter, colour in ((i, "i", "#0072B2"), (n, "n", "#D55E00")):
        plt.gca().add_patch(plt.Rectangle((patch % W * P, patch // W * P), P, P, fill=False, edgecolor=colour, linewidth=3))
        plt.text((patch % W + 0.5) * P, (patch // W + 0.5) * P, letter, color=colour, ha="center", va="center", weight="bold")
    plt.axis("off")


plt.figure(figsize=(6, 4))
show_photograph()

# %% [markdown]
# ## Queries and keys
#
# In a model, $q_i$ and $k_i$ are learned projections of the patch. Nothing is trained here: both are six numbers of it, the mean and the spread of
# its three colours, standardised over the photograph. So $q_i^\top k_j$ is large where two patches look alike, and one can see what follows from it.

# %%
numbers = torch.cat([patches.mean(1), patches.std(1)], dim=1)
q = k = (numbers - numbers.mean(0)) / numbers.std(0)
d = q.shape[1]
q.shape

# %% [markdown]
# ## Equation 9: gates
#
# $$g^x_{ij} = \sigma\!\left(\frac{q_i^\top k_j}{\sqrt{d}}\right), \qquad j \text{ in the row of } i$$
#
# The equation in the paper has no $\sqrt{d}$, its listing has. For the row of patch $i$:

# %%
row = torch.arange(i // W * W, i // W * W + W)  # the patches of i's row
gates = torch.sigmoid(q[i] @ k[row].T / math.sqrt(d))

plt.figure(figsize=(6, 2.4))
plt.bar(range(W), gates, color="#0072B2")
plt.imshow(pixels[i // W * P : (i // W + 1) * P], extent=(-0.5, W - 0.5, -0.2, -0.02), aspect="auto")
plt.ylim(-0.22, 1)
plt.xlabel("column of j")
plt.ylabel("gate")
print([round(float(g), 2) for g in gates])

# %% [markdown]
# ## Equation 10: positions
#
# $$p^x_{im} = \sum_{j:\; x_j \ge x_m} g^x_{ij}$$
#
# From $m$ to the right border. With all gates 1 this would be plain counting from the right; over the tower the count nearly stands still.

# %%
positions = torch.stack([gates[m:].sum() for m in range(W)])

plt.figure(figsize=(6, 2.4))
plt.plot([W - m for m in range(W)], "--", color="grey", label="plain counting")
plt.plot(positions, "o-", color="#0072B2", label="positions seen from i")
plt.xlabel("column of m")
plt.ylabel("position")
plt.legend(frameon=False)
print([round(float(p), 2) for p in positions])

# %% [markdown]
# ## Equations 11 to 14: a table, read between its rows
#
# The table has a vector $e[p]$ for each integer position; here it is drawn at random, as before training. Between two of them the
# value is linear. Equation 13 takes the products first, which is cheaper: $z_i[p] = q_i^\top e[p]$ for all integers, then equation 14 interpolates numbers:
#
# $$z_i[p] = z_i[\lfloor p\rfloor] + (p - \lfloor p\rfloor)\,\bigl(z_i[\lfloor p\rfloor + 1] - z_i[\lfloor p\rfloor]\bigr)$$

# %%
encoding = SaPE2(num_heads=1, head_dim=d, grid=(H, W), table_std=0.2).double().eval()
e = encoding.table_x.detach()  # (number of positions, d)
z = e @ q[i]
low = positions.floor().long().clamp(max=len(e) - 2)
vector = z[low] + (positions - low) * (z[low + 1] - z[low])

plt.figure(figsize=(6, 2.4))
plt.plot(z, "s-", color="grey", label="products with the table")
plt.plot(positions, vector, "o", color="#0072B2", label="read at the positions")
plt.xlabel("position")
plt.legend(frameon=False)
print([round(float(value), 2) for value in vector])

# %% [markdown]
# Equation 11 read literally interpolates the vectors of the table and takes the product last. It is the same:

# %%
e_between = e[low] + (positions - low)[:, None] * (e[low + 1] - e[low])
print("largest difference:", float((e_between @ q[i] - vector).abs().max()))
assert torch.allclose(e_between @ q[i], vector)

# %% [markdown]
# ## The same for every patch and both axes
#
# For rows as above; for columns the image is turned.


# %%
def line_vectors(q, k, table):
    """Gates, positions and vectors of all patches along lines; q and k are (lines, length, d)."""
    gates = torch.sigmoid(q @ k.transpose(1, 2) / math.sqrt(q.shape[2]))  # eq. 9
    positions = gates.flip(2).cumsum(2).flip(2)  # eq. 10
    products = q @ table.T  # eq. 13
    low = positions.floor().long().clamp(max=len(table) - 2)
    at, after = products.gather(2, low), products.gather(2, low + 1)
    return gates, positions, at + (positions - low) * (after - at)  # eq. 14


def turned(lines):
    """(W, H, ...) as (H, W, ...) and back."""
    return lines.transpose(0, 1)


grid_q, grid_k = q.view(H, W, d), k.view(H, W, d)
along_x = line_vectors(grid_q, grid_k, encoding.table_x.detach())
along_y = line_vectors(turned(grid_q), turned(grid_k), encoding.table_y.detach())
mine = {}
for name, x, y in zip(("gates", "positions", "vectors"), along_x, along_y, strict=True):
    mine[f"{name}_x"] = x.reshape(H * W, W)
    mine[f"{name}_y"] = turned(y).reshape(H * W, H)

assert torch.allclose(mine["vectors_x"][i], vector)
print({name: tuple(value.shape) for name, value in mine.items()})

# %% [markdown]
# ## Equation 15: distance
#
# $$b^x_{in} = \lVert s^x_i - s^x_n \rVert_2$$
#
# for **any** two patches, in one row or not, and the same along y. Here the vectors of $i$ and $n$:

# %%
s_i, s_n = mine["vectors_x"][i], mine["vectors_x"][n]
plt.figure(figsize=(6, 2.4))
plt.fill_between(range(W), s_i, s_n, color="grey", alpha=0.25)
plt.plot(s_i, "o-", color="#0072B2", label="vector of i")
plt.plot(s_n, "o-", color="#D55E00", label="vector of n")
plt.xlabel("column of m")
plt.legend(frameon=False)
print("distance along x:", round(float((s_i - s_n).norm()), 3))

# %%
mine["bias"] = torch.cdist(mine["vectors_x"], mine["vectors_x"]) + torch.cdist(mine["vectors_y"], mine["vectors_y"])

figure, axes = plt.subplots(1, 3, figsize=(11, 2.6))
for axis, patch, name in zip(axes, (i, n, 6 * W + 1), ("i, sky", "n, tower", "a tree, below on the left"), strict=True):
    image = axis.imshow(mine["bias"][patch].view(H, W), vmin=0, vmax=float(mine["bias"].max()))
    axis.add_patch(plt.Rectangle((patch % W - 0.5, patch // W - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=2))
    axis.set_title(f"bias from {name}")
    axis.axis("off")
_ = figure.colorbar(image, ax=axes, shrink=0.8, label="logits")
# %% [markdown]
# ## Equation 16: attention
#
# $$a_{in} = \frac{q_i^\top k_n}{\sqrt{d}} + b_{in}$$
#
# as the listing has it; the equation divides the bias by $\sqrt{d}$, too. The distance is **added**: what differs from $i$ gains attention. With the
# other sign (`sign=minus`) what resembles it does, as the paper's prose says.

# %%
logits = q[i] @ k.T / math.sqrt(d)
figure, axes = plt.subplots(1, 3, figsize=(11, 2.6))
for axis, sign, name in zip(axes, (0, 1, -1), ("without the bias", "bias added (the paper)", "bias subtracted"), strict=True):
    attention = (logits + sign * mine["bias"][i]).softmax(0)
    image = axis.imshow(attention.view(H, W))
    axis.add_patch(plt.Rectangle((i % W - 0.5, i // W - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=2))
    axis.set_title(f"attention of i, {name}", fontsize=9)
    axis.axis("off")
    figure.colorbar(image, ax=axis, shrink=0.8)

# %% [markdown]
# ## Checked
#
# Every number above against the literal loops, and against the class that models use:

# %%
with torch.no_grad():
    loops = reference.sape2(q, k, {"x": encoding.table_x, "y": encoding.table_y}, (H, W))
    package = {name: value[0, 0] for name, value in encoding.maps(q[None, None], k[None, None], (H, W)).items()}
for name, value in mine.items():
    difference = max(float((value - other[name]).abs().max()) for other in (loops, package))
    print(f"{name:12}  largest difference {difference:.1e}")
    assert difference < 1e-6

# %% [markdown]
# ## Three facts to take along
#
# The bias of a patch with itself is 0 and the bias is symmetric; exchanging whole rows of the image exchanges it along; and if content does not matter (all gates
# equal), **no position is left at all**: every patch then counts the same.

# %%
bias = mine["bias"]
print("diagonal:", float(bias.diagonal().abs().max()), " asymmetry:", float((bias - bias.T).abs().max()))

order = torch.randperm(H)
moved = (order[:, None] * W + torch.arange(W)).flatten()  # whole rows in another order
rows_only = SaPE2(num_heads=1, head_dim=d, grid=(H, W), axes="x").double().eval()
with torch.no_grad():
    before = rows_only.bias(q[None, None], k[None, None], (H, W)).dense()[0, 0]
    after = rows_only.bias(q[None, None][:, :, moved], k[None, None][:, :, moved], (H, W)).dense()[0, 0]
print("rows exchanged:", float((after - before[moved][:, moved]).abs().max()))

blind = SaPE2(num_heads=1, head_dim=d, grid=(H, W), gates="constant").double().eval()
any_order = torch.randperm(H * W)
with torch.no_grad():
    before = blind.bias(q[None, None], k[None, None], (H, W)).dense()[0, 0]
    after = blind.bias(q[None, None][:, :, any_order], k[None, None][:, :, any_order], (H, W)).dense()[0, 0]
print("constant gates, any order:", float((after - before[any_order][:, any_order]).abs().max()))
assert torch.allclose(after, before[any_order][:, any_order])

# %% [markdown]
# The same for a trained model, patch by patch: [the microscope](../explore.md). In your own ViT: [the next notebook](put_it_into_your_vit.ipynb).
