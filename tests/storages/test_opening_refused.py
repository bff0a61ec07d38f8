"""What can be wrong with a storage is told in words, without passwords."""

from __future__ import annotations

import os
import sqlite3
import traceback
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from hq_optuna.errors import StorageError
from hq_optuna.storages import (
    explain_storage_errors,
    load_study,
    open_storage,
    opening,
    sqlite_url,
    study_exists,
)
from tests.servers import free_port

optuna.logging.set_verbosity(optuna.logging.WARNING)
SECRET = "hunter2hunter2"


def test_a_read_only_file_is_refused(filled, monkeypatch):
    monkeypatch.setattr(os, "access", lambda p, mode: not Path(p).is_file())  # root may write
    with pytest.raises(StorageError, match=r"study\.db is read-only. Give a file that can be"):
        open_storage(sqlite_url(filled))


def test_a_read_only_folder_is_refused(path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda p, mode: False)
    with pytest.raises(StorageError, match=r"The folder .* is read-only. Give another --storage"):
        open_storage(sqlite_url(path))
    assert not path.exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Cannot create the folder .*file: "):
        open_storage(sqlite_url(tmp_path / "file" / "study.db"))


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(
        StorageError, match=r"unable to open database file. Check that the file and"
    ):
        open_storage(sqlite_url(tmp_path))


def test_a_file_that_is_no_database_is_refused_and_left_as_it_was(path):
    path.write_text("bits,score\n" * 1000)
    for use in (open_storage, lambda url: load_study(url, "x"), lambda url: study_exists(url, "x")):
        with pytest.raises(StorageError, match=r"file is not a database. The file is not a SQLite"):
            use(sqlite_url(path))
    assert path.read_text() == "bits,score\n" * 1000


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "is no storage URL. Expected for example 'sqlite:///search.db'"),
        ("study.db", "'study.db' is no storage URL"),
        ("sqlite:/study.db", "is no storage URL"),
        ("postgresql://me@host:port/hq", "is no storage URL"),
        ("nosuch://host/hq", r"Storage nosuch://host/hq: Can't load plugin.*nosuch. Check the URL"),
    ],
)
def test_a_broken_url_is_refused_in_words(url, words):
    for use in (open_storage, lambda u: study_exists(u, "x"), lambda u: load_study(u, "x")):
        with pytest.raises(StorageError, match=words):
            use(url)


def test_an_unknown_sqlite_driver_is_refused(path):
    with pytest.raises(StorageError, match="Can't load plugin"):
        open_storage(f"sqlite+nosuch:///{path}")


def test_a_missing_driver_is_named_with_how_to_install_it():
    with pytest.raises(StorageError, match=r"No module named 'MySQLdb'. .*hq_optuna\[mysql\]"):
        open_storage("mysql://me@127.0.0.1/hq")


@pytest.mark.parametrize(
    ("scheme", "driver"), [("postgresql+psycopg", "psycopg"), ("mysql+pymysql", "pymysql")]
)
def test_a_server_that_does_not_answer_is_named(scheme, driver):
    pytest.importorskip(driver)
    url = f"{scheme}://me:{SECRET}@127.0.0.1:{free_port()}/hq"
    for use in (open_storage, lambda u: study_exists(u, "x"), lambda u: load_study(u, "x")):
        with pytest.raises(StorageError, match=r"refused.* Check the URL, and that the") as error:
            use(url)
        assert_silent(error.value)
        assert "127.0.0.1" in str(error.value)
        assert "me:***@" in str(error.value)


def assert_silent(error: BaseException) -> None:
    """Neither the error nor what a traceback prints of its causes knows the password."""
    assert SECRET not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://me:{SECRET}@127.0.0.1:port/hq",
        f"postgresql+psycopg://me:{SECRET}@x@127.0.0.1:1/hq",
        f"postgresql+psycopg://me:x@{SECRET}@127.0.0.1:1/hq",
        f"postgresql+psycopg://me:a/{SECRET}:b@127.0.0.1:1/hq",
        f"postgresql+psycopg://me:{SECRET}{{@127.0.0.1:1/hq",
        f"postgresql+psycopg://127.0.0.1:1/hq?user=me&password={SECRET}",
        f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/hq?nosuch=1",
        f"mysql+pymysql://me:{SECRET}@127.0.0.1:1/hq?nosuch=1",
        f"postgresql+psycopg://me:a@b/{SECRET}@127.0.0.1:1/hq",
        f"mysql+pymysql://127.0.0.1:1/hq?password={SECRET}",
        f"mysql://me:{SECRET}@127.0.0.1:1/hq",
        f"nosuch://me:{SECRET}@127.0.0.1:1/hq",
        f"postgresql//me:{SECRET}@127.0.0.1/hq",
        f"://me:{SECRET}@127.0.0.1/hq",
    ],
)
@pytest.mark.parametrize("use", ["open", "exists", "load"])
def test_no_message_holds_the_password(url, use):
    call = {
        "open": open_storage,
        "exists": lambda u: study_exists(u, "x"),
        "load": lambda u: load_study(u, "x"),
    }[use]
    with pytest.raises(StorageError) as error:
        call(url)
    assert_silent(error.value)


def test_a_driver_that_says_the_password_is_not_repeated(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"cannot log in with {SECRET}\nsecond line")

    monkeypatch.setattr(opening, "Database", fail)
    with pytest.raises(StorageError, match=r"cannot log in with \*\*\*. Check") as error:
        open_storage(f"postgresql://me:{SECRET}@127.0.0.1/hq")
    assert_silent(error.value)


def test_a_full_disk_is_told_with_what_to_do_and_what_was_recorded_stays(path):
    storage = open_storage(sqlite_url(path))
    study = optuna.create_study(study_name="full", storage=storage)
    study.set_user_attr("before", 1)

    def shrink(connection: sqlite3.Connection, _: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")

    sqlalchemy.event.listen(storage._backend.engine, "connect", shrink)
    storage._backend.engine.dispose()
    with (
        pytest.raises(
            StorageError, match=r"Storage here: database or disk is full. Free some"
        ) as e,
        explain_storage_errors("here"),
    ):
        for i in range(100):
            study.set_user_attr(f"long {i}", "x" * 10_000)
    assert e.value.__suppress_context__
    assert load_study(sqlite_url(path), "full").user_attrs["before"] == 1


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("attempt to write a readonly database", "Check that the file and its folder exist"),
        ("disk I/O error", "Free some space and start the same command again"),
        ("[Errno 28] No space left on device", "Free some space"),
        ("database is locked", "Another program holds the database; try again"),
        ("server closed the connection", "Check the URL, and that the database runs"),
    ],
)
def test_errors_while_a_study_runs_are_told_with_a_next_step(reason, advice):
    error = sqlalchemy.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError(reason))
    with pytest.raises(StorageError) as told, explain_storage_errors("here"):
        raise optuna.exceptions.StorageInternalError("during the commit") from error
    assert str(told.value).startswith(f"Storage here: {reason}. {advice}")


@pytest.mark.parametrize("error", [ValueError("mine"), ImportError("mine"), KeyboardInterrupt()])
def test_errors_of_an_objective_are_left_as_they_are(error):
    with pytest.raises(type(error)) as raised, explain_storage_errors("here"):
        raise error
    assert raised.value is error
