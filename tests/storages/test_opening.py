"""Opening a storage: fit for several processes; reading one; what is shown of its URL."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage

from hq_optuna.errors import StorageError
from hq_optuna.storages import (
    load_study,
    open_storage,
    opening,
    redact_url,
    sqlite_url,
    study_exists,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)
SECRET = "hunter2hunter2"


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
    assert process.communicate(timeout=120)[1].count("Error") == 0
    assert process.returncode == 0
    assert [s.study_name for s in storage.get_all_studies()] == ["late"]


def test_a_file_that_another_program_fills_before_it_is_in_wal_mode_is_waited_for(path):
    """SQLite does not wait for a writer when it changes the journal: "locked", and at once."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE theirs (x)")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        sqlite3.connect(path, timeout=60).execute("PRAGMA journal_mode=WAL")
    released = threading.Event()

    def release() -> None:
        released.set()
        other.execute("ROLLBACK")

    threading.Timer(0.3, release).start()
    assert pragma(open_storage(sqlite_url(path)), "journal_mode") == "wal"
    assert released.is_set()


@pytest.mark.parametrize("use", [open_storage, study_exists, load_study])
def test_every_connection_to_a_file_waits_for_a_writer(filled, use):
    waits = []

    def connected(connection, _record):
        waits.append(connection.execute("PRAGMA busy_timeout").fetchone()[0])

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", connected)
    try:
        use(sqlite_url(filled), *([] if use is open_storage else ["a"]))
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", connected)
    assert set(waits) == {60_000}  # ms


def test_a_file_that_stays_locked_ends_in_a_sentence(path, monkeypatch):
    monkeypatch.setattr(opening, "SQLITE_BUSY_TIMEOUT_S", 0.3)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TABLE theirs (x)")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="Another program holds the database; try again"):
        open_storage(sqlite_url(path))
    other.execute("ROLLBACK")
    open_storage(sqlite_url(path))


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
    words = "no longer compatible with the table schema"
    with pytest.raises(StorageError, match=words) as error:
        open_storage(sqlite_url(filled))
    assert str(error.value).endswith("`$ pip install -U optuna`.")  # the URL is right


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
