"""Where a search stands, read from its storage alone while others work on it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from optuna.study import Study

from hq_optuna import attributes
from hq_optuna.attributes import StudyInfo
from hq_optuna.optuna_internals import place_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.pieces import PieceState, read_pieces
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.study_view import stored_limits
from hq_optuna.protocol.table import stored_sums
from hq_optuna.search import ProgressiveSearch
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.storages.trials import TrialRow, read_rows

LATEST = 64  # candidates by which the rate is judged
State = Literal["preparing", "running", "idle", "finished", "stopped"]
"""Idle: nobody works on it. Stopped: by a limit, and nobody is at work any more."""


@dataclass(frozen=True)
class WorkerStatus:
    """One worker of a search."""

    name: str  # `host:pid`
    alive: bool | None  # `None` where only its own host could tell
    doing: str  # in words; empty if it waits, ended or died
    candidates: int  # complete ones that it scored


@dataclass(frozen=True)
class SearchStatus:
    """Where a search stands."""

    state: State
    reason: str = ""  # why it ended, in words; empty while it has not
    steps: int = 0  # closed ones
    done: int = 0  # candidates of the open step, of `of`
    of: int = 0
    candidates: int = 0  # that count
    seconds: float = 0.0  # spent on trials so far, of all workers
    share: float = 0.0  # of the way from the start's cost to the budget, 0 to 1
    per_minute: float = 0.0  # candidates: workers that score now, over the latest mean time
    left_s: float | None = None  # estimate until the budget is met; `None` where there is none
    workers: tuple[WorkerStatus, ...] = ()  # alive, elsewhere, or dead at work
    gone: int = 0  # workers that ended or died earlier
    bits: tuple[tuple[int, int], ...] = ()  # (weight, activation) of the incumbent's layers
    levels: tuple[int, ...] = ()  # all bits that a layer may have, fewest first
    pieces: tuple[PieceState, ...] = ()  # of the preparation, where workers share it

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)


class StatusReader:
    """Looks at one study again and again; each look reads what is new."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._log: StepLog | None = None
        self._info: StudyInfo | None = None
        self._scored: Counter[str] = Counter()
        self._latest: list[float] = []

    def read(self) -> SearchStatus:
        """Return where the search stands now."""
        log = self._open()
        if log is None or self._info is None:
            return self._preparing()
        rows = read_rows(*place_of(self._study), log.cursor)
        log.limit(stored_limits(self._study))
        log.update(rows)
        self._count(log, rows)
        return self._status(log, self._info)

    def _preparing(self) -> SearchStatus:
        """Return where the pieces stand that come before the first trial."""
        storage, study_id = place_of(self._study)
        pieces = read_pieces(storage.get_study_system_attrs(study_id))
        total, done = (sum(p.work for p in pieces if p.done or whole) for whole in (True, False))
        seconds = sum(piece.seconds for piece in pieces)
        at_work = {p.worker: p.name for p in pieces if p.worker and not p.done}
        workers = tuple(
            WorkerStatus(
                worker_identity.short_name(name),
                worker_identity.is_alive(name) or None,
                f"piece {at_work[name]}" if name in at_work else "",
                0,
            )
            for name in sorted({piece.worker for piece in pieces if piece.worker})
            if name in at_work or worker_identity.is_alive(name)
        )
        left_s = None
        if done and at_work:
            left_s = (total - done) * seconds / done / len(at_work)
        return SearchStatus(
            "preparing",
            seconds=seconds,
            share=done / total if total else 0.0,
            left_s=left_s,
            workers=workers,
            pieces=pieces,
        )

    @property
    def record(self) -> int | None:
        """Number of the trial that recorded the last closed step, as of the last look."""
        return self._log.closed[-1].number if self._log is not None and self._log.closed else None

    def _open(self) -> StepLog | None:
        if self._log is None:
            storage, study_id = place_of(self._study)
            system = storage.get_study_system_attrs(study_id)
            user = storage.get_study_user_attrs(study_id)
            info = user.get(attributes.INFO)
            space_data = attributes.join(attributes.SPACE, system)
            made = system.get(attributes.SETTINGS)
            if info is None or space_data is None or made is None:
                return None
            self._info = StudyInfo.from_json(info)
            space = SearchSpace.from_json(space_data)
            rules = ProgressiveSearch.from_json(made, space, self._info.metric)
            sums = stored_sums(self._study, rules)
            self._log = StepLog(rules, signed=attributes.FINGERPRINT in user, sums=sums)
        return self._log

    def _count(self, log: StepLog, rows: Sequence[TrialRow]) -> None:
        for row in rows:
            ticket = row.ticket
            if ticket is None or not ticket.worker:
                continue
            scored = ticket.kind == "candidate" and log.counts(row)
            self._scored[ticket.worker] += scored
            if scored and row.seconds is not None:
                self._latest = [*self._latest, row.seconds][-LATEST:]

    def _status(self, log: StepLog, info: StudyInfo) -> SearchStatus:
        found, gone = self._workers(log)
        n_busy = sum(1 for worker in found if worker.doing and worker.alive is not False)
        step, incumbent = log.open, log.incumbent
        mean_s = sum(self._latest) / len(self._latest) if self._latest else 0.0
        share = 0.0 if incumbent is None else log.search.progress(incumbent.state)
        config = None if incumbent is None else log.search.space.config(incumbent.state)
        state = _state(log, n_busy)
        return SearchStatus(
            state=state,
            reason="" if state == "running" else end_reason(log),
            steps=len(log.closed),
            done=0 if step is None else len(step.done),
            of=0 if step is None else len(step.states),
            candidates=len(log.results),
            seconds=log.seconds,
            share=share,
            per_minute=60 * n_busy / mean_s if mean_s > 0 else 0.0,
            left_s=self._left(log, share, n_busy, mean_s),
            workers=found,
            gone=gone,
            bits=() if config is None else tuple((w, a) for w, a in config.values()),
            levels=log.search.space.levels,
        )

    @staticmethod
    def _left(log: StepLog, share: float, n_busy: int, mean_s: float) -> float | None:
        """Return the time that the steps to the budget take, at the pace of those so far."""
        step = log.open
        if step is None or not n_busy or not mean_s or share <= 0 or len(log.closed) < 2:
            return None
        steps = (1 - share) / (share / (len(log.closed) - 1))
        per_step = math.ceil(log.search.n_candidates / n_busy) * mean_s
        rest = (len(step.states) - len(step.done)) / n_busy * mean_s
        return max(steps - 1, 0.0) * per_step + rest

    def _workers(self, log: StepLog) -> tuple[tuple[WorkerStatus, ...], int]:
        """Return the workers worth a line, and how many others there were."""
        doing = {}
        for ticket in log.owners.running.values():
            what = "record" if ticket.kind == "incumbent" else f"candidate {ticket.slot + 1}"
            what = "training" if ticket.trains else what
            doing[ticket.worker] = f"step {ticket.step}, {what}"
        died = {ticket.worker for ticket in log.owners.died}
        known = sorted(self._scored.keys() | doing.keys() | died)
        found = []
        for name in known:
            alive: bool | None = worker_identity.is_alive(name) or None
            if name in died or worker_identity.is_dead(name):
                alive = False
            if name in died or name in doing or alive:
                short = worker_identity.short_name(name)
                found.append(WorkerStatus(short, alive, doing.get(name, ""), self._scored[name]))
        return tuple(found), len(known) - len(found)


def _state(log: StepLog, n_busy: int) -> State:
    if log.open is None and not log.stopped_by:
        return "finished"
    if n_busy:  # also workers that end the step they are at
        return "running"
    return "stopped" if log.open is None else "idle"


def end_reason(log: StepLog) -> str:
    """Return why a search is over, in words; empty while it is not."""
    if log.stopped_by:
        return log.stopped_by
    if log.open is not None:
        return ""
    if log.incumbent is not None and log.search.met(log.incumbent):
        return "the budget is met"
    return "nothing is left to lower"


def read_status(study: Study) -> SearchStatus:
    """Return where a search stands."""
    return StatusReader(study).read()
