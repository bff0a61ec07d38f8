"""The worker's end of the pipe: takes orders from a coordinator, line by line, and answers.

Orders are JSON objects on standard input: ``{"claim": 7, "bits": [8, 4]}`` asks for a
candidate; ``"train": 12`` in it asks for the training that the trial with this id records.
``{"cancel": 7}`` takes that back, ``{"end": true}`` says that the search is over. The end of the
input says that the launcher is gone. Knows nothing of networks or storages.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any

from hq_optuna.protocol.claims import NotNeeded

Answer = tuple[float, Mapping[str, Any]]  # a candidate's score, and what is recorded beside it


class Orders:
    """Orders as they arrive from a file, read by a thread of their own until the file ends.

    The descriptor is read as it is, because Python aborts a process that ends while a thread waits
    within ``sys.stdin``.
    """

    def __init__(self, descriptor: int, on_gone: Callable[[], None]) -> None:
        self._queue: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._cancelled: set[int] = set()
        self._descriptor, self._on_gone = descriptor, on_gone
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def _read(self) -> None:
        left = b""
        with contextlib.suppress(OSError):  # closed under our hands
            while read := os.read(self._descriptor, 65536):
                *lines, left = (left + read).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    if "cancel" in order:
                        self._cancelled.add(order["cancel"])
                    else:
                        self._queue.put(order)
        self._on_gone()

    def needed(self, claim: int) -> bool:
        """Return whether a candidate was not taken back."""
        return claim not in self._cancelled

    def next(self) -> dict[str, Any]:
        """Return the next order; wait for it."""
        # A bounded wait again and again, as a lock without end would keep Ctrl-C from Python.
        while True:
            with contextlib.suppress(Empty):
                return self._queue.get(timeout=1.0)


def serve(
    orders: Orders,
    score: Callable[[dict[str, Any], Callable[[], bool]], Answer],
    tell: Callable[..., None],
) -> None:
    """Score what is ordered until the search is over, and tell the launcher events and facts.

    ``score`` is given an order, and a function that says whether the order is still needed; it may
    raise `NotNeeded`.
    """
    tell("ready")
    while True:
        order = orders.next()
        if order.get("end"):
            return
        claim = order["claim"]
        tell("training" if "train" in order else "scoring")
        try:
            value, facts = score(order, functools.partial(orders.needed, claim))
        except NotNeeded:
            tell("cancelled", claim=claim)
            continue
        tell("scored", claim=claim, value=value, facts=dict(facts))
