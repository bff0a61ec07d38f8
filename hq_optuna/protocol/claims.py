"""Trials that are claimed by being created: ticket, parameters and known facts in one write.

`optuna.Study.ask` creates an empty trial and fills it in pieces. A worker that dies in between
leaves a trial that nobody can tell whose it is, and every piece is a transaction. Here a worker
decides first and creates the trial complete. Of two that reach for the same work, the lower number
has it: numbers are handed out one after the other on every storage, and whoever has a number sees
all lower ones.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.owners import HELD
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.study_view import StudyView
from hq_optuna.protocol.tickets import candidate_ticket, excess, facts, parameters, record_ticket
from hq_optuna.storages.writing import add_user_attrs, create_trials, finish_trial

ATTEMPTS = 3
"""How often a worker reaches for work in a row before it waits a little."""

PATIENCE_S = 0.3
"""A worker that found nothing of its own for so long takes what it would leave to others."""

LOST_S = 0.01
"""What losing a claim counts as waiting: others are at the same work."""

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
        # In memory the storage hands out its own trial, which must not change before the end.
        self._cached_frozen_trial = copy.copy(self._cached_frozen_trial)
        self._cached_frozen_trial.user_attrs = dict(self._cached_frozen_trial.user_attrs)
        self._written = set(self._cached_frozen_trial.user_attrs)
        self._kept: dict[str, Any] = {}

    def set_user_attr(self, key: str, value: Any) -> None:
        """Keep an attribute for the end of the trial; one that is in the storage changes now."""
        if key in self._written:
            super().set_user_attr(key, value)
            return
        self._kept[key] = value
        self._cached_frozen_trial.user_attrs[key] = value

    def finish(self, state: TrialState, value: float | None = None) -> None:
        """End the trial.

        Raises:
            UpdateFinishedTrialError: Somebody took this worker for dead, and ended it.
        """
        try:
            finish_trial(self.study._storage, self._trial_id, state, value, self._kept)
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
    add_user_attrs(trial.study._storage, trial._trial_id, new)
    trial._cached_frozen_trial.user_attrs.update(new)
    for key in facts.keys() - new.keys():  # a retried trial has those of its first life
        trial.set_user_attr(key, facts[key])


def template(
    ticket: Ticket,
    parameters: Mapping[str, tuple[int | str, tuple[int | str, ...]]],
    facts: Mapping[str, Any],
    constraint: tuple[str, float] | None,
    value: float | None = None,
) -> FrozenTrial:
    """Return the trial that a claim creates.

    Args:
        ticket: The claim.
        parameters: ``{parameter: (value, choices)}``.
        facts: User attributes.
        constraint: Metric and excess over the budget.
        value: Of a trial that is created complete.
    """
    system: dict[str, Any] = {attributes.TICKET: ticket.to_json()}
    if constraint is not None:
        system[attributes.OLD_CONSTRAINTS] = [constraint[1]]
    return optuna.create_trial(
        state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
        value=value,
        params={name: value for name, (value, _) in parameters.items()},
        distributions={
            name: CategoricalDistribution(choices) for name, (_, choices) in parameters.items()
        },
        user_attrs=dict(facts),
        system_attrs=system,
        constraints=None if constraint is None else dict([constraint]),
    )


def claim(view: StudyView, study: Study, waited_s: float = math.inf) -> ClaimedTrial | None:
    """Claim work for a worker, see `ProgressiveBitSampler.ask`."""
    for _ in range(ATTEMPTS):
        log = view.read(study)
        view.refuse_another_search(study)
        if log.owners.waiting and (queued := study._pop_waiting_trial_id()) is not None:
            return ClaimedTrial(study, queued)  # somebody enqueued it
        with view.lock:
            if not log.anything_left():
                return None
            # With the number that was expected nobody can have claimed anything meanwhile. Who was
            # taken for dead may have ended its trial and itself between our look and our judgement.
            expected = -1 if log.owners.dead else log.cursor.n
            ticket = _choose(log, view.search, waited_s)
            if ticket is None:
                return None
            view.failures.refuse_more(log, ticket)
        trial = _create(view, study, ticket)
        if trial.number == expected or not _lost(view, study, ticket, trial):
            return trial
        waited_s = max(waited_s, LOST_S)
    return None


def _choose(log: StepLog, search: str, waited_s: float) -> Ticket | None:
    """Return the ticket of work that is free; workers of one study choose apart.

    A claim that is lost costs two transactions, and of many workers that look at the same moment
    all but one would lose. So each has slots of its own, by its place among the workers, and takes
    others' only while there are enough for all that are idle before it. A step is recorded by who
    did the last of it, who looks at once. Whoever waited in vain does what is left.
    """
    step = log.open
    assert step is not None
    patient = 0 < waited_s < PATIENCE_S
    if step.complete:
        return None if patient else _numbered(record_ticket(log, search))
    me = worker_identity.worker_id()
    crew = log.owners.at_work(me, last=2 * len(step.states))
    free = step.free[len(log.owners.untagged) :]
    own = own_slots(free, crew, me)
    if not own and waited_s < PATIENCE_S and log.owners.idle_before(me, crew) >= len(free):
        return None
    slot = own[0] if own else free[-1 - crew.index(me) % len(free)]
    return _numbered(candidate_ticket(log, slot, search))


def own_slots(free: Sequence[int], crew: Sequence[str], worker: str) -> list[int]:
    """Return those of the free slots that a worker takes before others do.

    Args:
        free: Free slots of a step.
        crew: Names of the workers, in an order that all agree on.
        worker: One of them.

    Example:
        >>> own_slots([0, 1, 2, 4], ["a", "b"], "a")
        [0, 2, 4]
    """
    place = crew.index(worker)
    return [slot for slot in free if slot % len(crew) == place]


def new_claim() -> int:
    """Return a number for a claim of this process."""
    return next(_numbers)


def _numbered(ticket: Ticket) -> Ticket:
    return dataclasses.replace(ticket, claim=new_claim())


def _create(view: StudyView, study: Study, ticket: Ticket) -> ClaimedTrial:
    storage = study._storage
    HELD[ticket.claim] = None
    try:
        trial_id = storage.create_new_trial(study._study_id, _template_of(view, study, ticket))
        HELD[ticket.claim] = trial_id
        view.tickets[trial_id] = ticket
        return ClaimedTrial(study, trial_id, ticket.claim)
    except BaseException:
        HELD.pop(ticket.claim, None)  # whatever was created is nobody's
        raise


def _template_of(
    view: StudyView,
    study: Study,
    ticket: Ticket,
    value: float | None = None,
    more: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    cost = view.log.search.cost_of(ticket.bits)
    over = excess(cost, view.log.search.limit)
    constraint = None
    if view.budget is not None and over is not None:
        constraint = (view.budget.metric, over)
    return template(
        ticket,
        parameters(ticket, view.space, view.encoding),
        {**facts(ticket, view.space, cost), **(more or {})},
        constraint,
        value,
    )


def create_record(
    view: StudyView,
    study: Study,
    ticket: Ticket,
    value: float,
    facts: Mapping[str, Any],
) -> None:
    """Create a step's record complete: for who knows of nobody else that might record the step.

    Should there be somebody all the same, the record with the lower number counts, and both say the
    same.

    Args:
        view: The study as this process reads it.
        study: The study.
        ticket: Of the kind ``"incumbent"``.
        value: The record's value.
        facts: User attributes beside those that the ticket knows.
    """
    made = _template_of(view, study, ticket, value, facts)
    create_trials(study._storage, study._study_id, [made])


def create_together(
    view: StudyView, study: Study, tickets: Sequence[Ticket]
) -> list[tuple[int, int]]:
    """Create the trials of several tickets at once, as claims of this process.

    The worker is left out of what a candidate and a training show: it is not known yet, or need not
    be who claims.

    Args:
        view: The study as this process reads it.
        study: The study.
        tickets: With claims of their own, see `new_claim`.

    Returns:
        Number and id of each trial.
    """
    templates = []
    for ticket in tickets:
        made = _template_of(view, study, ticket)
        if ticket.kind == "candidate" or ticket.trains:
            del made.user_attrs[attributes.WORKER]
        templates.append(made)
        HELD[ticket.claim] = None
    try:
        created = create_trials(study._storage, study._study_id, templates)
    except BaseException:
        for ticket in tickets:
            HELD.pop(ticket.claim, None)
        raise
    for ticket, (_, trial_id) in zip(tickets, created, strict=True):
        HELD[ticket.claim] = trial_id
    return created


def _lost(view: StudyView, study: Study, ticket: Ticket, trial: ClaimedTrial) -> bool:
    """Give the work up if a lower number has it, and return whether so."""
    log = view.read(study)
    stranger = view.is_mine is False
    if not stranger and not log.taken(ticket, trial.number):
        return False
    view.tickets.pop(trial._trial_id, None)
    trial.finish(TrialState.FAIL if stranger else TrialState.PRUNED)
    view.refuse_another_search(study)
    return True
