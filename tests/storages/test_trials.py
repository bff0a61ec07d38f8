"""Rows of trials and the end of one, the same on a database as through Optuna's own calls."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.optuna_internals import database_of
from hq_optuna.protocol.claims import write_facts
from hq_optuna.storages import RetryingStorage, open_storage, sqlite_url
from hq_optuna.storages.trials import Cursor, read_facts, read_rows, row_of
from hq_optuna.storages.writing import finish_trial, set_trial_attrs
from tests.fake_search import fake_study
from tests.samplers.tables import assigned, new_study, ours, sampler


@pytest.fixture(params=["ours", "optuna", "memory", "retrying"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> optuna.storages.BaseStorage:
    """Our database, a database that somebody else opened, and no database at all."""
    url = sqlite_url(tmp_path / "study.db")
    if request.param == "memory":
        return InMemoryStorage()
    if request.param == "optuna":
        return optuna.storages.get_storage(RDBStorage(url))
    if request.param == "retrying":
        return RetryingStorage(open_storage(url))
    return open_storage(url)


def test_rows_say_what_optuna_says(storage):
    study = fake_study(5, storage=storage)
    study.enqueue_trial({"x": 1})
    study.ask()
    waiting = study.add_trial(optuna.create_trial(state=TrialState.WAITING))
    assert waiting is None
    study._storage.create_new_trial(study._study_id)
    study.add_trial(optuna.create_trial(value=math.inf))
    study.add_trial(optuna.create_trial(value=-math.inf))
    cursor = Cursor()
    rows = read_rows(study._storage, study._study_id, cursor)
    assert rows == [row_of(trial) for trial in study.get_trials()]
    assert {row.state for row in rows} >= {TrialState.COMPLETE, TrialState.RUNNING}
    cursor.move(rows)
    assert cursor.n == len(study.trials)
    assert set(cursor.unfinished) == {r.number for r in rows if not r.state.is_finished()}


def test_only_what_is_new_or_was_unfinished_is_read_again(storage):
    study = new_study(sampler(5), storage)
    cursor = Cursor()

    def read() -> list[int]:
        rows = read_rows(study._storage, study._study_id, cursor)
        cursor.move(rows)
        return [row.number for row in rows]

    first, second = study.ask(), study.ask()
    assert read() == [0, 1]
    assert read() == [0, 1]
    study.tell(second, 1.0)
    assert read() == [0, 1]
    study.ask()
    assert read() == [0, 2]
    study.tell(first, 1.0)
    assert read() == [0, 2]
    assert read() == [2]
    other = optuna.create_study(storage=storage, study_name="other")
    other.ask()
    assert read() == [2]


def test_a_beat_is_read_while_the_trial_runs(storage):
    study = new_study(sampler(5), storage)
    trial = ours(study).ask(study)
    seen = [
        beat
        for beat in (1, 2)
        if study._storage.set_trial_system_attr(trial._trial_id, attributes.HEARTBEAT, beat) is None
        and str(read_rows(study._storage, study._study_id, Cursor())[0].heartbeat) == str(beat)
    ]
    assert seen == [1, 2]


def test_facts_are_the_attributes_that_were_asked_for(storage):
    study = fake_study(5, storage=storage, n_trials=6)
    study.ask()
    keys = (attributes.SCORE_WEIGHTS, attributes.SECONDS)
    facts = read_facts(study._storage, study._study_id, keys)
    for fact, trial in zip(facts, study.get_trials(), strict=True):
        assert replace(fact, user_attrs={}) == row_of(trial)
        assert fact.user_attrs == {k: v for k, v in trial.user_attrs.items() if k in keys}
        if trial.duration is None:
            assert fact.seconds is None
        else:
            assert fact.seconds == pytest.approx(trial.duration.total_seconds(), abs=1e-6)


def test_a_claimed_trial_shows_what_its_template_says(storage):
    study = new_study(sampler(5, encoding="layers"), storage)
    trial = ours(study).ask(study)
    frozen = study._storage.get_trial(trial._trial_id)
    ticket = attributes.Ticket.read(frozen.system_attrs)
    assert frozen.state == TrialState.RUNNING
    assert frozen.params == {name: v for name, (v, _) in ours(study).parameters(ticket).items()}
    assert frozen.user_attrs[attributes.KIND] == "candidate"
    old = frozen.system_attrs[attributes.OLD_CONSTRAINTS]
    assert frozen.constraints == {"bops": old[0], "0": old[0]}
    assert trial.number == 0
    assert (
        abs((frozen.datetime_start - optuna.create_trial(value=0).datetime_start).total_seconds())
        < 60
    )


def test_attributes_of_a_claimed_trial_are_written_with_its_end(storage):
    study = new_study(sampler(5), storage)
    trial = ours(study).ask(study)
    trial.set_user_attr("note", [1, "two"])
    trial.set_user_attr(attributes.WORKER, "somebody")  # it was created with one
    assert trial.user_attrs["note"] == [1, "two"]
    stored = study._storage.get_trial(trial._trial_id).user_attrs
    assert "note" not in stored
    assert stored[attributes.WORKER] == "somebody"
    trial.finish(TrialState.COMPLETE, assigned(trial))
    done = study.trials[0]
    assert done.user_attrs["note"] == [1, "two"]
    assert done.value == assigned(trial)
    assert done.state == TrialState.COMPLETE
    assert done.duration.total_seconds() < 60


@pytest.mark.parametrize("value", [1.5, math.inf, -math.inf, None])
def test_a_trial_ends_once(storage, value):
    study = new_study(sampler(5), storage)
    trial_id = study._storage.create_new_trial(study._study_id)
    state = TrialState.FAIL if value is None else TrialState.COMPLETE
    finish_trial(study._storage, trial_id, state, value, {"a": 1})
    for again in (TrialState.COMPLETE, TrialState.FAIL):
        with pytest.raises(UpdateFinishedTrialError):
            finish_trial(study._storage, trial_id, again, 7.0, {"b": 2})
    trial = study.trials[0]
    assert (trial.state, trial.value, trial.user_attrs) == (state, value, {"a": 1})
    with pytest.raises(UpdateFinishedTrialError):
        set_trial_attrs(study._storage, trial_id, {"c": 3})


def test_facts_are_given_to_any_trial_and_again_to_a_retried_one(storage):
    study = new_study(sampler(5), storage)
    trial = study.ask()
    write_facts(trial, {"a": 1, "b": 2.5})
    assert trial.user_attrs == {"a": 1, "b": 2.5}
    assert study._storage.get_trial(trial._trial_id).user_attrs == {"a": 1, "b": 2.5}
    write_facts(trial, {"a": 3, "c": None})
    assert study._storage.get_trial(trial._trial_id).user_attrs == {"a": 3, "b": 2.5, "c": None}


def test_a_candidate_is_two_commits_whatever_the_number_of_layers(tmp_path):
    for layers in (5, 40):
        storage = open_storage(sqlite_url(tmp_path / f"{layers}.db"))
        study = new_study(sampler(layers, encoding="layers"), storage)
        counts = {"commit": 0, "statement": 0}
        engine = database_of(storage).engine

        def commit(_: object, counts: dict[str, int] = counts) -> None:
            counts["commit"] += 1

        def statement(*_: object, counts: dict[str, int] = counts) -> None:
            counts["statement"] += 1

        for _ in range(4):
            trial = ours(study).ask(study)
            trial.finish(TrialState.COMPLETE, assigned(trial))
        sqlalchemy.event.listen(engine, "before_cursor_execute", statement)
        sqlalchemy.event.listen(engine, "commit", commit)
        trial = ours(study).ask(study)
        write_facts(trial, dict.fromkeys("abcd", 1.0))
        trial.finish(TrialState.COMPLETE, 1.0)
        # Optuna's own read of the new trial ends with a commit too, of nothing.
        assert counts["commit"] == 3
        assert counts["statement"] <= 18


def test_a_worker_reads_a_study_of_thousands_of_trials_in_one_query(tmp_path):
    storage = open_storage(sqlite_url(tmp_path / "study.db"))
    study = new_study(sampler(5), storage)
    study.optimize(assigned, n_trials=10)
    queries: list[str] = []
    fresh = open_storage(sqlite_url(tmp_path / "study.db"))
    mine = optuna.load_study(study_name="table", storage=fresh, sampler=sampler(5))
    sqlalchemy.event.listen(
        database_of(fresh).engine,
        "before_cursor_execute",
        lambda _a, _b, text, *_: queries.append(text),
    )
    ours(mine).log(mine)
    assert sum("FROM trials" in query for query in queries) == 1
    queries.clear()
    read_facts(mine._storage, mine._study_id, ["seconds"])
    assert len(queries) == 2


def test_a_database_that_went_away_is_told_as_optuna_tells_it(tmp_path):
    storage = open_storage(sqlite_url(tmp_path / "study.db"))
    study = new_study(sampler(5), storage)
    trial = ours(study).ask(study)
    with database_of(storage).engine.begin() as connection:
        connection.exec_driver_sql("drop table trials")
    with pytest.raises(StorageInternalError):
        read_rows(storage, study._study_id, Cursor())
    with pytest.raises(StorageInternalError):
        trial.finish(TrialState.COMPLETE, 1.0)
    with pytest.raises(StorageInternalError):
        set_trial_attrs(storage, trial._trial_id, {"a": 1})


def test_a_trial_that_was_ended_unheard_is_not_ended_twice(tmp_path, monkeypatch):
    storage = RetryingStorage(open_storage(sqlite_url(tmp_path / "study.db")))
    study = optuna.create_study(storage=storage)
    database = database_of(storage.wrapped)
    for method in ("finish_trials", "set_trial_attrs"):
        original = getattr(database, method)

        def unheard(*arguments, original=original, calls=[], **named):  # noqa: B006
            done = original(*arguments, **named)
            calls.append(1)
            if len(calls) == 1:
                lost = sqlalchemy.exc.OperationalError("COMMIT", {}, Exception("connection lost"))
                raise StorageInternalError("lost") from lost
            return done

        monkeypatch.setattr(database, method, unheard)
    trial = study.ask()
    set_trial_attrs(storage, trial._trial_id, {"a": 1})
    finish_trial(storage, trial._trial_id, TrialState.COMPLETE, 0.5, {"b": 2})
    (found,) = study.trials
    assert (found.value, found.user_attrs) == (0.5, {"a": 1, "b": 2})
    assert storage.n_retries == 2
    with pytest.raises(UpdateFinishedTrialError):
        finish_trial(storage, trial._trial_id, TrialState.FAIL, None, {})
