"""Notebooks from scripts in cells, executed, with outputs.

Command:  python docs/notebooks/build.py [NAME ...]      (all by default; from any folder)

A script is a list of cells: `# %%` starts code, `# %% [markdown]` text, whose lines are comments. The notebook stands beside it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS_A_CELL = 300


def cells(script: str) -> list[tuple[str, str]]:
    """("code" or "markdown", text) of every cell; what stands before the first mark is not shown."""
    parts = re.split(r"^# %%( \[markdown\])?\n", script, flags=re.MULTILINE)
    result = []
    for mark, body in zip(parts[1::2], parts[2::2], strict=True):
        text = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if mark else body
        result.append(("markdown" if mark else "code", text.strip("\n")))
    return result


def notebook(script: str) -> Any:
    """The notebook of a script, not executed; its cells are numbered, so that the same script gives the same file."""
    import nbformat

    make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    made = [make[kind](text, id=f"cell-{number}") for number, (kind, text) in enumerate(cells(script))]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=made, metadata=kernel)


def execute(script: Path, folder: Path) -> Any:
    """The notebook after all its cells have run in `folder`; raises CellExecutionError at the first that fails."""
    from nbclient import NotebookClient

    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, in any notebook without widgets
    made = notebook(script.read_text(encoding="utf-8"))
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(made, timeout=SECONDS_A_CELL, record_timing=False, resources=where).execute()
    made.metadata["language_info"] = {"name": "python"}
    return made


def main() -> None:
    import nbformat

    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.py") if path.stem != "build")
    for name in names:
        file = HERE / f"{name}.ipynb"
        nbformat.write(execute(HERE / f"{name}.py", HERE), file)
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
