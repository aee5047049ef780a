"""Memory and time of one layer's attention against the number of tokens, and the largest grid that trains in 8 GB.

Command:  python benchmarks/memory.py        (about half an hour on two CPU cores; needs about 16 GB for the largest maps)
One image, 6 heads of 64, float32, forward plus backward.

Measured: peak extra memory (what PyTorch's allocator gives out above what was alive before, temporaries included) and time
(medians of alternating rounds), for squares of 8x8 to 64x64 tokens; a form whose predicted memory the machine does not have
is left out and says so. Largest grid: the side of the largest square whose *predicted* memory stays within the budget;
predicted means that the step is run on tensors without memory, whose storages are added up while they live
(`predicted_memory.py`). Forms that keep whole maps: by bisection. Forms in blocks: by a law in N
and N * side through the predictions at two sides beyond which no weights are kept, since a prediction runs block by block,
too. The rows hold predicted and measured bytes where both exist, so that one can judge the prediction. Once for the
attention of one layer alone, once for a ViT-Small (patch 16, one image, gradients and the two moments of AdamW included;
predicted for one and for two layers, further layers taken to be like the second). Writes benchmarks/results/memory.jsonl as
it goes, goes on where it stopped (remove the file to measure again), and draws docs/figures/memory.png.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import straightforward
import torch
import torch.nn.functional as F
from peers import (
    PLAIN,
    PLAIN_FUSED,
    Ours,
    Peer,
    StraightforwardSaPE2,
    make_straightforward,
    random_tokens,
    straightforward_sape2,
)
from predicted_memory import predicted_peak
from timing import Row, compare, conditions, parser, save
from torch import Tensor, nn

from sape2 import create_model, viz
from sape2.attention import choose_path
from sape2.attention import module as attention_module
from sape2.attention.kernels import blocks
from sape2.attention.kernels.workspace import Workspace
from sape2.encodings import AttentionEncoding
from sape2.evaluation.cost.measure import forward_backward, growth_exponent
from sape2.evaluation.cost.memory import peak_bytes
from sape2.runs.rows import read_rows
from sape2.tables import markdown_table
from sape2.training.memory_errors import available_bytes

SIDES = [8, 16, 24, 32, 48, 64]
HEADS, HEAD_DIM, PATCH = 6, 64, 16
MAX_SIDE = 1024
IN_BLOCKS = [56, 64, 80]  # sides at which our forms keep no weights, so that what is left grows
LAW = (50, 64)  # sides: from 49 on, six maps exceed `sape2.attention.paths.KEPT_ELEMENTS`
LAYERS = 12
COLUMNS = ["form", "side", "bytes", "predicted_bytes", "ms", "p10", "p90", "note"]
LARGEST_COLUMNS = ["form", "scope", "side", "bytes"]
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "memory.png"
STRAIGHTFORWARD = "sape2: straightforward"
SAPE2 = "sape2: ours"
OURS = {
    SAPE2: "sape2",
    "sape2 squared_distance: ours": "sape2:readout=squared_distance",
    "sape2 direct: ours": "sape2:readout=direct",
}
FORMS = [PLAIN, PLAIN_FUSED, STRAIGHTFORWARD, *OURS]
ENCODINGS = {"ape": "ape", STRAIGHTFORWARD: "ape+sape2", SAPE2: "ape+sape2"}  # of ViT-Small


def attention(form: str, side: int, device: str = "cpu") -> tuple[nn.Module, list[Tensor]]:
    """The form, and its q, k, v and gradient for one image; on "meta" without memory."""
    grid = (side, side)
    if form in OURS:
        module = Ours(OURS[form], HEADS, HEAD_DIM, grid)
    elif form == STRAIGHTFORWARD:
        module = straightforward_sape2(Ours("sape2", HEADS, HEAD_DIM, grid).encoding, grid)
    else:
        module = Peer(straightforward.plain if form == PLAIN else F.scaled_dot_product_attention, form)
    torch.manual_seed(0)
    return module, random_tokens(1, HEADS, grid, HEAD_DIM, device=device)


def predict(step: Callable, module: nn.Module, inputs: list[Tensor]) -> int | None:
    """`predicted_peak` along the path of tensors with memory (`choose_path` gives those without the readable form).

    The straightforward form keeps the readable one: whole maps, as the paper's listing has them.
    """

    def chosen(q: Tensor, encoding: AttentionEncoding, *given: Any) -> str:
        in_blocks = encoding.makes_bias and not isinstance(encoding, StraightforwardSaPE2)
        return "blocks" if in_blocks else choose_path(q, encoding, *given)

    own_buffers = patch.object(blocks, "WORKSPACE", Workspace())
    with patch.object(attention_module, "choose_path", chosen), own_buffers:
        return predicted_peak(step, module, inputs)


@functools.cache
def attention_bytes(form: str, side: int) -> int | None:
    return predict(forward_backward, *attention(form, side, "meta"))


@functools.cache
def model_bytes(form: str, side: int) -> int | None:
    """Of a training step of ViT-Small: what lives during forward and backward, the parameters and their two moments."""
    one, two = (shallow_model_bytes(form, side, depth) for depth in (1, 2))
    return None if one is None or two is None else one + (LAYERS - 1) * (two - one)


def loss_gradients(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, ...]:
    """Cross-entropy of (images, labels) and its gradients with respect to all parameters that it depends on."""
    images, labels = batch
    loss = F.cross_entropy(model(images), labels)
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def shallow_model_bytes(form: str, side: int, depth: int) -> int | None:
    size = {"image_size": side * PATCH, "patch_size": PATCH, "num_classes": 10, "depth": depth}
    with torch.device("meta"):
        model = create_model("vit_small", encoding=ENCODINGS[form], **size)
    if form == STRAIGHTFORWARD:
        make_straightforward(model)
    batch = [torch.empty(1, 3, side * PATCH, side * PATCH, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")]
    extra = predict(loss_gradients, model, batch)
    return None if extra is None else extra + 3 * sum(p.nbytes for p in model.parameters())


def law_of(bytes_of: Callable[..., int | None]) -> Callable[[int], float] | None:
    """Bytes of a square of some side: a + N * (b + c * side), through the predictions for one token and at the sides of `LAW`.

    Weights and their moments do not grow; tokens, weights of a block and gradients grow with N; gates and positions, from
    a patch along its row and column, with N * side.
    """
    one, *found = [bytes_of(side=side) for side in (1, *LAW)]
    if one is None or None in found:
        return None
    (near, far), (low, high) = LAW, [(total - one) / side**2 for total, side in zip(found, LAW, strict=True)]
    return lambda side: one + side**2 * (low + (high - low) * (side - near) / (far - near))


def predicted_bytes(form: str, side: int) -> int | None:
    """Of the attention of one layer: by the law where it holds, else by a run without memory."""
    law = law_of(partial(attention_bytes, form)) if form in OURS and side > LAW[1] else None
    return attention_bytes(form, side) if law is None else round(law(side))


def measure(side: int, rounds: int) -> list[Row]:
    """One row for every form that fits."""
    rows, steps = [], {}
    for form in FORMS:
        predicted, available = predicted_bytes(form, side), available_bytes()
        row = {"form": form, "side": side, "tokens": side * side, "predicted_bytes": predicted, "bytes": None, "ms": None}
        if predicted is not None and predicted > 0.9 * available:
            row["note"] = f"needs about {predicted / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"
        else:
            steps[form] = partial(forward_backward, *attention(form, side))
            row["bytes"] = peak_bytes(steps[form])
        rows.append(row)
    times = compare(steps, rounds)
    return [row | times.get(row["form"], {}) for row in rows]


def measure_in_blocks(form: str, side: int) -> Row:
    """Memory alone, of one step without warm-up: beyond the sides whose time is measured."""
    return {
        "form": form,
        "scope": "in blocks",
        "side": side,
        "bytes": peak_bytes(partial(forward_backward, *attention(form, side))),
    }


def largest_side(form: str, bytes_of: Callable[..., int | None], budget: int) -> int | None:
    """The largest side whose predicted memory is within the budget; None if it cannot be predicted."""
    if form not in OURS:
        return bisected_side(partial(bytes_of, form), budget)
    law = law_of(partial(bytes_of, form))
    return law and max(side for side in range(1, MAX_SIDE) if law(side) <= budget)


def bisected_side(bytes_of: Callable[..., int | None], budget: int) -> int | None:
    """Doubled until it does not fit, then halved: predicting much too large a side takes hours."""

    def fits(side: int) -> bool | None:
        needed = bytes_of(side=side)
        return needed and needed <= budget

    low, high = 1, 2
    while high < MAX_SIDE and fits(high):
        low, high = high, min(2 * high, MAX_SIDE)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return None if fits(low) is None else low


def growth(rows: list[Row], quantity: str) -> list[Row]:
    """The exponent of every form from 24x24 tokens on, where what is constant no longer counts.

    Not of bytes of ours: they are kept in another way from 49x49 tokens on (`block_growth`).
    """
    points = {
        form: [(r["tokens"], r[quantity]) for r in rows if r["form"] == form and r["side"] >= 24 and r[quantity]]
        for form in FORMS
    }
    forms = [form for form in FORMS if len(points[form]) > 1 and not (quantity == "bytes" and form in OURS)]
    return [{"form": form, "exponent": growth_exponent(points[form])} for form in forms]


def block_growth(rows: list[Row]) -> float:
    """The exponent in N where nothing but what blocks need is kept."""
    return growth_exponent([(row["side"] ** 2, row["bytes"]) for row in rows if row.get("scope") == "in blocks"])


def main() -> None:
    arguments_parser = parser(__doc__, "memory.jsonl", rounds=5)
    arguments_parser.add_argument("--gigabytes", type=float, default=8.0, help="the budget of the largest grid (default 8)")
    arguments_parser.add_argument("--max-side", type=int, default=64, help="the largest square that is measured (default 64)")
    arguments = arguments_parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about, rows = conditions(), read_rows(arguments.out)
    done = {(row.get("scope"), row["form"], row["side"]) for row in rows}
    for side in (side for side in SIDES if side <= arguments.max_side and (None, FORMS[-1], side) not in done):
        rows += [row | about for row in measure(side, arguments.rounds)]
        print(markdown_table(rows[-len(FORMS) :], COLUMNS), flush=True)
        save(arguments.out, rows)
    measured = [row for row in rows if "scope" not in row]
    for quantity in ("bytes", "ms"):
        print(f"growth of {quantity} with N\n\n{markdown_table(growth(measured, quantity), ['form', 'exponent'])}")
    budget, predicted = int(arguments.gigabytes * 1e9), {(row.get("scope"), row["form"]) for row in rows}
    for scope, bytes_of, forms in (("attention", attention_bytes, FORMS), ("vit_small", model_bytes, ENCODINGS)):
        for form in (form for form in forms if (scope, form) not in predicted):
            side = largest_side(form, bytes_of, budget)
            rows.append({"form": form, "scope": scope, "side": side, "budget_bytes": budget} | about)
            save(arguments.out, rows)
    for side in (side for side in IN_BLOCKS if ("in blocks", SAPE2, side) not in done):
        rows.append(measure_in_blocks(SAPE2, side) | about)
        save(arguments.out, rows)
    draw([row for row in rows if row.get("bytes")], FIGURE)
    print(markdown_table([row for row in rows if "scope" in row], LARGEST_COLUMNS))
    print(f"growth of {SAPE2} with N in blocks: {block_growth(rows):.3f}")


def draw(rows: list[Row], path: Path) -> None:
    bytes_of = {form: {row["side"] ** 2: row["bytes"] for row in rows if row["form"] == form} for form in FORMS}
    lines = {form: [(n, found[n] / 2**20) for n in sorted(found)] for form, found in bytes_of.items()}
    title, label = "attention of one image, 6 heads of 64, fp32", "peak extra memory, forward plus backward (MiB)"
    viz.plot_growth({title: lines}, path, label)


if __name__ == "__main__":
    main()
