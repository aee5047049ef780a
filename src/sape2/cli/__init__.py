"""The command line, `sape2 ...`: parses arguments, prints results and turns errors into messages and exit statuses.

Exit status: 0 for success, 2 for an error that the user can correct (one line on standard error; SAPE2_DEBUG=1 shows the
traceback), 128 + n after signal n.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from typing import Any, NoReturn

from sape2._version import __version__
from sape2.cli.commands import COMMANDS
from sape2.cli.text import print_anything
from sape2.config.names import did_you_mean
from sape2.progress import say

# Some containers set them: float32 is then multiplied with the digits of half types, on the GPU and (the last two) the CPU.
LESS_THAN_FLOAT32 = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE",
                     "DNNL_DEFAULT_FPMATH_MODE")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    print_anything()
    try:
        return _written(_run(argv))
    except SystemExit as end:  # of argparse, behind its help or what is wrong
        raise SystemExit(_written(end.code)) from None


def _written(status: Any) -> Any:
    """The exit status once all output is out: Python itself would try that last, and answer with a status of its own."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not (status or isinstance(error, BrokenPipeError)):  # whoever reads a pipe has seen enough
            print(f"sape2: standard output cannot be written: {error.strerror}", file=sys.stderr)
            return 2
    return status


def _run(argv: list[str] | None) -> int:
    os.environ["MPLBACKEND"] = "agg"  # pictures go into files: what the variable held is not ours to stumble over
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of what Pillow warns, an image is refused by name, or nothing is lost
    parser = build_parser()
    arguments, others = parser.parse_known_args(map(with_home, sys.argv[1:] if argv is None else argv))
    if arguments.command is None and not others:
        parser.print_help()
        return 0
    if others:
        getattr(arguments, "parser", parser).refuse(others)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a line about the profiler at every measurement of memory
    for name in LESS_THAN_FLOAT32:
        os.environ.pop(name, None)
    if not sys.stderr.isatty():  # the bars of libraries; ours look themselves
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    try:
        refuse_empty(arguments)
        return arguments.run(arguments)
    except BrokenPipeError:
        return 0
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("SAPE2_DEBUG"):
            raise
        say(f"sape2: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        print("sape2: interrupted", file=sys.stderr)
        return 130


# --- grammar ---------------------------------------------------------------------------------------------------------


def with_home(word: str) -> str:
    """ "--out=~/runs" as the shell gives "--out ~/runs": it expands a ~ only where a word begins."""
    option, equals, value = word.partition("=")
    is_path = bool(equals) and option.startswith("--") and re.match(r"~[\w.-]*(/|$)", value) is not None
    return f"{option}={os.path.expanduser(value)}" if is_path else word


def refuse_empty(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a path or name that is empty, which as a path would be the present folder."""
    for action in arguments.parser._actions:
        value = getattr(arguments, action.dest, None)
        if "" in (value if isinstance(value, list) else [value]):
            name = (action.option_strings or [action.metavar])[0]
            raise ValueError(f"{name} is empty, as a variable of the shell that is not set leaves it")


class Parser(argparse.ArgumentParser):
    """argparse that reports invalid arguments in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def refuse(self, others: list[str]) -> NoReturn:
        """Reports arguments that the command does not take."""
        options = [text for action in self._actions for text in action.option_strings]
        meant = did_you_mean(others[0], options) if others[0].startswith("-") else ""
        self.error(f"unrecognized arguments: {' '.join(others)}{f'; {meant.strip()}' if meant else ''}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            meant = did_you_mean(str(value), known)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {meant}choose from {', '.join(known)}")


def build_parser() -> Parser:
    parser = Parser(prog="sape2", description="Position encodings for vision transformers: train, measure, compare.")
    parser.add_argument("--version", action="version", version=f"sape2 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.HELP, allow_abbrev=False)  # compare --seed 3 is not --seeds 3
        command.add_options(subparser)
        subparser.set_defaults(run=command.run, parser=subparser)
    return parser
