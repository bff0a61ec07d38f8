"""`open_storage`: any storage URL to an Optuna storage, SQLite made fit for several processes.

URLs of what is no database follow SQLite's: ``journal:///search.log`` is beside you,
``journal:////data/search.log`` is not. A path that ends in ``.log`` or ``.journal`` is a journal
file too. ``grpc://host:port`` is a proxy that somebody runs before a database. Whoever only reads
needs no right to write: neither the file, nor its folder, nor ``sqlite:///file:…?mode=ro&uri=true``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study

from hq_optuna.errors import StorageError
from hq_optuna.optuna_internals import database_of
from hq_optuna.storages.database import Database

logger = logging.getLogger(__name__)

_Done = TypeVar("_Done")

SQLITE_BUSY_TIMEOUT_S = 60  # how long a connection waits for another writer
FIRST_USE_ATTEMPTS = 8  # how often tables that several processes create at once are looked for
LOCKED_PAUSE_S = 0.02  # mean pause before SQLite is asked again that says at once it is locked
_WAITS: dict[str, Any] = {"timeout": SQLITE_BUSY_TIMEOUT_S}
JOURNAL_SUFFIXES = (".log", ".journal")

GRPC_PORT = 13000  # where Optuna's proxy listens unless told otherwise
GRPC_TIMEOUT_S = 10.0

_SECRET = re.compile(r"(?i)([?&][^=&@]*(?:pass|pwd|secret|token)[^=&@]*=)[^&]*")


def redact_url(url: str) -> str:
    """Return the URL with its password replaced by ``***``.

    Example:
        >>> redact_url("postgresql+psycopg://me:secret@db/hq")
        'postgresql+psycopg://me:***@db/hq'
    """
    scheme, separator, rest = url.partition("://")
    if "@" in scheme:
        separator = ""
    if scheme == "sqlite" and rest.startswith("/"):
        return url  # a path, which may well hold an @
    # SQLAlchemy ends the password at the first @ and would show the rest of one that holds an @.
    user, at, tail = rest.rpartition("@") if separator else url.rpartition("@")
    if at and not separator:  # not a URL; still take no risk with what stands before an @
        url = f"***@{tail}"
    elif at and ":" in user:
        url = f"{scheme}://{user.partition(':')[0]}:***@{tail}"
    return _SECRET.sub(r"\1***", url)


def sqlite_url(path: Path) -> str:
    """Return the storage URL of a SQLite file.

    Raises:
        StorageError: No URL can name the path.
    """
    if "?" in str(path):
        raise StorageError(f"{path}: a database's URL ends at a '?'. Choose a path without it.")
    return f"sqlite:///{path.as_posix()}"


def url_of(storage: str | Path) -> str:
    """Return the URL of a storage; a path is a SQLite file, or a journal by its ending.

    Raises:
        StorageError: A path that was a URL.

    Example:
        >>> url_of(Path("runs") / "study.db")
        'sqlite:///runs/study.db'
    """
    text = str(storage)
    if isinstance(storage, str) or text.endswith(JOURNAL_SUFFIXES):
        return text
    if re.match(r"[a-z][a-z0-9+]+:/", text):  # a Path has one slash less than the URL it was
        raise StorageError(f"{redact_url(text)}: a URL is given as text, and not as a Path.")
    return sqlite_url(storage)


def open_storage(storage: str | Path | BaseStorage | None, *, reads: bool = False) -> BaseStorage:
    """Open a storage for a search.

    A SQLite file is put into WAL mode (readers never block writers, a commit costs a fraction) with
    a busy timeout; its folder is created. WAL does not work on network file systems: use a
    database server there.

    Args:
        storage: URL of a database, ``journal:///search.log``, ``grpc://host:port``, the path of a
            file, an open Optuna storage (returned as it is), or ``None`` for memory.
        reads: Whether a file that can only be read is opened as well.

    Raises:
        StorageError: The URL is broken, its driver is missing, or the database cannot be reached
            or written. The message never holds the password.
    """
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    storage = url_of(storage)
    if storage.startswith("grpc://"):
        return open_grpc(storage)
    if (path := journal_path(storage)) is not None:
        return open_journal(path, reads=reads)
    shown = redact_url(storage)
    url = _parse(storage)
    with explain_storage_errors(shown, url):
        if url.get_backend_name() == "sqlite":
            return _open_sqlite(storage, url, reads)
        return optuna.storages.get_storage(_create_tables(storage, {}))


def journal_path(storage: str) -> Path | None:
    """Return the file of a journal's URL, or ``None`` where it is no journal.

    Example:
        >>> journal_path("journal:///a/b.log").as_posix(), journal_path("b.log").as_posix()
        ('a/b.log', 'b.log')
        >>> journal_path("sqlite:///b.log")
    """
    if storage.startswith("journal://"):
        rest = storage.removeprefix("journal://")
        if not rest.startswith("/") or not rest.strip("/"):
            raise StorageError(
                f"{storage!r} is no journal URL. Expected 'journal:///search.log' for a file here, "
                "or 'journal:////data/search.log' for one at /data/search.log."
            )
        return Path(unquote(rest[1:]))
    if "://" not in storage and storage.endswith(JOURNAL_SUFFIXES):
        return Path(storage)
    return None


def _make_folder_of(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"Cannot create the folder {path.parent}: {error.strerror}.") from None


class _JournalFile(JournalFileBackend):
    """Optuna's journal file, which would begin anew where it is removed."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._check = _watched(path)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        self._check()
        return super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._check()
        super().append_logs(logs)


def _watched(path: Path) -> Callable[..., None]:
    """Return what raises `StorageError` once this file is emptied, removed or replaced."""
    opened = path.stat()
    filled = opened.st_size > 0

    def check(*_: Any) -> None:
        nonlocal filled
        with contextlib.suppress(OSError):
            found = path.stat()
            if os.path.samestat(found, opened) and (found.st_size or not filled):
                filled |= found.st_size > 0
                return
        raise StorageError(
            f"{path} was emptied, removed or replaced while it was in use. Put it back and start "
            "the same command again to go on, or start it without the file to begin anew."
        )

    return check


def open_journal(path: Path, *, reads: bool = False) -> BaseStorage:
    """Open a journal file, made if need be; `StorageError` where it cannot be written, or read."""
    _make_folder_of(path)
    if path.is_dir():
        raise StorageError(f"{path} is a folder. Give the path of a file.")
    if not reads:
        refuse_read_only(str(path))
    try:
        return JournalStorage(_JournalFile(path))
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise StorageError(
            f"{path} is no journal of Optuna, or one of a later version ({type(error).__name__}: "
            f"{str(error).rstrip('.')}). Give the path of another file, or update Optuna."
        ) from None


def refuse_read_only(storage: str | Path) -> None:
    """Refuse a file that a search cannot write, where that can be told without opening it.

    Raises:
        StorageError: The file or its folder can only be read, or the URL says so.
    """
    storage = url_of(storage)
    path = journal_path(storage)
    if path is None:
        url = _parse(storage) if not storage.startswith("grpc://") else None
        path = None if url is None else _sqlite_file(url)
        why = "" if url is None or path is None else _why_read_only(url, path)
    else:
        able = os.access(path if path.exists() else path.parent, os.W_OK)
        why = "" if able else f"{path} cannot be written. Give another --storage."
    if why and path is not None and path.parent.exists():  # else it will be made
        raise StorageError(why)


def open_grpc(storage: str) -> BaseStorage:
    """Connect to a gRPC proxy, or raise `StorageError` with a next step."""
    try:
        parts = urlsplit(storage)
        host, port = parts.hostname, GRPC_PORT if parts.port is None else parts.port
    except ValueError:
        host, port = None, GRPC_PORT
    if not host or parts.path not in ("", "/") or "@" in parts.netloc:
        raise StorageError(
            "A gRPC proxy is written 'grpc://host:port', for example 'grpc://db.example:13000'; "
            "it knows no users and no passwords."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            proxy = GrpcStorageProxy(host=host, port=port)
        proxy.wait_server_ready(timeout=GRPC_TIMEOUT_S)
    except ImportError:
        raise StorageError(
            f"Storage {storage} needs gRPC. Install it: pip install 'hq_optuna[grpc]'."
        ) from None
    except ConnectionError:
        raise StorageError(
            f"Storage {storage}: nobody answers within {GRPC_TIMEOUT_S:g} s. Check host and port, "
            "and that optuna.storages.run_grpc_proxy_server runs there."
        ) from None
    return proxy


def _parse(storage: str) -> sqlalchemy.URL:
    try:
        url = sqlalchemy.engine.make_url(storage)
        # A password that holds an @ would go on as the host, and into the driver's messages.
        if url.get_backend_name() != "sqlite" and "@" in f"{url.host}{url.database}":
            raise ValueError
        return url
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        raise StorageError(
            f"{redact_url(storage)!r} is no storage URL. Expected for example "
            "'sqlite:///search.db', 'postgresql+psycopg://user:password@host/database', "
            "'journal:///search.log' or 'grpc://host:13000'. "
            "Write @, : and / in a password as %40, %3A and %2F."
        ) from None


def _create_tables(storage: str, engine_kwargs: dict[str, Any]) -> Database:
    """Open a database and create its tables, while other processes may be doing the same.

    Optuna looks for tables and creates them in two steps; of processes that open an empty database
    at the same time about half fail on a table that exists by then. Looking again is enough.
    """
    template = storage.replace("{", "{{").replace("}", "}}")  # Optuna formats the URL
    attempt = 0
    while True:
        attempt += 1
        try:
            return Database(template, engine_kwargs=engine_kwargs)
        except (sqlalchemy.exc.DatabaseError, StorageInternalError) as error:
            text = str(_innermost(error)).lower()
            there = any(word in text for word in ("already exists", "unique", "duplicate"))
            if not there or attempt == FIRST_USE_ATTEMPTS:
                raise
            logger.debug("Another process creates the tables now: %s", text)
            time.sleep(random.uniform(0.01, 0.025) * 2**attempt)


def _open_sqlite(storage: str, url: sqlalchemy.URL, reads: bool) -> BaseStorage:
    path = _sqlite_file(url)
    if path is not None:
        if reads and _why_read_only(url, path):
            return optuna.storages.get_storage(_create_tables(storage, _reader(url, path)))
        _make_folder_of(path)
        refuse_read_only(storage)
        # WAL is a property of the file; set it before Optuna's first connection.
        engine = sqlalchemy.create_engine(url, connect_args=_WAITS)
        _while_locked(lambda: _set_wal(engine))
        engine.dispose()
    opened = _while_locked(lambda: _create_tables(storage, {"connect_args": _WAITS}))
    if path is not None:  # a database in memory lives in the connection it has now
        sqlalchemy.event.listen(opened.engine, "connect", _tune_connection)
        opened.engine.dispose()  # the connections made so far do not have the setting
        check = _watched(path)  # a connection goes on in a file that is no more, or makes a new one
        for moment in ("do_connect", "checkout"):
            sqlalchemy.event.listen(opened.engine, moment, check)
    return optuna.storages.get_storage(opened)


def _sqlite_file(url: sqlalchemy.URL) -> Path | None:
    """Return the file of a database, ``None`` for one in memory or another kind of database."""
    if url.get_backend_name() != "sqlite":
        return None
    path = url.database or ""
    if path.startswith("file:") and "uri" in url.query:  # SQLite's own form
        path = "" if url.query.get("mode") == "memory" else unquote(urlsplit(path).path)
    return None if path in ("", ":memory:") else Path(path)


def sqlite_path(storage: str) -> Path | None:
    """Return the file of a SQLite database's URL, ``None`` for other URLs."""
    return _sqlite_file(_parse(storage)) if storage.startswith("sqlite") else None


def _why_read_only(url: sqlalchemy.URL, path: Path) -> str:
    """Return why a SQLite file can only be read, empty where it can be written."""
    if url.query.get("mode") == "ro" or "immutable" in url.query:
        return f"{path} is opened for reading only. A search writes: give {sqlite_url(path)}."
    if path.exists() and not os.access(path, os.W_OK):
        return f"{path} is read-only. Give a file that can be written."
    if not os.access(path.parent, os.W_OK):  # SQLite keeps files beside its own
        return f"The folder {path.parent} is read-only. Give another --storage."
    return ""


def _reader(url: sqlalchemy.URL, path: Path) -> dict[str, Any]:
    """Return the engine options that open a SQLite file for reading alone, wherever it lies.

    A file in WAL mode needs another beside it even to be read, unless it is said never to change.
    While nobody writes, and its log is empty, it does not; each connection looks anew.
    """

    def connect() -> sqlite3.Connection:
        try:
            with path.open("rb") as file:
                in_wal_mode = file.read(20)[18:] == b"\2\2"
            log = path.with_name(f"{path.name}-wal")
            rests = in_wal_mode or "immutable" in url.query
            rests = rests and not (log.exists() and log.stat().st_size)
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}.") from None
        name = f"file:{quote(path.absolute().as_posix())}?"
        name += "immutable=1" if rests else "mode=ro"
        opened: sqlite3.Connection = sqlite3.connect(
            name, uri=True, check_same_thread=False, **_WAITS
        )
        return opened

    return {"creator": connect, "poolclass": sqlalchemy.pool.NullPool}


def _set_wal(engine: sqlalchemy.Engine) -> None:
    with engine.connect() as connection:
        if connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")


def _while_locked(act: Callable[[], _Done], sqlite: bool = True) -> _Done:
    """Do something with a SQLite file again as long as it is locked, up to the busy timeout.

    Where two connections would wait for each other, as when several processes put a new file into
    WAL mode, SQLite does not wait but says at once that the file is locked.
    """
    until = time.monotonic() + SQLITE_BUSY_TIMEOUT_S
    while True:
        try:
            return act()
        except (sqlalchemy.exc.DatabaseError, StorageInternalError) as error:
            locked = sqlite and "locked" in str(_innermost(error)).lower()
            if not locked or time.monotonic() >= until:
                raise
        time.sleep(random.uniform(0, 2 * LOCKED_PAUSE_S))


def _tune_connection(connection: sqlite3.Connection, _record: Any) -> None:
    # With WAL, NORMAL survives a killed process; only a power cut may lose the last commits.
    connection.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def explain_storage_errors(shown: str, opening: sqlalchemy.URL | None = None) -> Iterator[None]:
    """Turn database errors into `StorageError` with a next step, and without passwords.

    While a storage is opened every error is about it: drivers refuse what they do not know with a
    TypeError, ValueError or RuntimeError of their own.
    """
    ours = sqlalchemy.exc.SQLAlchemyError, StorageInternalError
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError) or (opening is None and not isinstance(error, ours)):
            raise
        secret = None if opening is None else opening.password
        raise _explained(shown, error, secret) from None


def _innermost(error: BaseException) -> BaseException:
    # Optuna wraps the driver's error; the innermost one says what happened.
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _explained(shown: str, error: Exception, secret: str | None = None) -> StorageError:
    # The chain's text may hold the URL, so only the driver's own words are kept of it.
    cause = _innermost(error)
    text = str(getattr(cause, "orig", None) or cause).strip().splitlines()
    reason = text[0].rstrip(".") if text else type(cause).__name__
    reason = reason.replace(secret, "***") if secret else reason
    return StorageError(f"Storage {shown}: {reason}. {_advice(reason, error)}".rstrip())


def _advice(reason: str, error: BaseException) -> str:
    lower = "no module named" if isinstance(error, ImportError) else reason.lower()
    found = (advice for words, advice in _ADVICE.items() if re.search(words, lower))
    return next(found, "Check the URL, and that the database runs and can be reached.")


def refuses_writing(error: BaseException) -> bool:
    """Return whether a storage said that it can only be read."""
    text = str(_innermost(error)).lower()
    words = ("readonly", "read-only", "permission denied", "command denied")
    return isinstance(error, PermissionError) or any(said in text for said in words)


_ADVICE = {
    "no module named": "Install the driver, for example pip install 'hq_optuna[postgresql]' for "
    "postgresql+psycopg://, or 'hq_optuna[mysql]' for mysql+pymysql://.",
    "disk is full|no space left|disk i/o": "Free some space and start the same command again: what "
    "was recorded stays.",
    "readonly|read-only|unable to open": "Check that the file and its folder exist and can be "
    "written.",
    "permission denied|command denied": "A search writes: give a user of the database that may.",
    "no such table|does not exist|doesn't exist|unknown database": "Somebody removed it: restore a "
    "copy, or begin anew in another database.",
    "malformed": "The file is damaged: restore a copy, or save what is left with sqlite3's "
    ".recover.",
    "not a database": "The file is not a SQLite database; give the path of another file.",
    "table schema": "",  # Optuna says what to do itself
    "locked": "Another program holds the database; try again.",
}
"""What a driver says, as a pattern → what to do."""


def study_exists(storage: str | Path, name: str) -> bool:
    """Return whether the storage holds a study of that name; creates nothing.

    Raises:
        StorageError: The storage cannot be opened.
    """
    if not storage_exists(storage):
        return False
    opened = open_storage(storage, reads=True)
    with explain_storage_errors(redact_url(url_of(storage))):
        try:
            opened.get_study_id_from_name(name)
        except KeyError:
            return False
        finally:  # gives connections back at once, not with Python's garbage: servers have few
            opened.remove_session()
            if (database := database_of(opened)) is not None:
                database.engine.dispose()
    return True


def load_study(storage: str | Path, name: str) -> Study:
    """Open an existing study for reading; creates nothing, and needs no right to write.

    Raises:
        StorageError: The storage cannot be opened, or holds no such study.
    """
    storage = url_of(storage)
    shown = redact_url(storage)
    if not _may_exist(storage):
        raise StorageError(f"There is no database at {shown}. Was a search started?")
    if not storage_exists(storage):
        raise StorageError(f"{shown} holds no study {name!r}. It holds: none.")
    opened = open_storage(storage, reads=True)
    with explain_storage_errors(shown):
        try:
            return optuna.load_study(study_name=name, storage=opened)
        except KeyError:
            names = ", ".join(sorted(s.study_name for s in opened.get_all_studies())) or "none"
            raise StorageError(f"{shown} holds no study {name!r}. It holds: {names}.") from None


def _may_exist(storage: str) -> bool:
    if storage.startswith("grpc://"):
        return True
    if (path := journal_path(storage)) is not None:
        return path.exists()
    path = _sqlite_file(_parse(storage))
    return path is None or path.exists()


def storage_exists(storage: str | Path) -> bool:
    """Return whether there is a storage that Optuna has used; creates nothing.

    Raises:
        StorageError: The storage cannot be opened.
    """
    storage = url_of(storage)
    if not _may_exist(storage):
        return False
    if storage.startswith("grpc://") or journal_path(storage) is not None:
        return True
    url = _parse(storage)
    path, sqlite = _sqlite_file(url), url.get_backend_name() == "sqlite"
    options: dict[str, Any] = {"connect_args": _WAITS} if sqlite else {}
    if path is not None and _why_read_only(url, path):
        options = _reader(url, path)
    with explain_storage_errors(redact_url(storage), url):
        engine = sqlalchemy.create_engine(url, **options)
        try:
            return _while_locked(lambda: sqlalchemy.inspect(engine).has_table("studies"), sqlite)
        finally:
            engine.dispose()
