"""Lists encodings, measures and probes from their source code, so that `sape2 list` imports no heavy library.

A test checks that the lists equal what the imported classes and functions declare.
"""

from __future__ import annotations

import ast
import builtins
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal

import sape2
from sape2.config.checks import describe_option
from sape2.tables import Row


class Source:
    """The top level of a module: its classes, functions and values by name, and where names are imported from."""

    def __init__(self, module: str) -> None:
        path = Path(sape2.__file__).parent.joinpath(*module.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        self.nodes: dict[str, Any] = {}  # ast.ClassDef, ast.FunctionDef or ast.expr
        self.homes: dict[str, str] = {}
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                self.nodes[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                self.homes |= {alias.name: node.module or "" for alias in node.names}
            else:
                self.nodes |= assigned(node)

    def find(self, name: str) -> tuple[Source, Any]:
        """Finds the definition of a name and the module that contains it."""
        return read(self.homes[name]).find(name) if name in self.homes else (self, self.nodes[name])

    def value(self, node: Any) -> Any:
        """The value of a constant, or of a name that refers to one."""
        if isinstance(node, ast.Name):
            source, found = self.find(node.id)
            return source.value(found)
        return ast.literal_eval(node)

    def names(self, name: str) -> dict[str, str]:
        """A dictionary {"rope": Rotary} as {"rope": "Rotary"}, and {"count": Count()} as {"count": "Count"}."""
        table = self.nodes[name]
        values: list[Any] = [value.func if isinstance(value, ast.Call) else value for value in table.values]
        return {key.value: value.id for key, value in zip(table.keys, values, strict=True)}

    def hint(self, node: Any) -> Any:
        """An annotation as the type that it stands for: plain types, Literal, unions, and names of such."""
        if isinstance(node, ast.BinOp):
            return reduce(or_, [self.hint(node.left), self.hint(node.right)])
        if isinstance(node, ast.Subscript):
            choice: Any = Literal
            return choice[self.value(node.slice)]
        if isinstance(node, ast.Name):
            kind = getattr(builtins, node.id, None)
            return kind if kind is not None else self.hint(self.find(node.id)[1])
        return ast.literal_eval(node)  # None


@cache
def read(module: str) -> Source:
    return Source(module)


def assigned(node: ast.stmt) -> dict[str, ast.expr]:
    """{name: value} of an assignment to a name; {} of anything else."""
    if isinstance(node, ast.Assign):
        return {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        return {node.target.id: node.value}
    return {}


# --- encodings -------------------------------------------------------------------------------------------------------


def encodings() -> list[Row]:
    """One row an encoding, with its options (the default first), and one for each of its variants."""
    room = read("sape2.encodings")
    tokens, attention = room.names("TOKEN_ENCODINGS"), room.names("ATTENTION_ENCODINGS")
    rows: list[Row] = []
    for name in dict.fromkeys(["none", *tokens, *attention]):
        own = attributes(room, (tokens | attention)[name])
        summary, source, variants, presets = (
            where.value(node) for where, node in map(own.__getitem__, ("summary", "source", "variants", "presets"))
        )
        where, options = own["Options"]
        described = options_of(where, options)
        if name in attention:
            described |= options_of(room, ast.Name("Schedule"))
        if presets:
            described = {"preset": "|".join(presets)} | described
        about = {"slot": "attention" if name in attention else "tokens", "source": source}
        rows.append({"name": name, "summary": summary} | about | {"options": described})
        rows += [{"name": f"{name}:{variant}", "summary": text} | about for variant, text in variants.items()]
    return rows


def attributes(source: Source, name: str) -> dict[str, tuple[Source, ast.expr]]:
    """The assignments of a class and its base classes, each with the module that contains it."""
    where, node = source.find(name)
    found: dict[str, tuple[Source, ast.expr]] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and where.homes.get(base.id, "sape2").startswith("sape2"):
            found |= attributes(where, base.id)
    for statement in node.body:
        found |= {key: (where, value) for key, value in assigned(statement).items()}
    return found


def options_of(source: Source, options: Any) -> dict[str, str]:
    """The fields of a dataclass of options, described."""
    where, node = source.find(options.id)
    fields: Any = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    return {field.target.id: describe_option(where.hint(field.annotation), where.value(field.value)) for field in fields}


# --- measures --------------------------------------------------------------------------------------------------------


def measures() -> list[Row]:
    """The first line of what each measure says of itself."""
    room = read("sape2.evaluation.measures")
    nodes = {name: room.find(function)[1] for name, function in room.names("MEASURES").items()}
    return [{"name": name, "summary": (ast.get_docstring(node) or "").split("\n")[0]} for name, node in nodes.items()]


# --- probes ----------------------------------------------------------------------------------------------------------


def probes() -> list[Row]:
    """One row a controlled task, with the names of its splits: the keys of SPLITS in its module."""
    room = read("sape2.studies.probes")
    rows: list[Row] = []
    for name, task in room.names("TASKS").items():
        where, summary = attributes(room, task)["summary"]
        splits = "; ".join(map(where.value, where.nodes["SPLITS"].keys))
        rows.append({"name": name, "summary": where.value(summary), "splits": splits})
    return rows
