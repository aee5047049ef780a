"""`sape2 list`: lists encodings, models, recipes, measures and probes."""

from __future__ import annotations

import argparse
from typing import Any

from sape2.cli.catalogue import encodings, measures, probes
from sape2.cli.options import add_json
from sape2.cli.output import Row
from sape2.config import MODELS, sizes_of
from sape2.config.recipes import DETECTION_RECIPES, RECIPES
from sape2.tables import print_json, print_table

HELP = "list recipes, encodings, models and other names to choose from"


def add_options(parser: argparse.ArgumentParser) -> None:
    choices = ["encodings", "models", "recipes", "measures", "probes"]
    parser.add_argument("what", choices=choices, metavar=f"{{{','.join(choices)}}}")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    tables = {"encodings": encodings, "models": _models, "recipes": _recipes, "measures": measures, "probes": probes}
    rows = tables[arguments.what]()
    if arguments.json:
        print_json(rows)
    elif arguments.what == "encodings":
        for title, table in _encoding_tables(rows).items():
            print_table(table, list(table[0]), title)
    else:
        print_table(rows, list(rows[0]), arguments.what)
    return 0


def _encoding_tables(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows as tables for people: encodings, variants, and options by encoding."""
    plain = [row for row in rows if "options" in row]
    return {
        "encodings": [{key: row[key] for key in ("name", "slot", "summary", "source")} for row in plain],
        "variants worth comparing": [{"name": row["name"], "summary": row["summary"]} for row in rows if row not in plain],
        "options": [
            {"name": row["name"], "option": option, "values, the default first": values}
            for row in plain
            for option, values in row["options"].items()
        ],
    }


def _models() -> list[Row]:
    return [{"name": name} | sizes_of(name) for name in MODELS]


def _recipes() -> list[Row]:
    rows: list[Row] = []
    for name, recipe in (RECIPES | DETECTION_RECIPES).items():
        config: Any = recipe()
        command, images, training = (
            ("detect", "images", "training") if name in DETECTION_RECIPES else ("train", "data", "train")
        )
        row = {"name": name, "command": command, "model": config.model.name, "data": getattr(config, images).name}
        summary = " ".join((recipe.__doc__ or "").split("\n\n")[0].split())
        rows.append(row | {"epochs": getattr(config, training).epochs, "summary": summary})
    return rows
