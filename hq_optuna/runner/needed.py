"""Whether a candidate that takes long is still needed, asked now and then."""

from __future__ import annotations

import time

import optuna
from optuna.trial import Trial

LOOK_EVERY_S = 2.0


class StillNeeded:
    """Ends a running trial once the search is over, or its slot is done.

    Args:
        trial: The running trial.

    Raises:
        optuna.TrialPruned: When called, at most every `LOOK_EVERY_S`: the work is not needed.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Ask, if the last time is long enough ago."""
        if time.monotonic() - self._last < LOOK_EVERY_S:
            return
        if self._trial.should_prune():
            raise optuna.TrialPruned("its work is no longer needed")
        self._last = time.monotonic()


def always() -> None:
    """Ask nobody."""
