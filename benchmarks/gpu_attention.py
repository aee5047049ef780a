"""Time and memory of attention alone in bf16: without a bias, with SaPE2 in every form, and as the paper's listing has it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpu_case import Case, NotAvailable, autocast, distance_attention
from peers import Ours, Peer, random_tokens, straightforward_sape2
from timing import Row, compare
from torch import Tensor, nn

from sape2.attention import module as attention_module
from sape2.evaluation.cost.measure import forward, forward_backward
from sape2.evaluation.cost.memory import peak_bytes

HEADS, HEAD_DIM = 6, 64
SDPA = "sdpa, no bias"
OURS = {
    "sape2": "sape2",
    "sape2 squared_distance": "sape2:readout=squared_distance",
    "sape2 direct": "sape2:readout=direct",
}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for side, images in options.size.attention.items():
        yield Case(f"{side}x{side}, {images} images", partial(rows_of, side, images, options))


class ByMask(Ours):
    """With the bias as a mask (B, h, N, N) for PyTorch's kernel."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with by_mask():
            return super().forward(q, k, v)

    def describe(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        return "fused, mask"


def by_mask() -> object:
    return patch.object(attention_module, "choose_path", lambda *_: "fused")


class KernelAlone(nn.Module):
    """The fused kernel, given vectors: without gates, sums and look-ups."""

    def __init__(self, images: int, side: int) -> None:
        super().__init__()
        self.attend = distance_attention()
        self.vectors = nn.ParameterList(torch.randn(images, HEADS, side**2, side) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, tuple(self.vectors))

    def describe(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        return "triton"


def forms(side: int, images: int) -> dict[str, Callable[[], nn.Module]]:
    sizes = (HEADS, HEAD_DIM, (side, side))
    return {
        SDPA: lambda: Peer(F.scaled_dot_product_attention, "fused"),
        **{form: partial(Ours, name, *sizes) for form, name in OURS.items()},
        "sape2 by mask": lambda: ByMask("sape2", *sizes),
        "sape2, the paper's listing": lambda: straightforward_sape2(Ours("sape2", *sizes).encoding, (side, side)),
        "kernel alone": lambda: KernelAlone(images, side),
    }


def rows_of(side: int, images: int, options: argparse.Namespace) -> list[Row]:
    """A row for every form and phase; forms that fail, for want of memory say, have one with their error."""
    torch.manual_seed(0)
    device = options.device
    inputs = random_tokens(images, HEADS, (side, side), HEAD_DIM, torch.bfloat16, str(device))
    shape = {"side": side, "images": images, "heads": HEADS, "head_dim": HEAD_DIM}
    rows, modules, extra = [], {}, {}
    for form, make in forms(side, images).items():
        try:
            torch.manual_seed(0)
            module = make().to(device)
            with autocast(device):
                extra[form] = peak_bytes(partial(forward_backward, module, inputs), device)
            modules[form] = module
        except NotAvailable as reason:
            rows.append({"form": form, "note": f"not available: {reason}"} | shape)
        except (RuntimeError, ValueError) as error:  # the others are measured still
            rows.append({"form": form, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"} | shape)
    for phase in (forward_backward, forward):
        with autocast(device):
            found = compare({form: partial(phase, module, inputs) for form, module in modules.items()}, options.size.rounds)
            paths = {form: module.describe(*inputs[:3]) for form, module in modules.items()}
        for form, row in found.items():
            memory = {"bytes": extra[form]} if phase is forward_backward else {}
            ratio = {"to_sdpa": row["ms"] / found[SDPA]["ms"]}
            rows.append({"form": form, "phase": phase.__name__} | shape | row | ratio | memory | {"path": paths[form]})
    return rows
