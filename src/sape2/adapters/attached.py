"""What all hosts share: where an encoding goes in a model, how attention uses it there, and how it is taken out again.

`attach` gives each attention module of the host a submodule `sape2`, the encoding, and changes the class of the module
to a subclass that overrides `forward` alone. The module, its parameters, names, hooks and training mode stay the same
objects; `detach` changes the class back. Why so: docs/decisions/0004-attach.md.
Axes: B batch, h heads, T = P + N tokens (P prefix tokens first), d head_dim.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from sape2.adapters.start import Start, looks_beyond_pairs, prepare, rotates
from sape2.attention import attend
from sape2.encodings import create_encodings
from sape2.encodings.base import AttentionEncoding, NoEncoding, bias_of
from sape2.encodings.grid import Grid, check_grid, num_tokens

Trainable = Literal["all", "encoding"]


# --- the tokens of a call --------------------------------------------------------------------------------------------


class _Place:
    """Where the calls of the model are."""

    def __init__(self) -> None:
        self.grid: Grid | None = None
        self.task = -1  # the backward pass in which the grid was read, -1 outside of any
        self.outer: list[tuple[Grid | None, int]] = []  # of the calls around this one, where a hook calls the model again


class _Running(_Place, threading.local):
    """A place for each thread."""


class Tokens:
    """What the attention modules of one model know of the tokens of the running call: each thread of its own.

    The grid is that of the output of the patch projection (B, D, H, W), never a square root. Gradient checkpointing runs
    blocks again in the backward pass, when other images may have passed since, and on an accelerator in a thread of its
    own: then the grid is the one with that many tokens among those seen. A copy of the model starts without any call.
    """

    def __init__(self, num_prefix: int, grid: Grid | None = None, counts: bool = False) -> None:
        self.num_prefix, self.given = num_prefix, grid
        self.counts = counts  # whether the encoding looks beyond pairs of patches
        self.running = _Running()
        self.compiled = _Place()  # of compiled code, for which torch.compile knows no threads
        self.seen: dict[int, set[Grid]] = {}  # by thread, since the last backward pass of that thread
        self.over: set[int] = set()  # threads whose backward pass has begun

    def __getstate__(self) -> dict[str, Any]:
        return {"num_prefix": self.num_prefix, "grid": self.given, "counts": self.counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def grid(self) -> Grid | None:
        """Of this thread; where it has none, the one that was given for all (`set_grid`)."""
        return self._place().grid or self.given

    def _place(self) -> _Place:
        return self.compiled if torch.compiler.is_compiling() else self.running

    def _read(self, grid: Grid | None) -> None:
        """Also for compiled blocks in a model that is not compiled."""
        self._place().grid = self.compiled.grid = grid

    def give(self, grid: Grid) -> None:
        """For the calls of this thread, and for threads that were given none."""
        self.given = self.running.grid = grid

    # Hooks. Of the model: `enter`, `leave`; of the module that makes the patches: `forget`; of its projection: `__call__`.

    def enter(self, model: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling():  # a graph would be made again for every grid that was there before
            self.running.outer.append((self.running.grid, self.running.task))
        self._read(None)

    def leave(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """After a call inside another one, its grid again."""
        if torch.compiler.is_compiling() or not self.running.outer:
            return
        grid, task = self.running.outer.pop()
        if self.running.outer:
            self._read(grid)
            self.running.task = task

    def forget(self, patches: nn.Module, inputs: Any) -> None:
        """So that a projection put in the place of the one with the hook cannot leave an old grid."""
        self._read(None)

    def __call__(self, projection: nn.Module, inputs: Any, output: Tensor) -> None:
        grid = (output.shape[-2], output.shape[-1])
        self._read(grid)
        if torch.compiler.is_compiling():
            return
        self.running.task = _backward_pass()
        if not torch.is_grad_enabled():
            return
        thread = threading.get_ident()
        if thread in self.over:  # the backward pass of what was seen before is over
            self.over.discard(thread)
            self.seen.pop(thread, None)
        self.seen[thread] = self.seen.get(thread, set()) | {grid}

    def grid_of(self, total: int) -> Grid:
        """The grid behind `total` tokens; raises ValueError if there is none, or more than one."""
        grid = self.grid
        if not torch.compiler.is_compiling() and _backward_pass() != -1 and (self.running.task != _backward_pass() or not grid):
            grid = self._seen_with(total) or grid
        if grid is None:
            raise ValueError(
                "no image has passed, in this thread, the patch projection that attach found, so the grid is not known; if the "
                "projection was replaced since, detach and attach again (save_adapter and load_adapter keep what was learned)"
            )
        if num_tokens(grid) + self.num_prefix != total:
            raise ValueError(
                f"an attached encoding needs all {grid[0]}x{grid[1]} patches after {self.num_prefix} prefix tokens; attention "
                f"got {total} tokens. Patch dropout and token merging take patches away: set patch_drop_rate to 0, or detach"
            )
        return grid

    def _seen_with(self, total: int) -> Grid | None:
        """Of the grids seen by any thread the one with that many tokens; raises ValueError if there are several."""
        thread = threading.get_ident()
        self.over.update([thread] if thread in self.seen else self.seen if len(self.seen) == 1 else [])
        fitting = {g for seen in list(self.seen.values()) for g in seen if num_tokens(g) + self.num_prefix == total}
        if len(fitting) > 1:
            raise ValueError(
                f"gradient checkpointing runs a block again on {total} tokens, one of the grids {sorted(fitting)} seen "
                "before this backward pass; call backward between images of different shapes and equally many patches"
            )
        return next(iter(fitting), None)

    def check_padding(self, mask: Tensor | None) -> None:
        """Raises ValueError for a mask of padded keys if the encoding would count the patches behind it all the same."""
        if mask is not None and self.counts:
            raise ValueError(
                "this encoding counts all patches of a line, also those that a padding mask hides, so padded images would not "
                "get the result of unpadded ones; crop or resize instead, or attach rpe, rpe_contextual or alibi"
            )


def _backward_pass() -> int:
    return torch._C._current_graph_task_id()  # as torch.utils.checkpoint asks; -1 outside of any


# --- attention -------------------------------------------------------------------------------------------------------


class Attached:
    """Mixed into the attention class of a host by a subclass that overrides `forward`."""

    host_class: ClassVar[type[nn.Module]]
    sape2: AttentionEncoding
    sape2_tokens: Tokens

    def attend(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        v: Float[Tensor, "batch heads tokens head_dim"],
        *,
        dropout: float,
        mask: Tensor | None = None,
        rotated: tuple[Tensor, Tensor] | None = None,
        tokens: Float[Tensor, "batch tokens dim"] | None = None,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Attention with the encoding. `mask`, `tokens`: as `bias_map`; `rotated`: q and k as the host turns them."""
        if mask is None and rotated is None:
            return attend(q, k, v, self.sape2_tokens.grid_of(q.shape[-2]), self.sape2, dropout, tokens=tokens)
        bias = self.bias_map(q, k, mask, tokens)
        q, k = rotated or self.rotate(q, k)
        mask = None if bias is None else bias.to(v.dtype)
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, dropout_p=dropout)

    def bias_map(self, q: Tensor, k: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> Tensor | None:
        """The bias of all T tokens (0 for prefix tokens) plus a mask, in logits; q and k before any rotation.

        A mask broadcasts to (B, h, T, T); True keeps a pair, as a float it is added. `tokens`, (B, T, D), are what the host
        projects to q and k, for encodings that read them.
        """
        grid, num_prefix = self.sape2_tokens.grid_of(q.shape[-2]), self.sape2_tokens.num_prefix
        of_grid = None if tokens is None else tokens[:, num_prefix:]
        bias = bias_of(self.sape2, q[:, :, num_prefix:], k[:, :, num_prefix:], grid, tokens=of_grid)
        additive = None if mask is None else as_additive(mask, q.dtype)
        if bias is None:
            return additive
        matrix = F.pad(bias.dense(), (num_prefix, 0, num_prefix, 0))  # (B or 1, h, T, T)
        matrix = matrix if matrix.dim() == 4 else matrix[None]
        return matrix if additive is None else matrix + additive

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k turned by the encoding; prefix tokens stay."""
        grid, num_prefix = self.sape2_tokens.grid_of(q.shape[-2]), self.sape2_tokens.num_prefix
        q_grid, k_grid = q[:, :, num_prefix:], k[:, :, num_prefix:]
        turned_q, turned_k = self.sape2.rotate(q_grid, k_grid, grid)
        if turned_q is q_grid:
            return q, k
        return torch.cat([q[:, :, :num_prefix], turned_q], -2), torch.cat([k[:, :, :num_prefix], turned_k], -2)


def as_additive(mask: Shaped[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """0 where a boolean mask keeps a pair and -inf where it does not; a float mask as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def causal_mask(total: int, device: torch.device) -> Bool[Tensor, "tokens tokens"]:
    return torch.ones(total, total, dtype=torch.bool, device=device).tril()


# --- putting in and taking out ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """Where an encoding goes in one model of a host library."""

    name: str
    layers: list[tuple[nn.Module, type[Attached]]]  # each attention module and the class that it gets
    projection: nn.Module | None  # its output is (B, D, H, W)
    num_prefix: int
    grid: Grid | None
    num_heads: int
    head_dim: int
    rotates: bool = False


@dataclass
class Attachment:
    """What was attached to a model, and what `remove` needs to restore it."""

    host: str
    encoding: str
    start: Start
    grid: Grid
    num_heads: int
    head_dim: int
    depth: int
    attentions: dict[int, nn.Module]  # by layer; layers without encoding are left out
    tokens: Tokens
    hooks: list[Any]
    frozen: list[nn.Parameter]


def put_in(model: nn.Module, host: Host, encoding: str, trainable: Trainable, start: Start, grid: Grid | None) -> None:
    """Gives the attention modules of `host` their encodings. Changes nothing if it raises."""
    if trainable not in get_args(Trainable):
        raise ValueError(f"trainable must be one of {', '.join(get_args(Trainable))}; got {trainable!r}")
    if grid is None and host.grid is None:
        raise ValueError("the model does not say for which image size it was made; give grid=(H, W), the patches of one")
    grid = check_grid(grid or host.grid or (0, 0))
    layers = _create(host, encoding, start, grid)
    tokens = Tokens(host.num_prefix, grid if host.projection is None else None, _counts(layers, host))
    used = {
        i: (m, c, e) for i, ((m, c), e) in enumerate(zip(host.layers, layers, strict=True)) if not isinstance(e, NoEncoding)
    }
    frozen = [p for p in model.parameters() if p.requires_grad] if trainable == "encoding" else []
    for module, attached_class, layer in used.values():
        _swap(module, attached_class, layer, tokens)
    for parameter in frozen:
        parameter.requires_grad_(False)
    hooks = [] if host.projection is None else _listen(model, host.projection, tokens)
    attentions = {index: module for index, (module, *_) in used.items()}
    sizes = (host.num_heads, host.head_dim, len(host.layers))
    model.sape2_attachment = Attachment(host.name, encoding, start, grid, *sizes, attentions, tokens, hooks, frozen)  # pyrefly: ignore


def _listen(model: nn.Module, projection: nn.Module, tokens: Tokens) -> list[Any]:
    """The hooks that tell `tokens` of every call."""
    patches = next(module for module in model.modules() if any(part is projection for part in module.children()))
    hooks = [
        model.register_forward_pre_hook(tokens.enter),
        model.register_forward_hook(tokens.leave, always_call=True),
        projection.register_forward_hook(tokens),
    ]
    return hooks if patches is model else [*hooks, patches.register_forward_pre_hook(tokens.forget)]


def _create(host: Host, encoding: str, start: Start, grid: Grid) -> list[AttentionEncoding]:
    with torch.device("cpu"):  # the probes of `prepare` are
        tokens, layers = create_encodings(encoding, host.num_heads, host.head_dim, grid, len(host.layers))
    if tokens:
        raise ValueError(
            f"attach puts encodings into attention; {encoding!r} also changes the tokens, for which the model has its own "
            "positions. Leave ape, sincos and cpe out"
        )
    if host.rotates and any(rotates(layer) for layer in layers):
        raise ValueError(
            f"this {host.name} turns q and k itself; a second rotation, {encoding!r}, would mix with it. Attach a bias"
        )
    return prepare(layers, start, host.num_heads, host.head_dim)


def _counts(layers: list[AttentionEncoding], host: Host) -> bool:
    different = {str(layer): layer for layer in layers}  # layers of one kind and the same options do the same
    return any(looks_beyond_pairs(layer, host.num_heads, host.head_dim) for layer in different.values())


def _swap(module: nn.Module, attached_class: type[Attached], encoding: AttentionEncoding, tokens: Tokens) -> None:
    """In the precision of the host, but not below float32: positions need it."""
    like = next(module.parameters())
    module.sape2 = encoding.to(like.device, torch.promote_types(like.dtype, torch.float32)).train(module.training)
    module.sape2_tokens = tokens  # pyrefly: ignore
    module.__class__ = attached_class  # pyrefly: ignore


def check_free(model: nn.Module) -> None:
    """Raises ValueError if something is attached already."""
    attachment = getattr(model, "sape2_attachment", None)
    if isinstance(attachment, Attachment):
        raise ValueError(f"the model has {attachment.encoding!r} attached already; detach it first")


def take_out(model: nn.Module) -> None:
    """Restores what `put_in` changed."""
    attachment = attachment_of(model)
    for module in attachment.attentions.values():
        module.__class__ = module.host_class  # pyrefly: ignore
        del module.sape2
        for name in ("sape2_tokens", "sape2_both"):
            vars(module).pop(name, None)
    for hook in attachment.hooks:
        hook.remove()
    for parameter in attachment.frozen:
        parameter.requires_grad_(True)
    del model.sape2_attachment


def attachment_of(model: nn.Module) -> Attachment:
    """Raises ValueError if nothing is attached."""
    attachment = getattr(model, "sape2_attachment", None)
    if not isinstance(attachment, Attachment):
        raise ValueError(f"nothing is attached to this {type(model).__name__}; give the very model that attach was given")
    return attachment


def attached_encodings(model: nn.Module) -> dict[int, AttentionEncoding]:
    """The attached encodings by layer, counted from 0; layers without one are left out."""
    found = {index: module.sape2 for index, module in attachment_of(model).attentions.items()}
    return {index: encoding for index, encoding in found.items() if isinstance(encoding, AttentionEncoding)}


def encoding_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that attach brought, each once: for an optimiser group of their own, without weight decay."""
    yield from nn.ModuleList(attached_encodings(model).values()).parameters()
