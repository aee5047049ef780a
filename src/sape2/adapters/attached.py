"""Puts an encoding into a host and takes it out again.

`attach` gives each attention module of the host a submodule `sape2`, the encoding, and changes the class of the module
to a subclass that overrides `forward` alone. An encoding of the tokens is a submodule of a block, called by a hook
(`after.py`). The modules, their parameters, names, hooks and training mode stay the same objects; `detach` changes the
class back. Why so: docs/decisions/0004-attach.md.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from sape2.adapters.after import AfterBlock, block_around, change_output
from sape2.adapters.attention import Attached, encoding_of, replaced
from sape2.adapters.start import Start, prepare
from sape2.adapters.tokens import Tokens
from sape2.encodings import TOKEN_ENCODINGS, create_encodings
from sape2.encodings.base import AttentionEncoding, NoEncoding, TokenEncoding, encoding_names, without_decay
from sape2.encodings.grid import Grid, check_grid
from sape2.encodings.names import name_once

Trainable = Literal["all", "encoding"]
Model = TypeVar("Model", bound=nn.Module)


class Size(NamedTuple):
    """What the tables of one attention module are made for. The grid is None where the model does not say it."""

    num_heads: int
    head_dim: int
    grid: Grid | None


@dataclass(frozen=True)
class Host:
    """The places in a model of a host library where an encoding is attached."""

    name: str
    layers: list[tuple[nn.Module, type[Attached]]]  # each attention module and the class that it gets
    source: nn.Module | None  # from whose calls `tokens` reads where the patches are
    tokens: Tokens
    sizes: list[Size]  # of each attention module
    rotates: bool = False
    drops: tuple[nn.Module, type[nn.Module]] | None = None  # patch dropout and the class that it gets, which says what stays


class Changed:
    """A module whose class is changed to one that shares `sape2_tokens`, until `remove`, as a hook has it."""

    def __init__(self, module: nn.Module, attached_class: type[nn.Module], tokens: Tokens) -> None:
        self.module, self.host_class, self.attached_class = module, type(module), attached_class
        module.sape2_tokens = tokens  # pyrefly: ignore
        module.__class__ = attached_class  # pyrefly: ignore

    def check(self) -> None:
        """Raises ValueError if another tool has changed the class again."""
        if type(self.module) is not self.attached_class:
            raise ValueError(
                f"the class of an attached {self.host_class.__name__} was changed again, to {type(self.module).__name__}, as "
                "torch.nn.utils.parametrize and fully_shard do; take that off before detach"
            )

    def remove(self) -> None:
        self.module.__class__ = self.host_class  # pyrefly: ignore
        del self.module.sape2_tokens


@dataclass
class Attachment:
    """An attached encoding, with everything that `remove` needs to restore the model."""

    host: str
    encoding: str
    start: Start
    sizes: list[Size]
    attentions: dict[int, nn.Module]  # by layer; layers without encoding are left out
    blocks: dict[int, nn.Module]  # by layer, those behind which the tokens are changed
    tokens: Tokens
    hooks: list[Any]
    frozen: list[nn.Parameter]
    told: bool = False  # that nothing of the encoding learns

    def holders(self) -> list[nn.Module]:
        """The modules of the host that have an encoding as their `sape2`."""
        return [*self.attentions.values(), *self.blocks.values()]

    def encodings(self) -> list[nn.Module]:
        """Those that layers share, once."""
        return list(dict.fromkeys(holder.sape2 for holder in self.holders()))  # pyrefly: ignore

    def tell_if_frozen(self) -> None:
        parameters = [p for encoding in self.encodings() for p in encoding.parameters()]
        if parameters and not any(p.requires_grad for p in parameters):
            self.told = True
            warnings.warn(
                f"nothing of the attached {self.encoding!r} learns: all its parameters are frozen, as peft's get_peft_model "
                "freezes them. Attach after it, or set requires_grad_(True) for sape2.encoding_parameters(model)",
                stacklevel=2,
            )


def check_parts(attachment: Attachment) -> None:
    """Raises ValueError if peft has put something in the place of an encoding or of a part of one.

    Tables in such a part would be left out of the bias, or written under names that no model has.
    """
    parts = (part for encoding in attachment.encodings() for part in encoding.modules())
    if (strange := next((part for part in parts if type(part).__module__.startswith("peft.")), None)) is not None:
        raise replaced(strange)


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of what must not decay: those of the host and everything of the encoding; what timm's optimisers ask for."""
    own: Any = getattr(type(model), "no_weight_decay", None)
    return without_decay(encoding_names(model) | (set(own(model)) if own else set()))


def put_in(model: nn.Module, host: Host, encoding: str, trainable: Trainable, start: Start, grids: list[Grid | None]) -> None:
    """Gives the attention modules of `host` their encodings, for a grid each. Changes nothing if it raises."""
    if trainable not in get_args(Trainable):
        raise ValueError(f"trainable must be one of {', '.join(get_args(Trainable))}; got {trainable!r}")
    if any(grid is None for grid in grids):
        raise ValueError("the model does not say for which image size it was made; give grid=(H, W), the patches of one")
    sizes = [size._replace(grid=check_grid(grid)) for size, grid in zip(host.sizes, grids, strict=True)]
    on_tokens, layers = _create(host, encoding, start, sizes)
    if trainable == "encoding" and not any(True for part in (*on_tokens, *layers) for _ in part.parameters()):
        raise ValueError(
            f'{encoding!r} has no parameters here, so trainable="encoding" would leave nothing that learns; leave it out'
        )
    tokens = host.tokens
    given = [index for index, layer in enumerate(layers) if not isinstance(layer, NoEncoding)]
    first = {host.layers[index][0]: index for index in reversed(given)}  # a model may use one module in several layers
    used = {index: (*host.layers[index], layers[index]) for index in sorted(first.values())}
    frozen = [p for p in model.parameters() if p.requires_grad] if trainable == "encoding" else []
    blocks = {part.after_block or 0: block_around(model, host.layers[part.after_block or 0][0]) for part in on_tokens}
    changed = [module for module, *_ in used.values()]
    _check_changeable(model, [*changed, *blocks.values(), *([] if host.drops is None else [host.drops[0]])])
    hooks: list[Any] = [_swap(module, attached_class, layer, tokens, model) for module, attached_class, layer in used.values()]
    if blocks and "torch._dynamo" in sys.modules:  # else nothing was compiled, and a reset would import it, in a second
        torch.compiler.reset()  # code that was compiled before does not look for a new hook
    for block, part in zip(blocks.values(), on_tokens, strict=True):
        _hold(block, AfterBlock(part, start, tokens), model)
        hooks.append(block.register_forward_hook(change_output, prepend=True))  # before what reads the block
    for parameter in frozen:
        parameter.requires_grad_(False)
    hooks += [] if host.source is None else _listen(model, host.source, tokens)
    hooks += [] if host.drops is None else [Changed(*host.drops, tokens)]
    hooks += [model.register_forward_pre_hook(_look_whether_it_learns), *name_once(model)]
    attentions = {index: module for index, (module, *_) in used.items()}
    attachment = Attachment(host.name, encoding, start, sizes, attentions, blocks, tokens, hooks, frozen)
    model.sape2_attachment = attachment  # pyrefly: ignore
    model.no_weight_decay = functools.partial(no_weight_decay, model)  # pyrefly: ignore


def _check_changeable(model: nn.Module, modules: list[nn.Module]) -> None:
    """Raises ValueError if another class would be without effect, or an encoding without values."""
    names = {id(module): name for name, module in model.named_modules()}
    for module in modules:
        name = names[id(module)] or type(module).__name__
        if "forward" in vars(module):
            raise ValueError(
                f"{name} has a forward of its own (of accelerate's device_map or offloading, or a patch), which hides that of "
                "its class, so an encoding would never be called; attach before that, or take it off"
            )
        if _like(module, model).is_meta:
            raise ValueError(
                f"{name} is on the meta device, where an encoding would lose its values; attach when the weights are loaded, "
                "so after from_pretrained and not within __init__"
            )


def _like(module: nn.Module, model: nn.Module) -> Tensor:
    """A tensor of the module or, since a quantized one may hold no parameters at all, of the model."""
    return next((tensor for part in (module, model) for tensor in (*part.parameters(), *part.buffers())), torch.empty(0))


def _listen(model: nn.Module, source: nn.Module, tokens: Tokens) -> list[Any]:
    """The hooks that tell `tokens` of every call."""
    patches = next(module for module in model.modules() if any(part is source for part in module.children()))
    hooks = [
        model.register_forward_pre_hook(tokens.enter),
        model.register_forward_hook(tokens.leave, always_call=True),
        source.register_forward_hook(tokens, with_kwargs=True),
    ]
    return hooks if patches is model else [*hooks, patches.register_forward_pre_hook(tokens.forget)]


Made = tuple[list[TokenEncoding], list[AttentionEncoding]]


def _create(host: Host, encoding: str, start: Start, sizes: list[Size]) -> Made:
    """What acts behind blocks, and an encoding for each layer; modules that layers share are shared by those of one size."""
    made = {size: _create_alike(host, encoding, start, size, len(sizes)) for size in dict.fromkeys(sizes)}
    return made[sizes[0]][0], [made[size][1][index] for index, size in enumerate(sizes)]


def _create_alike(host: Host, encoding: str, start: Start, size: Size, depth: int) -> Made:
    num_heads, head_dim, grid = size
    assert grid is not None
    with torch.device("cpu"):  # the probes of `prepare` are
        tokens, layers = create_encodings(encoding, num_heads, head_dim, grid, depth)
    if any(part.after_block is None for part in tokens):
        tables = [name for name, known in TOKEN_ENCODINGS.items() if known.after_block is None]
        rest = "+".join(part for part in encoding.split("+") if part.partition(":")[0].strip() not in tables)
        raise ValueError(
            f"{encoding!r} adds a vector of each place to the tokens, for which the model has its own positions. "
            f"Leave {' and '.join(tables)} out{f': attach {rest!r}' if rest else ''}"
        )
    if host.rotates and any(layer.rotates for layer in layers):
        raise ValueError(
            f"this {host.name} turns q and k itself; a second rotation, {encoding!r}, would mix with it. Attach a bias"
        )
    return tokens, prepare(layers, start, num_heads, head_dim)


def _swap(
    module: nn.Module, attached_class: type[Any], encoding: AttentionEncoding, tokens: Tokens, model: nn.Module
) -> Changed:
    _hold(module, encoding, model)
    return Changed(module, attached_class, tokens)


def _hold(module: nn.Module, encoding: nn.Module, model: nn.Module) -> None:
    """On the device of the module, in float32 whatever the precision of the host, float64 apart: positions need it."""
    like = _like(module, model)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    module.sape2 = encoding.to(like.device, dtype).train(module.training)


def _look_whether_it_learns(model: nn.Module, inputs: Any) -> None:
    """And, before that, whether it is what was attached. Told once, at a call in training."""
    attachment: Any = model.sape2_attachment
    if torch.compiler.is_compiling():
        return
    check_parts(attachment)
    if model.training and torch.is_grad_enabled() and not attachment.told:
        attachment.tell_if_frozen()


def check_free(model: nn.Module) -> None:
    """Raises ValueError if something is attached already, to the model or to one around it or within."""
    attachment = getattr(model, "sape2_attachment", None)
    if isinstance(attachment, Attachment):
        raise ValueError(f"the model has {attachment.encoding!r} attached already; detach it first")
    if any(isinstance(part, (Attached, AfterBlock)) for part in (model.modules() if isinstance(model, nn.Module) else ())):
        raise ValueError("an encoding is attached already to a part of this model or to one around it; detach it there first")


def detach(model: Model) -> Model:
    """Takes the encoding out: the classes, parameter names and trainable parameters are those before `attach`."""
    attachment = attachment_of(model)
    for hook in attachment.hooks:
        if isinstance(hook, Changed):
            hook.check()
    for holder in attachment.holders():
        del holder.sape2
        vars(holder).pop("sape2_both", None)
    for hook in attachment.hooks:
        hook.remove()
    for parameter in attachment.frozen:
        parameter.requires_grad_(True)
    del model.sape2_attachment, model.no_weight_decay
    return model


def attachment_of(model: nn.Module) -> Attachment:
    """Raises ValueError if nothing is attached."""
    attachment = getattr(model, "sape2_attachment", None)
    if not isinstance(attachment, Attachment):
        raise ValueError(f"nothing is attached to this {type(model).__name__}; give the very model that attach was given")
    return attachment


def attached_encodings(model: nn.Module) -> dict[int, AttentionEncoding]:
    """The attached encodings of attention by layer, counted from 0; layers without one are left out."""
    attachment = attachment_of(model)
    check_parts(attachment)
    return {index: encoding_of(module) for index, module in attachment.attentions.items()}


def encoding_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that attach brought, each once: for an optimiser group of their own, without weight decay."""
    yield from nn.ModuleList(attachment_of(model).encodings()).parameters()
