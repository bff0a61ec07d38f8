"""The loop of one worker: what it does, when it waits, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from hq_optuna import attrs, workers
from hq_optuna.errors import ResumeError, StorageError
from hq_optuna.runner import worker
from hq_optuna.runner.beats import beating
from hq_optuna.runner.worker import fail_dead_trials, work
from hq_optuna.samplers import owners
from hq_optuna.samplers.log import StepLog
from hq_optuna.storages import RetryingStorage
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
    work(study, assigned)
    assert history(study) == expected(study)
    assert clock.slept == []


def test_ctrl_c_while_the_result_is_stored_comes_after_it(study, monkeypatch):
    storage, store = study._storage, study._storage.set_trial_state_values

    def interrupted(trial_id: int, state: TrialState, values: object = None) -> bool:
        if trial_id == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return store(trial_id, state, values)

    monkeypatch.setattr(storage, "set_trial_state_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work(study, assigned)
    assert states(study) == [TrialState.COMPLETE] * 4


class Away(InMemoryStorage):
    """A storage that stops answering after so many calls that write."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.answers = answers

    def _answer(self) -> None:
        self.answers -= 1
        if self.answers < 0:
            raise ConnectionResetError("the server is gone")

    def set_trial_state_values(self, *arguments: object, **named: object) -> bool:
        self._answer()
        return super().set_trial_state_values(*arguments, **named)

    def create_new_trial(self, *arguments: object, **named: object) -> int:
        self._answer()
        return super().create_new_trial(*arguments, **named)


def away_study(away: Away, retry_for_s: float) -> optuna.Study:
    storage = RetryingStorage(away, "the database", retry_for_s=retry_for_s)
    return new_study(sampler(6, encoding="compact"), storage)


@pytest.mark.parametrize("answers", [8, 9])  # creating a trial, storing its result
def test_a_storage_that_stays_away_ends_the_worker_with_a_sentence_and_loses_nothing(answers):
    away = Away(answers)
    study = away_study(away, retry_for_s=0)
    with pytest.raises(StorageError, match=r"the database: the server is gone\."):
        work(study, assigned)
    away.answers = 10**6
    work(study, assigned)
    assert history(study) == expected(study)
    assert TrialState.RUNNING not in states(study)


def test_a_storage_that_comes_back_is_waited_for():
    away = Away(11)
    study = away_study(away, retry_for_s=60)
    back = threading.Timer(0.3, lambda: setattr(away, "answers", 10**6))
    back.start()
    work(study, assigned)
    assert history(study) == expected(study)
    assert set(states(study)) == {TrialState.COMPLETE}


def test_ctrl_c_ends_a_wait_for_the_storage_at_once():
    away = Away(8)
    study = away_study(away, retry_for_s=3600)
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work(study, assigned)
    assert time.monotonic() - began < 60
    away.answers = 10**6
    work(away_study(away, 0), assigned)
    assert history(study) == expected(study)


def test_a_trial_that_was_made_twice_is_marked_failed(monkeypatch):
    away = Away(10**6)
    study = away_study(away, retry_for_s=3600)
    create, calls = away.create_new_trial, []

    def unheard(*arguments: object, **named: object) -> int:
        number = create(*arguments, **named)
        calls.append(number)
        if len(calls) == 5:
            raise ConnectionResetError
        return number

    monkeypatch.setattr(away, "create_new_trial", unheard)
    work(study, assigned)
    assert history(study) == expected(study)
    assert states(study)[calls[4]] == TrialState.FAIL
    assert TrialState.RUNNING not in states(study)


def test_what_the_worker_does_is_told(study):
    told: list[str] = []
    work(study, assigned, on_doing=told.append)
    log = ours(study).log(study)
    assert told[:3] == ["scoring", "scored", "recording"]
    assert told.count("scored") == told.count("scoring") == len(log.results)
    assert told.count("recording") == len(log.closed)
    assert "waiting" not in told


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


def begun(study: optuna.Study, **facts: object) -> int:
    trial = optuna.create_trial(state=TrialState.RUNNING, **facts)
    return study._storage.create_new_trial(study._study_id, template_trial=trial)


def test_a_trial_whose_worker_died_before_its_ticket_is_marked_failed_soon(study, clock):
    begun(study)
    foreign = begun(study, user_attrs={"by": "another sampler"})
    work(study, assigned)
    assert states(study)[0] == TrialState.FAIL
    assert study._storage.get_trial(foreign).state == TrialState.RUNNING
    assert history(study) == expected(study)
    assert sum(clock.slept) < 2 * owners.UNTAGGED_GRACE_S


def test_a_trial_has_ticket_parameters_and_facts_from_its_first_moment(study, monkeypatch):
    """A worker that is killed right after it made a trial leaves one that tells whose it is."""
    storage, create = study._storage, study._storage.create_new_trial

    def made(*arguments: object, **options: object) -> int:
        trial_id = create(*arguments, **options)
        trial = storage.get_trial(trial_id)
        ticket = attrs.Ticket.read(trial.system_attrs)
        assert ticket.worker == workers.worker_id()
        assert trial.user_attrs[attrs.KIND] == ticket.kind
        assert trial.user_attrs[attrs.COST] == ours(study).known(study).log.search.cost_of(
            ticket.bits
        )
        assert trial.system_attrs[attrs.OLD_CONSTRAINTS] == [trial.constraints["bops"]]
        shown = ours(study).parameters(ticket)
        assert trial.params == {name: value for name, (value, _) in shown.items()}
        return trial_id

    monkeypatch.setattr(storage, "create_new_trial", made)
    work(study, assigned)
    assert history(study) == expected(study)


def test_a_worker_that_was_taken_for_dead_goes_on_with_another_trial(study):
    """Paused within its trial, it finds the trial failed."""

    def objective(trial: optuna.Trial) -> float:
        if trial.number == 2:
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return assigned(trial)

    work(study, objective)
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


@pytest.mark.parametrize("kind", ["candidate", "incumbent"])
def test_what_a_silent_worker_elsewhere_had_is_taken_over_after_the_grace_period(
    study, clock, kind
):
    """Nobody here can know whether it is dead: it is waited for, and its work is then repeated."""
    log = ours(study).log(study)
    if kind == "incumbent":
        add(study, open_ticket(log, 0), total(log.search.space, log.search.space.top))
        log = ours(study).log(study)
    ticket = record_ticket(log, worker=AWAY) if kind == "incumbent" else None
    number = add(study, ticket or open_ticket(log, 0, worker=AWAY))
    work(study, assigned)
    assert history(study) == expected(study)
    assert owners.GRACE_S <= sum(clock.slept) < owners.GRACE_S + 2 * worker.LONGEST_WAIT_S
    assert max(clock.slept) <= worker.LONGEST_WAIT_S
    assert states(study)[number] == TrialState.FAIL
    log = ours(study).log(study)
    assert len(study.trials) == 1 + len(log.results) + len(log.closed)


def test_a_worker_elsewhere_that_gives_signs_of_life_is_waited_for(study, clock):
    log = ours(study).log(study)
    number = add(study, open_ticket(log, 0, worker=AWAY))
    trial_id = study.get_trials(deepcopy=False)[number]._trial_id
    beats = iter(range(1000))

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if len(clock.slept) == 300:
            top = log.search.space.top
            value = total(log.search.space, top)
            study._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
        elif len(clock.slept) < 300:
            study._storage.set_trial_system_attr(trial_id, attrs.BEAT, next(beats))

    worker.time.sleep = sleep
    work(study, assigned)
    # The record of its step is left to it for a moment: it may be about to make it.
    assert 300 <= len(clock.slept) <= 305
    assert sum(clock.slept) > 5 * owners.GRACE_S
    assert history(study) == expected(study)
    assert TrialState.FAIL not in states(study)


def test_a_trial_that_runs_long_gives_signs_of_life_and_a_short_one_costs_nothing(study):
    storage = study._storage
    trial_id = storage.create_new_trial(study._study_id)
    with beating(storage, trial_id):
        pass
    assert attrs.BEAT not in storage.get_trial(trial_id).system_attrs
    with beating(storage, trial_id, every_s=0.01):
        deadline = time.monotonic() + 30
        while storage.get_trial(trial_id).system_attrs.get(attrs.BEAT, 0) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    last = storage.get_trial(trial_id).system_attrs[attrs.BEAT]
    time.sleep(0.05)
    assert storage.get_trial(trial_id).system_attrs[attrs.BEAT] == last


def test_signs_of_life_that_cannot_be_written_disturb_nothing(study, monkeypatch):
    tries: list[object] = []

    def away(*arguments: object) -> None:
        tries.append(arguments)
        raise OSError("no route to host")

    trial_id = study._storage.create_new_trial(study._study_id)
    monkeypatch.setattr(study._storage, "set_trial_system_attr", away)
    with beating(study._storage, trial_id, every_s=0.005):
        deadline = time.monotonic() + 30
        while len(tries) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert len(tries) >= 3


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
    assert ours(study).ticket(study, trial._trial_id).kind == "incumbent"
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
    study._storage.set_study_system_attr(study._study_id, attrs.SETTINGS, None)
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
    ours(study).name_search(study, "01")
    ours(other).name_search(other, "02")  # other data, say
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
        if ours(study).ticket(study, trial._trial_id).kind == "free":
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
