"""Storages that are no database: Optuna's journal file, and its gRPC proxy before a database.

URLs follow SQLite's: ``journal:///search.log`` is beside you, ``journal:////data/search.log`` is
not. A path that ends in ``.log`` or ``.journal`` is a journal file too. ``grpc://host:port`` is a
proxy that somebody runs, port 13000 where none is said.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from urllib.parse import unquote, urlsplit

import optuna
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage
from optuna.storages.journal import JournalFileBackend

from hq_optuna.errors import StorageError

JOURNAL_SUFFIXES = (".log", ".journal")

GRPC_PORT = 13000
"""Where Optuna's proxy listens unless told otherwise."""

GRPC_TIMEOUT_S = 10.0


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


def is_grpc(storage: str) -> bool:
    """Return whether a URL names a gRPC proxy."""
    return storage.startswith("grpc://")


def open_journal(path: Path) -> BaseStorage:
    """Open a journal file, made if need be.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"Cannot create the folder {path.parent}: {error.strerror}.") from None
    if path.is_dir():
        raise StorageError(f"{path} is a folder. Give the path of a file.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise StorageError(f"{path} cannot be written. Give another --storage.")
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise StorageError(
            f"{path} is no journal of Optuna, or one of a later version ({type(error).__name__}: "
            f"{str(error).rstrip('.')}). Give the path of another file, or update Optuna."
        ) from None


def open_grpc(storage: str) -> BaseStorage:
    """Connect to a gRPC proxy.

    Raises:
        StorageError: The URL is broken, gRPC is not installed, or nobody answers.
    """
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
