"""Orders for workers that are spoken to line by line, and what comes back, between threads.

Each worker has a part of the network (`hq_optuna.search.order`), and of the orders that are ready
gets the one nearest to it. One that scores several candidates in one pass is told which ones it
gets next, and nobody else gets them.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hq_optuna.attrs import Ticket
from hq_optuna.search.order import parts


class Hand(Protocol):
    """A worker that scores what it is told to."""

    def order(self, order: Mapping[str, Any]) -> None:
        """Send it JSON data; `OSError` where it is gone."""


@dataclass(eq=False)
class Order:
    """A candidate that somebody is to score.

    Attributes:
        claim: Its number among this process's claims.
        bits: Of each variable.
        origin: Bits its step starts from; ``None`` in step 0.
        since: When it was made, by the foreman's clock.
        ticket: Of its trial; ``None`` before its step is open.
        number: Of its trial, once that is created.
        trial_id: Likewise its id.
        hand: Who has it, or had it.
        meant_for: Who gets it next, and scores it along with what they have.
        void: Whether nobody wants its result any more.
        early: Whether it was handed out before its step was open.
        base: The record whose trained network it is made from, if there is one.
        trains: Whether it is the record of a step whose bits are to be trained.
        part: Of the network, where it was chosen for a worker there; 0 to 1.
    """

    claim: int
    bits: tuple[int, ...]
    origin: tuple[int, ...] | None
    since: float
    ticket: Ticket | None = None
    number: int = -1
    trial_id: int | None = None
    hand: Hand | None = None
    meant_for: Hand | None = None
    void: bool = False
    early: bool = False
    base: int | None = None
    trains: bool = False
    part: float = 0.0

    def message(self, following: Sequence[Order] = ()) -> dict[str, Any]:
        """Return what a worker is told, with the orders that it gets next."""
        origin = None if self.origin is None else list(self.origin)
        said: dict[str, Any] = {"claim": self.claim, "bits": list(self.bits), "origin": origin}
        if following:
            said["next"] = [list(order.bits) for order in following]
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


class Hands:
    """Gives each idle worker the next order, from the thread that hears it is idle.

    Attributes:
        news: Set when there is something to collect.
    """

    def __init__(self) -> None:
        self.news = threading.Event()
        self._lock = threading.Lock()
        self._all: list[Hand] = []
        self._idle: deque[Hand] = deque()
        self._ready: list[Order] = []
        self._at: dict[Hand, Order] = {}
        self._together: dict[Hand, int] = {}  # candidates in one pass, where several
        self._results: list[Result] = []
        self._lost: list[Order] = []
        self._over = False

    def __len__(self) -> int:
        return len(self._all)

    @property
    def together(self) -> int:
        """Candidates that a worker may score in one pass, at most."""
        return max(self._together.values(), default=1)

    def hear(self, hand: Hand, event: Mapping[str, Any] | None) -> None:
        """Take in what a worker says, from any thread; ``None``: it is gone."""
        with self._lock:
            if event is None:
                for hands in (self._all, self._idle):
                    with contextlib.suppress(ValueError):
                        hands.remove(hand)
                self._together.pop(hand, None)
                if (order := self._at.pop(hand, None)) is not None:
                    self._lost.append(order)
                for order in self._ready:
                    order.meant_for = None if order.meant_for is hand else order.meant_for
            elif event.get("event") == "ready" and hand not in self._all:
                self._all.append(hand)
                self._idle.append(hand)
                self._together[hand] = int(event.get("together", 1))
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

    def _answers(self, hand: Hand, event: Mapping[str, Any]) -> bool:
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
        where = dict(zip(self._all, parts(len(self._all)), strict=True))
        left: list[Hand] = []
        while self._idle and self._ready:
            hand = self._idle.popleft()
            orders = self._orders_for(hand, where.get(hand, 0.0))
            if not orders:
                left.append(hand)
                continue
            order, *following = orders
            if not self._send(hand, order.message(following)):  # that it is gone will be heard
                continue
            for other in following:
                other.meant_for = hand
            self._ready.remove(order)
            order.hand, order.meant_for = hand, None
            self._at[hand] = order
        self._idle.extend(left)

    def _orders_for(self, hand: Hand, part: float) -> list[Order]:
        """Return the order that a worker gets now, and those that it may score in the same pass."""
        meant = [order for order in self._ready if order.meant_for is hand]
        if meant:
            return meant[:1]
        free = [order for order in self._ready if order.meant_for is None]
        free.sort(key=lambda order: abs(order.part - part))
        if not free:
            return []
        first, *others = free
        like = [
            o for o in others if (o.origin, o.base, o.trains) == (first.origin, first.base, False)
        ]
        n = min(self._together.get(hand, 1), math.ceil(len(free) / len(self._all)))
        return [first, *([] if first.trains else like[: n - 1])]

    @staticmethod
    def _send(hand: Hand, message: Mapping[str, Any]) -> bool:
        try:
            hand.order(message)
        except OSError:
            return False
        return True
