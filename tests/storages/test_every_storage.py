"""One suite for SQLite, PostgreSQL, MariaDB, the journal file and the gRPC proxy."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from hq_optuna import attributes
from hq_optuna.errors import StorageError
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.heartbeat import heartbeat
from hq_optuna.protocol.history import assignment, read_history
from hq_optuna.storages import load_study, open_storage, study_exists
from hq_optuna.storages.trials import Cursor, read_facts, read_rows, row_of
from hq_optuna.storages.writing import finish_trial, write_heartbeats
from hq_optuna.workers import loop
from hq_optuna.workers.loop import work
from tests.fake_search import fake_study
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
from tests.servers import KINDS, place

AWAY = f"elsewhere/1/1/{worker_identity.worker_id().rpartition('/')[2]}"


@pytest.fixture(scope="module", params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty storage; the tests make studies of their own in it."""
    with place(request.param, tmp_path_factory.mktemp(request.param)) as url:
        yield url


@pytest.fixture
def storage(url: str) -> Iterator[BaseStorage]:
    opened = open_storage(url)
    for study in opened.get_all_studies():
        opened.delete_study(study._study_id)
    yield opened
    opened.remove_session()


@pytest.mark.parametrize("encoding", ["layers", "compact"])
def test_a_worker_has_the_history_of_the_sequential_search(storage, encoding):
    study = new_study(sampler(5, encoding=encoding), storage)
    work(study, assigned)
    assert history(study) == expected(study)
    log = ours(study).log(study)
    assert len(study.trials) == len(log.results) + len(log.closed)
    assert set(states(study)) == {TrialState.COMPLETE}
    assert assignment(study.best_trial, study) == log.search.space.config(log.incumbent.state)


def test_three_threads_with_connections_of_their_own_score_every_candidate_once(url, storage):
    study = new_study(sampler(6, encoding="compact"), storage)
    scored: list[tuple[str, int, int]] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            by = sampler(6, encoding="compact")
            mine = optuna.load_study(study_name="table", storage=open_storage(url), sampler=by)

            def objective(trial: optuna.Trial) -> float:
                ticket = ours(mine).ticket(mine, trial)
                scored.append((ticket.kind, ticket.step, ticket.slot))
                return assigned(trial)

            work(mine, objective)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert history(study) == expected(study)
    log = ours(study).log(study)
    assert len(scored) == len(set(scored)) == len(log.results) + len(log.closed)


def test_rows_say_what_optuna_says_and_only_what_is_new_is_read_again(storage):
    study = fake_study(5, storage=storage, n_trials=7)
    trial = study.ask()
    study.add_trial(optuna.create_trial(value=math.inf))
    cursor = Cursor()
    rows = read_rows(study._storage, study._study_id, cursor)
    assert rows == [row_of(t) for t in study.get_trials()]
    cursor.move(rows)
    assert [r.number for r in read_rows(study._storage, study._study_id, cursor)] == [trial.number]
    facts = read_facts(study._storage, study._study_id, ["score_weights"])
    assert [f.user_attrs.get("score_weights") for f in facts] == [
        t.user_attrs.get("score_weights") for t in study.get_trials()
    ]


def test_a_trial_ends_once_and_with_all_it_has_to_say(storage):
    study = new_study(sampler(5), storage)
    trial = ours(study).ask(study)
    trial.set_user_attr("note", "x" * attributes.PART_CHARACTERS)
    value = 0.1 + 0.2  # not to lose a bit
    trial.finish(TrialState.COMPLETE, value)
    for state in (TrialState.COMPLETE, TrialState.FAIL):
        with pytest.raises(UpdateFinishedTrialError):
            finish_trial(study._storage, trial._trial_id, state, None, {})
    done = study.trials[0]
    assert (done.state, done.value) == (TrialState.COMPLETE, value)
    assert done.user_attrs["note"] == "x" * attributes.PART_CHARACTERS
    assert read_rows(study._storage, study._study_id, Cursor())[0].value == value


@pytest.mark.parametrize("kind", ["candidate", "incumbent"])
def test_what_a_silent_worker_elsewhere_had_is_taken_over(storage, kind, monkeypatch):
    monkeypatch.setattr(loop, "LONGEST_WAIT_S", 0.05)
    study = new_study(sampler(5, encoding="compact"), storage)
    log = ours(study).log(study)
    log.owners.grace_s = 0.5
    if kind == "incumbent":
        add(study, open_ticket(log, 0), total(log.search.space, log.search.space.top))
        log = ours(study).log(study)
        number = add(study, record_ticket(log, worker=AWAY))
    else:
        number = add(study, open_ticket(log, 0, worker=AWAY))
    work(study, assigned)
    assert history(study) == expected(study)
    assert states(study)[number] == TrialState.FAIL


def test_signs_of_life_are_seen_through_another_connection(url, storage):
    study = new_study(sampler(5, encoding="compact"), storage)
    trial = ours(study).ask(study)
    theirs = open_storage(url)
    seen = [read_rows(theirs, study._study_id, Cursor())[0].heartbeat]
    beat = functools.partial(write_heartbeats, storage, [trial._trial_id])
    with heartbeat(storage, beat, every_s=0.01):
        deadline = time.monotonic() + 120
        while len(set(seen)) < 3 and time.monotonic() < deadline:
            seen.append(read_rows(theirs, study._study_id, Cursor())[0].heartbeat)
    assert seen[0] is None
    assert len(set(seen)) == 3


def test_a_history_is_read_back(storage):
    study = fake_study(6, storage=storage, facts={"accuracy_before": 0.5})
    read = read_history(study)
    twin = read_history(fake_study(6))
    assert [(r.step, r.config, r.winner.score) for r in read.records] == [
        (r.step, r.config, r.winner.score) for r in twin.records
    ]
    assert read.facts == {"accuracy_before": 0.5}
    assert [c.score_weights for c in read.candidates] == [c.score_weights for c in twin.candidates]


def test_studies_are_found_by_name(url, storage):
    assert not study_exists(url, "table")
    new_study(sampler(5), storage)
    assert study_exists(url, "table")
    assert load_study(url, "table").study_name == "table"
    with pytest.raises(StorageError, match=r"holds no study 'other'\. It holds: table"):
        load_study(url, "other")


def test_nothing_is_created_by_asking_for_a_study(tmp_path: Path):
    path = tmp_path / "none.log"
    assert not study_exists(f"journal:///{path}", "table")
    with pytest.raises(StorageError, match="Was a search started"):
        load_study(f"journal:///{path}", "table")
    assert not path.exists()
