"""Telling others that a trial which runs long still has its owner."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterator

from optuna.storages import BaseStorage

from hq_optuna.protocol.owners import HEARTBEAT_S
from hq_optuna.storages.writing import write_heartbeats

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def heartbeat(storage: BaseStorage, trial_id: int, every_s: float | None = None) -> Iterator[None]:
    """Change one attribute of a running trial every few seconds while the body runs.

    Works on every storage, unlike Optuna's heartbeat, and observers compare no clocks: they see
    that it changes. A trial that is quicker than the first heartbeat costs nothing. A storage that
    cannot be reached costs heartbeats and nothing else.
    """
    ended = threading.Event()
    pause_s = HEARTBEAT_S if every_s is None else every_s

    def send() -> None:
        for count in itertools.count(1):
            if ended.wait(pause_s):
                break
            try:
                write_heartbeats(storage, [trial_id], count)
            except Exception as error:
                logger.debug("No heartbeat for trial %d: %s", trial_id, error)
        storage.remove_session()

    thread = threading.Thread(target=send, name=f"heartbeat-{trial_id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(pause_s)
