"""Tables and figures of many runs: one line for each run, or for each setting with its seeds together.

A cell is empty if its number was not measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sape2 import viz
from sape2.encodings import canonical_name
from sape2.runs.files import write_text
from sape2.runs.images import how_images_differ
from sape2.runs.settings import version_of
from sape2.studies.compare.groups import Group, group_runs, mean_epochs, mean_rows, shared_in_words
from sape2.studies.compare.headlines import COUNTS, HEADLINES, Headline, MeasuredRun
from sape2.studies.compare.summary import PAIRED, Summary, difference, numbers, summarize
from sape2.tables import Row, Table, csv_table, format_spread, markdown_table

WEIGHTS = {"last": "weights of the last epoch", "best": "weights of the best epoch on the validation set"}


@dataclass(frozen=True)
class Comparison:
    """Groups of runs side by side; `measures` are those shown, `split` and `weights` say which rows were read."""

    groups: list[Group]
    measures: list[str]
    split: str
    weights: str
    baseline: str | None = None  # the label of a group

    @property
    def title(self) -> str:
        shared = shared_in_words(self.groups)
        return f"{shared}{'; ' if shared else ''}{self.split} set, {WEIGHTS[self.weights]}"

    @property
    def has_seeds(self) -> bool:
        return any(len(group.runs) > 1 for group in self.groups)

    def columns(self) -> list[Headline]:
        """The columns of the shown measures for which any run has a number."""
        return [
            column
            for column in HEADLINES
            if (column.measure is None or column.measure in self.measures) and any(g.values(column) for g in self.groups)
        ]

    def summaries(self, column: Headline) -> dict[str, Summary]:
        """label -> mean and spread over the seeds of a group, in pairs of a seed with the baseline if there is one."""
        return summarize({group.label: group.values(column) for group in self.groups}, self.baseline)

    def rows(self) -> Iterator[Row]:
        """Rows for programs, one for each group and headline number; `mean` is None and n 0 where it was not measured."""
        found = {column.heading: self.summaries(column) for column in self.columns()}
        against = {} if self.baseline is None else {"baseline": self.baseline}
        for group in self.groups:
            for column in self.columns():
                about = {"label": group.label, "seeds": group.seeds, "split": self.split, "weights": self.weights}
                about |= {"conditions": self.title, "name": column.heading} | against
                number = numbers(found[column.heading].get(group.label), paired=bool(against))
                number |= {"unit": column.unit, "images": group.images(column.measure), "measure": column.measure}
                yield about | number | {"runs": [str(run.folder) for run in group.runs]}

    def table(self) -> list[Row]:
        """Table for people: one line for each group, "mean ± std" over seeds; cells that were not measured are left out."""
        return self._lines(_cell)

    def differences(self) -> list[Row]:
        """ "+0.0120 (-0.0010 to +0.0250)": mean difference to the baseline in pairs of a seed, and its 95 % interval."""
        return [line for line in self._lines(_difference) if line["encoding"] != self.baseline]

    def _lines(self, cell: Callable[[Headline, Summary, Group], str]) -> list[Row]:
        found = {column: self.summaries(column) for column in self.columns()}
        return [
            {"encoding": group.label, "seeds": group.seeds}
            | {
                column.heading: text
                for column, summaries in found.items()
                if group.label in summaries and (text := cell(column, summaries[group.label], group))
            }
            for group in self.groups
        ]

    def tables(self, most: int = 6) -> Iterator[Table]:
        """For a terminal: the table in parts of at most `most` numbers, each beginning with what tells the lines apart."""
        headings = [column.heading for column in self.columns()]
        shown = [(self.title, self.table())]
        if self.baseline is not None:
            shown.append((f"minus {self.baseline}; {self.title}", self.differences()))
        for title, lines in shown:
            for start in range(0, len(headings), most):
                yield title, lines, ["encoding", "seeds", *headings[start : start + most]]

    def write(self, folder: Path) -> list[Path]:
        """report.md, with what the columns mean, and report.csv, with every digit."""
        write_text(folder / "report.md", page(self, []))
        write_text(folder / "report.csv", csv_table(_wide(self)))
        return [folder / "report.md", folder / "report.csv"]

    def draw(self, folder: Path) -> list[Path]:
        """The figures, one line a group, and report.md with them in it. Raises ImportError without matplotlib."""
        epochs = {group.name: mean_epochs([run.epochs for run in group.runs]) for group in self.groups}
        files = []
        if all(epochs.values()):
            files.append(folder / "curves.png")
            viz.plot_curves(epochs, files[0], shared_in_words(self.groups))
        band, rows = {}, {group.name: group.runs[0].rows for group in self.groups}  # as measured, with intervals over images
        if self.has_seeds:
            band = {"band": "one std over seeds"}
            rows = {group.name: list(mean_rows([run.rows for run in group.runs])) for group in self.groups}
        files += viz.plot_measures(rows, self.measures, folder, notes=viz.Notes(about=self.title, **band))
        write_text(folder / "report.md", page(self, files))
        return files

    def notes(self) -> list[str]:
        """Notes that a reader must know before comparing."""
        notes = []
        if self.has_seeds:
            notes.append(
                "± is the standard deviation over seeds, not an interval; (n) where fewer runs than seeds were measured."
            )
        if self.baseline is not None:
            notes.append(f"minus {self.baseline}: over the seeds that both have, with the 95 % interval by Student's t.")
        notes += [note for group in self.groups for note in group.left_out]
        notes += self._of_images()
        for measure in self.measures:
            sizes = self._images(measure)
            if len(sizes) > 1 and measure != "cost":
                notes.append(f"{measure} was measured on different numbers of images: {', '.join(map(str, sizes))}.")
            lacking = [group.label for group in self.groups if any(measure not in run.measures() for run in group.runs)]
            if lacking:
                notes.append(f"{measure} is not measured for every run of: {'; '.join(lacking)}.")
        versions = sorted({version for run in self._runs() if (version := version_of(run.folder))})
        if len(versions) > 1:
            notes.append(f"Runs were begun by different versions of sape2: {', '.join(versions)}.")
        last = [row for run in self._runs() for row in run.epochs[-1:]]
        if len({(row.get("device"), row.get("precision"), row.get("processes", 1)) for row in last}) > 1:
            notes.append(
                "ms per step is not comparable: runs were trained on different devices, in different precision, or by "
                "different numbers of processes."
            )
        return notes

    def _of_images(self) -> Iterator[str]:
        """Notes on numbers that do not cover all images, and on lines whose numbers come from different images."""
        for measure in self.measures:
            limits: set[int] = {row.get("limit") or 0 for run in self._runs() for row in run.rows if row["measure"] == measure}
            if any(limits) and measure != "cost":
                told = " or ".join(f"{limit:,}" for limit in sorted(limits - {0}))
                yield f"{measure} is over {told} images drawn by class."
        first = self._runs()[0]
        for run in self._runs()[1:]:
            found = how_images_differ(first.seen, run.seen) if first.config.data.name == run.config.data.name else None
            if found and first.config.model.image_size == run.config.model.image_size:
                yield f"{run.folder} saw other images than {first.folder}: {found}. They do not share a line."
                return
        lacking = [str(run.folder) for run in self._runs() if not run.seen]
        if lacking and self.has_seeds:
            yield f"Whether these saw the same images is not known, for want of a data.json: {', '.join(lacking)}."

    def _images(self, measure: str) -> list[int]:
        """The different n of the first number of the measure that all runs have which have any."""
        found: list[dict[str, int]] = []
        for run in (run for run in self._runs() if measure in run.measures()):
            found.append({})
            for row in (row for row in run.rows if row["measure"] == measure):
                found[-1].setdefault(row["name"], row["n"])
        shared = next((name for name in (found[0] if found else ()) if all(name in sizes for sizes in found)), None)
        return sorted({sizes[shared] for sizes in found}) if shared else []

    def _runs(self) -> list[MeasuredRun]:
        return [run for group in self.groups for run in group.runs]


def compare(
    runs: list[MeasuredRun], measures: list[str] | None, split: str = "test", weights: str = "last", baseline: str | None = None
) -> Comparison:
    """The baseline is a label, or an encoding that only one group has. Raises ValueError if there is no such group.

    Also if there are no runs, or none was measured with what is asked for (None: whatever there is).
    """
    if not runs:
        raise ValueError("none of these runs is finished; give their sape2 train commands again to go on")
    known = list(dict.fromkeys(column.measure for column in HEADLINES if column.measure is not None))
    there = {measure for run in runs for measure in run.measures()}
    wanted = [measure for measure in known if measure in (there if measures is None else measures)]
    if not there & set(wanted):
        asked = ", ".join(measures or known)
        raise ValueError(
            f"no run has results of {asked} on the {split} set with weights {weights}; sape2 evaluate measures them"
        )
    groups = group_runs(runs)
    return Comparison(groups, wanted, split, weights, None if baseline is None else _named(groups, baseline))


def _named(groups: list[Group], baseline: str) -> str:
    """The label of the only group of this label or encoding, however that is written."""
    names = {baseline}
    with contextlib.suppress(ValueError):  # a label with more than an encoding in it
        names.add(canonical_name(baseline))
    found = [group.label for group in groups if names & {group.label, group.runs[0].config.model.encoding}]
    if len(found) != 1:
        known = "; ".join(group.label for group in groups)
        raise ValueError(f"the baseline must be one line of the table; {baseline!r} is {len(found)} of: {known}")
    return found[0]


def _digits(column: Headline, summary: Summary) -> int:
    return int(bool(summary.std)) if column.unit in COUNTS else 4 if abs(summary.mean) < 10 else 1


def _cell(column: Headline, summary: Summary, group: Group) -> str:
    """ "0.8121 ± 0.0031", with the number of runs behind it if not all of them have the number."""
    digits = _digits(column, summary)
    runs = "" if summary.n == len(group.runs) else f" ({summary.n})"
    return format_spread(summary.mean, summary.std if digits else None, digits) + runs


def _difference(column: Headline, summary: Summary, group: Group) -> str:
    """ "" for what has no pairs, and for the layer that tells most, a name rather than a number."""
    return "" if summary.pair is None or column.unit == "number" else difference(summary.pair, _digits(column, summary))


# --- files -----------------------------------------------------------------------------------------------------------


def _wide(comparison: Comparison) -> list[Row]:
    """One line a group: mean, std and n of every column, and its difference to the baseline if there is one."""
    lines: dict[str, Row] = {}
    kept = ("std", "n") if comparison.baseline is None else ("std", "n", *PAIRED, "pairs")
    for row in comparison.rows():
        line = lines.setdefault(row["label"], {"encoding": row["label"], "seeds": row["seeds"]})
        line["conditions"] = row["conditions"]
        line |= {row["name"]: row["mean"]} | {f"{row['name']} {key}": row[key] for key in kept}
    return list(lines.values())


def page(comparison: Comparison, figures: list[Path]) -> str:
    """The report in markdown."""
    columns = comparison.columns()
    meanings = [{"column": c.heading, "measure": c.measure or "train", "unit": c.unit, "meaning": c.meaning} for c in columns]
    folders = [
        {"encoding": group.label, "seed": run.config.seed, "run": str(run.folder)}
        for group in comparison.groups
        for run in group.runs
    ]
    headings = ["encoding", "seeds", *(column.heading for column in columns)]
    parts = [
        f"# Comparison of {len(folders)} runs\n\n{comparison.title}. An empty cell was not measured, or the model "
        "has nothing to measure there.\n",
        markdown_table(comparison.table(), headings),
        *(
            [f"## Minus {comparison.baseline}\n", markdown_table(comparison.differences(), headings)]
            if comparison.baseline
            else []
        ),
        "".join(f"- {note}\n" for note in comparison.notes()),
        "## Columns\n",
        markdown_table(meanings, ["column", "measure", "unit", "meaning"]),
        *(f"![{path.stem}]({path.name})\n" for path in figures),
        "## Runs\n",
        markdown_table(folders, ["encoding", "seed", "run"]),
    ]
    return "\n".join(part for part in parts if part)
