"""Who is dead: only a process of this host that is certainly gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.worker_identity import is_alive, is_dead, short_name, worker_id

NAME_ITSELF = """
import sys
from hq_optuna.protocol.worker_identity import worker_id
print(worker_id(), flush=True)
sys.stdin.read()
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="process start times come from /proc")


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that said its name and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", NAME_ITSELF],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_a_name_says_host_namespace_process_boot_and_start():
    host, namespace, pid, started = worker_id().split("/")
    boot, _, start = started.partition("-")
    assert (host, int(pid)) == (worker_identity.socket.gethostname(), os.getpid())
    assert namespace.isalnum()
    assert (boot.isalnum() and start.isdigit()) or sys.platform != "linux"
    assert worker_id() == worker_id()


def test_this_process_lives():
    assert not is_dead(worker_id())


def test_a_process_lives_until_it_is_killed_and_is_dead_afterwards(child):
    process, name = child
    assert name.split("/")[2] == str(process.pid)
    assert not is_dead(name)
    process.kill()
    process.wait()
    assert is_dead(name)


@linux
def test_a_killed_process_that_its_parent_has_not_reaped_is_dead(child):
    process, name = child
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and left a zombie
    assert is_dead(name)


@linux
def test_a_stopped_process_lives(child):
    process, name = child
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert not is_dead(name)


@linux
def test_another_process_with_the_same_number_is_told_by_its_start(child):
    _, name = child
    host, namespace, pid, started = name.split("/")
    boot, _, start = started.partition("-")
    assert is_dead(f"{host}/{namespace}/{pid}/{boot}-{int(start) - 1}")
    for unknown in ("", "-", f"{boot}-", f"-{start}"):  # nothing is concluded from it
        assert not is_dead(f"{host}/{namespace}/{pid}/{unknown}")


@linux
def test_after_a_reboot_another_process_with_the_same_number_and_start_is_not_the_dead_one(
    child, monkeypatch
):
    _, name = child
    monkeypatch.setattr(worker_identity, "_boot", lambda: "0123456789ab")
    assert is_dead(name)
    assert not worker_identity.is_alive(name)


@linux
def test_where_the_boot_is_not_known_process_and_start_decide(child, monkeypatch):
    process, name = child
    monkeypatch.setattr(worker_identity, "_boot", lambda: "")
    assert worker_identity.is_alive(name)
    process.kill()
    process.wait()
    assert is_dead(name)


def test_nothing_is_concluded_of_other_hosts_and_other_namespaces():
    host, namespace, _, start = worker_id().split("/")
    gone = 2**22 + 1  # above Linux's largest process id
    assert is_dead(f"{host}/{namespace}/{gone}/{start}")
    assert not is_dead(f"elsewhere/{namespace}/{gone}/{start}")
    assert not is_dead(f"{host}/1/{gone}/{start}")


def test_a_process_of_another_user_lives(monkeypatch):
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not is_dead(worker_id())


@pytest.mark.parametrize("name", ["", "somebody", "a/b", "host/1/pid/2", "a/b/c/d/e", "///"])
def test_a_name_of_another_form_is_of_nobody_known(name):
    assert not is_dead(name)


def test_short_names_are_for_people():
    assert short_name("box/4026531836/1234/1f0c33aa90d2-5678") == "box:1234"
    assert short_name("") == ""
    assert short_name("me") == "me"


def test_a_forked_process_has_a_name_of_its_own():
    mine = worker_id()
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(write, worker_id().encode())
        os._exit(0)
    os.waitpid(pid, 0)
    name = os.read(read, 1000).decode()
    os.close(read)
    os.close(write)
    assert name != mine
    assert is_dead(name)


def test_another_machine_of_the_same_name_is_another_host(monkeypatch):
    """Of its processes nothing is known here, though it was booted at another time."""
    ours = worker_identity._pid_namespace()
    read = Path.read_text

    def other(self: Path, *arguments, **options) -> str:
        ours = str(self) == "/etc/machine-id"
        return "f" * 32 if ours else read(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", other)
    worker_identity._pid_namespace.cache_clear()
    theirs = worker_identity._pid_namespace()
    monkeypatch.undo()
    worker_identity._pid_namespace.cache_clear()
    assert theirs != ours == worker_identity._pid_namespace()
    host, _, pid, started = worker_id().split("/")
    boot, _, start = started.partition("-")
    elsewhere = f"{host}/{theirs}/{pid}/{boot[::-1]}-{start}"
    assert not is_dead(elsewhere) and not is_alive(elsewhere)
