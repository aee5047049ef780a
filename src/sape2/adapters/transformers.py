"""transformers 5: ViT, DeiT, DINOv2 with and without registers, on the host's own back ends `eager` and `sdpa`.

The forward below is the one that all of them have in transformers 5, with the bias added to the mask that goes into the
back end, which is the host's and is looked up in every call, so `set_attn_implementation` works as before.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, ClassVar

from torch import Tensor, nn

from sape2.adapters.attached import Attached, Host

# attention class: (its module in transformers.models, number of prefix tokens)
FAMILIES: dict[str, tuple[str, Any]] = {
    "ViTAttention": ("vit.modeling_vit", lambda config: 1),
    "DeiTAttention": ("deit.modeling_deit", lambda config: 2),  # class and distillation token
    "Dinov2Attention": ("dinov2.modeling_dinov2", lambda config: 1),
    "Dinov2WithRegistersAttention": (
        "dinov2_with_registers.modeling_dinov2_with_registers",
        lambda config: 1 + config.num_register_tokens,
    ),
}
NO_BIAS = {
    "flex_attention": "its masks are compiled before q and k are known, and it has no backward pass on a CPU",
    "flash_attention_2": "flash kernels take no bias",
    "flash_attention_3": "flash kernels take no bias",
}


class _Attached(Attached):
    functions: ClassVar[Any]
    eager: ClassVar[Any]

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> tuple:
        check_backend(self.config._attn_implementation)
        attention_mask = self.sape2_tokens.given_mask(attention_mask)
        self.sape2_tokens.check_padding(attention_mask)
        projections = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projections)
        bias = self.bias_map(q, k, attention_mask, hidden_states)
        q, k = self.rotate(q, k)
        attention = self.functions.get_interface(self.config._attn_implementation, self.eager)
        dropout = self.attention_dropout if self.training else 0.0
        bias = None if bias is None else bias.to(q.dtype)
        output, weights = attention(self, q, k, v, bias, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2)), weights


def check_backend(name: str | None) -> None:
    """Raises ValueError for a back end that takes no bias."""
    if name not in ("eager", "sdpa", None):
        reason = NO_BIAS.get(str(name), "what it does with a bias is not known")
        raise ValueError(f'the attention back end {name!r} cannot carry an attached encoding: {reason}. Use "sdpa" or "eager"')


@functools.cache
def attached_class(name: str) -> type[Attached]:
    """The subclass of one of the attention classes in `FAMILIES`; made when asked for, since the library may be absent."""
    module = importlib.import_module(f"transformers.models.{FAMILIES[name][0]}")
    functions = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    host = getattr(module, name)
    contents = {
        "__module__": __name__,
        "__doc__": f"transformers' `{name}` with an encoding.",
        "host_class": host,
        "functions": functions,
        "eager": staticmethod(module.eager_attention_forward),
    }
    return type(f"Attached{name}", (_Attached, host), contents)


def __getattr__(name: str) -> Any:
    """So that models with an encoding can be pickled, which looks up classes by name."""
    if name.startswith("Attached") and name.removeprefix("Attached") in FAMILIES:
        return attached_class(name.removeprefix("Attached"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find(model: nn.Module) -> Host:
    _check_version()
    attentions: list[Any] = [module for module in model.modules() if type(module).__name__ in FAMILIES]
    patches = [module for module in model.modules() if type(module).__name__.endswith("PatchEmbeddings")]
    if not attentions or len(patches) != 1:
        known = ", ".join(name.removesuffix("Attention") for name in FAMILIES)
        raise ValueError(
            f"attach knows models of transformers with one image tower of the kinds {known}; got {type(model).__name__}"
        )
    first, name = attentions[0], type(attentions[0]).__name__
    check_backend(first.config._attn_implementation)
    patch: Any = patches[0]
    height, width = (int(patch.image_size[i]) // int(patch.patch_size[i]) for i in (0, 1))
    return Host(
        name=f"transformers {type(model).__name__}",
        layers=[(attention, attached_class(name)) for attention in attentions],
        projection=patch.projection,
        num_prefix=FAMILIES[name][1](first.config),
        grid=(height, width),
        num_heads=first.num_attention_heads,
        head_dim=first.head_dim,
    )


def _check_version() -> None:
    version = importlib.import_module("transformers").__version__
    if int(version.split(".")[0]) < 5:
        raise ImportError(f"attach needs transformers 5 or newer; got {version}: pip install 'sape2[hosts]'")
