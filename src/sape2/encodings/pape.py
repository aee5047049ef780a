"""PaPE, parabolic position encoding (arXiv:2602.01418): a bias of parabolas in the offset, set by the query."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.base import AttentionEncoding, Facts
from sape2.encodings.bias import AttentionBias, Factors
from sape2.encodings.content import Content
from sape2.encodings.grid import Grid, coordinates
from sape2.encodings.precision import full_precision, no_autocast

PARABOLAS = 50


@dataclass(frozen=True)
class PaPEOptions:
    """`form`: parabolas in learned directions with slopes (PaPE), or around the query alone, alike in all directions (PaPE-RI);
    `parabolas`: how many of the first kind each head adds up, 50 unless given.
    """

    form: Literal["directed", "rotation_invariant"] = "directed"
    parabolas: int | None = None

    def __post_init__(self) -> None:
        if self.parabolas is not None and self.parabolas < 1:
            raise ValueError(f"pape:parabolas must be at least 1; got {self.parabolas}")
        if self.parabolas is not None and self.form == "rotation_invariant":
            raise ValueError("pape:parabolas has no effect with form=rotation_invariant, which has one for each head")


class PaPE(AttentionEncoding):
    """b_in = (-sum_m a_im (p_im - p_nm)^2 + sum_m b_im (p_im - p_nm)) / sqrt(d), with p_m = w_m . (y, x),

    a_i = softplus(W_a x_i), b_i = W_b x_i, where x_i is the normed input of the block at patch i. In two dimensions the sums
    are one symmetric 2x2 matrix A_i = sum_m a_im w_m w_m^T and one vector c_i = sum_m b_im w_m for each query,
    b_in = (-(p_i - p_n)^T A_i (p_i - p_n) + c_i . (p_i - p_n)) / sqrt(d), six products for a pair.

    PaPE-RI (form=rotation_invariant) has a_i |s_h (p_i - p_n)|^2 alone: one learned a for each head, and a scale s_h that is
    drawn once, uniform within 1/sqrt(2), and kept. All start as in the source. Raises ValueError without tokens.
    """

    name = "pape"
    Options = PaPEOptions
    summary = "parabolas of the offset, with curvature and slope read from the query's token"
    source = "arXiv:2602.01418"
    variants: ClassVar[dict[str, str]] = {
        "form=rotation_invariant": "circles around the query: the same for every turn of the image"
    }
    facts = Facts(content_dependent=True, translation=True)
    reads_tokens = True

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)
        if self.options.form == "rotation_invariant":
            self.facts = Facts(content_dependent=True, translation=True, flip=True)
            self.curvature = _uniform(self.dim**-0.5, num_heads, self.dim)  # W_a, (h, D)
            self.register_buffer("scales", _uniform(2**-0.5, num_heads).data)  # (h,)
            return
        parabolas = self.options.parabolas or PARABOLAS
        self.curvature = _uniform(self.dim**-0.5, num_heads, parabolas, self.dim)  # W_a, (h, M, D)
        self.slope = _uniform(self.dim**-0.5, num_heads, parabolas, self.dim)  # W_b, (h, M, D)
        self.directions = _uniform(2**-0.5, num_heads, parabolas, 2)  # w, (h, M, 2) in (y, x)

    def make_bias(self, content: Content) -> AttentionBias:
        q, grid = content.q, content.grid
        tokens = content.read_tokens("pape", self.dim)
        with no_autocast(q):
            place = coordinates(grid, q.device).to(tokens.dtype)
            y, x = (place - place.mean(0)).unbind(-1)  # only differences matter, and small numbers round less
            yy, yx, xx, cy, cx = self._parabola(tokens).unbind(-1)  # each (B, h, N)
            constant = (cy - yy * y - 2 * yx * x) * y + (cx - xx * x) * x
            of_query = [constant, 2 * (yy * y + yx * x) - cy, 2 * (yx * y + xx * x) - cx, -yy, -2 * yx, -xx]
            of_key = [torch.ones_like(y), y, x, y * y, y * x, x * x]
            query_side = torch.stack(of_query, dim=-1) / math.sqrt(q.shape[-1])
            return AttentionBias(Factors(query_side, torch.stack(of_key, dim=-1)), dtype=q.dtype)

    def _parabola(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens 5"]:
        """A_yy, A_yx, A_xx, c_y and c_x of every query."""
        if self.options.form == "rotation_invariant":
            a = F.softplus(torch.einsum("bnd,hd->bhn", tokens, full_precision(self.curvature)))
            a = a * full_precision(self.scales).square()[:, None]
            zero = torch.zeros_like(a)
            return torch.stack([a, zero, a, zero, zero], dim=-1)
        a, b = (torch.einsum("bnd,hmd->bhnm", tokens, full_precision(w)) for w in (self.curvature, self.slope))
        wy, wx = full_precision(self.directions).unbind(-1)  # (h, M)
        products = torch.stack([wy * wy, wy * wx, wx * wx], dim=-1)  # (h, M, 3)
        return torch.cat([F.softplus(a) @ products, b @ torch.stack([wy, wx], dim=-1)], dim=-1)


def _uniform(bound: float, *shape: int) -> nn.Parameter:
    """A parameter initialised as PyTorch initialises a linear layer."""
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))
