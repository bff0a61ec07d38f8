"""A study read back as a search: candidates, step records, budget. For reports and plots.

Needs the storage alone: no network, no data, no sampler.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Beside, StudyInfo, Ticket
from hq_optuna.errors import ResumeError
from hq_optuna.optuna_internals import id_of, storage_of, trial_id_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.table import Rows, rows_of, sums_over
from hq_optuna.search import Additive, ProgressiveSearch
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.budget import Bound
from hq_optuna.space.cost import Metric
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.storages.trials import TrialRow, read_facts

_FACTS = (
    attributes.SCORE_WEIGHTS,
    attributes.SCORE_ACTIVATIONS,
    attributes.CALIBRATION_LOSS,
    attributes.SECONDS,
    attributes.WORKER,
    attributes.TRAINING,
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored candidate."""

    number: int  # of the trial
    step: int
    slot: int  # its place in the step
    variable: str | None  # what was changed, of a swap in words; `None` for the start
    from_bits: int | str | None  # as the variable shows it; `None` for a swap
    to_bits: int | str | None  # likewise
    state: tuple[int, ...]  # bits of each variable of the space
    score: float  # predicted loss rise, nats
    score_weights: float  # the weights' part, nats; NaN where unknown
    score_activations: float  # likewise
    calibration_loss: float  # measured; NaN where it was not
    cost: float  # in the unit of the study's metric
    seconds: float  # of the evaluation
    worker: str  # `host:pid`
    counted: bool  # the first complete result of its slot, made for this search
    rises: tuple[float, ...] = ()  # of a finalist: measured, nats, by blocks of samples

    @property
    def measured(self) -> float | None:
        """The measured rise of a finalist, nats; its score is what the table predicts."""
        return math.fsum(self.rises) / len(self.rises) if self.rises else None


TEST_OF = "test_of"  # the fact that names the answer which the test data were read for


@dataclass(frozen=True, slots=True)
class Reference:
    """A network that candidates are made from, as what their rises are counted from."""

    step: int  # that trained it; 0 for the start of the search, its widest bits
    score: float  # nats
    score_weights: float  # sum over layers, nats; NaN where unknown
    score_activations: float  # likewise
    calibration_loss: float  # measured; NaN where it was not


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A closed step: the trial that recorded it, and the candidate it took."""

    number: int  # of the trial
    step: int
    winner: Candidate
    config: BitConfig  # the winner's bits
    training: Mapping[str, Any] | None  # what it gave; `None`: not trained
    trained: Reference | None  # the trained network, where it was kept
    current: Candidate | Reference  # the winner, or what a training made of it

    @property
    def answer(self) -> str:
        """What tells this network from that of another step: its bits, and what training made."""
        return f"{self.config.digest} {self.current.score!r}"


@dataclass(frozen=True, slots=True)
class Run:
    """What one trial was as work.

    Times are those of the storage: the start by the clock of the host that created the trial, the
    end by the clock of the host that ended it. Another worker ends the trial of one that died, when
    it finds out. MySQL keeps whole seconds.
    """

    number: int  # of the trial
    worker: str  # its `worker_id`; `host:pid` or empty where its ticket does not say
    kind: Literal["candidate", "incumbent", "surplus", "free"]  # "free" also without a ticket
    step: int  # -1 where it has none
    slot: int  # -1 where it has none
    state: TrialState
    started: datetime  # UTC
    ended: datetime | None  # UTC; `None` while it runs
    seconds: float | None  # of its objective, where recorded
    counted: bool  # the search took its result
    handed: bool = False  # claimed by a launcher: it may have waited for its worker after its start
    trains: bool = False  # records a step whose winner it trains


@dataclass(frozen=True)
class History:
    """A search as its study tells it.

    ``sensitivity`` is ``{layer: {"weights": {bits: nats}, "activations": {bits: nats}}}``, and
    empty where none was stored.
    """

    study_name: str
    space: SearchSpace
    info: StudyInfo  # budget, costs, settings
    candidates: tuple[Candidate, ...]  # all complete ones, by trial number
    records: tuple[StepRecord, ...]  # closed steps in order
    sensitivity: Rows
    facts: Mapping[str, Any]  # measured at the end, by name ("accuracy_before", …)
    n_running: int  # trials that run now, or whose workers died unseen
    n_pruned: int  # trials that were not needed
    n_failed: int  # trials that ended in an error or were given back
    runs: tuple[Run, ...] = ()  # all trials as work: who did them, and when

    @property
    def incumbent(self) -> StepRecord | None:
        """The record of the last closed step."""
        return self.records[-1] if self.records else None

    @property
    def met(self) -> bool:
        """Whether the incumbent is within the budget."""
        return self.incumbent is not None and self.fits(self.incumbent.config)

    @property
    def beside(self) -> tuple[Bound, ...]:
        """The limits beside the first one."""
        return self.bounds[1:]

    @functools.cached_property
    def bounds(self) -> tuple[Bound, ...]:
        """All limits of the search; the first counts what candidates say they cost."""
        told: list[Beside | StudyInfo] = [self.info, *self.info.beside]
        return tuple(Bound(self.space.costs(t.metric), t.limit, t.budget) for t in told)

    def fits(self, config: BitConfig) -> bool:
        """Return whether an assignment is within all limits."""
        return all(bound.cost(config) <= bound.limit for bound in self.bounds)

    def additive(self, metric: Metric | None = None) -> Additive | None:
        """Return the sums over layers as a problem that can be solved exactly.

        Counts what the search's budget counts unless told otherwise, and then the limits beside it
        hold. ``None`` where the study does not hold a whole table of sensitivities.
        """
        beside = self.beside if metric in (None, self.info.metric) else ()
        return sums_over(self.space, self.sensitivity, metric or self.info.metric, beside)

    def step(self, step: int) -> tuple[Candidate, ...]:
        """Return the counted candidates of one step, by slot."""
        found = [c for c in self.candidates if c.step == step and c.counted]
        return tuple(sorted(found, key=lambda c: c.slot))

    def reference(self, step: int) -> Reference | None:
        """Return what a step's candidates are made from: what was trained last, or the start.

        Scores and losses before and after a training are those of different networks, so only
        rises over the same one can be compared. ``None`` before the start is scored.
        """
        for record in reversed(self.records):
            if record.step < step and record.trained is not None:
                return record.trained
        for c in self.candidates:
            if c.step == 0 and c.counted:
                return Reference(
                    0, c.score, c.score_weights, c.score_activations, c.calibration_loss
                )
        return None


def read_history(study: Study) -> History:
    """Read a study.

    Raises:
        ResumeError: The study is not one of this package.
    """
    storage = storage_of(study)
    system = storage.get_study_system_attrs(id_of(study))
    user = storage.get_study_user_attrs(id_of(study))
    space = _space(study.study_name, system, user)
    trials = read_facts(storage, id_of(study), _FACTS)
    info = StudyInfo.from_json(user[attributes.INFO])
    rows, made = rows_of(system), system.get(attributes.SETTINGS)
    log: StepLog | None = None
    if made is not None:
        rules = ProgressiveSearch.from_json(made, space, info.metric)
        sums = functools.partial(sums_over, space, rows, info.metric, rules.beside)
        log = StepLog(rules, signed=attributes.FINGERPRINT in user, sums=sums)
        log.update(trials)
    candidates = _candidates(log, trials, space, info.metric)
    records = () if log is None else _records(log, trials, candidates)
    states = [trial.state for trial in trials]
    counted = {c.number for c in candidates.values() if c.counted} | {r.number for r in records}
    return History(
        study_name=study.study_name,
        space=space,
        info=info,
        candidates=tuple(candidates.values()),
        records=records,
        sensitivity=rows,
        facts=_facts(user, records),
        n_running=states.count(TrialState.RUNNING),
        n_pruned=states.count(TrialState.PRUNED),
        n_failed=states.count(TrialState.FAIL),
        runs=read_runs(trials, counted),
    )


def _space(study_name: str, system: Mapping[str, Any], user: Mapping[str, Any]) -> SearchSpace:
    """Return the space of a study.

    Raises:
        ResumeError: The study is not one of this package, or is not prepared yet.
    """
    data = attributes.join(attributes.SPACE, system)
    if data is not None and attributes.INFO in user:
        return SearchSpace.from_json(data)
    said = (
        "is being prepared: its sensitivities are not measured yet. Look again later; if the "
        "worker that measures them died, start the search again."
        if attributes.FINGERPRINT in user
        else "is not a bit search of hq_optuna. Give the name of another study."
    )
    raise ResumeError(f"Study {study_name!r} {said}", changed=("kind of study",))


def _facts(user: Mapping[str, Any], records: Sequence[StepRecord]) -> dict[str, Any]:
    """Return what was measured at the end, by name.

    Leaves out what is measured no more, and test figures of another answer: searches go on.
    """
    prefix = f"{attributes.REPORT}:"
    facts = {
        key.removeprefix(prefix): fact
        for key, fact in user.items()
        if key.startswith(prefix) and fact is not None
    }
    measured = facts.pop(TEST_OF, None)
    if measured is None or (records and measured == records[-1].answer):
        return facts
    return {name: fact for name, fact in facts.items() if not name.startswith("test_")}


def _candidates(
    log: StepLog | None, trials: Sequence[TrialRow], space: SearchSpace, metric: Metric
) -> dict[int, Candidate]:
    """Return the complete candidates by trial number."""
    names, model = [variable.name for variable in space.variables], space.costs(metric)
    costs = {} if log is None else {n: log.results[place].cost for place, n in log.counted.items()}
    found: dict[int, Candidate] = {}
    for trial in trials:
        number, ticket, user = trial.number, trial.ticket, trial.user_attrs
        if ticket is None or ticket.kind != "candidate" or trial.value is None:
            continue
        whole = trial.state == TrialState.COMPLETE if log is None else log.counts(trial)
        if not whole or len(ticket.bits) != len(names):  # of a search refused here, or told by hand
            continue
        lowered = ticket.variable
        parts = tuple(
            user.get(name, math.nan)
            for name in (attributes.SCORE_WEIGHTS, attributes.SCORE_ACTIVATIONS)
        )
        found[number] = Candidate(
            number=number,
            step=ticket.step,
            slot=ticket.slot,
            variable=lowered,
            from_bits=_shown(space, lowered, ticket.from_bits),
            to_bits=_shown(
                *(space, lowered),
                ticket.bits[names.index(lowered)] if lowered in names else None,
            ),
            state=ticket.bits,
            score=_predicted(trial.value, ticket, parts),
            score_weights=parts[0],
            score_activations=parts[1],
            calibration_loss=user.get(attributes.CALIBRATION_LOSS, math.nan),
            cost=costs[number] if number in costs else model.cost(space.config(ticket.bits)),
            seconds=user.get(attributes.SECONDS, trial.seconds or math.nan),
            worker=user.get(attributes.WORKER) or worker_identity.short_name(ticket.worker),
            counted=number in costs,
            rises=trial.rises if ticket.measures else (),
        )
    return found


def _shown(space: SearchSpace, name: str | None, bits: int | None) -> int | str | None:
    """Return what a variable shows of its bits."""
    variable = next((v for v in space.variables if v.name == name), None)
    return bits if variable is None or bits is None else variable.shown(bits)


def _predicted(value: float, ticket: Ticket, parts: Sequence[float]) -> float:
    """Return the score of a trial: of a finalist what the table says, and not what was measured."""
    whole = sum(parts)
    return whole if ticket.measures and math.isfinite(whole) else value


def _records(
    log: StepLog, trials: Sequence[TrialRow], candidates: Mapping[int, Candidate]
) -> tuple[StepRecord, ...]:
    """Return the steps that the log holds as closed, with what was recorded beside them."""
    by_number = {trial.number: trial for trial in trials}
    records: list[StepRecord] = []
    for step, closed in enumerate(log.closed):
        trial, winner = by_number[closed.number], candidates[closed.winner]
        ticket = trial.ticket
        said: Mapping[str, Any] | None = None
        network: Reference | None = None
        if ticket is not None and ticket.trains:
            said = trial.user_attrs.get(attributes.TRAINING, {})
        if closed.trained:
            # The value of the answer's record is made to be the best of the study.
            assert said is not None
            assert trial.value is not None
            network = _reference(step, said.get("score", trial.value), trial.user_attrs)
        current: Candidate | Reference = winner if network is None else network
        if network is None and records and records[-1].winner.number == winner.number:
            current = records[-1].current
        config = log.search.space.config(winner.state)
        records.append(StepRecord(closed.number, step, winner, config, said, network, current))
    return tuple(records)


def _reference(step: int, score: float, user: Mapping[str, Any]) -> Reference:
    parts = (attributes.SCORE_WEIGHTS, attributes.SCORE_ACTIVATIONS, attributes.CALIBRATION_LOSS)
    return Reference(step, score, *(user.get(name, math.nan) for name in parts))


def read_runs(trials: Sequence[TrialRow], counted: Set[int]) -> tuple[Run, ...]:
    """Return the trials that somebody ran; ``counted`` are those whose results the search took."""
    found = []
    for trial in trials:
        user = trial.user_attrs
        if trial.started is None or trial.state == TrialState.WAITING:
            continue
        ticket = trial.ticket or Ticket("free", -1, -1, "", ())
        claimed, scored = ticket.worker, user.get(attributes.WORKER, "")
        handed = bool(claimed and scored) and scored != worker_identity.short_name(claimed)
        run = Run(
            number=trial.number,
            worker=scored if handed else claimed or scored,
            kind=ticket.kind,
            step=ticket.step,
            slot=ticket.slot,
            state=trial.state,
            started=trial.started,
            ended=trial.ended,
            seconds=user.get(attributes.SECONDS),
            counted=trial.number in counted,
            handed=handed,
            trains=ticket.trains,
        )
        found.append(run)
    return tuple(found)


def assignment(trial: FrozenTrial | optuna.Trial, study: Study | None = None) -> BitConfig:
    """Return the bits of all layers of any trial of a search.

    Args:
        trial: A candidate or a step record.
        study: Its study, which holds the search space. Not needed for an `optuna.Trial`, which
            knows its study.

    Raises:
        ValueError: The trial is not part of a bit search, or the study is missing.
    """
    if isinstance(trial, optuna.Trial):
        study = trial.study
        trial = storage_of(study).get_trial(trial_id_of(trial))
    ticket = Ticket.read(trial.system_attrs)
    by_params = ticket is None and bool(trial.params)  # another sampler's, or an enqueued one
    if not by_params and (ticket is None or not ticket.bits):
        raise ValueError(f"Trial {trial.number} is not a candidate or step record of a bit search.")
    if study is None:
        raise ValueError("A frozen trial does not know its layers: call assignment(trial, study).")
    data = attributes.join(attributes.SPACE, storage_of(study).get_study_system_attrs(id_of(study)))
    if data is None:
        raise ValueError(f"Study {study.study_name!r} does not hold a search space.")
    space = SearchSpace.from_json(data)
    if ticket is not None:
        return space.config(ticket.bits)
    names = [variable.name for variable in space.variables]
    if missing := set(names) - trial.params.keys():
        raise ValueError(f"Trial {trial.number} has no bits of {min(missing)!r}.")
    return space.config([trial.params[name] for name in names])
