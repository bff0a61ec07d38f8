"""Who works on what, and who is dead: read from the trials, judged by this process's own clock.

Three signs, none of which compares the clocks of two machines:

- A worker of this host whose process is gone is dead at once (`worker_identity`).
- The owner of a long trial keeps changing one attribute (`attributes.HEARTBEAT`). An observer that
  sees no change for `Owners.grace_s` takes the owner for dead.
- A trial that has no ticket `UNTAGGED_GRACE_S` after it was first seen is not of this search, and
  is left alone. (Workers of `hq_optuna.workers.loop` create trials with their ticket; other loops
  write it a moment later.)

Loops of Optuna's own never change the attribute, nor does who asks for a trial by hand. A process
of this host that lives and does so keeps its trial, but after the same time not its slot: what it
tells late is a duplicate.

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

UNTAGGED_GRACE_S = 3.0  # a trial that has not got its ticket after this long never will
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
        self.running: dict[int, Ticket] = {}  # by number: trials whose owner may be at work
        self.untagged: list[int] = []  # trials that may still get their ticket
        self.dead: dict[int, int] = {}  # number → id of running trials whose owner is dead
        self.died: list[Ticket] = []  # of those
        self.waiting = False  # somebody enqueued trials
        self._strangers = False  # others end trials here that get no ticket: none is waited for
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
                self._strangers |= row.state == TrialState.COMPLETE and row.ticket is None
                self._signs.pop(row.number, None)
                continue
            sign = (row.ticket is not None, row.heartbeat)
            if self._signs.get(row.number, (None, 0.0))[0] != sign:
                self._signs[row.number] = (sign, now)
            quiet_s = now - self._signs[row.number][1]
            if row.ticket is None:
                if quiet_s < UNTAGGED_GRACE_S and not self._strangers:
                    self.untagged.append(row.number)
            elif self._is_dead(row, row.ticket, quiet_s):
                self.dead[row.number] = row.trial_id
                self.died.append(row.ticket)
            elif row.ticket.claim or quiet_s < self.grace_s:
                self.running[row.number] = row.ticket

    def _is_dead(self, row: TrialRow, ticket: Ticket, quiet_s: float) -> bool:
        if ticket.claim and ticket.worker == worker_identity.worker_id():
            return HELD.get(ticket.claim, -1) not in (None, row.trial_id)
        if worker_identity.is_dead(ticket.worker):
            return True
        # What a worker claimed it beats for. If it lives and does not, this is a copy of its study.
        beats = ticket.claim > 0 or row.heartbeat is not None
        return quiet_s >= self.grace_s and (beats or not worker_identity.is_alive(ticket.worker))

    def at_work(self, worker: str, last: int) -> list[str]:
        """Return who did the ``last`` trials, and this worker, in an order that all agree on."""
        since = max(self._last_number.values(), default=0) - last
        names = {name for name, number in self._last_number.items() if number > since}
        return sorted({name for name in names if not worker_identity.is_dead(name)} | {worker})

    def idle_before(self, worker: str, workers: Sequence[str]) -> int:
        """Return how many workers without a trial come before this one."""
        busy = {ticket.worker for ticket in self.running.values()}
        return sum(1 for name in workers if name < worker and name not in busy)
