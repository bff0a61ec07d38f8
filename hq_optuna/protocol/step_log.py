"""The record of a search, replayed from its trials.

`StepLog` takes in trials and knows the incumbent of every closed step, and which slots of the open
step are done, running or free. It is incremental: it reads each finished trial once, so an update
of a study of thousands of trials costs what is new in it.

Everything is derived from immutable facts (finished trials and tickets), so every worker that has
seen the same trials has the same view, and a worker with an older view can only waste work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.protocol.owners import Owners
from hq_optuna.search import Additive, Incumbent, Limits, Past, ProgressiveSearch, Result
from hq_optuna.search.finalists import UNIFORM, Finalist, choose_finalist, finalists
from hq_optuna.search.rules import keeps
from hq_optuna.storages.trials import Cursor, TrialRow

_Key = tuple[int, str]  # step and parent, as tickets say them
_Told = tuple[int, float, Ticket]  # number, value and ticket of a complete trial


@dataclass(frozen=True, slots=True)
class Closed:
    """A closed step: its record, what it left, the trial it took, whether a training is kept."""

    number: int
    incumbent: Incumbent
    winner: int
    trained: bool = False
    worker: str = ""  # who recorded it
    value: float = math.inf  # of the record, which may be a little below its winner's score


@dataclass
class OpenStep:
    """The step that is being worked on."""

    step: int
    parent: str  # digest that tickets of this step carry
    states: tuple[tuple[int, ...], ...]  # bits of each candidate, by slot
    done: dict[int, int] = field(default_factory=dict)  # slot → the trial that counts
    running: dict[int, list[int]] = field(default_factory=dict)  # slot → trials not known dead
    recording: list[int] = field(default_factory=list)  # running step records
    final: bool = False  # nothing is left but to train the answer: a step without candidates
    names: tuple[str, ...] = ()  # of finalists: the step measures its candidates

    def note_running(self, running: Mapping[int, Ticket]) -> None:
        """Take in what runs now: trial number → ticket."""
        self.running, self.recording = {}, []
        for number, ticket in running.items():
            slot = ticket.slot
            if (ticket.step, ticket.parent) != self.key:
                continue
            if ticket.kind == "incumbent":
                self.recording.append(number)
            elif ticket.kind == "candidate" and self.states[slot : slot + 1] == (ticket.bits,):
                self.running.setdefault(slot, []).append(number)

    def needs(self, ticket: Ticket) -> bool:
        """Return whether a ticket's work is of this step, and not done."""
        done = ticket.kind == "candidate" and ticket.slot in self.done
        return self.key == (ticket.step, ticket.parent) and not done

    @property
    def key(self) -> tuple[int, str]:
        """What tickets say of this step and no others."""
        return self.step, self.parent

    @property
    def measures(self) -> bool:
        """Whether its candidates are finalists, which are measured."""
        return bool(self.names)

    @property
    def complete(self) -> bool:
        """Whether every candidate has its result."""
        return len(self.done) == len(self.states)

    @property
    def free(self) -> list[int]:
        """Slots that are neither done nor running."""
        slots = range(len(self.states))
        return [slot for slot in slots if slot not in self.done and slot not in self.running]


class StepLog:
    """Replays the trials of a study into the steps of a search with the study's own rules.

    Where the study's objective is this package's, trials count that it ``signed``: a value that
    somebody else told of a trial, running or asked for, is none of the search's. ``sums`` returns
    the table of rises that the study holds, which finalists are made from; ``None``: it has none.
    """

    def __init__(
        self,
        search: ProgressiveSearch,
        *,
        signed: bool = False,
        sums: Callable[[], Additive | None] = lambda: None,
    ) -> None:
        self.search = search
        self.sums = sums
        self.settings = search.to_json()  # once: its digest of the space takes milliseconds
        self.signed = signed
        self.cursor = Cursor()
        self.owners = Owners()
        # By number: the first says whose study this is, the others were refused.
        self.searches: list[str] = []
        self.closed: list[Closed] = []
        self.past = Past()
        self._by_number: dict[int, tuple[int, int, Result]] = {}
        # Complete trials by step and parent, which may be of steps that are not open yet.
        self._candidates: dict[_Key, dict[int, list[_Told]]] = {}
        self._records: dict[_Key, list[_Told]] = {}
        self._trainings: dict[_Key, dict[int, tuple[int, ...]]] = {}  # trial's id → bits
        self._closed_keys: set[_Key] = set()
        self.limits = Limits()
        self.stopped_by: str | None = None  # the limit that ended the search, in words
        self._finished_s = 0.0
        self._running_since: dict[int, float] = {}
        self._rises: dict[int, tuple[float, ...]] = {}  # by number of a finalist
        self._finalists: dict[tuple[int, ...], tuple[Finalist, ...]] = {}  # by the incumbent's bits
        self.measured = False  # the finalists were, and one of them was chosen
        self._step: OpenStep | None = self._open_step(None)

    @property
    def open(self) -> OpenStep | None:
        """The step that is being worked on; ``None`` where the search is over, or was stopped."""
        return None if self.stopped_by else self._step

    @property
    def seconds(self) -> float:
        """What was spent so far, of all workers together."""
        now = time.monotonic()
        return self._finished_s + sum(now - since for since in self._running_since.values())

    def limit(self, limits: Limits) -> None:
        """Set what the search may spend; a search that was stopped by a lower limit goes on."""
        self.limits = limits
        self._check_limits()

    @property
    def incumbent(self) -> Incumbent | None:
        """The incumbent of the last closed step."""
        return self.closed[-1].incumbent if self.closed else None

    @property
    def results(self) -> dict[tuple[int, int], Result]:
        """Every candidate that counts, by ``(step, slot)``."""
        return self.past.results

    @property
    def comparable(self) -> dict[tuple[int, int], Result]:
        """Those candidates whose scores are of the network as it is now, not trained since."""
        last = max((c.incumbent.step for c in self.closed if c.trained), default=-1)
        if last < 0:
            return self.results
        return {place: result for place, result in self.results.items() if place[0] > last}

    @property
    def counted(self) -> dict[tuple[int, int], int]:
        """The number of the trial that gave each of those, the first complete one of its slot."""
        found: dict[tuple[int, int], int] = {}
        for number in sorted(self._by_number, reverse=True):
            step, slot, _ = self._by_number[number]
            found[step, slot] = number
        return found

    def update(self, rows: Sequence[TrialRow]) -> None:
        """Take in trials that are new or were unfinished, ordered by number."""
        self.cursor.move(rows)
        self.owners.update(rows)
        for row in rows:
            self._note_search(row.ticket)
            self._note_time(row)
            ticket = row.ticket
            if ticket is None:
                continue
            key = (ticket.step, ticket.parent)
            if ticket.trains:
                self._trainings.setdefault(key, {})[row.trial_id] = ticket.bits
            if row.value is None or not self.counts(row):
                continue
            if ticket.kind == "incumbent":
                self._records.setdefault(key, []).append((row.number, row.value, ticket))
            elif ticket.kind == "candidate":
                scored = self._candidates.setdefault(key, {}).setdefault(ticket.slot, [])
                scored.append((row.number, row.value, ticket))
                if row.rises:
                    self._rises[row.number] = row.rises
                late = self.results.get((ticket.step, ticket.slot))
                if key in self._closed_keys and late is not None and late.state == ticket.bits:
                    # A late duplicate. Whoever reads the study afresh may name it in a record.
                    self._by_number[row.number] = (ticket.step, ticket.slot, late)
        self._advance()

    def counts(self, row: TrialRow) -> bool:
        """Return whether a trial is a complete one of this search, whatever it is needed for."""
        if row.state != TrialState.COMPLETE or row.ticket is None:
            return False
        theirs = row.ticket.search
        mine = not (theirs and self.searches) or attributes.same_search(self.searches[0], theirs)
        return mine and (row.signed or not self.signed)

    def _note_time(self, row: TrialRow) -> None:
        if row.state == TrialState.RUNNING and row.number in self.owners.running:
            self._running_since.setdefault(row.number, time.monotonic())
            return
        self._running_since.pop(row.number, None)
        # A trial that failed may have been found dead much later than it died.
        if row.state in (TrialState.COMPLETE, TrialState.PRUNED) and row.seconds is not None:
            self._finished_s += row.seconds

    def _check_limits(self) -> None:
        self.stopped_by = None
        if self._step is not None:
            done = sum(1 for step, _ in self.results if step < self._step.step)
            self.stopped_by = self.limits.forbid_step(
                len(self._step.states), done, self._step.step
            ) or self.limits.forbid_second(self.seconds)

    def _note_search(self, ticket: Ticket | None) -> None:
        if ticket is None or not ticket.search:
            return
        for place, search in enumerate(self.searches):
            if attributes.same_search(search, ticket.search):
                self.searches[place] = max(search, ticket.search, key=len)
                return
        self.searches.append(ticket.search)

    def anything_left(self, number: float = math.inf) -> bool:
        """Return whether the open step has work for a trial of this number.

        Work that a lower number has taken, or is about to take, is not.
        """
        step = self.open
        if step is None:
            return False
        before = self.untagged_before(number)
        if step.complete:
            return not step.recording and not before
        return before < len(step.free)

    def untagged_before(self, number: float) -> int:
        """Return how many running trials with a lower number still wait for their ticket."""
        return sum(1 for other in self.owners.untagged if other < number)

    def taken(self, ticket: Ticket, number: float) -> bool:
        """Return whether a ticket's work is done, or a lower number of a living worker does it."""
        step = self.open
        if step is None or not step.needs(ticket):
            return True
        others = step.running.get(ticket.slot, [])
        others = step.recording if ticket.kind == "incumbent" else others
        return any(other < number for other in others)

    def _advance(self) -> None:
        """Close every step that is complete and recorded, and open the next."""
        while self._step is not None:
            step = self._step
            self._count(step)
            record = self._first_record(step.key) if step.complete else None
            if record is None:
                break
            self._close(step, *record)
        if self._step is not None:
            self._step.note_running(self.owners.running)
        self._check_limits()

    def _count(self, step: OpenStep) -> None:
        """Take the results of the open step."""
        found = self._candidates.get(step.key, {})
        for slot, state in enumerate(step.states):
            # What scored other bits than the slot has came from another view of the record.
            told = [entry for entry in found.get(slot, ()) if entry[2].bits == state]
            if told:
                first, score, _ = min(told, key=lambda entry: entry[0])
                result = Result(state, score, self.search.cost_of(state))
                step.done[slot] = first
                self.results[step.step, slot] = result
                for number, _, _ in told:
                    self._by_number[number] = (step.step, slot, result)

    def _close(self, step: OpenStep, number: int, value: float, ticket: Ticket) -> None:
        """Close the open step as its record says."""
        assert ticket.origin is not None
        from_step, slot, result = self._by_number[ticket.origin]
        score = self.score_of(ticket.origin)
        # A training that did harm changes nothing; that of the answer was asked for.
        trained = ticket.trains and (step.final or keeps(value, score))
        score = value if trained else score
        incumbent = Incumbent(step.step, result.state, score, result.cost, (from_step, slot))
        taken = ticket.origin
        self.closed.append(Closed(number, incumbent, taken, trained, ticket.worker, value))
        self._closed_keys.add(step.key)
        self.past.incumbents.append(incumbent)
        self.measured |= step.measures
        self._step = None if step.final else self._open_step(incumbent)

    def score_of(self, number: int) -> float:
        """Return the score that a candidate's bits have now: they may have been trained since."""
        from_step, slot, result = self._by_number[number]
        last = self.incumbent
        if last is not None and last.origin == (from_step, slot):
            return last.score
        return result.score

    def _first_record(self, key: _Key) -> _Told | None:
        """Return a step's first record."""
        for number, value, ticket in sorted(self._records.get(key, ()), key=lambda told: told[0]):
            # A record of what is no candidate of this search would stop it for ever.
            found = self._by_number.get(-1 if ticket.origin is None else ticket.origin)
            if found is not None and found[2].state == ticket.bits:
                return number, value, ticket
        return None

    def _open_step(self, incumbent: Incumbent | None) -> OpenStep | None:
        """Return the step after an incumbent, or ``None`` where the search ends with it."""
        states = () if self.measured else self.search.states(incumbent, self.past)
        found = () if states else self._to_measure(incumbent)
        states = states or tuple(finalist.state for finalist in found)
        step = 0 if incumbent is None else incumbent.step + 1
        if not states and not self.search.final:
            return None
        left = (None, None) if incumbent is None else (incumbent.step, incumbent.state)
        parent = attributes.digest([self.settings, *left])
        names = tuple(finalist.name for finalist in found)
        return OpenStep(step, parent, states, final=not states, names=names)

    def _to_measure(self, incumbent: Incumbent | None) -> tuple[Finalist, ...]:
        """Return the finalists of a search whose steps end with an incumbent; none to compare."""
        search = self.search
        if not search.verify or self.measured or incumbent is None:
            return ()
        state = incumbent.state
        if state not in self._finalists:
            sums, met = self.sums(), search.met(incumbent)
            # Lowering may end beside the limits, where costs do not fall with the bits.
            start = state if sums is None or met else sums.best(search.limit)
            found = (
                ()
                if sums is None or start is None
                else finalists(sums, start, search.limit, search.verify)
            )
            self._finalists[state] = found if len(found) > met else ()
        return self._finalists[state]

    @property
    def base(self) -> int | None:
        """The number of the record whose trained network candidates are made from."""
        return next((c.number for c in reversed(self.closed) if c.trained), None)

    def trains_open_step(self) -> bool:
        """Return whether the record of the complete open step trains its bits."""
        step, search = self.open, self.search
        if step is None or step.final:
            return step is not None
        # Who trains the answer at the end need not train it just before.
        return search.trains(step.step) and not (search.final and self.ends_with_open_step())

    def best_within_budget(self) -> float:
        """Return the smallest value of a trial within the budget, infinity where there is none."""
        scores = [each.score for each in self.results.values() if self.search.met(each)]
        records = [c.value for c in self.closed if self.search.met(c.incumbent)]
        return min([*scores, *records], default=math.inf)

    def attempts(self, ticket: Ticket) -> list[int]:
        """Return the ids of the trials that began a record's training, the latest first."""
        begun = self._trainings.get((ticket.step, ticket.parent), {})
        return sorted((i for i, bits in begun.items() if bits == ticket.bits), reverse=True)

    def ends_with_open_step(self) -> bool:
        """Return whether the search is over once the complete open step is recorded."""
        assert self.open is not None
        if self.open.final or self.open.measures:
            return True
        incumbent, _ = self.close_open_step()
        past = Past([*self.past.incumbents, incumbent], self.past.results)
        return self.search.finished(incumbent, past) and not self._to_measure(incumbent)

    def close_open_step(self) -> tuple[Incumbent, int]:
        """Return what the complete open step leaves, and the number of the trial it takes."""
        assert self.open is not None
        assert self.open.complete
        step = self.open.step
        results = [self.results[step, slot] for slot in range(len(self.open.states))]
        if self.open.final:
            assert self.incumbent is not None
            incumbent = replace(self.incumbent, step=step)
        elif self.open.measures:
            chosen = self._chosen(self.open)
            won = results[chosen]
            incumbent = Incumbent(step, won.state, won.score, won.cost, (step, chosen))
        else:
            incumbent = self.search.close(self.incumbent, results, self.comparable)
        return incumbent, self.counted[incumbent.origin]

    def _chosen(self, step: OpenStep) -> int:
        """Return the slot of the finalist that wins."""
        sums = self.sums()
        assert sums is not None, "finalists come from it"
        predicted = [sums.score(self.search.space.config(state)) for state in step.states]
        measured = [
            self._rises.get(step.done[slot]) or (self.results[step.step, slot].score,)
            for slot in range(len(step.states))
        ]
        same = len({len(blocks) for blocks in measured}) == 1
        if not same:  # somebody told another value by hand: means alone compare
            measured = [(math.fsum(blocks) / len(blocks),) for blocks in measured]
        uniform = step.names.index(UNIFORM) if UNIFORM in step.names else None
        return choose_finalist(predicted, measured, uniform)
