"""One worker as a process of this host: its command, its events, its standard error."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

LAST_LINES = 12  # lines of standard error that are kept
READ_WITHIN_S = 10.0  # how long the rest of an ended worker's output is waited for
ENDS_WITH_STDIN = "HQ_OPTUNA_ENDS_WITH_STDIN"
"""Environment variable that tells a worker to end when its standard input does."""

SERVES = "HQ_OPTUNA_SERVES"
"""Environment variable that tells a worker to take its work from its standard input."""

Listener = Callable[["WorkerProcess", dict[str, Any] | None], None]
"""Called with each event of a worker, from a thread of its own; ``None``, perhaps twice, when it
says no more."""


@dataclass(frozen=True)
class WorkerCommand:
    """How a worker is started, here or on another host."""

    study: str  # path of the study file
    name: str  # of the study
    folder: str  # of the run
    storage: str = field(repr=False)  # in the environment: everybody can read command lines
    options: Sequence[str] = ()  # as typed

    def arguments(self, threads: int) -> list[str]:
        """Return the command line."""
        return [
            *(sys.executable, "-P", "-m", "hq_optuna", "worker", self.study),
            *("--name", self.name, "--folder", self.folder),
            *("--threads", str(threads), "--json", *self.options),
        ]

    def environment(self, threads: int, device: str | None) -> dict[str, str]:
        """Return the environment: the storage, a share of the cores, perhaps one GPU."""
        return {
            **os.environ,
            "HQ_OPTUNA_STORAGE": self.storage,
            ENDS_WITH_STDIN: "1",
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
            **({} if device is None else {"CUDA_VISIBLE_DEVICES": device}),
        }

    def start(
        self, threads: int, device: str | None = None, listener: Listener | None = None
    ) -> WorkerProcess:
        """Start the worker on this host; with a listener it scores what it is told to."""
        serves = {} if listener is None else {SERVES: "1"}
        environment = self.environment(threads, device) | serves
        return WorkerProcess(self.arguments(threads), environment, listener)


def thread_share(n_cores: int, n_workers: int) -> int:
    """Return the threads of each worker, at least one.

    Example:
        >>> thread_share(16, 4), thread_share(2, 3)
        (4, 1)
    """
    return max(1, n_cores // n_workers)


def devices(environment: Mapping[str, str], n_found: int) -> list[str]:
    """Return the GPUs this process may use, of those CUDA finds, as ``CUDA_VISIBLE_DEVICES`` does.

    Example:
        >>> devices({}, 2), devices({"CUDA_VISIBLE_DEVICES": "3,5"}, 2), devices({}, 0)
        (['0', '1'], ['3', '5'], [])
    """
    named = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    named = [name for name in named if name]
    return named[:n_found] if named else [str(index) for index in range(n_found)]


def take_all(queue: SimpleQueue[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what one thread may take out of a queue now, in order."""
    return [queue.get() for _ in range(queue.qsize())]


class WorkerProcess:
    """A worker that runs in a process group of its own, so that Ctrl-C reaches its launcher alone.

    Its standard input is a pipe: when the launcher is gone, however it went, the pipe ends, and the
    worker gives its candidate back and ends too.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        listener: Listener | None = None,
    ) -> None:
        self._listener = listener
        self._writing = threading.Lock()
        self._process = subprocess.Popen(
            arguments,
            env=dict(environment),
            cwd=Path.cwd(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._gone_since: float | None = None
        self._events: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._readers = [
            threading.Thread(target=self._read_events, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_lines, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return how it ended, as ``subprocess`` says it, or ``None`` while it runs.

        It has not ended before all it said is read, so that nothing is missed; but what it started
        may keep its pipes open for ever, and is waited for `READ_WITHIN_S`.
        """
        code = self._process.poll()
        if code is None:
            return None
        if self._gone_since is None:
            self._gone_since = time.monotonic()
        for reader in self._readers:
            reader.join(timeout=0.1)
        unheard = any(reader.is_alive() for reader in self._readers)
        return None if unheard and time.monotonic() - self._gone_since < READ_WITHIN_S else code

    def events(self) -> list[dict[str, Any]]:
        """Return what it told since the last call."""
        return take_all(self._events)

    def last_lines(self) -> list[str]:
        """Return the last lines of its standard error."""
        return list(self._lines)

    def terminate(self) -> None:
        """Ask it to give its candidate back and end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """Let go of an ended process."""
        self._process.wait()
        # What it started may live on and hold the other two open; their readers close them.
        if self._listener is not None and self._readers[0].is_alive():
            self._listener(self, None)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # what could not be sent to it any more
                self._process.stdin.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it JSON data, see `hq_optuna.workers.serving`; `OSError` where it is gone."""
        stream = self._process.stdin
        assert stream is not None
        try:
            with self._writing:
                stream.write(json.dumps(message) + "\n")
                stream.flush()
        except ValueError as error:  # closed
            raise BrokenPipeError(str(error)) from None

    def _read_events(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                try:
                    event = json.loads(line)
                except json.JSONDecodeError:  # what a study file prints
                    continue
                if isinstance(event, dict):
                    self._events.put(event)
                    if self._listener is not None:
                        self._listener(self, event)
        if self._listener is not None:
            self._listener(self, None)

    def _read_lines(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                if line.strip():
                    self._lines.append(line.rstrip())
