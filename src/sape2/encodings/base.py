"""The interface of position encodings: where they act, the hooks they implement and the facts they declare.

A *token* encoding acts once on the tokens. An *attention* encoding acts in every layer through two hooks,
`rotate` and `make_bias`, both no-ops by default. Shapes: q, k are (B, h, N, d), unscaled, without prefix tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sape2.encodings.bias import AttentionBias
from sape2.encodings.content import Content, Tokens, Vectors
from sape2.encodings.grid import Axis, Grid, check_grid, check_heads, num_prefix_tokens
from sape2.encodings.nodes import OneNode
from sape2.encodings.options import changed_options, make_options


@dataclass(frozen=True)
class NoOptions:
    """Options of encodings that have none."""


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


class PositionEncoding(OneNode, nn.Module):
    """What encodings of tokens and of attention have in common, made for the training `grid` with the options of their name.

    A class says its `name`, what it is (`summary`), where it comes from (`source`), and which settings of its options are
    worth a comparison (`variants`: options -> what they are and where they come from); `sape2 list encodings` shows all.
    """

    name: str = ""
    Options: type = NoOptions
    summary: str
    source: str
    variants: ClassVar[dict[str, str]] = {}
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # names of several options at once, the default first
    facts = Facts()

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, **options: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim = check_heads(num_heads, head_dim)
        self.dim = self.num_heads * self.head_dim
        self.grid = check_grid(grid)
        self.options = self.read_options(options)

    @classmethod
    def read_options(cls, given: dict[str, Any]) -> Any:
        """`Options` of these values over those of a preset. Raises ValueError that lists what is known."""
        if not cls.presets:
            return make_options(cls.Options, cls.name, given)
        preset = given.get("preset", next(iter(cls.presets)))
        if preset not in cls.presets:
            raise ValueError(f"{cls.name}:preset must be one of {', '.join(cls.presets)}; got {preset!r}")
        own = {name: value for name, value in given.items() if name != "preset"}
        return make_options(cls.Options, cls.name, cls.presets[preset] | own, "preset")

    def reset_parameters(self) -> None:
        """Draws all values again, in place, as modules of torch do: to train anew, or after a start on the meta device."""
        options = {name: value for name, value in dataclasses.asdict(self.options).items() if value is not None}
        with torch.device("cpu"):
            fresh = type(self)(self.num_heads, self.head_dim, self.grid, **options)
        self.load_state_dict(fresh.state_dict())

    def extra_repr(self) -> str:
        changed = changed_options(getattr(self, "options", self.Options()), self.Options())
        return ", ".join(f"{name}={value}" for name, value in changed.items())


class TokenEncoding(PositionEncoding):
    """Adds position to the tokens once: before the first block, or after block `after_block`.

    With `every_layer` a model has a module before every block, see `sape2.encodings.create_encodings`.
    """

    after_block: int | None = None
    every_layer: bool = False

    def forward(self, tokens: Float[Tensor, "batch tokens dim"], grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        raise NotImplementedError


class AttentionEncoding(PositionEncoding):
    """Adds position inside attention by two hooks, `rotate` and `make_bias`. Both see grid tokens only.

    A bias may depend on the `Content` and the encoding's parameters, image by image, and on nothing else. An encoding that
    reads the products q.k of the tokens of one line says so in `score_axes`, and must give the same without them. One that
    reads the tokens says so in `reads_tokens`, and one whose bias is q_i . e_n, with vectors e that are the same for all
    images, in `gives_key_vectors`: attention then joins `key_vectors` to the keys.
    """

    score_axes: tuple[Axis, ...] = ()
    hides: bool = False  # whether its bias hides patches from each other, so that no gain can start it from nothing
    reads_tokens: bool = False
    gives_key_vectors: bool = False
    gives_some_key_vectors: bool = False  # whether they can be added to the keys beside the bias of other parts

    @property
    def makes_bias(self) -> bool:
        return type(self).make_bias is not AttentionEncoding.make_bias

    @property
    def rotates(self) -> bool:
        return type(self).rotate is not AttentionEncoding.rotate

    def check_trainable(self) -> None:
        """Raises ValueError if the encoding stands at a point from which it cannot learn."""

    def rotate(self, q: Vectors, k: Vectors, grid: Grid) -> tuple[Vectors, Vectors]:
        return q, k

    def rotate_all(self, q: Vectors, k: Vectors, grid: Grid) -> tuple[Vectors, Vectors]:
        """`rotate` of whole sequences, whose prefix tokens stay as they are; the same tensors if nothing is rotated."""
        first = num_prefix_tokens(q.shape[-2], grid)
        parts = q[:, :, first:], k[:, :, first:]
        turned = self.rotate(*parts, grid)
        if turned[0] is parts[0] and turned[1] is parts[1]:
            return q, k
        if not first:
            return turned
        return torch.cat([q[:, :, :first], turned[0]], dim=-2), torch.cat([k[:, :, :first], turned[1]], dim=-2)

    def make_bias(self, content: Content) -> AttentionBias | None:
        return None

    def make_maps(self, content: Content) -> dict[str, Tensor]:
        """Intermediate results of the encoding, each (B, h, N, ...); at least `bias` if there is one."""
        bias = self.make_bias(content)
        return {} if bias is None else {"bias": bias.dense().expand(*content.q.shape[:2], -1, -1)}

    def bias(self, q: Vectors, k: Vectors, grid: Grid, tokens: Tokens | None = None) -> AttentionBias | None:
        """`make_bias` of grid tokens."""
        return self.make_bias(Content(q, k, grid, tokens=tokens))

    def maps(self, q: Vectors, k: Vectors, grid: Grid, tokens: Tokens | None = None) -> dict[str, Tensor]:
        """`make_maps` of grid tokens."""
        return self.make_maps(Content(q, k, grid, tokens=tokens))

    def key_vectors(self, q: Vectors, grid: Grid) -> Float[Tensor, "*#heads tokens head_dim"]:
        """The vectors e where `gives_key_vectors`. Of q, which is not rotated here, they see the shape.

        `make_bias` gives the same as a term, for maps and for where they cannot be joined.
        """
        raise NotImplementedError


def encoding_names(model: nn.Module) -> set[str]:
    """Names of the parameters of all encodings in a model."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, PositionEncoding)
        for name, _ in module.named_parameters()
    }


def without_decay(names: set[str]) -> set[str]:
    """These names, and as patterns of timm, `*.NAME`, for a model that `torch.compile` or peft gives longer names."""
    return names | {f"*.{name}" for name in names if not name.startswith("*.")}


class NoEncoding(AttentionEncoding):
    """No position at all: the control of every comparison."""

    name = "none"
    summary = "no position encoding, the control"
    source = "-"
    facts = Facts(translation=True, row_permutation=True, column_permutation=True, circular_shift=True, flip=True)

    def __init__(self, num_heads: int = 1, head_dim: int = 1, grid: Grid = (1, 1), **options: Any) -> None:
        super().__init__(num_heads, head_dim, grid, **options)


class Composite(AttentionEncoding):
    """Several attention encodings at once: rotations one after the other, biases added. A composite among them is its parts."""

    def __init__(self, parts: list[AttentionEncoding]) -> None:
        nn.Module.__init__(self)
        parts = [each for part in parts for each in (part.parts if isinstance(part, Composite) else [part])]
        self.parts: Any = nn.ModuleList(parts)
        facts = [part.facts for part in parts]
        symmetries = {field.name: all(getattr(fact, field.name) for fact in facts) for field in dataclasses.fields(Facts)}
        self.facts = Facts(**symmetries | {"content_dependent": any(fact.content_dependent for fact in facts)})
        self.score_axes = tuple(dict.fromkeys(axis for part in parts for axis in part.score_axes))
        self.reads_tokens = any(part.reads_tokens for part in parts)
        given = [part.gives_key_vectors for part in parts if part.makes_bias]
        self.gives_key_vectors = bool(given) and all(given)
        self.gives_some_key_vectors = any(given) and not self.rotates and not self.score_axes

    def reset_parameters(self) -> None:
        for part in self.parts:
            part.reset_parameters()

    @property
    def makes_bias(self) -> bool:
        return any(part.makes_bias for part in self.parts)

    @property
    def rotates(self) -> bool:
        return any(part.rotates for part in self.parts)

    def check_trainable(self) -> None:
        for part in self.parts:
            part.check_trainable()

    def rotate(self, q: Vectors, k: Vectors, grid: Grid) -> tuple[Vectors, Vectors]:
        return self.rotate_all(q, k, grid)

    def rotate_all(self, q: Vectors, k: Vectors, grid: Grid) -> tuple[Vectors, Vectors]:
        for part in self.parts:
            q, k = part.rotate_all(q, k, grid)
        return q, k

    def make_bias(self, content: Content) -> AttentionBias | None:
        parts = [part for part in self.parts if not (content.joined and part.gives_key_vectors)]
        biases = [part.make_bias(content) for part in parts]
        given = [bias for bias in biases if bias is not None]
        return functools.reduce(operator.add, given) if given else None

    def make_maps(self, content: Content) -> dict[str, Tensor]:
        """The maps of all parts; the biases are added up."""
        result: dict[str, Tensor] = {}
        for part in self.parts:
            for name, value in part.make_maps(content).items():
                result[name] = result[name] + value if name == "bias" and name in result else value
        return result

    def key_vectors(self, q: Vectors, grid: Grid) -> Float[Tensor, "*#heads tokens head_dim"]:
        """The sum of those that parts give."""
        return functools.reduce(operator.add, [part.key_vectors(q, grid) for part in self.parts if part.gives_key_vectors])
