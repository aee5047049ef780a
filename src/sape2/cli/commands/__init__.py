"""The commands by name, in the order of `sape2 --help`, one module each. Their work is done by other packages.

To add one: a module with `HELP`, `add_options` and `run`, and a line here. It imports heavy libraries inside `run`, so that
`sape2 --help` answers at once. It imports no other command: code that two commands share is in `options` and `output`.
"""

from __future__ import annotations

import argparse
from typing import Protocol

from sape2.cli.commands import (
    compare,
    cost,
    detect,
    evaluate,
    explain,
    explore,
    export,
    inspect,
    list,
    predict,
    probe,
    report,
    train,
)


class Command(Protocol):
    """The interface of a module of this folder."""

    @property
    def HELP(self) -> str:
        """One line for `sape2 --help`."""
        ...

    def add_options(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int:
        """The exit status. Raises ValueError, OSError or ImportError for what the user can put right."""
        ...


COMMANDS: dict[str, Command] = {
    "train": train,
    "detect": detect,
    "evaluate": evaluate,
    "predict": predict,
    "explain": explain,
    "compare": compare,
    "explore": explore,
    "inspect": inspect,
    "report": report,
    "probe": probe,
    "cost": cost,
    "export": export,
    "list": list,
}
