"""Lists every file below a folder, by its name and by its real path.

Links are followed, but never in a cycle. Hidden files and files left by operating systems are ignored.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sape2.data.base import IMAGE_ENDINGS, OTHER_ENDINGS, plain_name, tell
from sape2.data.labels import first_of

# Folders that hold copies or nothing.
LEFT_BY_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "RECYCLER", "System Volume Information",
                   "lost+found")  # fmt: skip
WRITTEN = ({"metrics.jsonl"}, {"results.jsonl"}, {"config.json", "data.json"}, {"study.json"}, {"sweep.json"}, {"report.csv"})
NOTES = (".md", ".rst", ".pdf", ".html", "thumbs.db", "desktop.ini")  # ends of names
NOTES += tuple(name + ending for name in ("license", "licence", "readme", "notes") for ending in ("", ".txt"))
NAMED = 3  # files that a line names; of more, the number


@dataclass(frozen=True)
class Files:
    """The files below `root`. Names are relative to it, with "/" between folders, in order of name folder by folder."""

    root: Path
    real: dict[str, str]  # file -> where it really lies; of hard links, which are one file, where the first lies
    folders: list[str]

    def ending(self, *endings: str) -> list[str]:
        """The files with one of these endings, in capitals or not."""
        return [name for name in self.real if name.lower().endswith(endings)]


def walk(root: Path) -> Files:
    """Raises OSError for a folder that cannot be listed. Tells of links that lead back, and of what is no ordinary file.

    Folders below the root that sape2 wrote (runs, reports) are left out, and told: their figures are no images of a class.
    A folder that links lead to several times is entered once below each DIR/A/B, so that circles of links end.
    """
    real, folders, odd, ours = {}, [], [], []
    waiting, entered = [("", os.path.realpath(root))], set()
    numbered: dict[tuple[int, int], str] = {}  # by device and number of the file
    while waiting:
        inside, here = waiting.pop()
        below, device, entries = [], os.stat(here).st_dev, _entries(here)
        if inside and any(found <= {entry.name for entry in entries} for found in WRITTEN):
            ours.append(inside.removesuffix("/"))
            continue
        for entry in entries:
            name, link = inside + entry.name, entry.is_symlink()
            lies = os.path.realpath(entry.path) if link else entry.path
            if not (os.path.isdir(lies) if link else entry.is_dir()):
                if entry.is_file(follow_symlinks=False):
                    first = numbered.setdefault((device, entry.inode()), lies)
                    real[name] = first if first is not lies and os.path.samefile(first, lies) else lies
                elif link and (os.path.isfile(lies) or not os.path.lexists(lies)):
                    real[name] = lies
                else:
                    odd.append(name)
            elif (link and os.path.commonpath([here, lies]) == lies) or (key := (*name.split("/")[:2], lies)) in entered:
                odd.append(name)
            else:
                entered.add(key)
                folders.append(name)
                below.append((f"{name}/", lies))
        waiting += reversed(below)
    if odd:
        reason = "links that lead back, or to a folder that is taken already, or no ordinary files"
        tell(f"{plain_name(root)}: left out, {reason}: {listed(odd)}")
    if ours:
        tell(f"{plain_name(root)}: left out, written by sape2: {listed(ours)}")
        around = {name[:end] for name in ours for end, letter in enumerate(f"{name}/") if letter == "/"}
        folders = [name for name in folders if name not in around or any(file.startswith(f"{name}/") for file in real)]
    return Files(root, real, folders)


def lying(files: Files, paths: Iterable[str]) -> dict[str, str]:
    """Maps the real path of each file that data refer to by `paths` to that path; only files that lie inside the root."""
    found, top = {}, os.path.join(os.path.realpath(files.root), "")
    for path in paths:
        if "\0" not in path:  # no file has such a name
            real = files.real.get(posixpath.normpath(path)) or os.path.realpath(files.root / path)
            if real.startswith(top) and os.path.exists(real):
                found[real] = path
    return found


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Entries of a folder in order of name, links last, so that files come before links to them."""
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not (entry.name.startswith(".") or entry.name in LEFT_BY_SYSTEMS)]
    return sorted(seen, key=lambda entry: (entry.is_symlink(), entry.name))


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def image_files(folder: Path) -> list[Path]:
    """Every image file below a folder, in order of path, also those that training leaves out; other files are told."""
    files, known = walk(folder), (*IMAGE_ENDINGS, *OTHER_ENDINGS)
    images = files.ending(*known)
    tell_left_out(plain_name(folder), files.real.keys() - {*images}, f"known are {', '.join(known)}")
    return sorted(folder / name for name in images)


def tell_left_out(where: str, names: Iterable[str], reason: str, what: str = "file") -> None:
    """Warns of the files that are not taken; notes for people are not counted."""
    left = sorted(name for name in names if not name.lower().endswith(NOTES))
    if left:
        number = f"1 {what} is" if len(left) == 1 else f"{len(left)} {what}s are"
        tell(f"{where}: {number} left out, {listed(left)}{endings(left) if len(left) > NAMED else ''}; {reason}")


def endings(names: list[str]) -> str:
    """ " (.gif 20, .heic 1)": every ending, the most frequent first."""
    found = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in names)
    return f" ({first_of([f'{plain_name(ending)} {number}' for ending, number in found.most_common()])})"


def listed(names: list[str]) -> str:
    return first_of([plain_name(name) for name in names], NAMED)
