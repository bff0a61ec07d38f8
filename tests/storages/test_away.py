"""A database server that goes away and comes back while a worker works: real server, real cuts."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from hq_optuna.errors import StorageError
from hq_optuna.storages import RetryingStorage, open_storage, redact_url
from hq_optuna.workers.loop import work
from tests.samplers.tables import (
    assigned,
    expected,
    history,
    new_study,
    ours,
    sampler,
    states,
    tickets,
)
from tests.servers import POSTGRESQL, PROXY, database, free_port, server


class Line:
    """A TCP connection between a worker and its server that can be cut."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._open = True
        self._ends: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Drop every connection, whatever is on its way, and take no new ones."""
        self._open = False
        for end in list(self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._open = True

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._open:
                near.close()
                continue
            far = socket.create_connection(self._to)
            self._ends |= {near, far}
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            self._ends.discard(end)
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def direct() -> Iterator[str]:
    """A database of the test's own, without a line between."""
    with database(server(POSTGRESQL)) as url:
        yield url


@pytest.fixture
def line(direct: str) -> Iterator[Line]:
    url = sqlalchemy.make_url(direct)
    made = Line(url.host or "127.0.0.1", url.port or 5432)
    yield made
    made.close()


def through(direct: str, line: Line) -> str:
    url = sqlalchemy.make_url(direct).set(host="127.0.0.1", port=line.port, password="hunter2")
    return url.render_as_string(hide_password=False)


def study_at(url: str, retry_for_s: float = 120) -> optuna.Study:
    kept = RetryingStorage(open_storage(url), redact_url(url), retry_for_s=retry_for_s)
    return new_study(sampler(6, encoding="compact"), kept)


def check(study: optuna.Study) -> None:
    """The history is the sequential one; nothing is lost, counted twice or left running."""
    assert history(study) == expected(study)
    found = Counter(
        (ticket.kind, ticket.step, ticket.slot)
        for trial, ticket in zip(study.get_trials(deepcopy=False), tickets(study), strict=True)
        if trial.state == TrialState.COMPLETE
    )
    assert set(found.values()) == {1}
    log = ours(study).log(study)
    assert len(found) == len(log.results) + len(log.closed)
    assert TrialState.RUNNING not in states(study)


def test_a_search_outlives_cuts_at_any_moment(direct, line):
    study = study_at(through(direct, line))
    rng, over, at_work = random.Random(0), threading.Event(), threading.Event()
    cuts = []

    def vandal() -> None:
        while at_work.wait() and not over.wait(rng.uniform(0, 0.1)):
            line.cut()
            cuts.append(1)
            time.sleep(rng.uniform(0, 0.2))
            at_work.clear()  # however slow all is, something is done between two cuts
            line.mend()

    def slow(trial: optuna.Trial) -> float:
        deadline = time.monotonic() + 120
        while True:
            at_work.set()
            time.sleep(0.02)
            if len(cuts) >= min(trial.number // 4, 3):  # the third comes before the end
                return assigned(trial)
            assert time.monotonic() < deadline

    thread = threading.Thread(target=vandal)
    thread.start()
    try:
        work(study, slow)
    finally:
        over.set()
        at_work.set()
        thread.join()
        line.mend()
    assert len(cuts) >= 3
    assert study._storage.n_retries >= 1
    check(study_at(direct))


def test_a_search_outlives_a_server_that_ends_its_connections(direct):
    study = study_at(direct)
    other = sqlalchemy.create_engine(direct, isolation_level="AUTOCOMMIT")
    ended = []

    def ends_connections(trial: optuna.Trial) -> float:
        if trial.number % 3 == 0:
            with other.connect() as connection:
                ended.extend(
                    connection.exec_driver_sql(
                        "select pg_terminate_backend(pid) from pg_stat_activity "
                        "where datname = current_database() and pid <> pg_backend_pid()"
                    ).all()
                )
        return assigned(trial)

    work(study, ends_connections)
    other.dispose()
    assert len(ended) >= 3
    check(study)


def test_a_server_that_stays_away_ends_the_worker_in_words_and_nothing_is_lost(direct, line):
    study = study_at(through(direct, line), retry_for_s=1)

    def cut(trial: optuna.Trial) -> float:
        if trial.number == 5:
            line.cut()
        return assigned(trial)

    with pytest.raises(StorageError) as raised:
        work(study, cut)
    text = str(raised.value)
    assert "hunter2" not in text
    assert "***" in text
    assert "--retry-for" in text
    line.mend()
    work(study_at(direct), assigned)
    check(study_at(direct))


def test_a_search_outlives_its_grpc_proxy(direct):
    pytest.importorskip("grpc", reason="needs gRPC: pip install 'hq_optuna[grpc]'")
    open_storage(direct)  # the tables
    port = free_port()

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROXY, direct, str(port)], cwd=Path(__file__).parents[2]
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return process
            time.sleep(0.05)
        raise AssertionError("the proxy does not start")

    proxies = [start()]
    restart = threading.Thread(target=lambda: proxies.append(start()))
    study = study_at(f"grpc://127.0.0.1:{port}")

    def killing(trial: optuna.Trial) -> float:
        if trial.number == 4:
            proxies[-1].kill()
            proxies[-1].wait()
            restart.start()
        return assigned(trial)

    try:
        work(study, killing)
        restart.join()
        assert len(proxies) == 2
        assert study._storage.n_retries >= 1
        check(study)
    finally:
        for process in proxies:
            process.kill()
            process.wait()
