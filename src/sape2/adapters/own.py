"""Attaches a further encoding to a trained model of this package, whose own encoding was chosen when it was created."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sape2.adapters.attached import Host, Size
from sape2.adapters.attention import Attached, encoding_of
from sape2.adapters.tokens import Tokens, inside
from sape2.attention import Attention, attend, logits
from sape2.encodings.base import Composite
from sape2.encodings.content import Content
from sape2.encodings.grid import Grid


class AttachedOwn(Attached, Attention):
    """`sape2.attention.Attention` with an encoding beside its own."""

    def both(self) -> Composite:
        """Its own encoding and the attached one; made once for these two, and kept where state_dict does not see it.

        A replica of `nn.DataParallel` gets what its model has kept, and has parts of its own.
        """
        attached, kept = encoding_of(self), self.__dict__.get("sape2_both")
        if kept is None or kept[0] is not self.encoding or kept[1] is not attached:
            both: Any = Composite([self.encoding, attached])
            both._is_replica = getattr(self, "_is_replica", False)
            kept = self.__dict__["sape2_both"] = (self.encoding, attached, both)
        return kept[2]

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.project(x)
        output = attend(q, k, v, grid, self.both(), self.attention_dropout if self.training else 0.0, tokens=x)
        return self.dropout(self.proj(output.transpose(1, 2).flatten(2)))

    def maps(self, x: Float[Tensor, "batch tokens dim"], grid: Grid) -> dict[str, Tensor]:
        q, k, _ = self.project(x)
        maps = self.both().make_maps(Content.of_grid(q, k, grid, x))
        return maps | {"attention": logits(q, k, grid, self.both(), x).softmax(-1)}


def find(model: nn.Module) -> Host:
    blocks: Any = getattr(model, "blocks", [])
    attentions: list[Any] = [getattr(block, "attn", None) for block in blocks]
    if not attentions or any(type(attention) is not Attention for attention in attentions):
        raise ValueError(f"attach knows the ViT of sape2; got {type(model).__name__}")
    config: Any = model.config
    return Host(
        name="sape2 ViT",
        layers=[(attention, AttachedOwn) for attention in attentions],
        source=inside(model.patch_embed.proj),  # pyrefly: ignore
        tokens=Tokens(model.num_prefix_tokens),  # pyrefly: ignore
        sizes=[Size(config.num_heads, config.head_dim, config.grid)] * len(attentions),
        rotates=any(attention.encoding.rotates for attention in attentions),
    )
