"""A worker as a process: its environment, its events, its last words, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hq_optuna.workers import process as process_module
from hq_optuna.workers.process import (
    ENDS_WITH_STDIN,
    WorkerCommand,
    WorkerProcess,
    devices,
    thread_share,
)

SECRET = "postgresql+psycopg://me:hunter2@db/hq"
COMMAND = WorkerCommand("/s/study.py", "s", "/runs/s", SECRET, ("--data", "/d"))


def python(code: str) -> WorkerProcess:
    return WorkerProcess([sys.executable, "-c", code], dict(os.environ))


def ended(process: WorkerProcess) -> int:
    deadline = time.monotonic() + 120
    while (code := process.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return code


def test_the_command_holds_no_password_and_its_environment_the_storage():
    arguments = COMMAND.arguments(3)
    assert "hunter2" not in " ".join(arguments) + repr(COMMAND)
    assert arguments[-2:] == ["--data", "/d"]
    assert arguments[arguments.index("--threads") + 1] == "3"
    environment = COMMAND.environment(3, "GPU-ab12")
    assert environment["HQ_OPTUNA_STORAGE"] == SECRET
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-ab12"
    assert environment[ENDS_WITH_STDIN]
    assert environment["PATH"] == os.environ["PATH"]


def test_the_commands_arguments_are_the_workers_own():
    from hq_optuna.cli.app import load

    worker = load("worker")
    arguments = COMMAND.arguments(2)
    own = arguments[arguments.index("worker") + 1 :]
    context = worker.make_context("worker", own)
    assert context.params["study"] == "/s/study.py"
    assert context.params["threads"] == 2
    assert context.args == ["--data", "/d"]  # the study file's


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(2, 1, 2), (2, 2, 1), (2, 9, 1), (64, 8, 8), (10, 4, 2)]
)
def test_cores_are_shared(cores, workers, threads):
    assert thread_share(cores, workers) == threads


@pytest.mark.parametrize(
    ("environment", "found", "expected"),
    [
        ({}, 0, []),
        ({}, 3, ["0", "1", "2"]),
        ({"CUDA_VISIBLE_DEVICES": "2, GPU-ab"}, 2, ["2", "GPU-ab"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, []),
        ({"CUDA_VISIBLE_DEVICES": "0,9"}, 1, ["0"]),
    ],
)
def test_gpus_are_named_as_the_launchers_own(environment, found, expected):
    assert devices(environment, found) == expected


def test_events_are_json_lines_and_other_output_is_passed_over():
    process = python(
        'import sys\nprint(\'loading\'); print(\'{"event": "scored", "scored": 1}\')\n'
        "print('[1]'); print('last', file=sys.stderr); sys.exit(3)"
    )
    assert ended(process) == 3
    assert process.events() == [{"event": "scored", "scored": 1}]
    assert process.events() == []
    assert process.last_lines() == ["last"]
    process.close()


def test_a_worker_has_not_ended_before_all_it_said_is_heard():
    may_go_on = threading.Event()

    def listener(_worker, event):
        if event is not None:
            assert may_go_on.wait(120)

    code = 'for i in range(3): print(\'{"event": "scored"}\')'
    process = WorkerProcess([sys.executable, "-c", code], dict(os.environ), listener)
    process._process.wait()
    assert process.poll() is None
    may_go_on.set()
    assert ended(process) == 0
    assert len(process.events()) == 3
    process.close()


def test_a_worker_that_left_its_pipes_to_another_has_ended_all_the_same(monkeypatch):
    monkeypatch.setattr(process_module, "READ_WITHIN_S", 0.2)
    process = python(
        "import subprocess, sys\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        'print(\'{"event": "started", "pid": %d}\' % other.pid, flush=True)'
    )
    deadline, told = time.monotonic() + 120, []
    while not told:
        assert time.monotonic() < deadline
        told = process.events()
    assert ended(process) == 0
    process.close()
    os.kill(told[0]["pid"], signal.SIGKILL)  # was there all the time


def test_of_many_words_the_last_are_kept():
    process = python("import sys\nfor i in range(100): print(f'line {i}', file=sys.stderr)")
    assert ended(process) == 0
    assert process.last_lines() == [f"line {i}" for i in range(88, 100)]
    process.close()


def test_a_worker_is_asked_or_killed():
    for end, signal_ in (("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)):
        process = python("import time; time.sleep(600)")
        getattr(process, end)()
        assert ended(process) == -signal_
        process.close()


def test_a_worker_is_let_go_of_though_what_it_started_lives_on():
    heard = []
    code = (
        "import json, os, subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
        "print(json.dumps({'child': child.pid}), flush=True)\nos._exit(3)"
    )
    process = WorkerProcess(
        [sys.executable, "-c", code], dict(os.environ), lambda _, event: heard.append(event)
    )
    assert ended(process) == 3
    child = heard[0]["child"]
    try:
        closing = threading.Thread(target=process.close, daemon=True)
        closing.start()
        closing.join(timeout=30)
        assert not closing.is_alive()
        assert heard == [{"child": child}, None]
    finally:
        os.kill(child, signal.SIGKILL)


def test_ctrl_c_of_the_terminal_reaches_the_launcher_alone():
    process = python("import time; time.sleep(600)")
    assert os.getpgid(process.pid) != os.getpgid(0)
    process.kill()
    process.close()


ORPHAN = """
import os, sys, time
from hq_optuna.workers.process import WorkerProcess
code = "import sys, threading; from hq_optuna.cli import worker; worker._end_with(0)"
child = WorkerProcess([sys.executable, "-c", code], dict(os.environ))
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_worker_does_not_outlive_a_launcher_that_was_killed():
    launcher = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    worker = int(launcher.stdout.readline())
    os.kill(worker, 0)
    launcher.kill()
    launcher.communicate()
    deadline = time.monotonic() + 120
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
