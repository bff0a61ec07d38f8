"""Whether a candidate that takes long is still needed, asked now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.trial import Trial

from hq_optuna.scoring import Scorer

LOOK_EVERY_S = 2.0


@contextmanager
def while_needed(scorer: Scorer, trial: Trial) -> Iterator[None]:
    """End the scoring of a trial once the search is over, or its slot is done.

    Asked between batches, at most every `LOOK_EVERY_S`.

    Raises:
        optuna.TrialPruned: From the scoring, when the work is not needed any more.
    """
    last = time.monotonic()

    def look() -> None:
        nonlocal last
        if time.monotonic() - last < LOOK_EVERY_S:
            return
        if trial.should_prune():
            raise optuna.TrialPruned("its work is no longer needed")
        last = time.monotonic()

    before, scorer.between_batches = scorer.between_batches, look
    try:
        yield
    finally:
        scorer.between_batches = before
