"""Pages are kept current off the path of the workers, by one process, and never end a search."""

from __future__ import annotations

import logging
import threading
import time

import optuna
import pytest

from hq_optuna.dashboard import PageWriter, writer
from hq_optuna.dashboard.pages import STAMP, note_in
from hq_optuna.protocol import worker_identity
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.storages import open_storage, sqlite_url
from tests.fake_search import fake_space, fake_study
from tests.fake_search import score as go_on
from tests.searches import search

SPACE = fake_space(8)


@pytest.fixture
def study(tmp_path):
    storage = open_storage(sqlite_url(tmp_path / "study.db"))
    return fake_study(SPACE, storage=storage, n_trials=0)


def log(study):
    assert isinstance(study.sampler, ProgressiveBitSampler)
    return study.sampler.log(study)


def system(study):
    return study._storage.get_study_system_attrs(study._study_id)


def wait_for_thread():
    for thread in threading.enumerate():
        if thread.name == "pages":
            thread.join(120)


def test_pages_follow_the_search_and_the_last_state_is_written(study):
    with PageWriter(study, every_s=3600.0) as pages:
        pages(log(study))
        wait_for_thread()
        assert "No step is closed yet" in note_in(system(study))
        go_on(study, SPACE)
        pages(log(study))  # too soon
        wait_for_thread()
        assert "No step is closed yet" in note_in(system(study))
    assert "Finished: the budget is met" in note_in(system(study))


def test_a_search_on_a_database_has_pages_without_being_asked(tmp_path):
    study = search().optimize(sqlite_url(tmp_path / "study.db"), "s")
    assert "Finished: the budget is met" in note_in(system(study))


def test_a_search_in_memory_has_none(tmp_path):
    for storage in (None, "sqlite:///:memory:"):
        study = search().optimize(storage)
        assert STAMP not in system(study)


def test_who_works_never_waits_for_the_writer(study, monkeypatch):
    may_go_on, began = threading.Event(), threading.Event()

    def slow(*_args, **_named):
        began.set()
        assert may_go_on.wait(120)

    monkeypatch.setattr(writer, "write_pages", slow)
    pages = PageWriter(study)
    pages(log(study))
    assert began.wait(120)  # in a thread, and this one goes on
    go_on(study, SPACE, 5)
    pages(log(study))
    assert sum(thread.name == "pages" for thread in threading.enumerate()) == 1
    may_go_on.set()
    pages.close()


def test_a_storage_that_fails_is_logged_once_and_ends_nothing(study, monkeypatch, caplog):
    def fail(*_args, **_named):
        raise OSError("disk full")

    monkeypatch.setattr(writer, "write_pages", fail)
    caplog.set_level(logging.DEBUG, "hq_optuna")
    with PageWriter(study, every_s=0.0) as pages:
        for _ in range(3):
            go_on(study, SPACE, 5)
            pages(log(study))
            wait_for_thread()
            pages._not_before = 0.0
    said = [r.levelname for r in caplog.records if "were not written: disk full" in r.message]
    assert said[0] == "WARNING"
    assert len(said) >= 3
    assert set(said[1:]) == {"DEBUG"}


def test_only_who_recorded_the_last_step_writes(study, monkeypatch):
    go_on(study, SPACE, 10)
    monkeypatch.setattr(worker_identity, "worker_id", lambda: "elsewhere/1/1/1")
    with PageWriter(study) as pages:
        pages(log(study))
    assert STAMP not in system(study)
    with PageWriter(study, always=True) as pages:  # as a launcher, who records nothing
        pages(log(study))
    assert STAMP in system(study)


def test_nobody_writes_shortly_after_another_one_did(study):
    with PageWriter(study) as first:
        first(log(study))
    before = system(study)[STAMP]
    go_on(study, SPACE, 10)
    second = PageWriter(study, every_s=3600.0)
    second(log(study))
    wait_for_thread()
    assert system(study)[STAMP] == before
    assert second._not_before > time.monotonic()
    third = PageWriter(study, every_s=0.0)
    third(log(study))
    wait_for_thread()
    assert system(study)[STAMP] != before


def test_it_rests_much_longer_than_it_writes(study, monkeypatch):
    now = [100.0]

    def slow(*_args, **_named):
        now[0] += 3

    monkeypatch.setattr(writer, "write_pages", slow)
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    pages = PageWriter(study, every_s=0.0)
    pages(log(study))
    wait_for_thread()
    assert pages._not_before - now[0] == 60


def test_without_the_dashboard_it_is_said_once_how_to_get_it(study, monkeypatch, caplog):
    monkeypatch.setattr(writer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(writer, "_said", threading.Event())
    caplog.set_level(logging.INFO, "hq_optuna")
    for _ in range(2):
        with PageWriter(study) as pages:
            pages(log(study))
    said = [r for r in caplog.records if "pip install 'hq_optuna[dashboard]'" in r.message]
    assert [record.levelname for record in said] == ["INFO"]
    assert "No step is closed yet" in note_in(system(study))  # they are written all the same


def test_the_study_may_be_of_another_storage_than_ours(tmp_path):
    storage = optuna.storages.RDBStorage(sqlite_url(tmp_path / "plain.db"))
    study = fake_study(SPACE, storage=storage, n_trials=20)
    with PageWriter(study, always=True):
        pass
    assert "**Incumbent.**" in note_in(system(study))
