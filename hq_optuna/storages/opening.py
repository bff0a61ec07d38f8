"""`open_storage`: any storage URL to an Optuna storage, SQLite made fit for several processes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study

from hq_optuna.errors import StorageError

SQLITE_BUSY_TIMEOUT_S = 60
"""How long a SQLite connection waits for another writer before it gives up."""


def redact_url(url: str) -> str:
    """Return the URL with its password replaced by ``***``.

    Example:
        >>> redact_url("postgresql+psycopg://me:secret@db/hq")
        'postgresql+psycopg://me:***@db/hq'
    """
    try:
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        # Not a URL; still take no risk with what stands before an @.
        head, at, tail = url.rpartition("@")
        return f"***@{tail}" if at else head or tail


def sqlite_url(path: Path) -> str:
    """Return the storage URL of a SQLite file."""
    return f"sqlite:///{path.as_posix()}"


def open_storage(storage: str | BaseStorage | None) -> BaseStorage:
    """Open a storage for a search.

    A SQLite file is put into WAL mode (readers never block writers, a commit costs a fraction) with
    a busy timeout; its folder is created. WAL does not work on network file systems: use a
    database server there.

    Args:
        storage: URL, an open Optuna storage (returned as it is), or ``None`` for memory.

    Raises:
        StorageError: The URL is broken, its driver is missing, or the database cannot be reached
            or written. The message never holds the password.
    """
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    shown = redact_url(storage)
    try:
        url = sqlalchemy.engine.make_url(storage)
    except sqlalchemy.exc.ArgumentError:
        raise StorageError(
            f"{shown!r} is no storage URL. Expected for example 'sqlite:///search.db' or "
            "'postgresql+psycopg://user:password@host/database'."
        ) from None
    with explain_storage_errors(shown):
        if url.get_backend_name() == "sqlite":
            return _open_sqlite(storage, url)
        return optuna.storages.get_storage(RDBStorage(storage))


def _open_sqlite(storage: str, url: sqlalchemy.URL) -> BaseStorage:
    if url.database and url.database != ":memory:":
        path = Path(url.database)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"Cannot create the folder {path.parent}: {error.strerror}."
            ) from None
        if path.exists() and not os.access(path, os.W_OK):
            raise StorageError(f"{path} is read-only. Give a file that can be written.")
        if not path.exists() and not os.access(path.parent, os.W_OK):
            raise StorageError(f"The folder {path.parent} is read-only. Give another --storage.")
        # WAL is a property of the file; set it before Optuna's first connection.
        engine = sqlalchemy.create_engine(url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_S})
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        engine.dispose()
    opened = RDBStorage(storage, engine_kwargs={"connect_args": {"timeout": SQLITE_BUSY_TIMEOUT_S}})
    sqlalchemy.event.listen(opened.engine, "connect", _tune_connection)
    opened.engine.dispose()  # the connections made so far do not have the setting
    return optuna.storages.get_storage(opened)


def _tune_connection(connection: sqlite3.Connection, _record: Any) -> None:
    # With WAL, NORMAL survives a killed process; only a power cut may lose the last commits.
    connection.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def explain_storage_errors(shown: str) -> Iterator[None]:
    """Turn database errors into `StorageError` with a next step, and without passwords."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError) as error:
        # Optuna wraps the driver's error; the innermost one says what happened. Its text may hold
        # the URL, so the chain is cut (`from None`) and only the driver's own words are kept.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = str(getattr(cause, "orig", None) or cause).strip().splitlines()
        reason = text[0] if text else type(cause).__name__
        raise StorageError(f"Storage {shown}: {reason}. {_advice(reason, error)}") from None


def _advice(reason: str, error: BaseException) -> str:
    lower = reason.lower()
    if isinstance(error, ImportError) or "no module named" in lower:
        return "Install the driver, for example pip install 'hq_optuna[postgresql]'."
    if "disk is full" in lower or "no space left" in lower or "disk i/o" in lower:
        return "Free some space and start the same command again: what was recorded stays."
    if "readonly" in lower or "read-only" in lower or "unable to open" in lower:
        return "Check that the file and its folder exist and can be written."
    if "locked" in lower:
        return "Another program holds the database; try again."
    return "Check the URL, and that the database runs and can be reached."


def study_exists(storage: str, name: str) -> bool:
    """Return whether the storage holds a study of that name; creates nothing."""
    if not _may_exist(storage):
        return False
    opened = open_storage(storage)
    with explain_storage_errors(redact_url(storage)):
        try:
            opened.get_study_id_from_name(name)
        except KeyError:
            return False
    return True


def load_study(storage: str, name: str) -> Study:
    """Open an existing study for reading; creates nothing.

    Raises:
        StorageError: The storage cannot be opened, or holds no such study.
    """
    if not _may_exist(storage):
        raise StorageError(f"There is no database at {redact_url(storage)}. Was a search started?")
    opened = open_storage(storage)
    with explain_storage_errors(redact_url(storage)):
        try:
            return optuna.load_study(study_name=name, storage=opened)
        except KeyError:
            names = ", ".join(sorted(s.study_name for s in opened.get_all_studies())) or "none"
            raise StorageError(
                f"{redact_url(storage)} holds no study {name!r}. It holds: {names}."
            ) from None


def _may_exist(storage: str) -> bool:
    try:
        url = sqlalchemy.engine.make_url(storage)
    except sqlalchemy.exc.ArgumentError:
        return True  # open_storage explains
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return True
    return Path(url.database).exists()
