"""Changes of settings on the command line: --set key=value."""

from __future__ import annotations

import ast
import contextlib
import json
from typing import Any

from sape2.config.checks import by_name, fits, hints, require
from sape2.config.names import nearest

NEAR = 3  # keys that one which is not known is told about
SEE = "sape2 train RECIPE --dry-run prints all keys"


def override(config: Any, assignments: list[str], see: str = SEE) -> Any:
    """The config with "section.key=value" (or "key=value" where the key is unique) applied; values are JSON or text.

    `see` says where all keys can be seen.
    """
    values = config.to_dict()
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        require(bool(equals), f"--set needs key=value; got {assignment!r}")
        section, key = _find_key(values, path, see)
        value = _parse(text, hints(type(getattr(config, section)))[key])
        square = (section, key) == ("model", "image_size") and isinstance(value, int)
        if (section, key) == ("model", "name") and value != config.model.name:
            raise ValueError("--set model.name would only rename the model; choose its size with --model")
        values[section][key] = [value] * 2 if square else value
    return type(config).from_dict(values)


def _find_key(values: dict[str, Any], path: str, see: str) -> tuple[str, str]:
    known = list(by_name(values))
    matches = [name for name in known if path in (name, name.split(".")[1])]
    if len(matches) == 1:
        section, key = matches[0].split(".")
        return section, key
    if matches:
        raise ValueError(f"--set {path} could be {_either(matches)}; write one of them in full")
    near = nearest(path.rpartition(".")[2], [name.split(".")[1] for name in known], NEAR)
    meant = [name for key in near for name in known if name.split(".")[1] == key]
    raise ValueError(f"--set knows no {path!r}; {f'did you mean {_either(meant)}? ' if meant else ''}{see}")


def _either(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _parse(text: str, hint: Any) -> Any:
    """JSON or Python, or text where that is meant: a column named 1 is no number. In quotes it is text in any case."""
    value: Any = text
    for read in (ast.literal_eval, json.loads):  # true and null are JSON alone; True, None, .5 and (1, 2) Python alone
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = read(text)
    return text if not fits(value, hint) and fits(text, hint) else value
