"""The interface of position encodings: where they act, the hooks they implement and the facts they declare.

A *token* encoding acts once on the tokens. An *attention* encoding acts in every layer through two hooks,
`rotate` and `bias`, both no-ops by default. Shapes: q, k are (B, h, N, d), unscaled, without prefix tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.bias import Distances, Factors, Matrix, Places
from sape2.encodings.grid import Axis, Grid, check_tokens
from sape2.encodings.options import changed_options, make_options

MAX_POSITIONS = 2**20  # rows of a table: a position of its own for every token of the largest grids


@dataclass(frozen=True)
class NoOptions:
    """Options of encodings that have none."""


Term = Matrix | Factors | Places | Distances
LineScores = dict[Axis, Tensor]  # q.k / sqrt(d) of every token with those of its own line, (B, h, S, H, W): `grid.own_line`


class AttentionBias:
    """A bias in logits, added after the 1/sqrt(d) scale: a sum of terms, see `sape2.encodings.bias` for the kinds.

    `AttentionBias(Matrix(b))` is a map that is there already; the other kinds need no N x N map in memory.
    """

    def __init__(self, *terms: Term, dtype: torch.dtype | None = None) -> None:
        if not terms:
            raise ValueError("an AttentionBias needs at least one term")
        self.terms, self.dtype = terms, dtype

    def dense(self) -> Float[Tensor, "*batch_heads tokens tokens"]:
        """The whole bias as one map, in `dtype` if one was given, else as precise as its terms."""
        with no_autocast(self.tensors()[0]):
            total = functools.reduce(operator.add, [term.dense() for term in self.terms])
        return total if self.dtype is None else total.to(self.dtype)

    def __add__(self, other: AttentionBias) -> AttentionBias:
        return AttentionBias(*self.terms, *other.terms, dtype=self.dtype or other.dtype)

    def scaled(self, scale: float | Tensor) -> AttentionBias:
        """`scale` times the bias; a tensor must broadcast against both a map and its rows, (h, 1, 1) for one per head."""
        if isinstance(scale, float) and scale == 1.0:
            return self
        return AttentionBias(*(term.scaled(scale) for term in self.terms), dtype=self.dtype)

    def tensors(self) -> list[Tensor]:
        """The tensors of all terms, in the order of the terms."""
        return [tensor for term in self.terms for tensor in term.tensors()]

    @property
    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for tensor in self.tensors())

    def factored(self) -> tuple[Tensor, Tensor] | None:
        """(query_side, key_side), (..., N, r), of all terms that are dot products; None if none is."""
        pairs = [term.factors() for term in self.terms]  # torch.compile cannot trace a walrus in a comprehension
        given = [pair for pair in pairs if pair is not None]
        return (_concatenate([p[0] for p in given]), _concatenate([p[1] for p in given])) if given else None

    def unfactored(self) -> AttentionBias | None:
        """The terms that are no dot products; None if all are."""
        rest = [term for term in self.terms if term.factors() is None]
        return AttentionBias(*rest, dtype=self.dtype) if rest else None

    def add_to(self, logits: Float[Tensor, "count rows tokens"], rows: slice, work: Tensor) -> None:
        """Adds some rows of the bias to a block of logits, in place; `work` is space in its shape."""
        for term in self.terms:
            term.add_to(logits, rows, work)

    def accumulate(self, grad: Float[Tensor, "count rows tokens"], rows: slice, grads: Sequence[Tensor], work: Tensor) -> None:
        """Adds to `grads`, in the order of `tensors()`, what the gradient of a block of logits gives."""
        start = 0
        for term in self.terms:
            count = len(term.tensors())
            term.accumulate(grad, rows, grads[start : start + count], work)
            start += count


def _concatenate(sides: list[Tensor]) -> Tensor:
    lead = torch.broadcast_shapes(*(side.shape[:-1] for side in sides))
    return torch.cat([side.expand(*lead, side.shape[-1]) for side in sides], dim=-1)


@dataclass(frozen=True)
class Facts:
    """Properties that an encoding has by construction. Tests check both directions: a true one holds, a false one fails.

    `content_dependent`: what the encoding adds depends on the content (false for a rotation, which is linear in q and k).
    The symmetries are those of the logit map a(x)[i, n] when the same content moves:
    `translation` by a step without wrap-around (pairs that stay inside), the others as permutations of the grid.
    """

    content_dependent: bool = False
    translation: bool = False
    row_permutation: bool = False
    column_permutation: bool = False
    circular_shift: bool = False
    flip: bool = False
    any_grid: bool = True


class TokenEncoding(nn.Module):
    """Adds position to the tokens once: before the first block, or after block `after_block`.

    With `every_layer` a model has a module before every block, see `sape2.encodings.create_encodings`.

    A class says what it is (`summary`), where it comes from (`source`), and which settings of its options are worth a
    comparison (`variants`: options -> what they are and where they come from); `sape2 list encodings` shows all three.
    """

    Options: type = NoOptions
    summary: str
    source: str
    variants: ClassVar[dict[str, str]] = {}
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # names of several options at once, the default first
    facts = Facts()
    after_block: int | None = None
    every_layer: bool = False

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__()

    def forward(self, tokens: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return changed_options(self.Options, getattr(self, "options", None))


class AttentionEncoding(nn.Module):
    """Adds position inside attention. Both hooks see grid tokens only; `bias` sees q and k before rotation.

    `summary`, `source` and `variants` as in `TokenEncoding`. A bias may depend on q, k and the encoding's parameters, image
    by image, and on nothing else. An encoding that reads the products q.k of the tokens of one line says so in
    `score_axes`; its `bias` then takes a further argument, `scores`, and must give the same without it: attention hands
    over what it has computed anyway. One that reads more of the block's input than q and k is a `TokenReader`.
    """

    Options: type = NoOptions
    summary: str
    source: str
    variants: ClassVar[dict[str, str]] = {}
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # names of several options at once, the default first
    facts = Facts()
    score_axes: tuple[Axis, ...] = ()
    reads_tokens: bool = False

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__()

    @property
    def makes_bias(self) -> bool:
        return type(self).bias is not AttentionEncoding.bias

    def extra_repr(self) -> str:
        return changed_options(self.Options, getattr(self, "options", None))

    def check_trainable(self) -> None:
        """Raises ValueError if the encoding stands at a point from which it cannot learn."""

    def rotate(
        self, q: Float[Tensor, "batch heads tokens head_dim"], k: Float[Tensor, "batch heads tokens head_dim"], grid: Grid
    ) -> tuple[Float[Tensor, "batch heads tokens head_dim"], Float[Tensor, "batch heads tokens head_dim"]]:
        return q, k

    def bias(
        self, q: Float[Tensor, "batch heads tokens head_dim"], k: Float[Tensor, "batch heads tokens head_dim"], grid: Grid
    ) -> AttentionBias | None:
        return None

    def key_vectors(
        self, q: Float[Tensor, "batch heads tokens head_dim"], grid: Grid
    ) -> Float[Tensor, "*#heads tokens head_dim"] | None:
        """Vectors e if all that the encoding does is the bias q_i . e_n, so that attention adds them to the keys; else None.

        They are the same for all images: of q they see the shape. `bias` gives the same as a term, for maps, and for where
        another encoding turns the queries.
        """
        return None

    def maps(
        self, q: Float[Tensor, "batch heads tokens head_dim"], k: Float[Tensor, "batch heads tokens head_dim"], grid: Grid
    ) -> dict[str, Tensor]:
        """Intermediate results of the encoding, each (B, h, N, ...); at least `bias` if there is one."""
        bias = self.bias(q, k, grid)
        return {} if bias is None else {"bias": bias.dense().expand(q.shape[0], q.shape[1], -1, -1)}


def encoding_names(model: nn.Module) -> set[str]:
    """Names of the parameters of all encodings in a model."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, (TokenEncoding, AttentionEncoding))
        for name, _ in module.named_parameters()
    }


def names_without_decay(model: nn.Module) -> set[str]:
    """These names, and as patterns of timm, `*.NAME`, for a model that `torch.compile` or peft gives longer names."""
    names = encoding_names(model)
    return names | {f"*.{name}" for name in names}


class TokenReader(AttentionEncoding):
    """An attention encoding whose bias reads, besides q and k, what they are projected from: the normed input of the block.

    Its hooks take these `tokens`, (B, N, D), without prefix tokens, and ask for them by `check_read`.
    """

    reads_tokens = True

    def maps(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        grid: Grid,
        tokens: Float[Tensor, "batch tokens dim"] | None = None,
    ) -> dict[str, Tensor]:
        bias = bias_of(self, q, k, grid, tokens=tokens)
        return {} if bias is None else {"bias": bias.dense().expand(q.shape[0], q.shape[1], -1, -1)}


def bias_of(
    encoding: AttentionEncoding,
    q: Tensor,
    k: Tensor,
    grid: Grid,
    scores: LineScores | None = None,
    tokens: Tensor | None = None,
) -> AttentionBias | None:
    """The bias, with the scores and tokens of the grid handed over to an encoding that reads such."""
    hook: Any = encoding.bias
    lines = (scores,) if scores and encoding.score_axes else ()
    return hook(q, k, grid, *lines, tokens=tokens) if encoding.reads_tokens else hook(q, k, grid, *lines)


def maps_of(encoding: AttentionEncoding, q: Tensor, k: Tensor, grid: Grid, tokens: Tensor | None = None) -> dict[str, Tensor]:
    """`maps`, with the tokens of the grid handed over to an encoding that reads them."""
    hook: Any = encoding.maps
    return hook(q, k, grid, tokens=tokens) if encoding.reads_tokens else hook(q, k, grid)


def check_read(name: str, tokens: Tensor | None, dim: int, grid: Grid) -> Tensor:
    """The tokens that an encoding reads, in float32 or better; raises ValueError if there are none, or of another width."""
    if tokens is None:
        raise ValueError(f"{name} reads the normed input of the block besides q and k; give tokens, (batch, tokens, {dim})")
    check_tokens(tokens, grid)
    if tokens.shape[-1] != dim:
        raise ValueError(f"this {name} reads tokens of width {dim} (num_heads times head_dim); got {tokens.shape[-1]}")
    return full_precision(tokens)


class NoEncoding(AttentionEncoding):
    """No position at all: the control of every comparison."""

    summary = "no position encoding, the control"
    source = "-"
    facts = Facts(translation=True, row_permutation=True, column_permutation=True, circular_shift=True, flip=True)

    def __init__(self, num_heads: int = 1, head_dim: int = 1, grid: Grid = (1, 1), **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid)
        make_options(NoOptions, "none", options)


class Composite(AttentionEncoding):
    """Several attention encodings at once: rotations one after the other, biases added."""

    def __init__(self, parts: list[AttentionEncoding]) -> None:
        nn.Module.__init__(self)
        self.parts = nn.ModuleList(parts)
        facts = [part.facts for part in parts]
        symmetries = {field.name: all(getattr(fact, field.name) for fact in facts) for field in dataclasses.fields(Facts)}
        self.facts = Facts(**symmetries | {"content_dependent": any(fact.content_dependent for fact in facts)})
        self.score_axes = tuple(dict.fromkeys(axis for part in parts for axis in part.score_axes))
        self.reads_tokens = any(part.reads_tokens for part in parts)

    @property
    def makes_bias(self) -> bool:
        return any(part.makes_bias for part in self._members())

    def check_trainable(self) -> None:
        for part in self._members():
            part.check_trainable()

    def _members(self) -> Iterator[AttentionEncoding]:
        return (part for part in self.parts if isinstance(part, AttentionEncoding))

    def rotate(
        self, q: Float[Tensor, "batch heads tokens head_dim"], k: Float[Tensor, "batch heads tokens head_dim"], grid: Grid
    ) -> tuple[Float[Tensor, "batch heads tokens head_dim"], Float[Tensor, "batch heads tokens head_dim"]]:
        for part in self._members():
            q, k = part.rotate(q, k, grid)
        return q, k

    def bias(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        grid: Grid,
        scores: LineScores | None = None,
        tokens: Float[Tensor, "batch tokens dim"] | None = None,
    ) -> AttentionBias | None:
        biases = [bias_of(part, q, k, grid, scores, tokens) for part in self._members()]
        given = [bias for bias in biases if bias is not None]
        return functools.reduce(operator.add, given) if given else None

    def key_vectors(
        self, q: Float[Tensor, "batch heads tokens head_dim"], grid: Grid
    ) -> Float[Tensor, "*#heads tokens head_dim"] | None:
        """The sum, where all parts are of that kind."""
        vectors = [part.key_vectors(q, grid) for part in self._members()]
        given = [v for v in vectors if v is not None]
        return functools.reduce(operator.add, given) if given and len(given) == len(vectors) else None

    def maps(
        self,
        q: Float[Tensor, "batch heads tokens head_dim"],
        k: Float[Tensor, "batch heads tokens head_dim"],
        grid: Grid,
        tokens: Float[Tensor, "batch tokens dim"] | None = None,
    ) -> dict[str, Tensor]:
        """The maps of all parts; the biases are added up."""
        result: dict[str, Tensor] = {}
        for part in self._members():
            for name, value in maps_of(part, q, k, grid, tokens).items():
                result[name] = result[name] + value if name == "bias" and name in result else value
        return result


def full_precision(tensor: Tensor) -> Tensor:
    """float32 for half types, anything wider unchanged: the island in which sums and positions are computed."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off on the tensor's device, so that float32 products stay float32.

    Not in an exported graph: a region there hides its operations from what reads the graph. Such a graph has its own precision.
    """
    device = tensor.device.type
    if torch.compiler.is_exporting():
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
