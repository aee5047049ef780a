"""Position encodings by name, one file for each family, and the rules for joined names. Attention is in `attention`.

A joined name is "ape+sape2:count=cyclic,every=2".

To add one: a class in a file of this folder, a line in its dict below, and its equations as a plain loop in `reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sape2.config.names import unknown
from sape2.encodings.absolute import KeyTable, LearnedAbsolute, SinCos
from sape2.encodings.base import AttentionEncoding, Composite, Facts, NoEncoding, TokenEncoding
from sape2.encodings.bias import AttentionBias
from sape2.encodings.conditional import Conditional
from sape2.encodings.cope import CoPE
from sape2.encodings.forget import Forget
from sape2.encodings.functional import FIRE, LogCPB
from sape2.encodings.grid import Grid
from sape2.encodings.lookhere import LookHere
from sape2.encodings.options import changed_options, check_options, describe_options, make_options
from sape2.encodings.pape import PaPE
from sape2.encodings.relative import ALiBi, RelativeContextual, RelativeDecomposed, RelativeTable
from sape2.encodings.rotary import PoPE, Rotary, RotaryMixed
from sape2.encodings.sape2 import SaPE2

TOKEN_ENCODINGS: dict[str, type[TokenEncoding]] = {
    "ape": LearnedAbsolute,
    "sincos": SinCos,
    "cpe": Conditional,
}
ATTENTION_ENCODINGS: dict[str, type[AttentionEncoding]] = {
    "none": NoEncoding,
    "key_table": KeyTable,
    "rope": Rotary,
    "rope_mixed": RotaryMixed,
    "pope": PoPE,
    "rpe": RelativeTable,
    "rpe_contextual": RelativeContextual,
    "rpe_decomposed": RelativeDecomposed,
    "alibi": ALiBi,
    "lookhere": LookHere,
    "log_cpb": LogCPB,
    "fire": FIRE,
    "pape": PaPE,
    "forget": Forget,
    "cope": CoPE,
    "sape2": SaPE2,
}

__all__ = [
    "ATTENTION_ENCODINGS", "FIRE", "TOKEN_ENCODINGS", "ALiBi", "AttentionBias", "AttentionEncoding", "CoPE", "Conditional",
    "Facts", "Forget", "KeyTable", "LearnedAbsolute", "LogCPB", "LookHere", "NoEncoding", "PaPE", "PoPE",
    "RelativeContextual", "RelativeDecomposed", "RelativeTable", "Rotary", "RotaryMixed", "SaPE2", "SinCos", "TokenEncoding",
    "canonical_name", "create_encoding", "create_encodings", "find_encoding", "list_encodings", "options_of", "parse_encoding",
]  # fmt: skip


def list_encodings() -> list[str]:
    """The names that `create_encoding` and `create_model(encoding=...)` know; they join with "+"."""
    return ["none", *TOKEN_ENCODINGS, *(name for name in ATTENTION_ENCODINGS if name != "none")]


def find_encoding(name: str) -> type[TokenEncoding] | type[AttentionEncoding]:
    """The class of a single name; raises ValueError that lists the known ones."""
    encoding = TOKEN_ENCODINGS.get(name) or ATTENTION_ENCODINGS.get(name)
    if encoding is None:
        raise unknown("encoding", name, list_encodings(), " (join them with +)")
    return encoding


@dataclass(frozen=True)
class Schedule:
    """The options that every attention encoding accepts in addition to its own.

    every=2 puts it in layers 2, 4, ... (counted from one); share=true gives these layers one module, tables and all.
    """

    every: int = 1
    share: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1; got {self.every}")


def options_of(name: str) -> dict[str, str]:
    """All options that a single name takes, with their values, the default first."""
    encoding = find_encoding(name)
    presets = {"preset": "|".join(encoding.presets)} if encoding.presets else {}
    schedule = {} if name in TOKEN_ENCODINGS else describe_options(Schedule)
    return presets | describe_options(encoding.Options) | schedule


@dataclass(frozen=True)
class Part:
    """One encoding of a joined name."""

    name: str
    options: dict[str, Any]
    schedule: Schedule

    @property
    def acts_on_tokens(self) -> bool:
        return self.name in TOKEN_ENCODINGS

    def create(self, num_heads: int, head_dim: int, grid: Grid) -> Any:
        return find_encoding(self.name)(num_heads, head_dim, grid, **self.options)


def parse_encoding(name: str) -> list[Part]:
    """The parts of a name, in its order. Raises ValueError for unknown names and for contradictions."""
    if not isinstance(name, str):
        raise ValueError(f'an encoding is a text such as "sape2" or "ape+sape2"; got {name!r}')
    parts = [_parse_part(text.strip()) for text in name.split("+")]
    names = [part.name for part in parts]
    twice = sorted({part for part in names if names.count(part) > 1})
    if twice:
        raise ValueError(f"encoding {name!r} has {twice[0]} twice")
    if "none" in names and len(names) > 1:
        raise ValueError(f"encoding {name!r} joins none with something; leave none out")
    tables = [n for n in names if n in TOKEN_ENCODINGS and TOKEN_ENCODINGS[n].after_block is None]
    attention = [n for n in names if n in ATTENTION_ENCODINGS]
    rotations = [n for n in attention if ATTENTION_ENCODINGS[n].rotate is not AttentionEncoding.rotate]
    for kind, found in (("absolute tables", tables), ("rotations", rotations)):
        if len(found) > 1:
            raise ValueError(f"encoding {name!r} has two {kind}, {' and '.join(found)}; choose one")
    return parts


def _parse_part(text: str) -> Part:
    name, _, option_text = text.partition(":")
    find_encoding(name)
    options: dict[str, Any] = {}
    for item in filter(None, option_text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key in options:
            raise ValueError(f"encoding option {item!r} of {name} must be key=value, each key once")
        options[key] = value
    if name in TOKEN_ENCODINGS and {"every", "share"} & set(options):
        raise ValueError(f"{name} acts once on the tokens; every= and share= are for attention encodings")
    check_options(name, options, list(options_of(name)))
    schedule = {key: options.pop(key) for key in ("every", "share") if key in options}
    return Part(name, options, make_options(Schedule, name, schedule))


def canonical_name(name: str) -> str:
    """The one name of an encoding, however it was written: parts and options sorted, defaults left out, numbers alike.

    "sape2:sign=plus+ape" is "ape+sape2". A preset stands where that is shorter: "sape2:gate_scale=none,divide_bias=true" is
    "sape2:preset=equations". Raises ValueError for what is no encoding.
    """
    return "+".join(map(_spelled, _in_order(parse_encoding(name))))


def _spelled(part: Part) -> str:
    encoding = find_encoding(part.name)
    meant, presets = encoding.read_options(part.options), encoding.presets or {"": {}}
    spellings = [
        ({"preset": known} if known != next(iter(presets)) else {}) | changed_options(meant, encoding.Options(**values))
        for known, values in presets.items()
    ]
    options = min(spellings, key=len) | changed_options(part.schedule, Schedule())
    return part.name + ":" * bool(options) + ",".join(f"{key}={_text(value)}" for key, value in sorted(options.items()))


def _text(value: Any) -> str:
    """A value in the form used in names: true, none, 0.5, 100."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def create_encoding(name: str, num_heads: int, head_dim: int, grid: Grid) -> TokenEncoding | AttentionEncoding:
    """One module for one layer: "sape2:count=cyclic", "ape", or several attention encodings joined ("rope+sape2").

    `grid` is the training grid (H, W). Raises ValueError for a token encoding joined with anything: they have
    different places in a model, so `create_model` makes them.
    """
    parts = _in_order(parse_encoding(name))
    for part in parts:
        if part.acts_on_tokens and len(parts) > 1:
            raise ValueError(f"{part.name} acts on the tokens, not in attention; use create_model(..., encoding={name!r})")
        if part.schedule != Schedule():
            raise ValueError(f"{part.name}: every= and share= speak of the layers of a model; use create_model")
    return _join([part.create(num_heads, head_dim, grid) for part in parts])


def create_encodings(
    name: str, num_heads: int, head_dim: int, grid: Grid, depth: int
) -> tuple[list[TokenEncoding], list[AttentionEncoding]]:
    """All modules of a model: its token encodings, and one attention encoding for each of the `depth` layers.

    A token encoding that acts before every block comes `depth` times.
    """
    parts, sizes = _in_order(parse_encoding(name)), (num_heads, head_dim, grid)
    tokens = [module for part in parts if part.acts_on_tokens for module in _create_on_tokens(part, sizes, depth)]
    layers: list[list[AttentionEncoding]] = [[] for _ in range(depth)]
    for part in parts:
        if part.acts_on_tokens:
            continue
        chosen = layers[part.schedule.every - 1 :: part.schedule.every]
        if not chosen:
            raise ValueError(f"{part.name}:every={part.schedule.every} leaves it out of all {depth} layers")
        shared = part.create(*sizes) if part.schedule.share else None
        for layer in chosen:
            layer.append(shared or part.create(*sizes))
    return tokens, [_join(layer) for layer in layers]


def _in_order(parts: list[Part]) -> list[Part]:
    """Sorts the parts of a name, so that a seed gives the same parameters however the name is written."""
    return sorted(parts, key=lambda part: part.name)


def _create_on_tokens(part: Part, sizes: tuple[int, int, Grid], depth: int) -> list[TokenEncoding]:
    """One module, or one for every block: before the first block, after block 0, and so on."""
    modules = [part.create(*sizes)]
    if modules[0].every_layer:
        modules += [part.create(*sizes) for _ in range(depth - 1)]
        for block, module in enumerate(modules[1:]):
            module.after_block = block
    return modules


def _join(parts: list[AttentionEncoding]) -> AttentionEncoding:
    if not parts:
        return NoEncoding()
    return parts[0] if len(parts) == 1 else Composite(parts)
