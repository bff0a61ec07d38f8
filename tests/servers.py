"""Storages of every kind for tests: real servers, where there are any, and a place of one's own.

A PostgreSQL or MariaDB server is used where its variable names one; its user must be allowed to
create databases. ``.ci/run`` starts both and sets the variables.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from hq_optuna.storages import sqlite_url

POSTGRESQL, MYSQL = "HQ_OPTUNA_POSTGRESQL", "HQ_OPTUNA_MYSQL"

EXAMPLES = {
    POSTGRESQL: "postgresql+psycopg://postgres@127.0.0.1/postgres",
    MYSQL: "mysql+pymysql://root@127.0.0.1/test",
}

KINDS = ("sqlite", "postgresql", "mysql", "journal", "grpc")

PROXY = """
import sys
import optuna
from hq_optuna.storages import open_storage
storage, port = open_storage(sys.argv[1]), int(sys.argv[2])
optuna.storages.run_grpc_proxy_server(storage, host="127.0.0.1", port=port)
"""


def server(variable: str) -> str:
    """Return the URL of a server, or skip the test."""
    url = os.environ.get(variable)
    if not url:
        pytest.skip(f"needs a server: set {variable}, for example to {EXAMPLES[variable]}")
    return url


@contextlib.contextmanager
def database(url: str) -> Iterator[str]:
    """Make a database on a server, and drop it afterwards."""
    name = f"hq_test_{uuid.uuid4().hex[:12]}"
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        made = engine.url.set(database=name)
        yield made.render_as_string(hide_password=False)
    finally:
        force = " WITH (FORCE)" if engine.name == "postgresql" else ""
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}{force}")
        engine.dispose()


def free_port() -> int:
    """Return a port on which nobody listens, from below those that connections get as their own."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def proxy(url: str) -> Iterator[str]:
    """Run Optuna's gRPC proxy before a database."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", PROXY, url, str(port)], cwd=Path(__file__).parents[1]
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def place(kind: str, folder: Path) -> Iterator[str]:
    """Make an empty storage of a kind and give its URL."""
    if kind == "sqlite":
        yield sqlite_url(folder / "study.db")
    elif kind == "journal":
        yield f"journal:///{(folder / 'study.log').as_posix()}"
    elif kind == "postgresql":
        with database(server(POSTGRESQL)) as url:
            yield url
    elif kind == "mysql":
        with database(server(MYSQL)) as url:
            yield url
    else:
        pytest.importorskip("grpc", reason="needs gRPC: pip install 'hq_optuna[grpc]'")
        with database(server(POSTGRESQL)) as behind, proxy(behind) as url:
            yield url
