"""Which slot a trial gets, and what becomes of trials that end badly."""

from __future__ import annotations

from collections import Counter

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.protocol import worker_identity
from tests.fake_search import fake_score, fake_table
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
    tickets,
    total,
)


def n_needed(study: optuna.Study) -> int:
    """Return how many trials the search takes when nothing is done twice."""
    log = ours(study).log(study)
    return len(log.results) + len(log.closed)


def test_workers_that_ask_one_after_the_other_get_different_slots():
    study = new_study(sampler(8, n_candidates=4))
    study.optimize(assigned, n_trials=2)
    asked = [study.ask() for _ in range(4)]
    assert [ticket.slot for ticket in tickets(study)[2:]] == [0, 1, 2, 3]
    study.ask()  # nothing is free: the slot with the fewest runners is backed up
    study.ask()
    assert [ticket.slot for ticket in tickets(study)[6:]] == [0, 1]
    study.tell(asked[2], 1.0)
    study.ask()
    assert tickets(study)[-1].slot == 3


def test_a_running_trial_without_a_ticket_yet_reserves_one_free_slot():
    study = new_study(sampler(8, n_candidates=4))
    study.optimize(assigned, n_trials=2)
    for _ in range(2):
        study._storage.create_new_trial(study._study_id)
    study.ask()
    assert tickets(study)[-1].slot == 2


def test_trials_that_lost_their_worker_before_their_ticket_do_not_stop_the_search():
    study = new_study()
    for _ in range(5):
        study._storage.create_new_trial(study._study_id)
    study.optimize(assigned)
    assert history(study) == expected(study)


def test_who_does_not_back_up_others_gets_nothing_to_do_where_nothing_is_left():
    study = new_study(sampler(8, n_candidates=3, backs_up=False))
    study.optimize(assigned, n_trials=2)
    asked = [study.ask() for _ in range(4)]
    assert [t.kind for t in tickets(study)[2:]] == ["candidate"] * 3 + ["surplus"]
    for trial in asked:
        study.tell(trial, assigned(trial))
    asked = [study.ask() for _ in range(3)]  # the step is complete, one of them records it
    assert [t.kind for t in tickets(study)[6:]] == ["incumbent", "surplus", "surplus"]
    for trial in asked:
        study.tell(trial, assigned(trial))
    study.optimize(assigned)
    assert history(study) == expected(study)


def test_who_does_not_back_up_others_leaves_what_a_lower_ticket_is_about_to_take():
    study = new_study(sampler(8, n_candidates=2, backs_up=False))
    study.optimize(assigned, n_trials=2)
    study._storage.create_new_trial(study._study_id)  # no ticket yet
    mine = [study.ask() for _ in range(2)]
    assert [(t.kind, t.slot) for t in tickets(study)[3:]] == [("candidate", 1), ("surplus", 0)]
    study.tell(mine[0], 1.0)
    add(study, open_ticket(ours(study).log(study), 0), 1.0)
    study.ask()
    assert tickets(study)[-1].kind == "surplus"  # the step is complete, and is recorded by them


def test_a_stale_ticket_is_ignored_and_its_trial_changes_nothing():
    study = new_study()
    study.optimize(assigned, n_trials=2)
    stale = Ticket("candidate", 1, 0, "0" * 12, ours(study).space.bottom)
    add(study, stale, -1.0)
    study.optimize(assigned)
    assert history(study) == expected(study)


def test_duplicates_and_second_records_by_hand_change_nothing():
    study = new_study(sampler(7))
    while not ours(study).finished(study):
        log = ours(study).log(study)
        add(study, open_ticket(log, 0), total(log.search.space, log.open.states[0]))
        study.optimize(assigned, n_trials=2)
    assert history(study) == expected(study)


class Broken(Exception):
    """What an objective may raise."""


def test_an_exception_gives_the_slot_back_and_the_history_is_the_same():
    study = new_study(sampler(7))
    n_calls = Counter()

    def objective(trial: optuna.Trial) -> float:
        ticket = ours(trial.study).ticket(trial.study, trial)
        n_calls[ticket.kind, ticket.step, ticket.slot] += 1
        if n_calls[ticket.kind, ticket.step, ticket.slot] == 1:
            raise Broken
        return assigned(trial)

    study.optimize(objective, catch=(Broken,))
    assert history(study) == expected(study)
    assert Counter(states(study))[TrialState.FAIL] == n_needed(study)
    assert set(n_calls.values()) == {2}


@pytest.mark.parametrize("end", ["nan", "pruned"])
def test_a_candidate_without_a_result_is_tried_again(end):
    study = new_study()

    def objective(trial: optuna.Trial) -> float:
        if trial.number in (0, 2, 3):
            if end == "pruned":
                raise optuna.TrialPruned
            return float("nan")
        return assigned(trial)

    study.optimize(objective)
    assert history(study) == expected(study)
    assert len(study.trials) == n_needed(study) + 3


def test_ctrl_c_gives_the_trial_back_and_the_next_optimize_goes_on():
    study = new_study()

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 4:
            raise KeyboardInterrupt
        return assigned(trial)

    with pytest.raises(KeyboardInterrupt):
        study.optimize(objective)
    assert states(study)[-1] == TrialState.FAIL
    lost = tickets(study)[-1]
    study.optimize(assigned)
    assert (tickets(study)[5].step, tickets(study)[5].slot) == (lost.step, lost.slot)
    assert history(study) == expected(study)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_whatever_interrupts_the_ticket_leaves_no_trial_running(monkeypatch, error):
    study = new_study()
    study.optimize(assigned, n_trials=3)

    def interrupt(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(study._storage, "set_trial_system_attr", interrupt)
        with pytest.raises(error):
            study.optimize(assigned, n_trials=1)
    assert states(study)[-1] == TrialState.FAIL
    study.optimize(assigned)
    assert history(study) == expected(study)


def test_a_retried_trial_keeps_its_parameters_and_its_slot():
    """As Optuna retries trials whose heartbeat stopped: a copy that waits with its parameters."""
    study = new_study()
    objective = suggesting(ours(study).space)
    study.optimize(objective, n_trials=2)
    asked = [study.ask() for _ in range(3)]
    objective(asked[1])
    storage = study._storage
    dead = {**tickets(study)[3].to_json(), "worker": "away/1/2/3"}
    storage.set_trial_system_attr(asked[1]._trial_id, attributes.TICKET, dead)
    study.tell(asked[1], state=TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback()(study, study.trials[3])
    study.optimize(objective, n_trials=1)
    retried = study.trials[-1]
    assert retried.params == study.trials[3].params
    assert tickets(study)[-1].slot == 1
    assert tickets(study)[-1].worker == worker_identity.worker_id()
    for trial in (asked[0], asked[2]):
        study.tell(trial, objective(trial))
    study.optimize(objective)
    assert history(study) == expected(study)


@pytest.mark.parametrize("how", ["enqueue", "add"])
def test_trials_that_somebody_put_in_the_queue_are_left_alone(how):
    study = new_study()
    space = ours(study).space
    objective = suggesting(space)
    study.optimize(objective, n_trials=3)
    mine = {variable.name: 4 for variable in space.variables}
    if how == "enqueue":
        study.enqueue_trial(mine)
    else:
        dists = {v.name: CategoricalDistribution(v.bits) for v in space.variables}
        waiting = optuna.create_trial(state=TrialState.WAITING, params=mine, distributions=dists)
        study.add_trial(waiting)
    study.optimize(objective)
    free = [
        trial for trial, t in zip(study.trials, tickets(study), strict=True) if t.kind == "free"
    ]
    assert [trial.params for trial in free] == [mine]
    assert free[0].value == sum(fake_score(fake_table(space), space.config([4] * len(mine))))
    assert history(study) == expected(study)
