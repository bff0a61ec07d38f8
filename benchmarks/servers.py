"""A PostgreSQL server of one's own, which a benchmark may restart without disturbing anybody."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


class OwnPostgreSQL:
    """A running server in a folder of its own.

    Attributes:
        url: Of its database ``postgres``.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._programs, self._data, self._log = programs, folder / "data", folder / "log"
        self._options = f"-p {port} -h 127.0.0.1 -k {folder} -c max_connections=200"
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        self._run("initdb", "-D", str(self._data), "-U", "postgres", "-A", "trust")
        self._control("start")

    def _run(self, program: str, *arguments: str) -> None:
        # PostgreSQL refuses to run as root.
        user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        command = [str(self._programs / program), *arguments]
        with (self._log.parent / "out").open("ab") as out:
            subprocess.run(command, check=True, stdout=out, stderr=out, cwd="/", **user)

    def _control(self, verb: str, *more: str) -> None:
        arguments = ["-w", "-D", str(self._data), "-l", str(self._log), *more]
        self._run("pg_ctl", verb, *arguments, *(["-o", self._options] if verb != "stop" else []))

    def restart(self) -> None:
        """Stop it at once, as a crash would close every connection, and start it again."""
        self._control("restart", "-m", "immediate")

    def stop(self) -> None:
        """Stop it."""
        self._control("stop", "-m", "immediate")


def postgresql_programs() -> Path | None:
    """Return the folder with PostgreSQL's server programs, or ``None``."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    where = shutil.which("initdb") or (str(found[-1]) if found else None)
    return None if where is None else Path(where).parent


@contextlib.contextmanager
def own_postgresql() -> Iterator[OwnPostgreSQL]:
    """Run a server while the body does.

    Raises:
        FileNotFoundError: PostgreSQL is not installed.
    """
    programs = postgresql_programs()
    if programs is None:
        raise FileNotFoundError("PostgreSQL's initdb is not here. Install PostgreSQL.")
    folder = Path(tempfile.mkdtemp(prefix="hq-postgresql-"))
    try:
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        server = OwnPostgreSQL(programs, folder)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
