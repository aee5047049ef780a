"""Controlled tasks by name: scenes, correct answers and chance levels. `studies.probing` trains models on them.

To add one: a file with a `Task` and its `SPLITS`, a line here, an oracle of its labels in the tests, a part of docs/probes.md.
"""

from __future__ import annotations

from sape2.config.names import unknown
from sape2.studies.probes.base import NOT_ASKED, TRAIN, Example, Scenes, Split, Task
from sape2.studies.probes.count import Count
from sape2.studies.probes.distant import Distant
from sape2.studies.probes.profile import ColumnProfile, Profile
from sape2.studies.probes.scenes import ObjectScenes

TASKS: dict[str, Task] = {
    "count": Count(),
    "row_profile": Profile(),
    "column_profile": ColumnProfile(),
    "scenes": ObjectScenes(),
    "distant": Distant(),
}

__all__ = ["NOT_ASKED", "TASKS", "TRAIN", "Example", "Scenes", "Split", "Task", "find_task"]


def find_task(name: str) -> Task:
    """The task of that name; raises ValueError that lists the known ones."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
