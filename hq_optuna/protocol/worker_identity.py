"""Who runs a trial, and whether it still lives.

A worker's name says where it runs, so that a worker on the same host can tell a dead owner from a
slow one at once. Of owners on other hosts nothing is known here: both `is_dead` and `is_alive` say
no.
"""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path


@functools.cache
def _pid_namespace() -> str:
    """Return what tells the processes that this one can see from those of others.

    Two machines may share a host name, and two containers as well; neither sees the other's
    processes.
    """
    try:
        machine = Path("/etc/machine-id").read_text().strip()[:8]
    except OSError:
        machine = ""
    try:
        return f"{machine}{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{machine}0"


@functools.cache
def _boot() -> str:
    """Return what tells this boot of the host from all others; empty where unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:12]
    except OSError:
        return ""


def _status(pid: int) -> tuple[str, str]:
    """Return a process's state and its start in clock ticks after boot; empty where unknown."""
    try:
        # The command name in field 2 may hold spaces and parentheses; field 22 is the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


@functools.cache
def _identity(pid: int) -> str:
    # A pid is used again, and so is a pair of pid and start after a reboot.
    start = f"{_boot()}-{_status(pid)[1]}"
    return f"{socket.gethostname()}/{_pid_namespace()}/{pid}/{start}"


def worker_id() -> str:
    """Return the name of this process: ``host/pid namespace/pid/boot-start``."""
    return _identity(os.getpid())


def my_short_name() -> str:
    """Return the name of this process for people: ``host:pid``."""
    return short_name(worker_id())


def short_name(worker: str) -> str:
    """Return ``host:pid`` for people.

    Example:
        >>> short_name("box/4026531836/1234/1f0c33aa90d2-5678")
        'box:1234'
    """
    parts = worker.split("/")
    return f"{parts[0]}:{parts[2]}" if len(parts) == 4 else worker


def is_dead(worker: str) -> bool:
    """Return whether the worker has certainly ended: a process of this host that is gone."""
    return _lives(worker) is False


def is_alive(worker: str) -> bool:
    """Return whether the worker certainly runs: a process of this host that is there."""
    return _lives(worker) is True


def _lives(worker: str) -> bool | None:
    """Return whether the worker lives, or ``None`` where this host cannot know."""
    parts = worker.split("/")
    if len(parts) != 4 or not parts[2].isdigit():
        return None
    host, namespace, pid, started = parts
    if (host, namespace) != (socket.gethostname(), _pid_namespace()):
        return None
    boot, _, start = started.partition("-")
    if boot and _boot() and boot != _boot():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # alive, but somebody else's
    state, found = _status(int(pid))
    # A process that was killed but not yet reaped by its parent is as good as gone.
    return not (state == "Z" or (start and found and found != start))
