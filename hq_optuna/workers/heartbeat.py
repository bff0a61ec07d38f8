"""Telling others that a trial which runs long still has its owner."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage

from hq_optuna import attributes
from hq_optuna.protocol.owners import BEAT_S
from hq_optuna.storages import RetryingStorage

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def heartbeat(storage: BaseStorage, trial_id: int, every_s: float | None = None) -> Iterator[None]:
    """Change one attribute of a running trial every few seconds while the body runs.

    Works on every storage, unlike Optuna's heartbeat, and observers compare no clocks: they see
    that it changes. A trial that is quicker than the first beat costs nothing. A storage that
    cannot be reached costs beats and nothing else.

    Args:
        storage: Where the trial is.
        trial_id: Its id there.
        every_s: Seconds between beats; `BEAT_S`.
    """
    if isinstance(storage, RetryingStorage):
        storage = storage.wrapped  # a late beat is worth nothing
    ended = threading.Event()
    pause_s = BEAT_S if every_s is None else every_s

    def beat() -> None:
        count = 0
        while not ended.wait(pause_s):
            count += 1
            try:
                storage.set_trial_system_attr(trial_id, attributes.BEAT, count)
            except UpdateFinishedTrialError:
                break  # taken for dead by others: what ends the trial finds out
            except Exception as error:
                logger.debug("No beat for trial %d: %s", trial_id, error)
        storage.remove_session()

    thread = threading.Thread(target=beat, name=f"beat-{trial_id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(pause_s)
