"""Holding Ctrl-C back for the moments in which a trial exists but cannot be given back."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Held:
    """Interrupts that are held back now, or call their handlers."""

    def __init__(self, handlers: Mapping[int, Any]) -> None:
        self._handlers = handlers
        self._pending: list[tuple[int, FrameType | None]] = []
        self._holding = True

    @property
    def pending(self) -> bool:
        """Whether an interrupt came that was held back."""
        return bool(self._pending)

    def hold(self) -> None:
        """Hold interrupts back from here on."""
        self._holding = True

    def release(self) -> None:
        """Let interrupts through from here on, the held ones first."""
        self._holding = False
        while self._pending:
            number, frame = self._pending.pop(0)
            self._handlers[number](number, frame)

    def sleep(self, seconds: float) -> None:
        """Sleep, unless an interrupt is held back or comes: then let it through."""
        if threading.current_thread() is not threading.main_thread():
            time.sleep(seconds)  # interrupts are the main thread's
            return
        until = time.monotonic() + seconds
        while True:
            if self.pending:
                self.release()
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(left, 0.1))

    def arrive(self, number: int, frame: FrameType | None) -> None:
        """Take in a signal: hold it back, or let it through."""
        if self._holding:
            self._pending.append((number, frame))
        else:
            self._handlers[number](number, frame)


@contextmanager
def held_interrupts() -> Iterator[Held]:
    """Hold SIGINT and SIGTERM back until the yielded object releases them, or the body ends.

    Optuna gives a trial back when the objective is interrupted. Interrupted between making the
    trial and calling the objective, or while it stores the result, it leaves it running for ever.
    Signals without a Python handler, and threads other than the main one, are left alone.
    """
    main = threading.current_thread() is threading.main_thread()
    handlers: dict[int, Any] = {
        n: h for n in SIGNALS if main and callable(h := signal.getsignal(n))
    }
    held = Held(handlers)
    for number in handlers:
        signal.signal(number, held.arrive)
    try:
        yield held
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    held.release()
