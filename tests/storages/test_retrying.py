"""A storage that is called again: nothing lost, nothing double, and an end."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import TrialState

from hq_optuna.errors import StorageError
from hq_optuna.storages import RetryingStorage, retrying, sqlite_url
from hq_optuna.storages.retrying import may_pass

GONE = sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("server closed the connection"))


class Flaky(InMemoryStorage):
    """Fails before a call, or after it was committed, as often as told."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, int] = {}
        self.after: dict[str, int] = {}
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith(("create_", "set_", "delete_")) and callable(value):
            return self._failing(name, value)
        return value

    def _failing(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            if self.before.get(name, 0):
                self.before[name] -= 1
                raise GONE
            value = call(*arguments, **named)
            if self.after.get(name, 0):
                self.after[name] -= 1
                raise GONE
            return value

        return failing


@pytest.fixture
def flaky() -> Flaky:
    return Flaky()


@pytest.fixture
def storage(flaky: Flaky) -> Iterator[RetryingStorage]:
    retried = RetryingStorage(flaky, "postgresql://me:***@db/hq", retry_for_s=60)
    with retried.pausing(lambda seconds: None):
        yield retried


@pytest.fixture
def study(storage: RetryingStorage) -> optuna.Study:
    return optuna.create_study(storage=storage, study_name="s")


class TestOptunasOwnSuite(StorageTestCase):
    """The wrapper is a storage like any other."""

    @pytest.fixture
    def storage(self) -> RetryingStorage:
        return RetryingStorage(InMemoryStorage())


FULL = """
import resource, sys, threading, time
import optuna
from hq_optuna.storages import RetryingStorage, open_storage
url, minutes = sys.argv[1], float(sys.argv[2])
storage = RetryingStorage(open_storage(url), url, retry_for_s=minutes * 60)
study = optuna.create_study(storage=storage, study_name="s")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
if minutes:  # somebody makes room
    def room():
        while not storage.n_retries:
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    threading.Thread(target=room, daemon=True).start()
trial = study.ask()
for i in range(60):
    trial.set_user_attr(f"a{i}", "x" * 20_000)
study.tell(trial, 0.5)
print(len(study.trials[0].user_attrs), storage.n_retries > 0)
"""


def on_a_full_disk(path: Path, minutes: float) -> subprocess.CompletedProcess[str]:
    """Write until no file may grow, in a process of its own; the limit is lifted if it waits."""
    return subprocess.run(
        [sys.executable, "-c", FULL, sqlite_url(path), str(minutes)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_full_disk_is_waited_for_and_nothing_is_lost(tmp_path):
    done = on_a_full_disk(tmp_path / "study.db", 1)
    assert done.stdout.split() == ["60", "True"], done.stderr


def test_a_disk_that_stays_full_ends_in_a_sentence_and_leaves_the_study_readable(tmp_path):
    done = on_a_full_disk(tmp_path / "study.db", 0)
    assert "StorageError" in done.stderr
    assert "Free some space and start the same command again" in done.stderr
    study = optuna.load_study(study_name="s", storage=sqlite_url(tmp_path / "study.db"))
    written = study.trials[0].user_attrs
    assert 0 < len(written) < 60
    assert set(written.values()) == {"x" * 20_000}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_search_goes_on_whatever_call_fails_once(flaky, storage, study, when):
    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("kind", "candidate")
        return trial.suggest_float("x", 0, 1)

    for name in ("create_new_trial", "set_trial_param", "set_trial_user_attr"):
        getattr(flaky, when)[name] = 1
    getattr(flaky, when)["set_trial_state_values"] = 1
    study.optimize(objective, n_trials=3)
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert len(complete) == 3
    assert all(t.params and t.user_attrs == {"kind": "candidate"} for t in complete)
    left = [t for t in study.trials if t.state != TrialState.COMPLETE]
    # A trial that was made twice leaves one without anything; it is known by that.
    assert [(t.state, t.params) for t in left] == (
        [(TrialState.RUNNING, {})] if when == "after" else []
    )
    assert storage.n_retries == 4


def test_a_result_that_was_stored_unheard_is_not_stored_twice(flaky, storage, study):
    trial = study.ask()
    flaky.after["set_trial_state_values"] = 1
    study.tell(trial, 0.25)
    assert flaky.calls.count("set_trial_state_values") == 2
    assert study.trials[0].value == 0.25


def test_a_trial_that_somebody_else_ended_meanwhile_is_still_an_error(flaky, storage, study):
    trial = study.ask()
    flaky.after["set_trial_state_values"] = 1
    with pytest.raises(StorageError):
        RetryingStorage(flaky, retry_for_s=0).set_trial_state_values(
            trial._trial_id, TrialState.FAIL
        )
    flaky.before["set_trial_state_values"] = 1
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.5])
    assert study.trials[0].state == TrialState.FAIL


def test_a_study_that_was_made_unheard_is_taken_and_anothers_is_not(flaky, storage):
    flaky.after["create_new_study"] = 1
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "mine")
    assert storage.get_study_id_from_name("mine") == study_id
    storage.create_new_trial(study_id)
    flaky.before["create_new_study"] = 1
    with pytest.raises(DuplicatedStudyError):
        storage.create_new_study([StudyDirection.MINIMIZE], "mine")
    flaky.after["delete_study"] = 1
    storage.delete_study(study_id)
    with pytest.raises(KeyError):
        storage.delete_study(study_id)


def test_pauses_grow_to_a_limit_and_end_with_a_sentence(flaky, storage, monkeypatch):
    now, pauses = [0.0], []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(storage, "_pause", pause)
    monkeypatch.setattr(retrying.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retrying.random, "uniform", lambda low, high: high)
    flaky.before["create_new_study"] = 10**6
    with pytest.raises(StorageError) as raised:
        storage.create_new_study([StudyDirection.MINIMIZE], "s")
    assert pauses[:4] == [0.1, 0.2, 0.4, 0.8]
    assert max(pauses) == retrying.LONGEST_PAUSE_S
    assert 55 < sum(pauses) <= 60
    text = str(raised.value)
    for words in ("postgresql://me:***@db/hq", "server closed the connection", "--retry-for"):
        assert words in text
    assert "Everything recorded stays" in text
    # What follows, such as giving the trial back, does not wait another minute.
    tried = len(pauses)
    with pytest.raises(StorageError):
        storage.create_new_study([StudyDirection.MINIMIZE], "s")
    assert len(pauses) == tried
    flaky.before.clear()
    storage.create_new_study([StudyDirection.MINIMIZE], "s")
    flaky.before["delete_study"] = 1
    storage.delete_study(0)  # since it answered, it is tried again


def test_whoever_interrupts_a_wait_waits_no_more(flaky, storage, study):
    trial = study.ask()

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    flaky.before["set_trial_user_attr"] = 5
    with storage.pausing(interrupted), pytest.raises(KeyboardInterrupt):
        trial.set_user_attr("a", 1)
    assert storage.hurries
    with pytest.raises(StorageError):
        trial.set_user_attr("a", 1)
    assert flaky.calls.count("set_trial_user_attr") == 2


class _Rpc(Exception):
    def __init__(self, name: str) -> None:
        self.name = name

    def code(self) -> Any:
        return self

    def details(self) -> str:
        return "failed to connect to all addresses"


_Rpc.__module__ = "grpc._channel"


def wrapped(error: Exception) -> StorageInternalError:
    outer = StorageInternalError("An exception is raised during the commit.")
    outer.__cause__ = error
    return outer


def database(words: str, kind: type[Exception] = sqlalchemy.exc.OperationalError) -> Exception:
    return kind("SELECT 1", {}, Exception(words))


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (wrapped(GONE), True),
        (wrapped(database("database or disk is full")), True),
        (database("database is locked"), True),
        (database("terminating connection", sqlalchemy.exc.InternalError), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (ConnectionResetError(), True),
        (_Rpc("UNAVAILABLE"), True),
        (_Rpc("PERMISSION_DENIED"), False),
        (wrapped(database("attempt to write a readonly database")), False),
        (database("value too long", sqlalchemy.exc.DataError), False),
        (StorageInternalError("without a cause"), False),
        (PermissionError(errno.EACCES, "no"), False),
        (UpdateFinishedTrialError(), False),
        (KeyError("x"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, passes):
    assert may_pass(error) is passes


def test_a_grpc_server_that_is_gone_is_named_in_words(flaky, storage):
    def gone(*_: Any) -> None:
        raise _Rpc("UNAVAILABLE")

    storage.wrapped.get_all_studies = gone  # type: ignore[method-assign]
    storage.retry_for_s = 0
    with pytest.raises(StorageError, match="failed to connect to all addresses"):
        storage.get_all_studies()


def test_a_negative_time_is_refused(flaky):
    with pytest.raises(ValueError, match="at least 0; got -1"):
        RetryingStorage(flaky, retry_for_s=-1)
