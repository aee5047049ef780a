"""transformers from 5.9 on: the vision transformers in `FAMILIES`, on the host's own back ends `eager` and `sdpa`.

The forward below is the one that all of them have there, with the bias added to the mask that goes into the
back end, which is the host's and is looked up in every call, so `set_attn_implementation` works as before. What differs
from family to family is where the parts of attention are, and which tokens stand on no grid.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sape2.adapters.attached import Host, Size
from sape2.adapters.attention import Attached, Window, attend_with, shifted
from sape2.adapters.layouts import Layout, Scattered, grids_of
from sape2.adapters.reasons import reason
from sape2.adapters.tokens import Tokens, grid_of_output, inside
from sape2.encodings.derivatives import is_transformed
from sape2.encodings.grid import Grid, as_grid


@dataclass(frozen=True)
class Family:
    """An attention class: its module in transformers.models, the tokens around the patches, and the names of its parts."""

    module: str
    num_prefix: Callable[[Any], int] = lambda config: 1
    num_suffix: Callable[[Any], int] = lambda config: 0
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    output: str | None = "o_proj"
    num_heads: str = "num_attention_heads"
    scale: str = "scaling"
    dropout: str = "attention_dropout"


def _two_towers(module: str, num_prefix: int) -> Family:
    """CLIP and what is made like it."""
    return Family(module, lambda config: num_prefix, output="out_proj", num_heads="num_heads", scale="scale", dropout="dropout")


def _unprojected(
    module: str, num_prefix: Callable[[Any], int] = lambda config: 1, num_suffix: Callable[[Any], int] = lambda config: 0
) -> Family:
    """YOLOS, and DINOv2 before transformers 5.18: the output is projected by the module around the attention."""
    return Family(module, num_prefix, num_suffix, ("query", "key", "value"), output=None, dropout="dropout_prob")


def _registers(config: Any) -> int:
    """A class token and registers."""
    return 1 + config.num_register_tokens


NEEDED = (5, 9)  # before it the names of parts differ
DINOV2, WITH_REGISTERS = "dinov2.modeling_dinov2", "dinov2_with_registers.modeling_dinov2_with_registers"
FAMILIES = {
    "ViTAttention": Family("vit.modeling_vit"),
    "DeiTAttention": Family("deit.modeling_deit", lambda config: 2),  # class and distillation token
    "Dinov2Attention": Family(DINOV2),
    "Dinov2SelfAttention": _unprojected(DINOV2),
    "Dinov2WithRegistersAttention": Family(WITH_REGISTERS, _registers),
    "Dinov2WithRegistersSelfAttention": _unprojected(WITH_REGISTERS, _registers),
    "DINOv3ViTAttention": Family("dinov3_vit.modeling_dinov3_vit", _registers, num_heads="num_heads", dropout="dropout"),
    "CLIPAttention": _two_towers("clip.modeling_clip", 1),
    "SiglipAttention": _two_towers("siglip.modeling_siglip", 0),
    "IJepaAttention": Family("ijepa.modeling_ijepa", lambda config: 0),
    "ViTMSNAttention": Family("vit_msn.modeling_vit_msn"),
    "YolosSelfAttention": _unprojected("yolos.modeling_yolos", num_suffix=lambda config: config.num_detection_tokens),
    "BeitAttention": Family("beit.modeling_beit"),
    "ViTMAEAttention": Family("vit_mae.modeling_vit_mae"),
    "Siglip2Attention": _two_towers("siglip2.modeling_siglip2", 0),
    "SwinAttention": Family("swin.modeling_swin", lambda config: 0),
    "SamVisionAttention": Family("sam.modeling_sam", lambda config: 0, scale="scale", dropout="dropout"),
    "SamVisionSdpaAttention": Family("sam.modeling_sam", lambda config: 0, scale="scale", dropout="dropout"),
}
KIND = re.compile("(Vision)?(Self|Sdpa)?Attention$")
NO_BIAS = {
    "flex_attention": "its masks are compiled before q and k are known, and it has no backward pass on a CPU",
    "flash_attention_2": "flash kernels take no bias",
    "flash_attention_3": "flash kernels take no bias",
}


class _Attached(Attached):
    family: ClassVar[Family]
    library: ClassVar[Any]
    functions: ClassVar[Any]

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None, **kwargs: Any
    ) -> tuple:
        check_backend(self.config._attn_implementation)
        attention_mask, window = self.host_mask(hidden_states, attention_mask)
        projected = (getattr(self, name)(hidden_states) for name in self.family.projections)
        q, k, v = (each.unflatten(-1, (getattr(self, self.family.num_heads), -1)).transpose(1, 2) for each in projected)
        bias = self.bias_map(q, k, attention_mask, hidden_states, window)
        if position_embeddings is None:
            q, k = self.rotate(q, k, window)
        else:
            q, k = self.library.apply_rotary_pos_emb(q, k, *position_embeddings)
        # In torch.func the fused kernel refuses a mask with a gradient.
        back_end = "eager" if is_transformed(q) else self.config._attn_implementation
        attention = self.functions.get_interface(back_end, self.library.eager_attention_forward)
        dropout = getattr(self, self.family.dropout) if self.training else 0.0
        bias = None if bias is None else bias.to(q.dtype)
        scale = getattr(self, self.family.scale)
        output, weights = attention(self, q, k, v, bias, dropout=dropout, scaling=scale, **kwargs)
        output = output.flatten(2)
        return output if self.family.output is None else getattr(self, self.family.output)(output), weights

    def host_mask(self: Any, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Window | None]:
        """What the host adds to its logits, and the window that the call is for."""
        return mask, None


class _AttachedWindow(_Attached):
    """Swin's: each window is a grid."""

    def host_mask(self: Any, hidden_states: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Window | None]:
        table = self.relative_position_bias
        return shifted(table(), mask, table.window_size, len(hidden_states))


class _AttachedSam(Attached):
    """Those of SAM, with and without the fused product; hidden_states is a window or the whole grid, (B, H, W, D)."""

    library: ClassVar[Any]

    def forward(self: Any, hidden_states: Tensor, output_attentions: Any = None) -> tuple[Tensor, Tensor | None]:
        grid = as_grid(hidden_states.shape[1], hidden_states.shape[2])
        x = hidden_states.flatten(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None
        if self.use_rel_pos:
            bias = self.get_decomposed_rel_pos(q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, grid, grid)
            bias = bias.reshape(*q.shape[:-1], q.shape[-2])
        bias = self.bias_map(q, k, bias, x, Window(grid))
        q, k = self.rotate(q, k, Window(grid))
        if self.host_class is self.library.SamVisionSdpaAttention:  # which drops nothing out, also in training
            output, weights = attend_with(q, k, v, bias), None
        else:
            logits = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.softmax(logits if bias is None else logits + bias, dtype=torch.float32, dim=-1).to(q.dtype)
            output = F.dropout(weights, p=self.dropout, training=self.training) @ v
            weights = weights.flatten(0, 1)
        return self.proj(output.transpose(1, 2).flatten(2).unflatten(1, grid)), weights


BASES = {"SwinAttention": _AttachedWindow, "SamVisionAttention": _AttachedSam, "SamVisionSdpaAttention": _AttachedSam}


def check_backend(name: str | None) -> None:
    """Raises ValueError for a back end that takes no bias."""
    if name not in ("eager", "sdpa", None):
        reason = NO_BIAS.get(name, "what it does with a bias is not known")
        raise ValueError(f'the attention back end {name!r} cannot carry an attached encoding: {reason}. Use "sdpa" or "eager"')


@functools.cache
def attached_class(name: str) -> type[Attached]:
    """The subclass of one of the attention classes in `FAMILIES`; made when asked for, since the library may be absent."""
    module = importlib.import_module(f"transformers.models.{FAMILIES[name].module}")
    host = getattr(module, name)
    contents = {
        "__module__": __name__,
        "__doc__": f"transformers' `{name}` with an encoding.",
        "family": FAMILIES[name],
        "library": module,
        "functions": importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS,
    }
    return type(f"Attached{name}", (BASES.get(name, _Attached), host), contents)


def __getattr__(name: str) -> Any:
    """So that models with an encoding can be pickled, which looks up classes by name."""
    if name.startswith("Attached") and name.removeprefix("Attached") in FAMILIES:
        return attached_class(name.removeprefix("Attached"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- where -----------------------------------------------------------------------------------------------------------


def find(model: nn.Module) -> Host:
    _check_version()
    sources = [module for module in model.modules() if type(module).__name__ in READERS]
    sources = sources or [conv for module in model.modules() for conv in _projections(module)]
    tower = _tower(model, sources[0]) if len(sources) == 1 else None
    if tower is None:
        known = ", ".join(dict.fromkeys(KIND.sub("", name) for name in FAMILIES))
        several = len(sources) > 1 and any(_is_attention(part) for part in model.modules())
        why = f"it makes patches in {len(sources)} places" if several else reason(model)
        raise ValueError(
            f"attach knows models of transformers with one image tower of the kinds {known}; got {type(model).__name__}: {why}"
        )
    layers = list(_layers(tower))
    attentions = [attention for _, attention in layers]
    config, family = tower.config, FAMILIES[type(attentions[0]).__name__]
    check_backend(config._attn_implementation)
    grid = _grid(config)
    return Host(
        name=f"transformers {type(model).__name__}",
        layers=[(each, attached_class(type(each).__name__)) for each in attentions],
        source=sources[0],
        tokens=Tokens(
            family.num_prefix(config), family.num_suffix(config), read=READERS.get(type(sources[0]).__name__, grid_of_output)
        ),
        sizes=[_size(layer, attention, grid) for layer, attention in layers],
        rotates=any(type(each).__name__ == "DINOv3ViTAttention" for each in attentions),
    )


def _projections(module: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that make patches."""
    named = type(module).__name__.endswith("Embeddings")
    return [conv for conv in map(inside, module.children()) if isinstance(conv, nn.Conv2d)] if named else []


def _of_mae(embeddings: Any, inputs: Any, keywords: dict[str, Any], output: Any) -> Layout:
    """MAE shuffles the patches and keeps the first of them, all where `mask_ratio` is 0."""
    kept, _, restore = output
    height, width = (inputs[0] if inputs else keywords["pixel_values"]).shape[-2:]
    patch_height, patch_width = _pair(embeddings.patch_size)
    place = restore.argsort(dim=1)[:, : kept.shape[1] - 1]
    return Scattered(((height // patch_height, width // patch_width),) * len(place), place, torch.ones_like(place).bool())


def _of_siglip2(embeddings: Any, inputs: Any, keywords: dict[str, Any], output: Tensor) -> Layout:
    """NaFlex: each image has a grid of its own, padded to one number of tokens."""
    shapes = inputs[1] if len(inputs) > 1 else keywords["spatial_shapes"]
    place = torch.arange(output.shape[1], device=output.device).expand(len(output), -1)
    valid = place < shapes.to(output.device).prod(-1, keepdim=True)
    return Scattered(grids_of(shapes), place, valid)


READERS = {"ViTMAEEmbeddings": _of_mae, "Siglip2VisionEmbeddings": _of_siglip2}


def _grid(config: Any) -> Grid:
    """That of the images, or of the positions, for which a tower was made."""
    if getattr(config, "image_size", None) is None:
        return (int(config.num_patches**0.5),) * 2
    (height, width), (patch_height, patch_width) = _pair(config.image_size), _pair(config.patch_size)
    return height // patch_height, width // patch_width


def _tower(model: nn.Module, source: nn.Module) -> Any:
    """The smallest part of the model that makes patches and has attention: towers of text and decoders stay out."""
    around = [part for part in model.modules() if any(each is source for each in part.modules())]
    return next((part for part in reversed(around) if any(_layers(part))), None)


def _layers(tower: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Attention modules, each after the module that holds it."""
    for holder in tower.modules():
        yield from ((holder, part) for part in holder.children() if _is_attention(part))


def _is_attention(part: nn.Module) -> bool:
    """By name and by projections: before transformers 5.18 `Dinov2Attention` was the module around the attention."""
    family = FAMILIES.get(type(part).__name__)
    return family is not None and any(hasattr(part, name) for name in ("qkv", family.projections[0]))


def _size(layer: Any, attention: Any, grid: Grid) -> Size:
    """`grid`: that of the images, for layers without windows."""
    family = FAMILIES[type(attention).__name__]
    num_heads = getattr(attention, family.num_heads)
    window = getattr(layer, "window_size", 0)
    fused = getattr(attention, "qkv", None)
    width = getattr(attention, family.projections[0]).out_features if fused is None else fused.out_features // 3
    return Size(num_heads, width // num_heads, (window, window) if window else grid)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def _check_version() -> None:
    version = importlib.import_module("transformers").__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) < NEEDED:
        needed = ".".join(map(str, NEEDED))
        raise ImportError(f"attach needs transformers {needed} or newer; got {version}: pip install 'sape2[hosts]'")
