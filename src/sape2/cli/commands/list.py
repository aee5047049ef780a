"""`sape2 list`: what there is to choose from."""

from __future__ import annotations

import argparse
from typing import Any

from sape2.cli.options import add_json
from sape2.cli.output import Row
from sape2.config import MODELS, ModelConfig

HELP = "what there is to choose from"


def add_options(parser: argparse.ArgumentParser) -> None:
    choices = ["encodings", "models", "recipes", "measures", "probes"]
    parser.add_argument("what", choices=choices, metavar=f"{{{','.join(choices)}}}")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    tables = {"encodings": _encodings, "models": _models, "recipes": _recipes, "measures": _measures, "probes": _probes}
    rows = tables[arguments.what]()
    from sape2.evaluation.report import print_json, print_table

    if arguments.json:
        print_json(rows)
    elif arguments.what == "encodings":
        for title, table in _encoding_tables(rows).items():
            print_table(table, list(table[0]), title)
    else:
        print_table(rows, list(rows[0]), arguments.what)
    return 0


def _encodings() -> list[Row]:
    """One row an encoding, with its options (the default first), and one for each of its variants."""
    from sape2.encodings import Schedule, find_encoding, list_encodings
    from sape2.encodings.base import AttentionEncoding, describe_options

    rows = []
    for name in list_encodings():
        encoding = find_encoding(name)
        in_attention = issubclass(encoding, AttentionEncoding)
        about = {"slot": "attention" if in_attention else "tokens", "source": encoding.source}
        options = describe_options(encoding.Options) | (describe_options(Schedule) if in_attention else {})
        rows.append({"name": name, "summary": encoding.summary} | about | {"options": options})
        rows += [{"name": f"{name}:{variant}", "summary": text} | about for variant, text in encoding.variants.items()]
    return rows


def _encoding_tables(rows: list[Row]) -> dict[str, list[Row]]:
    """The same for people: encodings, variants, and options by encoding."""
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
    columns = ("name", "dim", "depth", "num_heads", "mlp_ratio")
    return [dict(zip(columns, (name, *sizes), strict=True)) for name, sizes in MODELS.items()]


def _recipes() -> list[Row]:
    from sape2.config.recipes import RECIPES
    from sape2.config.recipes.coco import DETECTION_RECIPES

    found: list[tuple[Any, ModelConfig, str, int]] = []
    for recipe in RECIPES.values():
        config = recipe()
        found.append((recipe, config.model, config.data.name, config.train.epochs))
    for recipe in DETECTION_RECIPES.values():
        config = recipe()
        found.append((recipe, config.model, config.images.name, config.training.epochs))
    return [
        {
            "name": recipe.__name__,
            "model": model.name,
            "data": data,
            "epochs": epochs,
            "summary": " ".join((recipe.__doc__ or "").split("\n\n")[0].split()),
        }
        for recipe, model, data, epochs in found
    ]


def _measures() -> list[Row]:
    from sape2.evaluation import MEASURES

    return [{"name": name, "summary": (measure.__doc__ or "").split("\n")[0]} for name, measure in MEASURES.items()]


def _probes() -> list[Row]:
    from sape2.studies.probes import TASKS

    return [{"name": name, "summary": task.summary, "splits": "; ".join(task.splits)} for name, task in TASKS.items()]
