"""The commands by name, in the order of `sape2 --help`, one module each. Their work is done by other packages.

To add one: a module with `HELP`, `add_options(parser)` and `run(arguments)`, and a line here. `run` returns the exit status,
and raises ValueError, OSError or ImportError for what the user can put right. It imports heavy libraries itself, so that
`sape2 --help` answers at once. No command imports another: what two of them share is in `options` and `output`.
"""

from __future__ import annotations

from types import ModuleType

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

COMMANDS: dict[str, ModuleType] = {
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
