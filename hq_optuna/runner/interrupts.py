"""Holding Ctrl-C back for the moment in which a trial exists but is nobody's yet."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Hold SIGINT and SIGTERM back until the yielded function is called, or the body ends.

    Optuna gives a trial back when the objective is interrupted. Interrupted between making the
    trial and calling the objective, it leaves it running for ever. Signals without a Python
    handler, and threads other than the main one, are left alone.
    """
    handlers: dict[int, Any] = {}
    pending: list[tuple[int, FrameType | None]] = []
    holding = True

    def hold(number: int, frame: FrameType | None) -> None:
        if holding:
            pending.append((number, frame))
        else:
            handlers[number](number, frame)

    def release() -> None:
        nonlocal holding
        holding = False
        while pending:
            number, frame = pending.pop(0)
            handlers[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        handlers = {n: h for n in SIGNALS if callable(h := signal.getsignal(n))}
        for number in handlers:
            signal.signal(number, hold)
    try:
        yield release
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    release()
