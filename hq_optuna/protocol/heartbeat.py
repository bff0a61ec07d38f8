"""Telling others that work which takes long still has its owner."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator

from optuna.storages import BaseStorage

from hq_optuna.protocol.owners import HEARTBEAT_S

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def heartbeat(
    storage: BaseStorage, beat: Callable[[int], object], every_s: float | None = None
) -> Iterator[None]:
    """Call ``beat(count)`` every few seconds while the body runs; it changes one attribute.

    Works on every storage, unlike Optuna's heartbeat, and observers compare no clocks: they see
    that it changes. Work that is quicker than the first heartbeat costs nothing. A storage that
    cannot be reached costs heartbeats and nothing else.
    """
    ended = threading.Event()
    pause_s = HEARTBEAT_S if every_s is None else every_s

    def send() -> None:
        for count in itertools.count(1):
            if ended.wait(pause_s):
                break
            try:
                beat(count)
            except Exception as error:
                logger.debug("No heartbeat: %s", error)
        storage.remove_session()

    thread = threading.Thread(target=send, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(pause_s)
