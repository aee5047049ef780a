"""The most that can be known in the task `distant`: the majority of what the tokens of a type show.

Counted on the scenes that models are measured on.

Command:  python benchmarks/distant_ceiling.py
"""

from __future__ import annotations

import torch

from sape2.studies.probes import NOT_ASKED, Scenes, find_task
from sape2.studies.probing import measured_scenes, measured_splits
from sape2.tables import print_table


def majority_accuracy(scenes: Scenes) -> float:
    """Accuracy of that majority over all tokens that are asked; a tie is right half of the time."""
    shown, groups = scenes.cells[:, -1].flatten(1), scenes.groups
    same = (groups[:, :, None] == groups[:, None, :]).to(shown)
    votes = (same @ shown[..., None]).squeeze(-1)
    right = 0.5 + 0.5 * votes.sign() * (2 * scenes.labels - 1)
    return right[scenes.labels != NOT_ASKED].mean().item()


def main() -> None:
    task = find_task("distant")
    ceilings = {}
    for split in measured_splits(task):
        parts = list(measured_scenes(task, "distant", split))
        whole = Scenes(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        ceilings[split] = majority_accuracy(whole)
    print_table([{name: f"{value:.3f}" for name, value in ceilings.items()}], list(ceilings), "distant: the ceiling")


if __name__ == "__main__":
    main()
