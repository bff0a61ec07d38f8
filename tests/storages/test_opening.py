"""Opening a storage: fit for several processes, and errors in words without passwords."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
import traceback
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage

from hq_optuna.errors import StorageError
from hq_optuna.storages import (
    explain_storage_errors,
    load_study,
    open_storage,
    opening,
    redact_url,
    sqlite_url,
    study_exists,
    without_sql,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)
SECRET = "hunter2hunter2"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


@pytest.fixture
def filled(path: Path) -> Path:
    """A database with the studies ``a`` and ``b``."""
    storage = open_storage(sqlite_url(path))
    for name in ("b", "a"):
        optuna.create_study(study_name=name, storage=storage)
    return path


def closed_port() -> int:
    """Return a port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def pragma(storage, name: str):
    with storage._backend.engine.connect() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar()


# SQLite


def test_a_sqlite_file_is_in_wal_mode_with_a_busy_timeout_on_every_connection(path):
    storage = open_storage(sqlite_url(path))
    for _ in range(2):
        assert pragma(storage, "journal_mode") == "wal"
        assert pragma(storage, "busy_timeout") == 60_000  # ms
        assert pragma(storage, "synchronous") == 1  # NORMAL
        storage._backend.engine.dispose()
    with sqlite3.connect(path) as connection:  # whoever opens the file has it too
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_file_in_another_journal_mode_is_changed_and_keeps_its_studies(path):
    optuna.create_study(study_name="old", storage=f"sqlite:///{path}")
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("delete",)
    storage = open_storage(sqlite_url(path))
    assert pragma(storage, "journal_mode") == "wal"
    assert [s.study_name for s in storage.get_all_studies()] == ["old"]


def test_a_second_writer_waits_for_the_first(path):
    """With SQLite's own default, or none, the second would fail while the first holds the lock."""
    storage = open_storage(sqlite_url(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    program = (
        "import sys, optuna; from hq_optuna.storages import open_storage;"
        "print('ready', flush=True);"
        "optuna.create_study(study_name='late', storage=open_storage(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, sqlite_url(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    assert process.poll() is None
    other.execute("ROLLBACK")
    assert process.communicate(timeout=60)[1].count("Error") == 0
    assert process.returncode == 0
    assert [s.study_name for s in storage.get_all_studies()] == ["late"]


def test_the_folder_is_created(tmp_path):
    path = tmp_path / "a b" / "ü" / "study.db"
    open_storage(sqlite_url(path))
    assert path.is_file()


def test_braces_in_a_path_mean_themselves(tmp_path):
    path = tmp_path / "{SCHEMA_VERSION}" / "}{.db"
    open_storage(sqlite_url(path))
    assert path.is_file()
    assert study_exists(sqlite_url(path), "x") is False


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_sqlite_database_in_memory_works(url):
    study = optuna.create_study(storage=open_storage(url))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert len(study.trials) == 2
    assert study_exists(url, study.study_name) is False  # another memory


def test_no_storage_is_memory_and_an_open_one_is_returned_as_it_is():
    assert isinstance(open_storage(None), InMemoryStorage)
    mine = InMemoryStorage()
    assert open_storage(mine) is mine


def test_processes_that_open_an_empty_database_at_once_all_succeed(path):
    """Optuna alone: some of them fail on a table that exists by then."""
    program = (
        "import sys, optuna; from hq_optuna.storages import open_storage;"
        "print('ready', flush=True); sys.stdin.readline();"
        "storage = open_storage(sys.argv[1]);"
        "optuna.create_study(study_name='one', storage=storage, load_if_exists=True)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, sqlite_url(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert study_exists(sqlite_url(path), "one")


def test_tables_that_another_process_made_meanwhile_are_looked_for_again(monkeypatch):
    attempts = []

    def fail_twice(url: str, engine_kwargs: object) -> InMemoryStorage:
        attempts.append(url)
        if len(attempts) < 3:
            cause = sqlite3.OperationalError("table studies already exists")
            raise sqlalchemy.exc.OperationalError("CREATE TABLE", {}, cause)
        return InMemoryStorage()

    monkeypatch.setattr(opening, "Database", fail_twice)
    monkeypatch.setattr(opening.time, "sleep", lambda seconds: None)
    open_storage("postgresql://u:p@h/d")
    assert len(attempts) == 3
    attempts.clear()
    monkeypatch.setattr(opening, "FIRST_USE_ATTEMPTS", 2)
    with pytest.raises(StorageError, match="already exists"):
        open_storage("postgresql://u:p@h/d")


# What can be wrong


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
    url = f"{scheme}://me:{SECRET}@127.0.0.1:{closed_port()}/hq"
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


# Reading


def tables(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        rows = connection.execute("select name from sqlite_master").fetchall()
    return [row[0] for row in rows]


def test_reading_creates_nothing_where_nothing_is(path):
    missing = path.parent / "no folder" / "study.db"
    assert study_exists(sqlite_url(missing), "a") is False
    with pytest.raises(StorageError, match=r"There is no database at .* Was a search started\?"):
        load_study(sqlite_url(missing), "a")
    assert not missing.parent.exists()


def test_reading_creates_no_tables_in_somebody_elses_database(path):
    with sqlite3.connect(path) as connection:
        connection.execute("create table mine (x)")
    assert study_exists(sqlite_url(path), "a") is False
    with pytest.raises(StorageError, match=r"holds no study 'a'. It holds: none"):
        load_study(sqlite_url(path), "a")
    assert tables(path) == ["mine"]


def test_a_study_is_found_by_its_name(filled):
    url = sqlite_url(filled)
    assert study_exists(url, "a")
    assert not study_exists(url, "c")
    assert load_study(url, "a").study_name == "a"
    with pytest.raises(StorageError, match=r"holds no study 'c'. It holds: a, b\."):
        load_study(url, "c")
    with sqlite3.connect(filled) as connection:
        assert connection.execute("select count(*) from studies").fetchone() == (2,)


def test_a_database_of_a_later_optuna_is_refused_in_words(filled):
    with sqlite3.connect(filled) as connection:
        connection.execute("update alembic_version set version_num = 'v9.9.9'")
    with pytest.raises(StorageError, match="no longer compatible with the table schema"):
        open_storage(sqlite_url(filled))


# Passwords

printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30)


@settings(max_examples=300)
@given(user=st.text("abc_", max_size=5), rest=st.text("abc.:/?&@=%", max_size=20), noise=printable)
def test_what_stands_between_user_and_host_is_never_shown(user, rest, noise):
    for url in (
        f"postgresql://{user}:{SECRET}@{rest}",
        f"postgresql://{user}:{noise}{SECRET}@{rest}",
        f"{user}:{SECRET}@{rest}",
        f"mysql+pymysql://host/db?x=1&password={SECRET}&y=2",
        f"postgresql://{user}:x@host/db?sslpassword={SECRET}",
    ):
        assert SECRET not in redact_url(url)


@settings(max_examples=300)
@given(printable)
def test_any_text_can_be_redacted(text):
    assert isinstance(redact_url(text), str)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("sqlite:////home/me@work/a:b/study.db", "sqlite:////home/me@work/a:b/study.db"),
        ("postgresql://host:5432/hq", "postgresql://host:5432/hq"),
        ("postgresql://me@host/hq", "postgresql://me@host/hq"),
        ("postgresql://me:pw@host:5432/hq", "postgresql://me:***@host:5432/hq"),
        ("postgresql://me:pw@[::1]:5432/hq", "postgresql://me:***@[::1]:5432/hq"),
        ("mysql+pymysql://me:p%40w@host/hq?a=1", "mysql+pymysql://me:***@host/hq?a=1"),
        ("postgresql://h/d?password=x&user=me", "postgresql://h/d?password=***&user=me"),
        ("sqlite+pysqlcipher://:pass@/study.db", "sqlite+pysqlcipher://:***@/study.db"),
    ],
)
def test_the_rest_of_a_url_is_shown(url, shown):
    assert redact_url(url) == shown


def test_a_path_becomes_a_url_that_opens_it(tmp_path):
    path = tmp_path / "with space" / "study.db"
    assert sqlite_url(path) == f"sqlite:///{path}"
    assert sqlite_url(Path("study.db")) == "sqlite:///study.db"


# Journals and proxies


@pytest.mark.parametrize("form", ["journal:///{}", "{}"])
@pytest.mark.parametrize("name", ["study.log", "sub/study.journal"])
def test_a_journal_is_named_by_its_url_or_its_ending(tmp_path, form, name):
    path = tmp_path / name
    storage = open_storage(form.format(path))
    study = optuna.create_study(study_name="s", storage=storage)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert len(load_study(form.format(path), "s").trials) == 2
    assert path.exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("journal://study.log", "is no journal URL. Expected 'journal:///search.log'"),
        ("journal://", "is no journal URL"),
        ("journal:///", "is no journal URL"),
        ("grpc://", "written 'grpc://host:port'"),
        ("grpc://host:port", "written 'grpc://host:port'"),
        ("grpc://me:secret@host:1", "it knows no users and no passwords"),
        ("grpc://host:1/database", "written 'grpc://host:port'"),
    ],
)
def test_broken_urls_of_journals_and_proxies_are_explained(url, words):
    with pytest.raises(StorageError, match=words) as error:
        open_storage(url)
    assert "secret" not in str(error.value)


def test_a_journal_that_is_a_folder_or_no_journal_is_refused(tmp_path):
    with pytest.raises(StorageError, match="is a folder"):
        open_storage(f"journal:///{tmp_path}")
    text = tmp_path / "notes.log"
    text.write_text("not JSON\nat all\n")
    with pytest.raises(StorageError, match="is no journal of Optuna"):
        open_storage(str(text))


def test_a_proxy_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.setattr(without_sql, "GRPC_TIMEOUT_S", 0.2)
    with pytest.raises(StorageError, match=r"grpc://127\.0\.0\.1:9: nobody answers"):
        open_storage("grpc://127.0.0.1:9")


def test_grpc_that_is_not_installed_is_named(monkeypatch):
    def missing(**_: object) -> None:
        raise ImportError("No module named 'grpc'")

    monkeypatch.setattr(without_sql, "GrpcStorageProxy", missing)
    with pytest.raises(StorageError, match=r"pip install 'hq_optuna\[grpc\]'"):
        open_storage("grpc://localhost")
