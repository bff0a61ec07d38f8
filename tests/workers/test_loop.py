"""The loop of one worker: what it does, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from hq_optuna.errors import StorageError
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.storages import RetryingStorage
from hq_optuna.workers.loop import work
from tests.samplers.tables import assigned, expected, history, new_study, ours, sampler, states


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

    def interrupt() -> None:
        while study._storage.n_retries < 2:  # it waits
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
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


def test_an_objective_that_prunes_what_is_needed_ends_in_an_error_and_not_never(study):
    def objective(trial: optuna.Trial) -> float:
        if trial.number >= 4:
            raise optuna.TrialPruned
        return assigned(trial)

    with pytest.raises(RuntimeError, match=r"cannot go on without the score of .*: the obj"):
        work(study, objective)
    assert states(study)[4:] == [TrialState.PRUNED] * 5
    work(study, assigned)
    assert history(study) == expected(study)
