"""Who works on what, and who is dead: read from the trials, judged by this process's own clock.

Three signs, none of which compares the clocks of two machines:

- A worker of this host whose process is gone is dead at once (`worker_identity`).
- The owner of a long trial keeps changing one attribute (`attributes.HEARTBEAT`). An observer that
  sees no change for `Owners.grace_s` takes the owner for dead.
- A trial that has no ticket `UNTAGGED_GRACE_S` after it was first seen lost its worker. (Workers of
  `hq_optuna.workers.loop` create trials with their ticket; these come from other loops.)

A worker that only slept and is taken for dead costs one evaluation; the history stays the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from optuna.trial import TrialState

from hq_optuna.attributes import Ticket
from hq_optuna.protocol import worker_identity
from hq_optuna.storages.trials import TrialRow

UNTAGGED_GRACE_S = 3.0  # a trial that has not got its ticket after this long lost its worker
HEARTBEAT_S = 5.0  # how often the owner of a running trial changes its attribute
GRACE_S = 30.0  # how long it may stay unchanged: several heartbeats, and a restarted database

HELD: dict[int, int | None] = {}
"""Claims of this process → id of their trial, once it is known. A running trial of this process
that is not here is nobody's: its creation was repeated after a lost answer, or its end could not be
stored. Claims stay here when their trials end: another thread may have read the trials before."""


class Owners:
    """Follows running trials from one read of a study to the next."""

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.grace_s = grace_s
        self.running: dict[int, Ticket] = {}  # by number: trials whose owner may live
        self.untagged: list[int] = []  # trials that may still get their ticket
        self.dead: dict[int, int] = {}  # number → id of running trials whose owner is dead
        self.died: list[Ticket] = []  # of those
        self.waiting = False  # somebody enqueued trials
        self._signs: dict[int, tuple[Any, float]] = {}  # number → (sign, first seen)
        self._last_number: dict[str, int] = {}  # worker → its latest trial

    def update(self, rows: Sequence[TrialRow]) -> None:
        """Judge the running trials among rows, which are all unfinished ones and the new ones."""
        now = time.monotonic()
        self.running, self.untagged, self.dead, self.died = {}, [], {}, []
        self.waiting = any(row.state == TrialState.WAITING for row in rows)
        for row in rows:
            if row.ticket is not None:
                self._last_number[row.ticket.worker] = row.number
            if row.state != TrialState.RUNNING:
                self._signs.pop(row.number, None)
                continue
            sign = (row.ticket is not None, row.heartbeat)
            if self._signs.get(row.number, (None, 0.0))[0] != sign:
                self._signs[row.number] = (sign, now)
            quiet_s = now - self._signs[row.number][1]
            if row.ticket is None:
                if quiet_s < UNTAGGED_GRACE_S:
                    self.untagged.append(row.number)
                else:
                    self.dead[row.number] = row.trial_id
            elif self._is_dead(row, quiet_s):
                self.dead[row.number] = row.trial_id
                self.died.append(row.ticket)
            else:
                self.running[row.number] = row.ticket

    def _is_dead(self, row: TrialRow, quiet_s: float) -> bool:
        assert row.ticket is not None
        worker = row.ticket.worker
        if row.ticket.claim and worker == worker_identity.worker_id():
            return HELD.get(row.ticket.claim, -1) not in (None, row.trial_id)
        if worker_identity.is_dead(worker):
            return True
        # A process seen to live is trusted unless it was beating and stopped.
        hangs = row.heartbeat is not None or not worker_identity.is_alive(worker)
        return hangs and quiet_s >= self.grace_s

    def at_work(self, worker: str, last: int) -> list[str]:
        """Return who did the ``last`` trials, and this worker, in an order that all agree on."""
        since = max(self._last_number.values(), default=0) - last
        names = {name for name, number in self._last_number.items() if number > since}
        return sorted({name for name in names if not worker_identity.is_dead(name)} | {worker})

    def idle_before(self, worker: str, workers: Sequence[str]) -> int:
        """Return how many workers without a trial come before this one."""
        busy = {ticket.worker for ticket in self.running.values()}
        return sum(1 for name in workers if name < worker and name not in busy)
