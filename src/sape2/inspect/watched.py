"""A vision transformer of any library as a model whose layers can be looked into: hooks note what passes.

Nothing of the library is known but what its plain ViTs have in common: a list of alike blocks with attention, a convolution
that makes the grid of patches, prefix tokens first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sape2.encodings.grid import Grid, num_prefix_tokens


class Watched(nn.Module):
    """A `MappedModel` around a model, which is put into evaluation mode and asked for its attention weights.

    `images`, (1, C, height, width), pass once to see what there is. Raises ValueError for a model without such blocks.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.model = model.eval()
        self.grid: Grid | None = None
        self.notes: list[dict[str, Tensor]] = []  # what entered the first block, then what each block gave
        self.images: Tensor | None = None
        self._weights: Tensor | None = None
        blocks = _blocks(model)
        _patches(model).register_forward_hook(self._note_grid)
        blocks[0].register_forward_pre_hook(self._note_entering, with_kwargs=True)
        for block in blocks:
            _watch_attention(block, self)
            block.register_forward_hook(self._note_leaving)
        with torch.no_grad():
            tokens, grid = self.embed(images)
        for layer, note in enumerate(self.notes):
            _check_tokens(note["tokens"], tokens, layer)
        self.num_prefix_tokens = num_prefix_tokens(tokens.shape[1], grid)

    @property
    def has_attention(self) -> bool:
        """Whether the weights of every layer were seen, which fused kernels do not show."""
        return all("attention" in note for note in self.notes[1:])

    def forward(self, images: Tensor) -> Any:
        return self.model(images)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        self._pass(images)
        assert self.grid is not None
        return self.notes[0]["tokens"], self.grid

    def maps(self, images: Tensor) -> list[dict[str, Tensor]]:
        self._pass(images)
        return self.notes[1:]

    def _pass(self, images: Tensor) -> None:
        """Once for the same tensor, so that to embed it and to map it is one pass."""
        if images is not self.images:
            self.notes, self._weights = [], None
            self.model(images)
            self.images = images

    # --- hooks ---

    def _note_grid(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.grid = (output.shape[-2], output.shape[-1])

    def _note_entering(self, _: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        self.notes = [{"tokens": given[0] if given else named["hidden_states"]}]

    def _note_leaving(self, _: nn.Module, __: Any, output: Any) -> None:
        weights, self._weights = self._weights, None
        note = {"tokens": output[0] if isinstance(output, tuple) else output}
        self.notes.append(note if weights is None else note | {"attention": weights})

    def note_attention(self, weights: Tensor) -> None:
        self._weights = weights


def _watch_attention(block: nn.Module, watch: Watched) -> None:
    """timm gives the weights to a dropout unless its kernel is fused; transformers return them beside the output."""

    def of_dropout(_: nn.Module, given: tuple) -> None:
        watch.note_attention(given[0])

    def of_output(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].ndim == 4:
            watch.note_attention(output[1])

    modules: list[Any] = list(block.modules())
    for module in modules:
        if hasattr(module, "fused_attn") and isinstance(getattr(module, "attn_drop", None), nn.Module):
            module.fused_attn = False
            module.attn_drop.register_forward_pre_hook(of_dropout)
        elif module is not block:
            module.register_forward_hook(of_output)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The longest list of alike modules that contain attention."""
    lists = [list(found) for found in model.modules() if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found)]
    found = [blocks for blocks in lists if len(set(map(type, blocks))) == 1 and _attends(blocks[0])]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of blocks with attention, so it is no vision transformer")
    return max(found, key=len)


def _attends(block: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in block.modules())


def _patches(model: nn.Module) -> nn.Module:
    """The convolution that makes patches: the first whose stride is as large as its kernel."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    found = next((module for module in convolutions if module.stride == module.kernel_size != (1, 1)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no convolution that makes patches, from which its grid could be read")
    return found


def _check_tokens(tokens: Any, first: Tensor, layer: int) -> None:
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape != first.shape:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"a model can be inspected whose blocks all keep (batch, tokens, width); layer {layer} of this one gives {got}, "
            f"and {tuple(first.shape)} entered the first"
        )
