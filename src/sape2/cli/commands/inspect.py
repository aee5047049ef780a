"""`sape2 inspect`: measures how much position there is in the tokens of a trained backbone, ours or another."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from sape2.cli.options import add_json, pixel_size, whole_number
from sape2.cli.output import drawn, say
from sape2.runs.files import check_writable, safe_name
from sape2.runs.rows import write_rows
from sape2.tables import print_json, print_table

HELP = "measure how much position is in the tokens of a trained backbone"
MEANING = (
    "row, column: R² of a linear probe. shuffled: the patches of each image in random order, which leaves only position that\n"
    "the model adds. moved: relative change of the tokens when the image moves by one patch around the torus"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="run folder, name of a timm model, folder of transformers, or package.module:function"
    )
    parser.add_argument("--data", metavar="DIR", help="folder of images, at any depth (default the digits of scikit-learn)")
    parser.add_argument("--weights", metavar="W", help="FILE.safetensors of a timm model; last or best of a run (default last)")
    parser.add_argument("--size", metavar="HxW", help="pixels of the images (default what the model is made for)")
    parser.add_argument("--limit", default="200", metavar="N", help="images, at most (default 200)")
    parser.add_argument("--out", metavar="DIR", help="for results.jsonl and figures (default runs/inspect-MODEL)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    size = None if arguments.size is None else pixel_size(arguments.size)
    limit = whole_number("--limit", arguments.limit)
    from sape2.inspect.backbone import open_backbone
    from sape2.inspect.positions import attention_figure, draw_layers, inspected, note_of_few, read_images, table
    from sape2.runs.settings import check_own_results

    backbone = open_backbone(arguments.model, arguments.weights, size)
    folder = Path(arguments.out or f"runs/inspect-{safe_name(backbone.name)}")
    check_own_results(folder, "layer")
    check_writable(folder)
    source = arguments.data or "digits"
    data, unreadable = read_images(backbone, None if arguments.data is None else Path(arguments.data), limit)
    for reason in unreadable:
        say(f"left out: {reason}")
    if note := note_of_few(backbone, data):
        say(note)
    about = f"{backbone.notes}; {len(data)} images of {source}, {backbone.image_size[0]}x{backbone.image_size[1]} pixels"
    rows = list(inspected(backbone, data, source))
    write_rows(folder / "results.jsonl", rows)

    def draw_attention() -> list[Path]:
        found = attention_figure(backbone, data, about)
        if found is None:
            say("no attention maps: this model does not show its weights")
            return []
        found.save(folder / "attention.png")
        return [folder / "attention.png"]

    files = drawn(partial(draw_layers, rows, folder / "layers.png", f"{backbone.name}, {about}"), draw_attention)
    if arguments.json:
        print_json(rows)
        return 0
    lines = table(rows)
    print_table(lines, list(lines[0]), f"{backbone.name}, {about}")
    print(MEANING)
    print(f"in {folder}: {', '.join(['results.jsonl', *(path.name for path in files)])}")
    return 0
