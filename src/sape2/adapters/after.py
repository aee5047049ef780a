"""An encoding of the tokens behind a block of a host, where `attach` cannot change them within attention: `cpe`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.adapters.layouts import Layout, tokens_on
from sape2.adapters.start import Start
from sape2.adapters.tokens import Tokens
from sape2.encodings.base import PositionEncoding, TokenEncoding
from sape2.encodings.grid import as_grid
from sape2.encodings.precision import full_precision, no_autocast
from sape2.machine import uncompiled


class AfterBlock(PositionEncoding):
    """x + g (e(x) - x) on the patches that a block gives, with a learned gain g for each channel, 0 at the start.

    Without a gain (`start="as_is"`) it is e(x). Computed in float32 whatever the precision of the host, float64 apart.
    """

    def __init__(self, encoding: TokenEncoding, start: Start, tokens: Tokens) -> None:
        nn.Module.__init__(self)
        self.encoding, self.tokens = encoding, tokens
        self.gain = nn.Parameter(torch.zeros(encoding.dim)) if start == "no_effect" else None

    def reset_parameters(self) -> None:
        """Closes the gain; the encoding inside has a `reset_parameters` of its own."""
        if self.gain is not None:
            nn.init.zeros_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        """Of a sequence (B, T, D), or of an image (B, H, W, D) where the host keeps one."""
        if x.shape[-1] != self.encoding.dim:
            raise ValueError(
                f"{self.encoding.name} was made for tokens of {self.encoding.dim} channels, those of all heads together; this "
                f"block gives {x.shape[-1]}"
            )
        if x.dim() == 4:
            return self._changed(x.flatten(1, 2), as_grid(x.shape[1], x.shape[2])).view_as(x)
        first, last = self.tokens.ends(x.shape[1])
        changed = self._changed(x[:, first:last], self.tokens.layout_of(x.shape[1]))
        return torch.cat([x[:, :first], changed, x[:, last:]], dim=1)

    def _changed(self, x: Float[Tensor, "batch tokens dim"], layout: Layout) -> Float[Tensor, "batch tokens dim"]:
        full = full_precision(x)
        with no_autocast(full):
            encoded = tokens_on(layout, self.encoding, full)
            return (encoded if self.gain is None else full + self.gain * (encoded - full)).to(x.dtype)


def change_output(block: Any, inputs: Any, output: Any) -> Any:
    """The hook of a block whose `sape2` is an `AfterBlock`; of several outputs the first holds the tokens."""
    return (block.sape2(output[0]), *output[1:]) if isinstance(output, tuple) else block.sape2(output)


def block_around(model: nn.Module, attention: nn.Module) -> nn.Module:
    """The module around an attention that stands in a list, inside what compiles it. Raises ValueError if none does."""
    names = next(name for name, module in model.named_modules() if module is attention).split(".")
    for length in range(len(names), 0, -1):
        if isinstance(model.get_submodule(".".join(names[: length - 1])), (nn.ModuleList, nn.Sequential)):
            return uncompiled(model.get_submodule(".".join(names[:length])))
    raise ValueError(
        f"there is no list of blocks around {type(attention).__name__}, behind one of which tokens could be changed"
    )
