"""The study of docs/decisions/0011-sprint.md: its runs in their order, and its tables from the rows that are kept.

Command:  python benchmarks/sprint.py run STAGE [STAGE ...] --data DIR --out DIR [--threads N]
                 [--seeds N ...] [--encodings NAME ...]
          python benchmarks/sprint.py list       how many runs of each stage are kept
          python benchmarks/sprint.py            prints the tables
          python benchmarks/sprint.py figure     draws docs/figures/sprint_quarter.png and sprint_budget.png

DIR holds the folders cifar10 and cifar100. Every finished run becomes a line of benchmarks/results/sprint.jsonl at once
and is not run again: stop the command whenever you like, and give it again, on another machine too. Several processes may
share one --out; each takes runs that no other has.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from leaderboard import images_seen
from timing import RESULTS, ROOT, Row, conditions

from sape2.config import DataConfig, ModelConfig, RunConfig, override, with_epochs
from sape2.config.recipes import get_recipe
from sape2.encodings import canonical_name
from sape2.runs.files import digest_of
from sape2.runs.rows import read_rows
from sape2.runs.run import Run
from sape2.runs.settings import canonical
from sape2.studies.compare.outcome import outcome, paired_table
from sape2.studies.compare.paired import Paired, paired_difference
from sape2.studies.compare.rawrows import final_accuracy, final_validation_accuracy
from sape2.studies.compare.summary import grouped, summarize
from sape2.tables import markdown_table
from sape2.viz.base import legend_below, line_style, pyplot, save

if TYPE_CHECKING:
    from sape2.data import Splits
    from sape2.runs.lock import Lock

ROWS = RESULTS / "sprint.jsonl"
BASELINE = "ape"
SEEDS = (0, 1, 2)

# --- what is run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One run: a recipe with an encoding, a seed, a length and other settings."""

    recipe: str
    encoding: str
    seed: int = 0
    epochs: int | None = None
    settings: tuple[str, ...] = ()

    @cached_property
    def config(self) -> RunConfig:
        config = get_recipe(self.recipe)
        config = replace(config, seed=self.seed, model=replace(config.model, encoding=self.encoding))
        config = config if self.epochs is None else with_epochs(config, self.epochs)
        return canonical(override(config, list(self.settings)))

    @property
    def command(self) -> str:
        """What trains the same with the installed package."""
        length = "" if self.epochs is None else f" --epochs {self.epochs}"
        settings = "".join(f" --set {setting}" for setting in self.settings)
        return f"sape2 train {self.recipe} --data DIR --encoding {self.encoding} --seed {self.seed}{length}{settings}"

    @cached_property
    def digest(self) -> str:
        """Of all that decides the result, as in the raw rows of `sape2 compare`."""
        return digest_of(self.config.identity())


TABLE = ("none", "ape", "rope", "ape+rope", "ape+cope", "sape2", "ape+sape2")  # the paper's table 1
BEYOND = ("cpe", "rope+sape2:readout=direct", "cpe+sape2:readout=direct")
DIRECT = "sape2:readout=direct"
BASES = ("", "ape+", "rope+", "cpe+")
GATES = ("", ",gates=constant", ",gates=none,count=between")
FORMS = tuple(f"ape+sape2:{option}" for option in ("sign=minus", "sign=learned", "preset=equations", "normalize=sqrt_length"))
SCALED = ("ape", "ape+sape2")  # with LayerScale and without: in the paper's code the blocks of `ape` alone had it

# The recipe as it was before the search, so that the rows of the search stay those of its trials when the recipe changes.
BEFORE = (
    "train.optimizer=nmuon",
    "train.lr=0.002",
    "train.muon_lr=0.01",
    "train.muon_momentum=0.95",
    "train.betas=[0.9,0.95]",
    "train.weight_decay=0.05",
    "train.batch_size=128",
    "train.label_smoothing=0.1",
    "train.ema_decay=null",
    "augment.crop_padding=4",
)
SEARCH_ENCODINGS = ("none", "ape", "rope", "ape+sape2")
SEARCH_EPOCHS = 2
CANDIDATES: dict[str, tuple[str, ...]] = {  # what the screening with one encoding left
    "as it was": (),
    "batch 64": ("train.batch_size=64", "train.muon_lr=0.007", "train.lr=0.0014"),
}

QUARTER = 3  # epochs of the search for rates: a quarter of the recipe's
RATES = ((0.01, 0.002), (0.005, 0.0005), (0.01, 0.0005), (0.01, 0.008))  # of the blocks, of the encoding
DROPPED = ((0.02, 0.0005),)  # of the search as it was planned; two encodings had lost 3 and 5 points at it
TUNING_SEED = 1  # the first whose kept rows at the first pair are all of one machine and precision


def search() -> Iterator[Trial]:
    for settings in CANDIDATES.values():
        yield from (_candidate(name, settings) for name in SEARCH_ENCODINGS)


def _candidate(encoding: str, settings: tuple[str, ...]) -> Trial:
    return Trial("cifar10_sprint", encoding, 0, SEARCH_EPOCHS, BEFORE + settings)


def tuning(encodings: Iterable[str]) -> Iterator[Trial]:
    """Every encoding at the same pairs of rates. `none` has no rate of its own, and so each rate of the blocks once."""
    names = list(encodings)
    for rates in RATES:
        for encoding in names:
            if encoding != "none" or rates in RATES[:2]:
                yield _with_rates(encoding, rates)


def _with_rates(encoding: str, rates: tuple[float, float], seed: int = TUNING_SEED) -> Trial:
    return Trial("cifar10_sprint", encoding, seed, QUARTER, _settings(rates))


def one_rate(encodings: Iterable[str], seeds: Iterable[int] = SEEDS) -> Iterator[Trial]:
    """A quarter of the length with the first pair of rates for all, seed by seed."""
    names = list(encodings)
    for seed in seeds:
        yield from (_with_rates(name, RATES[0], seed) for name in names)


def _settings(rates: tuple[float, float]) -> tuple[str, ...]:
    return (f"train.muon_lr={rates[0]}", f"train.encoding_lr={rates[1]}")


def chosen_rates(rows: list[Row], encoding: str) -> tuple[str, ...]:
    """The rates that were best on the validation split. Raises ValueError while the search of this encoding is not done."""
    found = {row["digest"]: row for row in rows}
    trials = list(tuning([encoding]))
    left = [trial for trial in trials if trial.digest not in found]
    if left:
        raise ValueError(f"the rates of {encoding} are not searched yet: {len(left)} runs of stage tuning are left")
    return max(trials, key=lambda trial: final_validation_accuracy(found[trial.digest])).settings


def tuned(
    rows: list[Row], encodings: Iterable[str], seeds: Iterable[int] = SEEDS, recipe: str = "cifar10_sprint", **changes: object
) -> Iterator[Trial]:
    """Seed by seed, so that a study that is stopped has about as many seeds of every encoding."""
    names = list(encodings)
    for seed in seeds:
        for name in names:
            yield Trial(recipe, name, seed, settings=chosen_rates(rows, name), **changes)


def with_layer_scale(trials: Iterable[Trial]) -> Iterator[Trial]:
    return (replace(trial, settings=(*trial.settings, "model.layer_scale=1e-4")) for trial in trials)


_CONTROLS = (
    *(f"{base}{DIRECT}{gates}" for base in BASES for gates in GATES),
    *(f"ape+key_table{options}" for options in ("", ":by=token", ":to=both", ":heads=shared")),
    "rope+key_table",
    "cpe+key_table",
    "ape:every_layer=true",
)
CONTROLS = tuple(name for name in _CONTROLS if name not in (*TABLE, *BEYOND))  # the others are run with the table
STAGES: dict[str, Callable[[list[Row]], Iterable[Trial]]] = {
    "search": lambda rows: search(),
    "one_rate": lambda rows: one_rate(FIRST),
    "tuning_first": lambda rows: tuning(FIRST),
    "quarter": lambda rows: tuned(rows, FIRST, epochs=QUARTER),
    "tuning_headline": lambda rows: tuning(HEADLINE),
    "headline": lambda rows: tuned(rows, HEADLINE),
    "headline_quarter": lambda rows: tuned(rows, HEADLINE, epochs=QUARTER),
    "headline_cifar100": lambda rows: tuned(rows, HEADLINE, recipe="cifar100_sprint", epochs=QUARTER),
    "whole_cifar100": lambda rows: tuned(rows, HEADLINE, recipe="cifar100_sprint"),
    "one_rate_rivals": lambda rows: one_rate(RIVALS, (1, 2)),
    "joins": lambda rows: one_rate(JOINS, (1,)),
    "joins_of_biases": lambda rows: one_rate(JOINS_OF_BIASES, (1,)),
    "one_rate_table": lambda rows: one_rate((BASELINE, "ape+rope", "ape+cope", "sape2"), (1, 2, 3)),
    "one_rate_controls": lambda rows: one_rate(CONTROLS, (1, 2, 3)),
    "other_sizes": lambda rows: one_rate(AT_SIZES, (1, 2, 3)),
    "winner": lambda rows: one_rate((JOINS_OF_BIASES[-1], "cpe", "log_cpb", "rope", "cpe+log_cpb"), (1, 2, 3, 4, 5)),
    "tuning": lambda rows: tuning((*TABLE, *BEYOND)),
    "cifar10": lambda rows: tuned(rows, (*TABLE, *BEYOND)),
    "tuning_controls": lambda rows: tuning(CONTROLS),
    "controls": lambda rows: tuned(rows, CONTROLS),
    "cifar100": lambda rows: tuned(rows, (*TABLE, *BEYOND), recipe="cifar100_sprint"),
    "tuning_rivals": lambda rows: tuning(RIVALS),
    "one_rate_forms": lambda rows: one_rate((BASELINE, "ape+sape2", *FORMS), (1, 2, 3)),
    "tuning_forms": lambda rows: tuning(FORMS),
    "forms": lambda rows: tuned(rows, FORMS),
    "short": lambda rows: tuned(rows, LENGTHS, epochs=QUARTER),
    "long": lambda rows: tuned(rows, LENGTHS, epochs=16 * QUARTER),
    "layerscale": lambda rows: with_layer_scale(tuned(rows, SCALED)),
    "layerscale_quarter": lambda rows: with_layer_scale(tuned(rows, SCALED, epochs=QUARTER)),
    "more_seeds": lambda rows: tuned(rows, (*TABLE, *BEYOND), (3, 4)),
}
FIRST = ("none", "ape", "rope", "ape+sape2", *BEYOND, f"rope+{DIRECT},gates=constant", "rope+key_table")
# What the whole length is spent on first: the paper's claim, what is recommended, and the gates beside their control.
HEADLINE = ("ape", "cpe+log_cpb", "ape+sape2", "rope", "cpe", f"rope+{DIRECT},gates=constant", f"rope+{DIRECT}")
DINOV3 = "rope:preset=dinov3"
RIVALS = ("pape", DINOV3, "rope:directions=4", "pope", "log_cpb", "fire", "forget")
AT_SIZES = ("ape", "rope", DINOV3, f"{DINOV3},train_rescale=1", "cpe", "log_cpb", "fire", "cpe+log_cpb")
JOINS = ("cpe+rope", "cpe+key_table", "cpe+rope+key_table", f"cpe+rope+{DIRECT},gates=constant")  # of decision 0012
JOINS_OF_BIASES = ("cpe+log_cpb", "rope+log_cpb", f"log_cpb+{DIRECT},gates=constant", f"cpe+log_cpb+{DIRECT},gates=constant")
LENGTHS = ("ape", "rope", "ape+sape2", f"rope+{DIRECT}", f"rope+{DIRECT},gates=constant")


# --- running it --------------------------------------------------------------------------------------------------------


def run(given: argparse.Namespace) -> None:
    """Trains what is left, a run at a time, and keeps each as soon as it is finished."""
    import torch

    torch.set_num_threads(given.threads)
    for stage, trial in wanted(given.stages, given.seeds, given.encodings):
        train(trial, stage, given.data, given.out)


def wanted(stages: Iterable[str], seeds: Sequence[int], encodings: Sequence[str]) -> Iterator[tuple[str, Trial]]:
    """The runs of these stages, each with its stage; of all seeds or encodings if none is given."""
    names = [canonical_name(name) for name in encodings]
    for stage in stages:
        for trial in STAGES[stage](read_rows(ROWS)):
            if (not seeds or trial.seed in seeds) and (not names or canonical_name(trial.encoding) in names):
                yield stage, trial


def train(trial: Trial, stage: str, data: Path | None, out: Path, rows: Path = ROWS) -> None:
    """Does nothing if the run is kept, or if another process has it. Without `data` the recipe's own images are used."""
    if trial.digest in {row["digest"] for row in read_rows(rows)}:
        return
    run = run_of(trial, data, out / trial.digest)
    if lock := hold_if_free(run):
        with lock:
            keep(trained(trial, run) | {"stage": stage}, rows)


def hold_if_free(run: Run[RunConfig]) -> Lock | None:
    """The lock of its folder, or None if another process has it."""
    from sape2.runs.lock import Held

    try:
        return run.hold()
    except Held:
        return None


def run_of(trial: Trial, data: Path | None, folder: Path) -> Run[RunConfig]:
    source = None if data is None else str(data / trial.config.data.name)
    return Run(folder, replace(trial.config, data=replace(trial.config.data, source=source)))


def trained(trial: Trial, run: Run[RunConfig]) -> Row:
    """Trains a run that is held to its end; its raw row without its classes, and the conditions."""
    from sape2.models.trained import build_model
    from sape2.studies.compare.rawrows import raw_row
    from sape2.studies.run import run_to_end

    run_to_end(build_model(run.config), splits_of(run), run)
    row, about = raw_row(run), conditions()
    row["rows"] = [kept for kept in row["rows"] if "class" not in kept]
    return (
        row | {"command": trial.command, "processor": about["hardware"]} | {k: about[k] for k in ("date", "threads", "commit")}
    )


def splits_of(run: Run[RunConfig]) -> Splits:
    """The images of a run, which do not depend on its encoding."""
    return _splits(run.config.data, replace(run.config.model, encoding="none"))


@functools.lru_cache(maxsize=1)
def _splits(data: DataConfig, model: ModelConfig) -> Splits:
    """Decoded once for all runs of a process on the same images."""
    from sape2.data import load_data

    return load_data(data, model)


def keep(row: Row, rows: Path) -> None:
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# --- tables ------------------------------------------------------------------------------------------------------------


def search_table(rows: list[Row]) -> str:
    """Validation accuracy of the candidates, and their mean over the encodings that decide together."""
    found = {row["digest"]: row for row in rows}
    lines = []
    for name, settings in CANDIDATES.items():
        line: Row = {"candidate": name}
        for encoding in SEARCH_ENCODINGS:
            trial = _candidate(encoding, settings)
            if trial.digest in found:
                line[encoding] = f"{final_validation_accuracy(found[trial.digest]):.4f}"
        if len(line) > len(SEARCH_ENCODINGS):
            line["mean"] = f"{sum(float(line[e]) for e in SEARCH_ENCODINGS) / len(SEARCH_ENCODINGS):.4f}"
        if len(line) > 1:
            lines.append(line)
    return markdown_table(lines, ["candidate", *SEARCH_ENCODINGS, "mean"])


TUNINGS = ("tuning_headline", "tuning_first", "tuning", "tuning_rivals", "tuning_controls", "tuning_forms")


def tuning_table(rows: list[Row]) -> str:
    """Validation accuracy of every encoding at the pairs of rates it has, the best in bold; and what choosing adds."""
    found = {row["digest"]: final_validation_accuracy(row) for row in rows}
    lines: dict[str, Row] = {}
    for encoding in dict.fromkeys(trial.encoding for stage in TUNINGS for trial in STAGES[stage](rows)):
        for rates in (*RATES, *DROPPED):
            if (digest := _with_rates(encoding, rates).digest) in found:
                lines.setdefault(encoding, {})[_heading(rates)] = found[digest]
    headings = [*map(_heading, RATES), GAIN, *map(_heading, DROPPED)]
    searched = [_tuning_line(*line) for line in lines.items() if len(line[1]) > 1]
    return markdown_table(searched, ["encoding", *headings])


GAIN = "gain by choosing, points"


def _tuning_line(encoding: str, accuracies: dict[str, float]) -> Row:
    best, line = max(accuracies.values()), {"encoding": f"`{encoding}`"}
    line |= {rates: f"**{value:.4f}**" if value == best else f"{value:.4f}" for rates, value in accuracies.items()}
    first = accuracies.get(_heading(RATES[0]))
    return line if first is None else line | {GAIN: f"{100 * (best - first):.1f}"}


def _heading(rates: tuple[float, float]) -> str:
    return f"{rates[0]:g} / {rates[1]:g}"


LEVEL = 0.015  # an interval that holds 0 and ends within ±1.5 points


def accuracy_table(rows: list[Row], *stages: str, baseline: str = BASELINE) -> str:
    """Test accuracy of the kept runs of these stages, in pairs of a seed with the baseline; p is adjusted over the table."""
    return markdown_table(*paired_table(rows_of(rows, *stages), canonical_name(baseline), level=LEVEL))


QUARTERS = (  # with one pair of rates
    "one_rate",
    "one_rate_table",
    "one_rate_rivals",
    "one_rate_controls",
    "one_rate_forms",
    "other_sizes",
    "joins",
    "joins_of_biases",
    "winner",
)

WHOLE = ("headline", "cifar10", "more_seeds")  # the whole length, with rates of their own


def table_of_added(rows: list[Row], *stages: str) -> str:
    """The same for stages that were added to those of one pair of rates, whose baseline they share."""
    base = [row for row in rows_of(rows, "one_rate", "one_rate_table") if row["encoding"] == BASELINE]
    added = [row for row in rows_of(rows, *stages) if row["encoding"] != BASELINE]
    return markdown_table(*paired_table([*base, *added], BASELINE, level=LEVEL))


WINNER = JOINS_OF_BIASES[-1]
CONTRASTS = (  # what findings.md, choosing.md and README say of two encodings
    *(
        (name, BASELINE)
        for name in ("none", "ape+sape2", "ape+cope", "ape+rope", "rope", "cpe", "log_cpb", "cpe+log_cpb", WINNER)
    ),
    ("sape2", "none"),
    ("ape+rope", "rope"),
    (f"rope+{DIRECT}", "rope"),
    (f"cpe+{DIRECT}", "cpe"),
    (f"rope+{DIRECT},gates=constant", "rope"),
    (f"rope+{DIRECT}", f"rope+{DIRECT},gates=constant"),
    (f"cpe+{DIRECT}", f"cpe+{DIRECT},gates=constant"),
    ("rope+key_table", "rope"),
    (f"rope+{DIRECT},gates=constant", "rope+key_table"),
    *(("cpe+log_cpb", name) for name in ("rope", "cpe", "log_cpb", f"cpe+{DIRECT}")),
    *((WINNER, name) for name in ("rope", "cpe", "log_cpb", "cpe+log_cpb")),
)
SCOPES = {  # column -> stages
    "three passes, one pair of rates": QUARTERS,
    "twelve passes, rates of their own": WHOLE,
    "CIFAR-100, three passes": ("headline_cifar100",),
    "CIFAR-100, twelve passes": ("whole_cifar100",),
}


def contrast_table(rows: list[Row]) -> str:
    """Differences in points over the seeds that both encodings have, each with its interval and the number of pairs."""
    of = {scope: grouped(rows_of(rows, *stages), final_accuracy) for scope, stages in SCOPES.items()}
    lines = []
    for one, other in ((canonical_name(one), canonical_name(other)) for one, other in CONTRASTS):
        line = {"encoding": f"`{one}`", "minus": f"`{other}`"}
        for scope, values in of.items():
            if pair := paired_difference(values.get(one, {}), values.get(other, {})):
                line[scope] = f"{in_points(pair)}, n = {pair.n}"
        lines.append(line)
    return markdown_table(lines, ["encoding", "minus", *SCOPES])


def layer_scale_table(rows: list[Row]) -> str:
    """What LayerScale changes, and SaPE2's difference to the table with it in none, in both and in the table's model alone.

    The last is the paper's comparison: in its code only the blocks without SaPE2 had LayerScale.
    """
    of = {False: rows_of(rows, "headline_quarter"), True: rows_of(rows, "layerscale_quarter")}
    values = {scaled: grouped(found, final_accuracy) for scaled, found in of.items()}
    lines = []
    for one, other in (
        *(((name, True), (name, False)) for name in SCALED),
        *((("ape+sape2", mine), (BASELINE, base)) for mine, base in ((False, False), (True, True), (False, True))),
    ):
        pair = paired_difference(*(values[scaled].get(name, {}) for name, scaled in (one, other)))
        line = {heading: _scaled(*model) for heading, model in (("model", one), ("minus", other))}
        lines.append(line | ({"points": in_points(pair), "n": pair.n} if pair else {}))
    return markdown_table(lines, ["model", "minus", "points", "n"])


def _scaled(encoding: str, scaled: bool) -> str:
    return f"`{encoding}`" + (" with LayerScale" if scaled else "")


def in_points(pair: Paired) -> str:
    """ "+2.6 (1.1 to 4.1)", in points."""
    within = "" if pair.ci_low is None else f" ({100 * pair.ci_low:.1f} to {100 * pair.ci_high:.1f})"
    return f"{100 * pair.difference:+.1f}{within}"


def rows_of(rows: list[Row], *stages: str) -> list[Row]:
    digests = {trial.digest for stage in stages for trial in STAGES[stage](rows)}
    return [row for row in rows if row["digest"] in digests]


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "search": search_table,
    "one_rate": lambda rows: accuracy_table(rows, "one_rate"),
    "one_rate, against constant gates": lambda rows: accuracy_table(rows, "one_rate", baseline=f"rope+{DIRECT},gates=constant"),
    "one_rate_table": lambda rows: table_of_added(rows, "one_rate_table"),
    "one_rate_rivals": lambda rows: table_of_added(rows, "one_rate_rivals"),
    "joins": lambda rows: table_of_added(rows, "joins", "joins_of_biases"),
    "one_rate_controls": lambda rows: table_of_added(rows, "one_rate_controls"),
    "winner": lambda rows: accuracy_table(rows, "winner", baseline="cpe"),
    "contrasts": contrast_table,
    "one_rate_forms": lambda rows: accuracy_table(rows, "one_rate_forms", baseline="ape+sape2"),
    "layerscale_quarter": layer_scale_table,
    "tuning": tuning_table,
    "whole": lambda rows: accuracy_table(rows, *WHOLE),
    "headline_quarter": lambda rows: accuracy_table(rows, "headline_quarter"),
    "headline_cifar100": lambda rows: accuracy_table(rows, "headline_cifar100"),
    "whole_cifar100": lambda rows: accuracy_table(rows, "whole_cifar100"),
    "quarter": lambda rows: accuracy_table(rows, "quarter"),
    "controls": lambda rows: accuracy_table(rows, "cifar10", "controls"),
    "cifar100": lambda rows: accuracy_table(rows, "cifar100"),
}


def table(name: str, rows: list[Row]) -> str:
    """One of `TABLES`; where its runs are not done, what is left."""
    try:
        return TABLES[name](rows)
    except ValueError as left:  # rates that are not searched, no run of the baseline
        return f"{left}\n"


def tables(rows: list[Row]) -> str:
    return "\n".join(f"### {name}\n\n{table(name, rows)}" for name in TABLES)


FIGURES = ROOT / "docs" / "figures"


def figure(rows: list[Row]) -> str:
    """Draws both figures; says where they are."""
    return f"{quarter_figure(rows)}\n{budget_figure(rows)}"


def quarter_figure(rows: list[Row]) -> Path:
    """Every seed of the encodings at a quarter of the length with one pair of rates."""
    path = FIGURES / "sprint_quarter.png"
    with tempfile.TemporaryDirectory() as folder:
        found = outcome(rows_of(rows, *QUARTERS), BASELINE)
        shutil.move(found.draw(Path(folder))[0], path)
    return path


BUDGETS = ("headline_quarter", "headline", "long")  # the same rates of each encoding, by length


def budget_points(rows: list[Row]) -> dict[str, list[Row]]:
    """encoding -> its mean accuracy and paired difference to the baseline (points) for each length that has pairs."""
    points: dict[str, list[Row]] = {}
    for stage in BUDGETS:
        found = rows_of(rows, stage)
        for encoding, summary in summarize(grouped(found, final_accuracy), BASELINE).items():
            images = images_seen(next(row for row in found if row["encoding"] == encoding)) // 1000
            mine = points.setdefault(encoding, [])
            mine.append({"name": "accuracy", "images": images, "value": summary.mean})
            if pair := summary.pair:
                interval = {"value": pair.difference, "ci_low": pair.ci_low, "ci_high": pair.ci_high}
                known = {key: 100 * value for key, value in interval.items() if value is not None}
                mine.append({"name": "difference", "images": images} | known)
    return points


def budget_figure(rows: list[Row]) -> Path:
    """Accuracy, and its difference to the baseline, against the images that a training sees; bars are 95 % intervals."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4), layout="constrained")
    points = budget_points(rows)
    lengths = sorted({row["images"] for found in points.values() for row in found})
    for index, (name, found) in enumerate(points.items()):
        for axis, what in zip(axes, ("accuracy", "difference"), strict=True):
            some = [row for row in found if row["name"] == what]
            bars = [[abs(row["value"] - row.get(end, float("nan"))) for row in some] for end in ("ci_low", "ci_high")]
            apart = 1 + 0.02 * (index - len(points) // 2)  # so that bars do not cover each other
            places = [row["images"] * apart for row in some]
            axis.errorbar(places, [row["value"] for row in some], bars, capsize=3, label=name, **line_style(index))
    labels = ("test accuracy, mean over seeds", f"difference to {BASELINE} in pairs of a seed (points)")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xscale="log", xlabel="training images seen (thousands)", ylabel=label)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    legend_below(figure, *axes[0].get_legend_handles_labels())
    path = FIGURES / "sprint_budget.png"
    save(figure, path)
    return path


def progress(rows: list[Row]) -> str:
    """How many runs of each stage are kept; a stage whose rates are not chosen yet says so."""
    kept, lines = {row["digest"] for row in rows}, []
    for stage, trials in STAGES.items():
        try:
            digests = [trial.digest for trial in trials(rows)]
        except ValueError as error:
            lines.append({"stage": stage, "runs": str(error)})
        else:
            lines.append({"stage": stage, "runs": f"{len(kept & set(digests))} of {len(digests)}"})
    return markdown_table(lines, ["stage", "runs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", nargs="?", choices=["run", "list", "tables", "figure"], default="tables")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--data", type=Path, help="folder that holds cifar10 and cifar100")
    parser.add_argument("--out", type=Path, default=Path("runs") / "sprint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="of the stages' runs those with these seeds")
    parser.add_argument("--encodings", nargs="+", default=[], metavar="NAME", help="and those of these encodings")
    given = parser.parse_args()
    unknown = [stage for stage in given.stages if stage not in STAGES]
    if unknown or (given.command == "run" and not (given.stages and given.data)):
        parser.error(f"run needs --data DIR and stages out of {', '.join(STAGES)}; got {', '.join(given.stages) or 'none'}")
    if given.command == "run":
        run(given)
    else:
        print({"list": progress, "tables": tables, "figure": figure}[given.command](read_rows(ROWS)))


if __name__ == "__main__":
    main()
