"""Makes the model that comes with the package, for `sape2 explore`, from a finished run: weights in half precision.

Command:  python benchmarks/ship_model.py RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sape2.config.command import command
from sape2.inspect.explore import SHIPPED
from sape2.runs.run import Run

README = """# The model that `sape2 explore` opens without a run

A run folder of this project: weights of the last epoch, in half precision. Test accuracy {accuracy:.4f} (one seed, {test}
images). Made by

```bash
{command}
```

and `python benchmarks/ship_model.py RUN`.
"""


def ship(run: Run, folder: Path) -> None:
    """Settings without the place of the images, which images, weights, and a README with the command and the accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(torch.float16) for name, value in load_file(run.weights("last")).items()}
    save_file(weights, folder / "model.safetensors")
    settings = json.loads((run.folder / "config.json").read_text())
    settings["data"]["source"] = None
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "data.json").write_text(json.dumps(run.seen, indent=2) + "\n")
    row = next(
        r for r in run.results() if (r["name"], r["split"], r["weights"]) == ("accuracy", "test", "last") and "class" not in r
    )
    made = command(run.config, out=None, data="DIR")
    (folder / "README.md").write_text(README.format(accuracy=row["value"], test=row["n"], command=made))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit((__doc__ or "").strip())
    ship(Run.open_finished(sys.argv[1]), SHIPPED)
