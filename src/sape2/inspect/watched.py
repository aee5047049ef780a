"""A vision transformer of any library as a model whose layers can be looked into: hooks note what passes.

Where the patches of a model stand among its tokens is known for what `attach` knows (`sape2.adapters`). Of any other model
nothing is known but what plain ViTs have in common: a list of alike blocks with attention, a convolution that makes the grid
of patches, prefix tokens first, then the patches by rows. Whether it is so is tried on every model: images that differ in one
patch must differ in its token (`Watched._check_places`).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sape2.adapters import find_host
from sape2.adapters.layouts import Layout, Scattered
from sape2.adapters.tokens import Read, grid_of_output
from sape2.encodings.grid import Grid, num_tokens


class Watched(nn.Module):
    """A `MappedModel` around a model, which is put into evaluation mode and asked for its attention weights.

    Tokens and weights are told in one order, whatever that of the model: those that stand on no grid, then the patches by
    rows. `images` say the size; they and a few of that size pass to see what there is. Raises ValueError for a
    model without such blocks, and where a patch is not found in its place.
    """

    def __init__(self, model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> None:
        super().__init__()
        self.model = model.eval()
        self.layout: Layout | None = None
        self.notes: list[dict[str, Tensor]] = []  # what entered the first block, then what each block gave
        self.images: Tensor | None = None
        self._weights: Tensor | None = None
        blocks = _blocks(model)
        source, self.read, self.num_suffix = _patches(model)
        self.patch_size = _patch_size(source)
        self.packed = type(source).__name__ == "Siglip2VisionEmbeddings"
        source.register_forward_hook(self._note_layout, with_kwargs=True)
        blocks[0].register_forward_pre_hook(self._note_entering, with_kwargs=True)
        for block in blocks:
            _watch_attention(block, self)
            block.register_forward_hook(self._note_leaving)
        with torch.no_grad():
            self.num_prefix_tokens = self._check_places(images)

    @property
    def grid(self) -> Grid:
        assert self.layout is not None
        return self.layout.grids[0] if isinstance(self.layout, Scattered) else self.layout

    @property
    def has_attention(self) -> bool:
        """Whether the weights of every layer were seen, which fused kernels and windows do not show."""
        return all("attention" in note for note in self.notes[1:])

    def forward(self, images: Tensor) -> Any:
        return self.model(**_packed(images, self.patch_size)) if self.packed else self.model(images)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        self._pass(images)
        return self.notes[0]["tokens"], self.grid

    def maps(self, images: Tensor) -> list[dict[str, Tensor]]:
        self._pass(images)
        return self.notes[1:]

    def _pass(self, images: Tensor) -> None:
        """Once for the same tensor, so that to embed it and to map it is one pass."""
        if images is self.images:
            return
        self.notes, self._weights, self.images = [], None, None
        self(images)
        self._check_shapes()
        self.notes = [self._in_order(note) for note in self.notes]
        self.images = images

    # --- hooks ---

    def _note_layout(self, source: nn.Module, given: tuple, named: dict[str, Any], output: Any) -> None:
        self.layout = self.read(source, given, named, output)

    def _note_entering(self, _: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        self.notes = [{"tokens": _as_sequence(given[0] if given else named["hidden_states"])}]

    def _note_leaving(self, _: nn.Module, __: Any, output: Any) -> None:
        weights, self._weights = self._weights, None
        tokens = _as_sequence(output[0] if isinstance(output, tuple) else output)
        whole = weights is not None and weights.shape[-2:] == (tokens.shape[1],) * 2  # not those within windows
        self.notes.append({"tokens": tokens, "attention": weights} if whole else {"tokens": tokens})

    def note_attention(self, weights: Tensor) -> None:
        self._weights = weights

    # --- where the patches are ---

    def _check_shapes(self) -> None:
        """Raises ValueError unless every block keeps all tokens of the grid."""
        name, first = type(self.model).__name__, self.notes[0]["tokens"]
        for layer, note in enumerate(self.notes):
            if note["tokens"].ndim != 3 or note["tokens"].shape != first.shape:
                raise ValueError(
                    "a model can be inspected whose blocks all keep (batch, tokens, width); layer "
                    f"{layer} of this {name} gives {tuple(note['tokens'].shape)}, and {tuple(first.shape)} entered the first. "
                    f"{OF_STAGES}"
                )
        here = self.layout.place.shape[1] if isinstance(self.layout, Scattered) else num_tokens(self.grid)
        if here < num_tokens(self.grid):
            raise ValueError(
                f"this {name} drops patches: {here} of {num_tokens(self.grid)} are left. Set mask_ratio to 0 in its config "
                "(config.json of a folder), so that all of them pass"
            )
        if first.shape[1] < here:
            raise ValueError(
                f"this {name} makes {self.grid[0]}x{self.grid[1]} patches, and {first.shape[1]} tokens enter the first of its "
                f"blocks. {OF_STAGES}"
            )

    def _in_order(self, note: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens, and rows and columns of weights: those of no grid first, then the patches by rows."""
        if self.num_suffix == 0 and not isinstance(self.layout, Scattered):
            return note
        tokens, order = note["tokens"], self._order(note["tokens"])
        found = {"tokens": tokens.gather(1, order[..., None].expand_as(tokens))}
        if "attention" in note:
            weights, rows, columns = note["attention"], order[:, None, :, None], order[:, None, None, :]
            found["attention"] = weights.gather(2, rows.expand_as(weights)).gather(3, columns.expand_as(weights))
        return found

    def _order(self, tokens: Float[Tensor, "batch tokens dim"]) -> Int[Tensor, "batch tokens"]:
        patches = num_tokens(self.grid)
        first = tokens.shape[1] - patches - self.num_suffix
        at = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        stand = at[:, first : first + patches]
        if isinstance(self.layout, Scattered):
            stand = stand.gather(1, self.layout.place.argsort(1))
        return torch.cat([at[:, :first], at[:, first + patches :], stand], dim=1)

    def _check_places(self, images: Float[Tensor, "batch channels height width"]) -> int:
        """The number of tokens that stand on no grid. Raises ValueError unless each corner of an image changes its token."""
        tokens, (height, width) = self.embed(images)
        apart = tokens.shape[1] - height * width
        corners = list(dict.fromkeys(itertools.product((0, height - 1), (0, width - 1))))
        patch_size = _in_pixels(self.patch_size, (height, width), images)
        changed = images[:1].repeat(1 + len(corners), 1, 1, 1)
        for image, corner in zip(changed[1:], corners, strict=True):
            _change(image, corner, patch_size)
        tokens, _ = self.embed(changed)
        found = (tokens[1:] - tokens[:1]).norm(dim=-1).argmax(-1)
        for (y, x), at in zip(corners, found.tolist(), strict=True):
            if at != apart + y * width + x:
                raise ValueError(
                    f"the patch in row {y}, column {x} changes token {at} of this {type(self.model).__name__}, not token "
                    f"{apart + y * width + x}: its tokens are not {apart} that stand on no grid and then {height}x{width} "
                    "patches by rows. Where they stand otherwise is known of models that attach knows, with nothing attached"
                )
        return apart


OF_STAGES = "Models of stages (Swin, ConvNeXt, Hiera) change their grid on the way and have no one grid to be measured on"


def _as_sequence(tokens: Any) -> Tensor:
    """(B, N, D), also of a model such as SAM, whose blocks keep (B, H, W, D)."""
    if not isinstance(tokens, Tensor):
        raise ValueError(
            f"a model can be inspected whose blocks keep one tensor of tokens; this one has {type(tokens).__name__}"
        )
    return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens


def _in_pixels(patch_size: Grid, grid: Grid, images: Tensor) -> Grid:
    """The patch size in pixels, where the patches may be of features that convolutions made of the image."""
    height, width = images.shape[-2:]
    fits = all(abs(side - n * size) < size for side, n, size in zip((height, width), grid, patch_size, strict=True))
    return patch_size if fits else (height // grid[0], width // grid[1])


def _change(image: Float[Tensor, "channels height width"], place: Grid, patch_size: Grid) -> None:
    """Puts noise into the middle of one patch."""
    rows, columns = (slice(at * n + n // 4, at * n + n - n // 4) for at, n in zip(place, patch_size, strict=True))
    part = image[:, rows, columns]
    part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(0)))


def _packed(images: Float[Tensor, "batch channels height width"], patch_size: Grid) -> dict[str, Tensor]:
    """The patches of whole images as the image processor of SigLIP 2 lays them out, all of one grid, without padding."""
    grid = (images.shape[-2] // patch_size[0], images.shape[-1] // patch_size[1])
    whole = images[..., : grid[0] * patch_size[0], : grid[1] * patch_size[1]]
    patches = whole.unflatten(-1, (grid[1], patch_size[1])).unflatten(-3, (grid[0], patch_size[0]))  # (B, C, H, p, W, p)
    values = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    seen = torch.ones(values.shape[:2], dtype=torch.long, device=images.device)
    shapes = torch.tensor(grid, device=images.device).expand(len(images), -1)
    return {"pixel_values": values, "pixel_attention_mask": seen, "spatial_shapes": shapes}


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
    """The longest list of alike modules that contain attention. Raises ValueError where it is within one stage of several."""
    lists = [list(found) for found in model.modules() if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found)]
    found = [blocks for blocks in lists if len(set(map(type, blocks))) == 1 and _attends(blocks[0])]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of blocks with attention, so it is no vision transformer")
    longest = max(found, key=len)
    stages = next((each for each in found if len(each) > 1 and any(_holds(stage, longest[0]) for stage in each)), None)
    if stages is not None:
        raise ValueError(f"the blocks of this {type(model).__name__} stand in {len(stages)} stages. {OF_STAGES}")
    return longest


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return module is not part and any(each is part for each in module.modules())


def _attends(block: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in block.modules())


def _patches(model: nn.Module) -> tuple[nn.Module, Read, int]:
    """What is called for the patches, how a call tells their layout, and how many tokens stand behind them."""
    try:
        host = find_host(model)
    except (ValueError, ImportError):
        return _projection(model), grid_of_output, 0
    assert host.source is not None
    return host.source, host.tokens.read, host.tokens.num_suffix


def _projection(model: nn.Module) -> nn.Module:
    """The convolution that makes patches: the first whose stride is as large as its kernel."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    found = next((module for module in convolutions if module.stride == module.kernel_size != (1, 1)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no convolution that makes patches, from which its grid could be read")
    return found


def _patch_size(source: Any) -> Grid:
    """(height, width) of the patches that it makes, of the pixels or features that it sees."""
    found = source.stride if isinstance(source, nn.Conv2d) else source.patch_size
    height, width = found if isinstance(found, (tuple, list)) else (found, found)
    return int(height), int(width)
