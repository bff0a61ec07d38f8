"""Trials that are claimed by being created: ticket, parameters and known facts in one write.

`optuna.Study.ask` creates an empty trial and fills it in pieces. A worker that dies in between
leaves a trial that nobody can attribute, and every piece is a transaction. Here a worker decides
first and creates the trial complete. If two workers claim the same work, the lower number wins:
every storage hands out numbers one after the other, and a worker with a number sees all lower ones.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.errors import StorageError
from hq_optuna.optuna_internals import cached_trial, place_of, pop_waiting, trial_id_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.owners import HELD
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.study_view import StudyView
from hq_optuna.protocol.tickets import (
    candidate_ticket,
    constrained,
    facts,
    parameters,
    record_ticket,
)
from hq_optuna.storages.writing import create_trials, finish_trial, set_trial_attrs

ATTEMPTS = 3  # how often a worker tries to claim work before it waits
PATIENCE_S = 0.3  # a worker that found no slot of its own for this long takes those of others
LOST_S = 0.01  # what a lost claim counts as waiting: others are at the same work
_numbers = itertools.count(1)


class NotNeeded(Exception):
    """Raised while a candidate is scored that nobody needs any more."""


class ClaimedTrial(optuna.Trial):
    """A running trial that keeps its user attributes until it ends, and writes them with its value.

    Attributes are lost with a worker that dies, as is its candidate.
    """

    def __init__(self, study: Study, trial_id: int, claim: int = 0) -> None:
        super().__init__(study, trial_id)
        self._claim = claim
        self._written = super().user_attrs.keys()
        self._kept: dict[str, Any] = {}

    @property
    def user_attrs(self) -> dict[str, Any]:
        """The attributes in the storage, and those that are kept for the end."""
        return {**super().user_attrs, **self._kept}

    def set_user_attr(self, key: str, value: Any) -> None:
        """Keep an attribute for the end of the trial; one that is in the storage changes now."""
        if key in self._written:
            super().set_user_attr(key, value)
        else:
            self._kept[key] = value

    def finish(self, state: TrialState, value: float | None = None) -> None:
        """End the trial; `UpdateFinishedTrialError` where others took this worker for dead."""
        try:
            finish_trial(self.storage, trial_id_of(self), state, value, self._kept)
        except BaseException:
            HELD.pop(self._claim, None)  # it still runs, and nobody runs it
            raise


def write_facts(trial: optuna.Trial, facts: Mapping[str, Any]) -> None:
    """Give a running trial user attributes, in one transaction where the storage can.

    A claimed trial writes what is new when it ends, and what it was created with never again.
    """
    known = trial.user_attrs
    new = {key: value for key, value in facts.items() if key not in known}
    if isinstance(trial, ClaimedTrial):
        for key, value in new.items():
            trial.set_user_attr(key, value)
        return
    set_trial_attrs(trial.storage, trial_id_of(trial), new)
    cached_trial(trial).user_attrs.update(new)
    for key in facts.keys() - new.keys():  # a retried trial has those of its first life
        trial.set_user_attr(key, facts[key])


def write_constraint(
    trial: optuna.Trial, costs: Sequence[float], limits: Mapping[Any, float]
) -> None:
    """Write whether a running trial is over a budget; nothing where there is none."""
    over = constrained(costs, limits)
    set_trial_attrs(trial.storage, trial_id_of(trial), over, system=True)


def claim(view: StudyView, study: Study, waited_s: float = math.inf) -> ClaimedTrial | None:
    """Claim work for a worker, see `ProgressiveBitSampler.ask`."""
    for _ in range(ATTEMPTS):
        log = view.read(study)
        view.refuse_another_search(study)
        if log.owners.waiting and (queued := pop_waiting(study)) is not None:
            return ClaimedTrial(study, queued)  # somebody enqueued it
        with view.lock:
            if not log.anything_left():
                return None
            # If the trial gets the expected number, nobody claimed anything in between. A worker
            # judged dead may have ended its trial, and then itself, since the trials were read.
            expected = -1 if log.owners.dead else log.cursor.n
            ticket = _choose(log, view.search, waited_s)
            if ticket is None:
                return None
            view.failures.refuse_more(log.search.space, ticket, told=False)
        trial = _create(view, study, ticket)
        if trial.number == expected or not _lost(view, study, ticket, trial):
            return trial
        waited_s = max(waited_s, LOST_S)
    return None


def _choose(log: StepLog, search: str, waited_s: float) -> Ticket | None:
    """Return the ticket of work that is free; workers of one study choose apart.

    A lost claim costs two transactions, and of many workers that choose at the same moment all but
    one would lose. So each has slots of its own, by its place among the workers, and takes others'
    only while there are enough for all idle workers before it. The worker that did the last of a
    step, and so asks first, records it. A worker that waited in vain takes what is left.
    """
    step = log.open
    assert step is not None
    patient = 0 < waited_s < PATIENCE_S
    if step.complete:
        return None if patient else record_ticket(log, search, new_claim())
    me = worker_identity.worker_id()
    workers = log.owners.at_work(me, last=2 * len(step.states))
    free = step.free[len(log.owners.untagged) :]
    own = own_slots(free, workers, me)
    if not own and waited_s < PATIENCE_S and log.owners.idle_before(me, workers) >= len(free):
        return None
    slot = own[0] if own else free[-1 - workers.index(me) % len(free)]
    return candidate_ticket(log, slot, search, new_claim())


def own_slots(free: Sequence[int], workers: Sequence[str], worker: str) -> list[int]:
    """Return those of the free slots that one of the workers takes before the others do.

    Example:
        >>> own_slots([0, 1, 2, 4], ["a", "b"], "a")
        [0, 2, 4]
    """
    place = workers.index(worker)
    return [slot for slot in free if slot % len(workers) == place]


def new_claim() -> int:
    """Return a number for a claim of this process."""
    return next(_numbers)


def _refuse_another_study(study: Study, number: int, n_seen: int) -> None:
    """Refuse a study in which a new trial has a number that was seen before: numbers only grow."""
    if number < n_seen:
        raise StorageError(
            f"Study {study.study_name!r} was deleted and begun anew while it was in use. Start the "
            "same command again to join the new one."
        )


@contextlib.contextmanager
def _claiming(*tickets: Ticket) -> Iterator[None]:
    """Hold claims while their trials are created; what a failed try created is nobody's."""
    HELD.update(dict.fromkeys(ticket.claim for ticket in tickets))
    try:
        yield
    except BaseException:
        for ticket in tickets:
            HELD.pop(ticket.claim, None)
        raise


def _create(view: StudyView, study: Study, ticket: Ticket) -> ClaimedTrial:
    storage, study_id = place_of(study)
    n_seen = view.log.cursor.n
    with _claiming(ticket):
        trial_id = storage.create_new_trial(study_id, template(view, ticket))
        HELD[ticket.claim] = trial_id
        view.tickets[trial_id] = ticket
        trial = ClaimedTrial(study, trial_id, ticket.claim)
        _refuse_another_study(study, trial.number, n_seen)
        return trial


def template(
    view: StudyView,
    ticket: Ticket,
    value: float | None = None,
    more: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    """Return the trial that a claim creates, complete where it has a value."""
    search = view.log.search
    costs = dict(zip(search.limits, search.costs_of(ticket.bits), strict=True))
    shown = parameters(ticket, view.space, view.encoding)
    return optuna.create_trial(
        state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
        value=value,
        params={name: bits for name, (bits, _) in shown.items()},
        distributions={n: CategoricalDistribution(choices) for n, (_, choices) in shown.items()},
        user_attrs={**facts(ticket, view.space, costs), **(more or {})},
        system_attrs=view.constrained(ticket.bits) | {attributes.TICKET: ticket.to_json()},
    )


def create_record(
    view: StudyView, study: Study, ticket: Ticket, value: float, facts: Mapping[str, Any]
) -> None:
    """Create a step's record complete, where nobody else is known that might record the step.

    Should somebody else record it all the same, the record with the lower number counts, and both
    say the same. ``facts`` are user attributes beside those that the ticket knows.
    """
    create_trials(*place_of(study), [template(view, ticket, value, facts)])


def create_together(
    view: StudyView, study: Study, tickets: Sequence[Ticket]
) -> list[tuple[int, int]]:
    """Create the trials of claims' tickets at once, and return the number and id of each.

    What a candidate and a training show leaves the worker out: others will do them.
    """
    templates = [template(view, ticket) for ticket in tickets]
    for ticket, made in zip(tickets, templates, strict=True):
        if ticket.kind == "candidate" or ticket.trains:
            del made.user_attrs[attributes.WORKER]
    with _claiming(*tickets):
        n_seen = view.log.cursor.n
        created = create_trials(*place_of(study), templates)
        _refuse_another_study(study, created[0][0], n_seen)
    HELD.update({t.claim: trial_id for t, (_, trial_id) in zip(tickets, created, strict=True)})
    return created


def _lost(view: StudyView, study: Study, ticket: Ticket, trial: ClaimedTrial) -> bool:
    """Give the work up if a lower number has it, and return whether so."""
    log = view.read(study)
    stranger = view.is_mine is False
    if not stranger and not log.taken(ticket, trial.number):
        return False
    view.tickets.pop(trial_id_of(trial), None)
    trial.finish(TrialState.FAIL if stranger else TrialState.PRUNED)
    view.refuse_another_search(study)
    return True
