"""Workers that wait for each other, or meet in one slot or one new study."""

from __future__ import annotations

import threading

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.errors import ResumeError
from hq_optuna.protocol import owners
from hq_optuna.storages import open_storage, sqlite_url
from hq_optuna.workers import loop
from hq_optuna.workers.loop import work
from tests.elsewhere import AWAY, DEAD
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
    total,
)


def test_an_idle_worker_looks_at_most_about_once_a_second(study, clock, monkeypatch):
    log = ours(study).log(study)
    add(study, open_ticket(log, 0, worker=AWAY))
    looks: list[float] = []
    read = study._storage.get_all_trials

    def counted(*arguments: object, **options: object) -> object:
        looks.append(clock.now)
        return read(*arguments, **options)

    monkeypatch.setattr(study._storage, "get_all_trials", counted)
    owners_grace = owners.GRACE_S
    work(study, assigned)
    waiting = [look for look in looks if 5 <= look < owners_grace - 1]
    assert len(waiting) / (owners_grace - 6) <= 1.1


def test_an_idle_worker_sends_a_database_one_query_a_look(tmp_path, clock):
    storage = open_storage(sqlite_url(tmp_path / "study.db"))
    study = new_study(sampler(6, encoding="compact"), storage)
    add(study, open_ticket(ours(study).log(study), 0, worker=AWAY))
    queries: list[float] = []
    sqlalchemy.event.listen(
        storage._backend.engine,
        "before_cursor_execute",
        lambda *_: queries.append(clock.now),
    )
    work(study, assigned)
    waiting = [query for query in queries if 5 <= query < owners.GRACE_S - 1]
    rate = len(waiting) / (owners.GRACE_S - 6)  # queries per second
    assert 0.5 < rate <= 1.1
    assert history(study) == expected(study)  # and in the end it takes up what nobody does


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

    loop.time.sleep = finish
    work(study, assigned)
    # Its maker is thought to be at work for two steps more, and is left its share for a moment.
    assert 3 <= len(clock.slept) <= 12
    assert sum(clock.slept) < 2
    assert history(study) == expected(study)
    assert ours(study).log(study).closed[0].number == number


def test_of_two_workers_in_one_slot_the_one_with_the_higher_number_gives_way(study, monkeypatch):
    storage, create = study._storage, study._storage.create_new_trial
    log = ours(study).log(study)
    rival: list[int] = []

    def later(*arguments: object, **options: object) -> int:
        if not rival:  # between our look and our claim
            monkeypatch.setattr(storage, "create_new_trial", create)
            rival.append(add(study, open_ticket(log, 0, worker=AWAY)))
        return create(*arguments, **options)

    monkeypatch.setattr(storage, "create_new_trial", later)
    assert ours(study).ask(study) is None
    assert states(study) == [TrialState.RUNNING, TrialState.PRUNED]


def test_who_ended_its_trial_and_itself_between_our_look_and_our_claim_is_not_repeated(
    study, monkeypatch
):
    storage, create = study._storage, study._storage.create_new_trial
    log = ours(study).log(study)
    number = add(study, open_ticket(log, 0, worker=DEAD))  # its process is gone by now
    trial_id = study.get_trials(deepcopy=False)[number]._trial_id

    def later(*arguments: object, **options: object) -> int:
        monkeypatch.setattr(storage, "create_new_trial", create)
        space = ours(study).space
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [total(space, space.top)])
        return create(*arguments, **options)

    monkeypatch.setattr(storage, "create_new_trial", later)
    trial = ours(study).ask(study)
    assert ours(study).ticket(study, trial).kind == "incumbent"
    assert states(study) == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING]


def test_of_two_workers_in_two_slots_both_go_on(study, monkeypatch):
    work_until(study, 2)
    storage, create = study._storage, study._storage.create_new_trial
    log = ours(study).log(study)
    rival: list[int] = []

    def later(*arguments: object, **options: object) -> int:
        if not rival:
            monkeypatch.setattr(storage, "create_new_trial", create)
            rival.append(add(study, open_ticket(log, 1, worker=AWAY)))
        return create(*arguments, **options)

    monkeypatch.setattr(storage, "create_new_trial", later)
    trial = ours(study).ask(study)
    assert (trial.number, rival) == (3, [2])
    assert states(study)[2:] == [TrialState.RUNNING] * 2


def work_until(study: optuna.Study, n: int) -> None:
    """Run n trials."""
    for _ in range(n):
        trial = ours(study).ask(study)
        trial.finish(TrialState.COMPLETE, assigned(trial))


def test_of_two_searches_in_one_new_study_the_one_with_the_lower_number_has_it(study):
    """Both found it empty and wrote their settings; the later one's are there now."""
    other = optuna.load_study(
        study_name=study.study_name, storage=study._storage, sampler=sampler(6, seed=5)
    )
    ours(study).check_study(study)
    study._storage.set_study_system_attr(study._study_id, attributes.SETTINGS, None)
    ours(other).check_study(other)
    work_until(study, 1)
    with pytest.raises(ResumeError, match="its first trial was made with other settings"):
        work(other, assigned)
    assert states(study) == [TrialState.COMPLETE]
    work(
        optuna.load_study(study_name="table", storage=study._storage, sampler=study.sampler),
        assigned,
    )
    assert history(study) == expected(study)
    again = sampler(6, encoding="compact")  # a resume finds the settings of its own search
    work(optuna.load_study(study_name="table", storage=study._storage, sampler=again), assigned)


def test_a_search_that_loses_the_race_for_the_first_number_gives_its_trial_back(study):
    other = optuna.load_study(
        study_name=study.study_name, storage=study._storage, sampler=sampler(6, encoding="compact")
    )
    for by, rest in ((study, "01"), (other, "02")):  # other data, say
        ours(by).view(by).search += f"/{rest}"
    ours(other).log(other)
    storage, create = study._storage, study._storage.create_new_trial

    def later(*arguments: object, **options: object) -> int:
        storage.create_new_trial = create
        work_until(study, 1)
        return create(*arguments, **options)

    storage.create_new_trial = later
    with pytest.raises(ResumeError, match="other settings, another network or other data"):
        work(other, assigned)
    assert states(study) == [TrialState.COMPLETE, TrialState.FAIL]
    work(study, assigned)
    assert history(study) == expected(study)


def test_an_objective_that_returns_nan_is_an_error_and_not_tried_for_ever(study):
    with pytest.raises(ValueError, match="Trial 0: the objective returned NaN"):
        work(study, lambda trial: float("nan"))
    assert states(study) == [TrialState.FAIL]


def test_trials_that_somebody_enqueued_are_run_too(study):
    study.enqueue_trial({"temperature": 1.0})
    seen: list[float] = []

    def objective(trial: optuna.Trial) -> float:
        if ours(study).ticket(study, trial).kind == "free":
            seen.append(trial.suggest_float("temperature", 0, 2))
            return 1.0
        return assigned(trial)

    work(study, objective)
    assert seen == [1.0]
    assert states(study)[0] == TrialState.COMPLETE
    assert history(study) == expected(study)


def test_three_threads_score_every_candidate_once(study):
    scored: list[tuple[str, int, int]] = []

    def objective(trial: optuna.Trial) -> float:
        ticket = ours(study).ticket(study, trial)
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
