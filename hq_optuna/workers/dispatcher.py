"""`Dispatcher`: hands orders to workers at the other end of a pipe, and collects their answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hq_optuna.attributes import Ticket


class RemoteWorker(Protocol):
    """A worker that scores what it is told to."""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it JSON data; `OSError` where it is gone."""


@dataclass(eq=False)
class Order:
    """A candidate for some worker to score."""

    claim: int  # its number among this process's claims
    bits: tuple[int, ...]  # of each variable
    since: float = field(default_factory=time.monotonic)  # when it was made
    ticket: Ticket | None = None  # `None` before its step is open
    number: int = -1  # its trial's, once created
    trial_id: int | None = None
    cancelled: bool = False  # nobody wants its result any more
    base: int | None = None  # the record whose trained network it is made from
    trains: bool = False  # the record of a step whose bits are to be trained
    measures: bool = False  # a finalist

    def created_as(self, ticket: Ticket, number: int, trial_id: int) -> None:
        """Take the trial that was created for it."""
        self.ticket, self.number, self.trial_id = ticket, number, trial_id

    def cancel(self) -> None:
        """Give up its result."""
        self.cancelled = True

    def message(self) -> dict[str, Any]:
        """Return what a worker is sent."""
        said: dict[str, Any] = {"claim": self.claim, "bits": list(self.bits)}
        if self.base is not None:
            said["base"] = self.base
        if self.measures:
            said["measures"] = True
        if self.trains:
            said["train"] = self.trial_id
        return said


Answer = tuple[Order, Mapping[str, Any]]


class Dispatcher:
    """Gives each idle worker the next order, from the thread that learns it is idle."""

    def __init__(self) -> None:
        self.news = threading.Event()  # set when there is something to collect
        self._lock = threading.Lock()
        self._workers: list[RemoteWorker] = []
        self._idle: deque[RemoteWorker] = deque()
        self._queue: list[Order] = []
        self._running: dict[RemoteWorker, Order] = {}
        self._answers: list[Answer] = []
        self._lost: list[Order] = []
        self._over = False

    def __len__(self) -> int:
        return len(self._workers)

    def receive(self, worker: RemoteWorker, event: Mapping[str, Any] | None) -> None:
        """Take in what a worker says, from any thread; ``None``: it is gone."""
        with self._lock:
            if event is None:
                for workers in (self._workers, self._idle):
                    with contextlib.suppress(ValueError):
                        workers.remove(worker)
                if (order := self._running.pop(worker, None)) is not None:
                    self._lost.append(order)
            elif event.get("event") == "ready" and worker not in self._workers:
                self._workers.append(worker)
                self._idle.append(worker)
                if self._over:
                    self._send(worker, {"end": True})
            elif self._is_answer(worker, event):
                order = self._running.pop(worker)
                if event["event"] == "scored" and not order.cancelled:
                    self._answers.append((order, event))
                self._idle.append(worker)
            else:
                return
            self._assign()
        self.news.set()

    def _is_answer(self, worker: RemoteWorker, event: Mapping[str, Any]) -> bool:
        """Return whether an event answers a worker's order, and is no other JSON."""
        order, kind = self._running.get(worker), event.get("event")
        whole = kind == "cancelled" or (kind == "scored" and {"value", "facts"} <= event.keys())
        return order is not None and whole and event.get("claim") == order.claim

    def submit(self, orders: Sequence[Order]) -> None:
        """Queue orders."""
        with self._lock:
            self._queue.extend(orders)
            self._assign()

    def cancel(self, orders: Sequence[Order]) -> None:
        """Give up the results of orders, and tell those who are at them."""
        with self._lock:
            for order in orders:
                order.cancel()
            for worker, order in self._running.items():
                if order in orders:
                    self._send(worker, {"cancel": order.claim})

    def collect(self) -> tuple[list[Answer], list[Order]]:
        """Return answers since the last call, and orders whose worker was lost."""
        with self._lock:
            answers, self._answers = self._answers, []
            lost, self._lost = self._lost, []
        return answers, lost

    def shutdown(self) -> None:
        """Tell all workers that the search is over, those too that will be ready later."""
        with self._lock:
            self._over = True
            self._queue.clear()
            for worker in self._workers:
                self._send(worker, {"end": True})

    def _assign(self) -> None:
        self._queue = [order for order in self._queue if not order.cancelled]
        while self._idle and self._queue:
            worker, order = self._idle.popleft(), self._queue[0]
            if self._send(worker, order.message()):  # else an event will say that it is gone
                del self._queue[0]
                self._running[worker] = order

    @staticmethod
    def _send(worker: RemoteWorker, message: Mapping[str, Any]) -> bool:
        with contextlib.suppress(OSError):
            worker.send(message)
            return True
        return False
