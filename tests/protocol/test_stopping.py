"""Loops of Optuna's own end with the search, and not before."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna.attributes import Ticket
from hq_optuna.protocol.stopping import MAX_FAILURES
from tests.samplers.tables import (
    add,
    assigned,
    expected,
    history,
    new_study,
    open_ticket,
    ours,
    sampler,
    states,
    suggesting,
    total,
)

MANY = 200
"""More trials than a search of these tests takes, so that a loop without end fails."""


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_loop_ends_with_the_search_under_hyperband(n_jobs):
    study = new_study(pruner=optuna.pruners.HyperbandPruner())
    study.optimize(suggesting(ours(study).space), n_trials=MANY, n_jobs=n_jobs)
    assert history(study) == expected(study)
    n = len(study.trials)
    assert n < MANY
    study.optimize(suggesting(ours(study).space), n_trials=MANY)
    assert len(study.trials) == n + 1  # Optuna asks before it can be told


def test_an_ordinary_study_is_its_own():
    assert not hasattr(new_study(), "_study")


def lacking(study: optuna.Study, result: Callable[[], float]) -> Callable[[optuna.Trial], float]:
    """Return an objective that has no score for 4 bits of the space's second variable."""
    variable = ours(study).space.variables[1]
    score = suggesting(ours(study).space)

    def objective(trial: optuna.Trial) -> float:
        value = score(trial)
        return result() if trial.params[variable.name] == 4 else value

    return objective


def pruned() -> float:
    raise optuna.TrialPruned


def raised() -> float:
    raise ValueError("no such kernel")


@pytest.mark.parametrize("n_jobs", [1, 2])
@pytest.mark.parametrize(
    ("result", "state", "words"),
    [
        (lambda: math.nan, TrialState.FAIL, "returned NaN"),
        (raised, TrialState.FAIL, "raised an error"),
        (pruned, TrialState.PRUNED, "the objective pruned"),
    ],
)
def test_a_loop_ends_in_words_where_needed_work_never_brings_a_result(result, state, words, n_jobs):
    study = new_study(sampler(6, n_candidates=6))
    name = ours(study).space.variables[1].name
    said = rf"without the score of {re.escape(name)} 8 → 4 in step 1: .*{words}.* 5 trials"
    with pytest.raises(RuntimeError, match=said):
        study.optimize(lacking(study, result), n_trials=MANY, n_jobs=n_jobs, catch=(ValueError,))
    assert states(study).count(state) <= MAX_FAILURES + n_jobs
    study.optimize(suggesting(ours(study).space), n_trials=MANY)  # repaired
    assert history(study) == expected(study)


def test_a_start_and_a_record_that_fail_are_named():
    study = new_study()
    with pytest.raises(RuntimeError, match=r"without the score of the start: .* 5 trials"):
        study.optimize(lambda trial: math.nan, n_trials=MANY)
    study.optimize(assigned, n_trials=1)
    with pytest.raises(RuntimeError, match=r"without the record of step 0: .* 5 trials"):
        study.optimize(lambda trial: math.nan, n_trials=MANY)
    study.optimize(assigned, n_trials=MANY)
    assert history(study) == expected(study)


def test_a_few_failures_end_no_loop():
    study = new_study()
    failing = itertools.cycle([True] * (MAX_FAILURES - 1) + [False])
    study.optimize(lambda trial: math.nan if next(failing) else assigned(trial), n_trials=10 * MANY)
    assert history(study) == expected(study)
    for _ in range(2 * MAX_FAILURES):  # the search is over: nothing is needed
        study.optimize(lambda trial: math.nan)


def test_pruned_work_that_others_did_meanwhile_ends_no_loop():
    other = new_study()
    other.optimize(assigned, n_trials=2)
    for _ in range(2 * MAX_FAILURES):
        log = ours(other).log(other)
        late = other.ask()
        slot = Ticket.read(other._storage.get_trial(late._trial_id).system_attrs).slot
        add(other, open_ticket(log, slot), total(log.search.space, log.open.states[slot]))
        other.tell(late, state=TrialState.PRUNED)
        if ours(other).log(other).open.complete:
            other.optimize(assigned, n_trials=1)
    other.optimize(assigned)
    assert history(other) == expected(other)
