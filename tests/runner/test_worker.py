"""The loop of one worker: what it does, when it waits, and what it leaves behind."""

from __future__ import annotations

import threading
from datetime import timedelta

import optuna
import pytest
from optuna.trial import TrialState

from hq_optuna import attrs, workers
from hq_optuna.runner import worker
from hq_optuna.runner.worker import fail_dead_trials, work
from hq_optuna.samplers import log as log_module
from hq_optuna.samplers.log import StepLog
from tests.samplers.tables import (
    add,
    assigned,
    expected,
    history,
    new_study,
    open_ticket,
    ours,
    record_ticket,
    sampler,
    states,
    tickets,
    total,
)

HOST, NAMESPACE, _, START = workers.worker_id().split("/")
DEAD = f"{HOST}/{NAMESPACE}/{2**22 + 1}/{START}"  # above Linux's largest process id
AWAY = f"elsewhere/{NAMESPACE}/1/{START}"


@pytest.fixture
def study() -> optuna.Study:
    return new_study(sampler(6, encoding="compact"))


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        monkeypatch.setattr(worker.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(worker.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_worker_works_to_the_end_without_a_trial_too_many(study):
    work(study, assigned)
    assert history(study) == expected(study)
    log = ours(study).log(study)
    assert len(study.trials) == len(log.results) + len(log.closed)
    assert set(states(study)) == {TrialState.COMPLETE}


def test_a_finished_search_is_left_as_it_is(study):
    work(study, assigned)
    before = study.trials
    work(study, assigned)
    assert study.trials == before


def test_progress_is_told_with_the_record_after_every_trial(study):
    told: list[tuple[int, int]] = []

    def tell(log: StepLog) -> None:
        told.append((len(log.closed), len(log.results)))

    work(study, assigned, on_progress=tell)
    assert told == sorted(told)
    assert told[0] == (0, 0)
    assert len(told) == len(study.trials) + 1


def test_ctrl_c_gives_the_candidate_back_and_another_worker_takes_it_at_once(study, clock):
    def objective(trial: optuna.Trial) -> float:
        if trial.number == 3:
            raise KeyboardInterrupt
        return assigned(trial)

    with pytest.raises(KeyboardInterrupt):
        work(study, objective)
    assert states(study)[3] == TrialState.FAIL
    assert ours(study).backs_up  # whoever goes on without `work` can
    work(study, assigned)
    assert history(study) == expected(study)
    assert clock.slept == []


def test_an_error_of_the_objective_gives_the_candidate_back_and_comes_out(study):
    def objective(trial: optuna.Trial) -> float:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        work(study, objective)
    assert states(study) == [TrialState.FAIL]
    work(study, assigned)
    assert history(study) == expected(study)


def test_trials_of_dead_workers_are_marked_failed_and_others_are_not(study):
    log = ours(study).log(study)
    numbers = {
        name: add(study, open_ticket(log, 0, worker=name)) for name in (DEAD, AWAY, "", "odd")
    }
    numbers["mine"] = add(study, open_ticket(log, 0, worker=workers.worker_id()))
    untagged = study._storage.create_new_trial(study._study_id)
    assert fail_dead_trials(study) == 1
    assert states(study)[numbers.pop(DEAD)] == TrialState.FAIL
    assert {states(study)[n] for n in numbers.values()} == {TrialState.RUNNING}
    assert study._storage.get_trial(untagged).state == TrialState.RUNNING
    assert fail_dead_trials(study) == 0


def begun_long_ago(study: optuna.Study, **facts: object) -> int:
    trial = optuna.create_trial(state=TrialState.RUNNING, **facts)
    trial.datetime_start -= timedelta(seconds=log_module.UNTAGGED_GRACE_S + 1)
    return study._storage.create_new_trial(study._study_id, template_trial=trial)


def test_a_trial_whose_worker_died_before_its_ticket_is_marked_failed_on_resume(study, clock):
    begun_long_ago(study)
    foreign = begun_long_ago(study, user_attrs={"by": "another sampler"})
    work(study, assigned)
    assert states(study)[0] == TrialState.FAIL
    assert study._storage.get_trial(foreign).state == TrialState.RUNNING
    assert history(study) == expected(study)
    assert clock.slept == []  # neither is waited for


def test_a_worker_that_was_taken_for_dead_goes_on_with_another_trial(study, monkeypatch):
    """Paused between its trial and its ticket, it finds the trial failed."""
    storage, write = study._storage, study._storage.set_trial_system_attr

    def pause(trial_id: int, key: str, value: object) -> None:
        if trial_id == 2:
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
        write(trial_id, key, value)

    monkeypatch.setattr(storage, "set_trial_system_attr", pause)
    work(study, assigned)
    assert states(study).count(TrialState.FAIL) == 1
    assert history(study) == expected(study)


def test_a_trial_that_another_worker_ended_meanwhile_is_left_as_it_is(study, monkeypatch):
    add(study, open_ticket(ours(study).log(study), 0, worker=DEAD))

    def late(*_: object, **__: object) -> None:
        raise optuna.exceptions.UpdateFinishedTrialError

    monkeypatch.setattr(study._storage, "set_trial_state_values", late)
    assert fail_dead_trials(study) == 0


def test_the_slot_of_a_dead_worker_is_filled_at_once(study, clock):
    add(study, open_ticket(ours(study).log(study), 0, worker=DEAD))
    work(study, assigned)
    assert history(study) == expected(study)
    assert clock.slept == []
    assert states(study)[0] == TrialState.FAIL


def test_the_slot_of_a_silent_worker_elsewhere_is_filled_after_a_while(study, clock):
    """Nobody here can know whether it is dead: it is waited for, and its work is then repeated."""
    add(study, open_ticket(ours(study).log(study), 0, worker=AWAY))
    work(study, assigned)
    assert history(study) == expected(study)
    assert worker.LEAST_GRACE_S < sum(clock.slept) < 2 * worker.LEAST_GRACE_S
    assert max(clock.slept) <= worker.LONGEST_WAIT_S
    assert states(study)[0] == TrialState.RUNNING
    log = ours(study).log(study)
    assert len(study.trials) == 1 + len(log.results) + len(log.closed)


def test_a_silent_worker_is_waited_for_longer_where_candidates_take_long(study, clock):
    def slow(trial: optuna.Trial) -> float:
        clock.now += 100
        if tickets(study)[-1].step == 1 and not away:
            away.append(add(study, open_ticket(ours(study).log(study), 2, worker=AWAY)))
        return assigned(trial)

    away: list[int] = []
    work(study, slow)
    assert history(study) == expected(study)
    assert 500 < sum(clock.slept) < 510


def test_a_record_that_another_worker_is_making_is_waited_for(study, clock):
    log = ours(study).log(study)
    add(study, open_ticket(log, 0), total(log.search.space, log.search.space.top))
    ours(study).log(study)
    record = record_ticket(log, worker=AWAY)
    number = add(study, record)
    trial_id = study.get_trials(deepcopy=False)[number]._trial_id

    def finish(seconds: float) -> None:
        clock.slept.append(seconds)
        if len(clock.slept) == 3:
            study._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])

    worker.time.sleep = finish
    work(study, assigned)
    assert len(clock.slept) == 3
    assert history(study) == expected(study)
    assert ours(study).log(study).closed[0].number == number


def test_of_two_workers_in_one_slot_the_one_with_the_higher_number_gives_way(study):
    storage, log = study._storage, ours(study).log(study)
    first = storage.create_new_trial(study._study_id)
    trial = study.ask()  # takes the only slot before the first one wrote its ticket
    ticket = open_ticket(log, 0, worker=AWAY)
    storage.set_trial_system_attr(first, attrs.TICKET, ticket.to_json())
    log = ours(study).log(study)
    assert log.open.running == {0: [0, 1]}
    assert worker._does_another(log, tickets(study)[1], trial)
    assert not worker._does_another(log, ticket, study.trials[0])


def test_three_threads_score_every_candidate_once(study):
    scored: list[tuple[str, int, int]] = []

    def objective(trial: optuna.Trial) -> float:
        ticket = ours(study).ticket(study, trial._trial_id)
        scored.append((ticket.kind, ticket.step, ticket.slot))
        return assigned(trial)

    def run() -> None:
        mine = optuna.load_study(
            study_name=study.study_name, storage=study._storage, sampler=study.sampler
        )
        work(mine, objective)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert history(study) == expected(study)
    log = ours(study).log(study)
    assert len(scored) == len(log.results) + len(log.closed)
    assert len({(kind, step) for kind, step, _ in scored if kind == "incumbent"}) == len(log.closed)
