"""One run from its settings to its rows: what `sape2 train`, and every run of `sape2 compare`, does."""

from __future__ import annotations

from collections.abc import Callable

from sape2.checkpoint import Progress, Row, check_run, is_finished
from sape2.claim import Claim
from sape2.config import RunConfig
from sape2.data import Splits
from sape2.evaluation.accuracy import quick_accuracy
from sape2.runs import measure
from sape2.train import train
from sape2.vit import ViT


def run_to_end(
    model: ViT,
    splits: Splits,
    config: RunConfig,
    claim: Claim,
    quiet: bool = False,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> list[Row]:
    """Trains on from where the run in the claimed folder stands, unless it is finished, and measures the test set.

    Nothing is saved once the claim is lost. `watch` hears where the run stands after each step. Raises what `train` and
    `Claim.check` raise.
    """

    def guard(progress: Progress, saving: bool) -> None:
        if saving:
            claim.check()
        watch(progress)

    folder = claim.folder
    check_run(folder, config)
    if not is_finished(folder):
        train(model, splits.train, lambda trained: quick_accuracy(trained, splits.validation), config, folder, quiet, guard)
    claim.check()
    return measure(folder, splits, ["accuracy"], "test", ["last", "best"])
