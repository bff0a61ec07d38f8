"""Workers on a `dask.distributed` cluster.

Each Dask task starts one worker as a process of its own on the host it runs on, so that a worker
can be ended, has a main thread for its signals, and dies alone. What the worker tells travels back
as Dask events. A task that is not wanted any more (cancelled, or its client is gone) ends its
worker.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hq_optuna.errors import HqOptunaError, StudyFileError, WorkerError
from hq_optuna.workers.process import WorkerCommand, take_all, thread_share

LOOK_EVERY_S = 0.2
GRACE_S = 20.0
CONNECT_FOR_S = 30.0


class Cluster:
    """Starts workers on the Dask cluster whose scheduler has an address, ``"tcp://host:8786"``.

    The study file is read by its path on each host. Each worker has ``threads`` threads, or its
    share of the Dask worker's. Raises `WorkerError` where there is no such scheduler, or
    `distributed` is not installed.
    """

    def __init__(self, address: str, command: WorkerCommand, *, threads: int | None = None) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise WorkerError(
                "A Dask cluster needs the package distributed: pip install 'hq_optuna[dask]'."
            ) from None
        try:
            connect: Any = Client  # is not typed
            self._client = connect(address, timeout=CONNECT_FOR_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise WorkerError(
                f"There is no Dask scheduler at {address}: {str(error).splitlines()[0]}. "
                "Start one with dask scheduler, and dask worker on each host."
            ) from None
        self._command = replace(command, folder=str(Path(command.folder).absolute()))
        self._threads = threads
        self._addresses = sorted(self._client.scheduler_info(n_workers=-1)["workers"])
        self.n_workers = max(1, len(self._addresses))  # Dask workers there are now

    def start(self, index: int) -> TaskHandle:
        """Submit one worker; spread over the cluster as it was when the client connected."""
        return TaskHandle(self._client, index, self._command, self._threads, self._addresses)

    def close(self) -> None:
        """Leave the cluster."""
        self._client.close()


class TaskHandle:
    """A worker that a Dask task runs somewhere."""

    def __init__(
        self, client: Any, index: int, command: WorkerCommand, threads: int | None, hosts: list[str]
    ) -> None:
        self._client = client
        self._topic = f"hq-optuna-{uuid.uuid4().hex}"
        self._events: SimpleQueue[dict[str, Any]] = SimpleQueue()  # filled by Dask's thread
        self._lines: tuple[str, ...] | None = None
        client.subscribe_topic(self._topic, self._receive)
        where = [hosts[index % len(hosts)]] if hosts else None
        self._future = client.submit(
            run_worker,
            *(command, threads, self._topic),
            key=f"hq-optuna-worker-{command.name}-{index + 1}-{self._topic[-8:]}",
            pure=False,
            retries=0,
            workers=where,
            allow_other_workers=True if where else None,
        )

    def _receive(self, event: tuple[float, dict[str, Any]]) -> None:
        self._events.put(event[1])

    def poll(self) -> int | None:
        """Return the worker's exit status, 1 where Dask lost the task, or ``None``."""
        if not self._future.done():
            return None
        first = self._lines is None
        if self._future.status == "finished":
            code, lines, errors = self._future.result()
            self._lines = tuple(lines)
            for event in errors if first else ():
                self._events.put(event)
            return int(code)
        if self._future.status == "error":
            error = self._future.exception()
            self._lines = (f"{type(error).__name__}: {error}",)
            if first and isinstance(error, HqOptunaError):
                self._events.put({"error": type(error).__name__, "message": str(error)})
            return 1
        self._lines = (f"Dask says the task is {self._future.status}.",)
        return 1

    def events(self) -> list[dict[str, Any]]:
        """Return what the worker told since the last call."""
        return take_all(self._events)

    def last_lines(self) -> tuple[str, ...]:
        """Return the last lines of its standard error."""
        return self._lines or ()

    def terminate(self) -> None:
        """Ask the task to end its worker."""
        self._client.log_event(self._topic, {"event": "ending"})
        self._future.cancel()

    def kill(self) -> None:
        """Do the same; the task insists by itself."""
        self._future.cancel(force=True)

    def close(self) -> None:
        """Let go of the task."""
        self._client.unsubscribe_topic(self._topic)
        self._future.release()


def run_worker(
    command: WorkerCommand, threads: int | None, topic: str
) -> tuple[int, tuple[str, ...], list[dict[str, Any]]]:
    """Run one worker within a Dask task until it ends, or until the task is not wanted any more.

    Returns its exit status, the last lines of its standard error, and the events in which it said
    what was wrong: as events they may come after the result.
    """
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    if not Path(command.study).is_file():
        raise StudyFileError(
            f"{socket.gethostname()} has no study file {command.study}. Put it there, or on a file "
            "system that all hosts share, under the same path."
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    process = command.start(threads or thread_share(cores or 1, worker.state.nthreads))
    errors = []

    def pass_on() -> None:
        for event in process.events():
            worker.log_event(topic, event)
            if "error" in event:
                errors.append(event)

    try:
        while process.poll() is None:
            pass_on()
            task = worker.state.tasks.get(key)
            if task is None or task.state != "executing":
                break
            time.sleep(LOOK_EVERY_S)
        else:
            pass_on()
            return process.poll() or 0, tuple(process.last_lines()), errors
        process.terminate()
        until = time.monotonic() + GRACE_S
        while process.poll() is None and time.monotonic() < until:
            time.sleep(LOOK_EVERY_S)
    finally:
        process.kill()
        process.close()
    return 1, (), errors
