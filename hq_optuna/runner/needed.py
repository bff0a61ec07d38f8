"""Whether a candidate that takes long is still needed, asked now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hq_optuna.scoring import Scorer

LOOK_EVERY_S = 2.0


@contextmanager
def while_needed(
    scorer: Scorer, needed: Callable[[], bool], otherwise: Exception, every_s: float = LOOK_EVERY_S
) -> Iterator[None]:
    """End the scoring of a candidate once the search is over, or its slot is done.

    Args:
        scorer: Who scores.
        needed: Asked between batches.
        otherwise: Raised from the scoring when the work is not needed any more.
        every_s: How often it is asked at most.
    """
    last = time.monotonic()

    def look() -> None:
        nonlocal last
        if time.monotonic() - last < every_s:
            return
        if not needed():
            raise otherwise
        last = time.monotonic()

    before, scorer.between_batches = scorer.between_batches, look
    try:
        yield
    finally:
        scorer.between_batches = before
