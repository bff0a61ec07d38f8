"""Studies on additive tables, and what their history must be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.protocol.history import assignment
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.search import Incumbent
from hq_optuna.space.budget import Budget
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.storages import open_storage, sqlite_url
from hq_optuna.storages.trials import read_rows
from tests.fake_search import fake_score, fake_space, fake_table

optuna.logging.set_verbosity(optuna.logging.WARNING)

BUDGET = Budget.fraction(bops=0.4)
STORAGES: dict[str, Callable[[Path], BaseStorage]] = {
    "memory": lambda folder: InMemoryStorage(),
    "sqlite": lambda folder: open_storage(sqlite_url(folder / "study.db")),
    "journal": lambda folder: JournalStorage(JournalFileBackend(str(folder / "study.log"))),
}


def sampler(space: SearchSpace | int = 6, **options: Any) -> ProgressiveBitSampler:
    """Return a sampler with small steps and a budget of 40 %."""
    space = fake_space(space) if isinstance(space, int) else space
    return ProgressiveBitSampler(space, **{"budget": BUDGET, "n_candidates": 3, **options})


def new_study(
    by: ProgressiveBitSampler | None = None, storage: BaseStorage | None = None, **options: Any
) -> Study:
    return optuna.create_study(
        study_name="table",
        storage=storage,
        sampler=sampler() if by is None else by,
        load_if_exists=True,
        **options,
    )


def ours(study: Study) -> ProgressiveBitSampler:
    found = study.sampler
    assert isinstance(found, ProgressiveBitSampler)
    return found


def total(space: SearchSpace, state: Sequence[int]) -> float:
    """Return the score that the table gives to bits of the variables."""
    return sum(fake_score(fake_table(space), space.config(state)))


def suggesting(space: SearchSpace) -> Callable[[optuna.Trial], float]:
    """Return an objective that asks for every variable of the space, as any user's would."""

    def objective(trial: optuna.Trial) -> float:
        return total(space, [trial.suggest_categorical(v.name, v.bits) for v in space.variables])

    return objective


def assigned(trial: optuna.Trial) -> float:
    """Score a trial of any encoding; writes no parameters."""
    space = ours(trial.study).space
    return sum(fake_score(fake_table(space), assignment(trial)))


def history(study: Study) -> list[Incumbent]:
    """Return the incumbents of the closed steps, read anew from the storage."""
    log = update(study, StepLog(ours(study).log(study).search))
    return [closed.incumbent for closed in log.closed]


def expected(study: Study) -> list[Incumbent]:
    """Return the incumbents of the plain sequential search: no trials, no storage, no tickets."""
    search = ours(study).log(study).search
    table = fake_table(search.space)
    return search.run(lambda config: sum(fake_score(table, config)))


def tickets(study: Study) -> list[Ticket | None]:
    return [Ticket.read(trial.system_attrs) for trial in study.get_trials(deepcopy=False)]


def states(study: Study) -> list[TrialState]:
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def add(study: Study, ticket: Ticket, value: float | None = None) -> int:
    """Add a trial with a ticket by hand, complete if it has a value; return its number."""
    trial = optuna.create_trial(
        state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
        value=value,
        system_attrs={attributes.TICKET: ticket.to_json()},
    )
    trial_id = study._storage.create_new_trial(study._study_id, template_trial=trial)
    return study._storage.get_trial_number_from_id(trial_id)


def open_ticket(log: StepLog, slot: int, **changes: Any) -> Ticket:
    """Return the ticket of a slot of the open step."""
    step = log.open
    assert step is not None
    facts = {"kind": "candidate", "slot": slot, "step": step.step, "parent": step.parent}
    return Ticket(**{**facts, "bits": step.states[slot], **changes})


def record_ticket(log: StepLog, **changes: Any) -> Ticket:
    """Return the ticket of the record that closes the complete open step."""
    step = log.open
    assert step is not None
    incumbent, winner = log.close_open_step()
    facts: dict[str, Any] = {
        "kind": "incumbent",
        "step": step.step,
        "slot": incumbent.origin[1],
        "parent": step.parent,
        "bits": incumbent.state,
        "origin": winner,
    }
    return Ticket(**{**facts, **changes})


def fill_step(study: Study, log: StepLog, *, shuffle: int | None = None) -> list[int]:
    """Complete every slot of the open step by hand and return the numbers by slot."""
    step = log.open
    assert step is not None
    order = list(range(len(step.states)))
    if shuffle is not None:
        random.Random(shuffle).shuffle(order)
    numbers = {
        slot: add(study, open_ticket(log, slot), total(log.search.space, step.states[slot]))
        for slot in order
    }
    update(study, log)
    return [numbers[slot] for slot in sorted(numbers)]


def update(study: Study, log: StepLog) -> StepLog:
    log.update(read_rows(study._storage, study._study_id, log.cursor))
    return log
