"""Orders for workers that are spoken to line by line, and what comes back, between threads."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hq_optuna.attributes import Ticket


class RemoteWorker(Protocol):
    """A worker that scores what it is told to."""

    def order(self, order: Mapping[str, Any]) -> None:
        """Send it JSON data; `OSError` where it is gone."""


@dataclass(eq=False)
class Order:
    """A candidate that somebody is to score.

    Attributes:
        claim: Its number among this process's claims.
        bits: Of each variable.
        since: When it was made, by the foreman's clock.
        ticket: Of its trial; ``None`` before its step is open.
        number: Of its trial, once that is created.
        trial_id: Likewise its id.
        hand: Who has it, or had it.
        void: Whether nobody wants its result any more.
        early: Whether it was handed out before its step was open.
        base: The record whose trained network it is made from, if there is one.
        trains: Whether it is the record of a step whose bits are to be trained.
    """

    claim: int
    bits: tuple[int, ...]
    since: float
    ticket: Ticket | None = None
    number: int = -1
    trial_id: int | None = None
    hand: RemoteWorker | None = None
    void: bool = False
    early: bool = False
    base: int | None = None
    trains: bool = False

    def message(self) -> dict[str, Any]:
        """Return what a worker is told."""
        said: dict[str, Any] = {"claim": self.claim, "bits": list(self.bits)}
        if self.base is not None:
            said["base"] = self.base
        if self.trains:
            said["train"] = self.trial_id
        return said

    def drop(self) -> None:
        """Say that its result is not wanted, to who has it too."""
        self.void = True
        if self.hand is not None:
            with contextlib.suppress(OSError):
                self.hand.order({"drop": self.claim})


Result = tuple[Order, Mapping[str, Any]]


class Dispatcher:
    """Gives each idle worker the next order, from the thread that hears it is idle.

    Attributes:
        news: Set when there is something to collect.
    """

    def __init__(self) -> None:
        self.news = threading.Event()
        self._lock = threading.Lock()
        self._all: list[RemoteWorker] = []
        self._idle: deque[RemoteWorker] = deque()
        self._ready: list[Order] = []
        self._at: dict[RemoteWorker, Order] = {}
        self._results: list[Result] = []
        self._lost: list[Order] = []
        self._over = False

    def __len__(self) -> int:
        return len(self._all)

    def hear(self, hand: RemoteWorker, event: Mapping[str, Any] | None) -> None:
        """Take in what a worker says, from any thread; ``None``: it is gone."""
        with self._lock:
            if event is None:
                for hands in (self._all, self._idle):
                    with contextlib.suppress(ValueError):
                        hands.remove(hand)
                if (order := self._at.pop(hand, None)) is not None:
                    self._lost.append(order)
            elif event.get("event") == "ready" and hand not in self._all:
                self._all.append(hand)
                self._idle.append(hand)
                if self._over:
                    self._send(hand, {"end": True})
            elif self._answers(hand, event):
                order = self._at.pop(hand)
                if event["event"] == "scored" and not order.void:
                    self._results.append((order, event))
                self._idle.append(hand)
            else:
                return
            self._deal()
        self.news.set()

    def _answers(self, hand: RemoteWorker, event: Mapping[str, Any]) -> bool:
        """Say whether an event is the answer to what a worker was told, and no other JSON."""
        order, kind = self._at.get(hand), event.get("event")
        whole = kind == "dropped" or (kind == "scored" and {"value", "facts"} <= event.keys())
        return order is not None and whole and event.get("claim") == order.claim

    def hand_out(self, orders: Sequence[Order]) -> None:
        """Add orders to those that are ready."""
        with self._lock:
            self._ready.extend(orders)
            self._deal()

    def collect(self) -> tuple[list[Result], list[Order]]:
        """Return results since the last call, and orders whose worker was lost."""
        with self._lock:
            results, self._results = self._results, []
            lost, self._lost = self._lost, []
        return results, lost

    def dismiss(self) -> None:
        """Tell all workers that the search is over, those too that will be ready later."""
        with self._lock:
            self._over = True
            self._ready.clear()
            for hand in self._all:
                self._send(hand, {"end": True})

    def _deal(self) -> None:
        self._ready = [order for order in self._ready if not order.void]
        while self._idle and self._ready:
            hand, order = self._idle.popleft(), self._ready[0]
            if not self._send(hand, order.message()):  # that it is gone will be heard
                continue
            self._ready.pop(0)
            order.hand = hand
            self._at[hand] = order

    @staticmethod
    def _send(hand: RemoteWorker, message: Mapping[str, Any]) -> bool:
        try:
            hand.order(message)
        except OSError:
            return False
        return True
