"""`Coordinator`: claims work for all workers of a launcher, hands it out, and stores the answers.

A worker that talks to the database itself spends more of its processor's time there than a quick
candidate takes, and 32 of them reach for the same work at the same moment. A coordinator claims for
all of its workers in one transaction, stores their results in another, and knows what it has handed
out. While nobody else works on the study, candidates are handed out first and claimed while they
are scored, and those of the next step as soon as the last result of a step is known.

For the storage a coordinator is one worker that runs several trials: the step protocol, what is
recorded, and the history are the same. Its workers may die at any moment; their candidates are then
marked failed and handed out again. When the coordinator itself dies its workers end, and others
find its process gone.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.study import Study
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.errors import StorageError
from hq_optuna.optuna_internals import storage_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.claims import create_record, create_together, new_claim, own_slots
from hq_optuna.protocol.owners import HEARTBEAT_S
from hq_optuna.protocol.step_log import OpenStep, StepLog
from hq_optuna.protocol.table_steps import is_looked_up, stored_look_up, write_step
from hq_optuna.protocol.tickets import candidate_ticket, closing, record_ticket, winner_of
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.search import Past, Result
from hq_optuna.storages import explain_errors_of, pausing
from hq_optuna.storages.database import Ended
from hq_optuna.storages.writing import finish_trials, write_heartbeats, writes_together
from hq_optuna.workers.dispatcher import Answer, Dispatcher, Order, RemoteWorker
from hq_optuna.workers.interrupts import held_interrupts
from hq_optuna.workers.loop import fail_dead_trials

logger = logging.getLogger(__name__)


class Coordinator:
    """Runs a search with workers that never touch its storage.

    `receive` may be called from any thread; everything else from one, the launcher's main thread.
    The study has a `ProgressiveBitSampler`, as `BitSearch.open` returns it; ``on_progress`` is
    called with the record of the search whenever it was read.
    """

    def __init__(
        self, study: Study, *, on_progress: Callable[[StepLog], None] = lambda log: None
    ) -> None:
        sampler = study.sampler
        assert isinstance(sampler, ProgressiveBitSampler)
        self._study, self._view, self._storage = study, sampler.view(study), storage_of(study)
        self._on_progress = on_progress
        self._at_once = 2 if writes_together(self._storage) else 1
        self.dispatcher = Dispatcher()
        self.over = False
        self._log: StepLog | None = None  # as it was last read
        self._claimed: dict[int, Order] = {}  # by claim: those with a trial that is not ended
        self._ahead: dict[tuple[int, ...], Order] = {}  # by bits: of the step that opens next
        self._early: list[Answer] = []  # to those
        self._facts: dict[int, tuple[float, Mapping[str, Any]]] = {}  # by number, of this step
        self._failed: set[int] = set()
        self._last_heartbeat, self._n_heartbeats = time.monotonic(), 0

    def receive(self, worker: RemoteWorker, event: Mapping[str, Any] | None) -> None:
        """Take in what a worker says, from any thread; ``None``: it is gone."""
        self.dispatcher.receive(worker, event)

    def poll(self, wait_s: float) -> bool:
        """Wait for news, do what is to do, and return whether the search goes on.

        Raises what `hq_optuna.workers.loop.work` raises.
        """
        self.dispatcher.news.wait(wait_s)
        self.dispatcher.news.clear()
        # Ctrl-C ends a wait for the database too.
        told = explain_errors_of(self._storage, self._study)
        with told, held_interrupts() as held, pausing(self._storage, held.sleep):
            while not self.over and self._turn() and not held.pending:
                pass
            self._send_heartbeats()
        return not self.over

    def give_back(self) -> None:
        """Mark what was claimed and is not stored as failed, so that others have it at once."""
        state = TrialState.PRUNED if self.over else TrialState.FAIL
        with contextlib.suppress(StorageError):  # others find this process gone
            self._end(list(self._claimed.values()), state)

    def _turn(self) -> bool:
        """Store, read, record, claim; return whether to do so again at once."""
        answers, lost = self.dispatcher.collect()
        self._prefetch(answers)
        self._store(answers)
        self._end([order for order in lost if order.ticket is not None], TrialState.FAIL)
        self.dispatcher.submit([order for order in lost if order.ticket is None])
        self._view.check_settings(self._study)
        log = self._log = self._view.read(self._study)
        self._view.refuse_another_search(self._study)
        self._on_progress(log)
        if log.owners.dead.keys() - self._failed:
            fail_dead_trials(self._study)
            self._failed |= log.owners.dead.keys()
        step = log.open
        if step is None:
            self.over = True
            self._end([*self._claimed.values(), *self._ahead.values()], TrialState.PRUNED)
            self.dispatcher.shutdown()
            return False
        if is_looked_up(log) and (look_up := stored_look_up(self._study, log)) is not None:
            write_step(self._view, self._study, look_up)
            return True
        # Candidates of closed steps, and those that others have done.
        claimed = self._claimed.values()
        unneeded = [o for o in claimed if o.ticket is not None and not step.needs(o.ticket)]
        self._end(unneeded, TrialState.PRUNED)
        if step.complete:
            return log.anything_left() and self._record(log)
        self._claim(log, step)
        return bool(self._early)

    def _store(self, answers: Sequence[Answer]) -> None:
        """Store answers as far as their trials are there."""
        ended, early = list[Ended](), list[Answer]()
        for order, said in [*self._early, *answers]:
            if order.trial_id is None:
                early.append((order, said))
                continue
            self._claimed.pop(order.claim, None)
            if order.cancelled:
                continue
            value, facts = _value(said), dict(said["facts"])
            self._facts[order.number] = (value, facts)
            seconds = facts.get(attributes.SECONDS)
            ended.append(Ended(order.trial_id, TrialState.COMPLETE, value, facts, seconds))
        self._early = [(order, said) for order, said in early if not order.cancelled]
        self._finish(ended)

    def _finish(self, ended: Sequence[Ended]) -> None:
        if ended:
            finish_trials(self._storage, ended)

    def _end(self, orders: Sequence[Order], state: TrialState) -> None:
        """Give up orders, and end their trials."""
        self.dispatcher.cancel(orders)
        for order in orders:
            self._claimed.pop(order.claim, None)
        self._finish([Ended(o.trial_id, state) for o in orders if o.trial_id is not None])

    # Claiming

    def _claim(self, log: StepLog, step: OpenStep) -> None:
        chosen = self._choose(log, step)
        states = [step.states[slot] for slot in chosen]
        # What was submitted early is of another step than was expected, or is shared with others.
        self.dispatcher.cancel([self._ahead.pop(bits) for bits in self._ahead.keys() - {*states}])
        if not chosen:
            return
        early, self._ahead = self._ahead, {}
        orders = [
            early.get(s) or Order(new_claim(), s, base=log.base, measures=step.measures)
            for s in states
        ]
        tickets = [
            candidate_ticket(log, slot, self._view.search, order.claim)
            for slot, order in zip(chosen, orders, strict=True)
        ]
        self._claimed |= {order.claim: order for order in orders}
        new, alone = [order for order in orders if order.bits not in early], self._is_alone(log)
        if alone:
            self.dispatcher.submit(new)
        created = create_together(self._view, self._study, tickets)
        for order, ticket, place in zip(orders, tickets, created, strict=True):
            order.created_as(ticket, *place)
        self._give_up_lost(log, orders)
        if not alone:
            self.dispatcher.submit([order for order in new if not order.cancelled])

    def _give_up_lost(self, log: StepLog, orders: Sequence[Order]) -> None:
        """End orders whose work others claimed meanwhile: of two the lower number has it."""
        undisturbed = range(log.cursor.n, log.cursor.n + len(orders))
        if not log.owners.dead and [order.number for order in orders] == [*undisturbed]:
            return
        log = self._view.read(self._study)
        lost = [o for o in orders if o.ticket is not None and log.taken(o.ticket, o.number)]
        self._end(lost, TrialState.PRUNED)

    def _choose(self, log: StepLog, step: OpenStep) -> list[int]:
        """Return the slots to claim now.

        Alone, one more candidate is claimed for each worker than it can do now, if the storage lets
        trials say when they really began: so it need not wait for the storage. Where others work,
        each begins with slots of its own, as single workers do.
        """
        at_work = self._at_work(log)
        each = self._at_once if len(at_work) == 1 else 1
        free = list(step.free[len(log.owners.untagged) :])
        if len(at_work) > 1:
            own = own_slots(free, at_work, worker_identity.worker_id())
            free.sort(key=lambda slot: slot not in own)
        ahead = [slot for slot in free if step.states[slot] in self._ahead]
        lacking = max(each * len(self.dispatcher) - len(self._claimed) - len(ahead), 0)
        return [*ahead, *[slot for slot in free if slot not in ahead][:lacking]]

    @staticmethod
    def _at_work(log: StepLog) -> list[str]:
        """Return who works on the study, this process among them."""
        n = 1 if log.open is None else len(log.open.states)
        return log.owners.at_work(worker_identity.worker_id(), last=2 * n)

    def _is_alone(self, log: StepLog) -> bool:
        return len(self._at_work(log)) == 1

    def _prefetch(self, answers: Sequence[Answer]) -> None:
        """Submit what the next step begins with, if these answers complete the open one."""
        log = self._log
        if log is None or log.open is None or not answers or self._ahead or not self._is_alone(log):
            return
        step, search = log.open, log.search
        if step.final or step.measures or search.trains(step.step):
            return  # it is the last one, or the next one begins from what training gives
        found = self._found(log, step, answers)
        if len(found) < len(step.states):
            return
        closed = [found[slot] for slot in range(len(step.states))]
        incumbent = search.close(log.incumbent, closed, log.results)
        places = {(step.step, slot): result for slot, result in found.items()}
        past = Past([*log.past.incumbents, incumbent], log.past.results | places)
        states = search.states(incumbent, past)[: self._at_once * len(self.dispatcher)]
        self._ahead = {s: Order(new_claim(), s, base=log.base) for s in states}
        self.dispatcher.submit(list(self._ahead.values()))

    def _found(self, log: StepLog, step: OpenStep, answers: Sequence[Answer]) -> dict[int, Result]:
        """Return the results of a step by slot, stored or not."""
        found = {slot: log.results[step.step, slot] for slot in step.done}
        for order, said in [*self._early, *answers]:
            if order.ticket is not None and order.ticket.parent == step.parent:
                cost = log.search.cost_of(order.bits)
                found[order.ticket.slot] = Result(order.bits, _value(said), cost)
        return found

    # The step's record, and heartbeats

    def _record(self, log: StepLog) -> bool:
        """Close the complete open step, unless somebody else does; return whether it is closed."""
        began = time.perf_counter()
        ticket = record_ticket(log, self._view.search, new_claim())
        assert ticket.origin is not None
        if ticket.trains:
            if (created := self._create_record(log, ticket)) is not None:
                order = Order(ticket.claim, ticket.bits, base=log.base, trains=True)
                order.created_as(ticket, *created)
                self._claimed[order.claim] = order
                self.dispatcher.submit([order])
            return False
        winner = self._facts.get(ticket.origin) or winner_of(self._study, ticket.origin)
        value, facts = closing(*winner, log)
        facts[attributes.SECONDS] = round(time.perf_counter() - began, 6)
        if self._is_alone(log):
            create_record(self._view, self._study, ticket, value, facts)
        elif (created := self._create_record(log, ticket)) is not None:
            self._finish([Ended(created[1], TrialState.COMPLETE, value, facts)])
        else:
            return False
        self._facts.clear()
        return True

    def _create_record(self, log: StepLog, ticket: Ticket) -> tuple[int, int] | None:
        """Claim a record; return number and id, or ``None`` where a lower number has it."""
        undisturbed = -1 if log.owners.dead else log.cursor.n
        [(number, trial_id)] = create_together(self._view, self._study, [ticket])
        if number != undisturbed and self._view.read(self._study).taken(ticket, number):
            self._finish([Ended(trial_id, TrialState.PRUNED)])
            return None
        return number, trial_id

    def _send_heartbeats(self) -> None:
        now = time.monotonic()
        if now - self._last_heartbeat < HEARTBEAT_S:
            return
        self._last_heartbeat, self._n_heartbeats = now, self._n_heartbeats + 1
        long = [o for o in self._claimed.values() if now - o.since >= HEARTBEAT_S]
        old = [order.trial_id for order in long if order.trial_id is not None]
        if old:
            try:
                write_heartbeats(self._storage, old, self._n_heartbeats)
            except Exception as error:  # costs a heartbeat and nothing else
                logger.debug("No heartbeat for %d trials: %s", len(old), error)


def _value(said: Mapping[str, Any]) -> float:
    value = float(said["value"])
    if math.isnan(value):
        raise ValueError("The objective returned NaN. Expected a number.")
    return value
