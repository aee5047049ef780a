"""Whether two runs saw the same images, by the fingerprints of `data.fingerprint` that their data.json hold."""

from __future__ import annotations

from sape2.tables import Row


def other_images(before: Row, now: Row) -> str | None:
    """The first difference of the images in words; None if there is none, as far as both tell.

    Another layout of the same files is no difference: names and sizes are compared only within one layout. Raises KeyError,
    TypeError or AttributeError for what is no fingerprint.
    """
    what = {"images": "the number", "labels": "the labels", "bytes": "the content", "pixels": "the content"}
    if before["layout"] == now["layout"]:
        what["names"] = "the names or sizes"
    for split in ("train", "test"):
        for key, words in what.items():
            old, new = before[split].get(key), now[split].get(key)
            if old is not None and new is not None and old != new:
                return f"{words} of its {split} images ({old} there, {new} here)"
    if before.get("classes") and now.get("classes") and before["classes"] != now["classes"]:
        return "the names of its classes, or their order"
    return None


def other_rule(before: Row, rule: int | None) -> int | None:
    """The rule by which the images were read, if it is not `rule`; None too where nothing was decoded."""
    there = before.get("reading_rule")
    return there if None not in (there, rule) and there != rule else None


def how_images_differ(first: Row, second: Row) -> str | None:
    """Describes how the images of two runs differ, or the rules by which they were read; None if equal or unknown."""
    try:
        found = other_images(first, second)
    except (TypeError, AttributeError, KeyError):  # one of them is missing or damaged
        return None
    rule = second.get("reading_rule")
    if found or (other := other_rule(first, rule)) is None:
        return found
    return f"the rule by which they were read ({other} there, {rule} here)"
