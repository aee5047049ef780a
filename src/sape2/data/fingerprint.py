"""A fingerprint of the images of a run, so that resuming with others is noticed. Cheap: labels, names, a few files.

It also stores facts that later commands show: the names of the classes and the sizes of the images.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from sape2.data.arrays import ArrayImages
from sape2.data.base import Source, digest, encoded
from sape2.data.pixels import RULE, named, opened, upright_size

PROBES = 16  # images of a split whose bytes are looked at


def fingerprint(sources: dict[str, Source] | dict[str, ArrayImages]) -> dict[str, Any]:
    """Per split: number of images, digests of all labels, of the bytes of 16 images, of names and sizes.

    The first three are the same in every layout that keeps the files as they are; names and sizes are of this layout.
    Where files are decoded, the rule by which they are read (`data.pixels`) and the (height, width) of the 16.
    """
    first = next(iter(sources.values()))
    about = {"layout": first.layout, "classes": list(first.classes)}
    about |= {} if first.layout == "arrays" else {"reading_rule": RULE}
    return about | {split: _describe(source) for split, source in sources.items()}


def _describe(source: Source | ArrayImages) -> dict[str, Any]:
    labels, arrays = source.labels, isinstance(source, ArrayImages)
    probes = np.unique(np.linspace(0, len(labels) - 1, PROBES).round().astype(int)).tolist() if labels else []
    read = [source.images[index].tobytes() if isinstance(source, ArrayImages) else encoded(source, index) for index in probes]
    about = {
        "images": len(labels),
        "labels": digest(str(labels).encode()),
        "pixels" if arrays else "bytes": digest(b"".join(digest(data).encode() for data in read)),
        "names": "" if isinstance(source, ArrayImages) else digest(repr(source.contents()).encode()),
    }
    return about if arrays else about | {"sizes": _sizes(read)}


def _sizes(files: list[bytes]) -> list[tuple[int, int]]:
    """Each (height, width) that one of them has, as far as they are images."""
    sizes = set()
    for data in files:
        with contextlib.suppress(ValueError), named("image"), opened(data) as image:
            sizes.add(upright_size(image))
    return sorted(sizes)
