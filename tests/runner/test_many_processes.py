"""Several processes on one storage, killed or not, have the history of one."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.study import Study
from optuna.trial import TrialState

from hq_optuna.storages import sqlite_url
from tests.runner.table_worker import NAME, by, opened
from tests.samplers.tables import expected, history, ours, tickets

ROOT = Path(__file__).parents[2]


def make(storage: str) -> Study:
    return optuna.create_study(study_name=NAME, storage=opened(storage), sampler=by())


def start(storage: str, seconds: float = 0.01) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.runner.table_worker", storage, str(seconds)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list[subprocess.Popen[str]]) -> None:
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors


def place(folder: Path, kind: str) -> str:
    return sqlite_url(folder / "study.db") if kind == "sqlite" else str(folder / "study.log")


def check(study: Study) -> None:
    """The history is the sequential one, and nothing is lost or left running."""
    assert history(study) == expected(study)
    assert len(history(study)) >= 8
    done = {
        (ticket.step, ticket.slot)
        for trial, ticket in zip(study.get_trials(deepcopy=False), tickets(study), strict=True)
        if trial.state == TrialState.COMPLETE and ticket.kind == "candidate"
    }
    assert done == set(ours(study).log(study).results)


@pytest.mark.parametrize(("kind", "n"), [("sqlite", 1), ("sqlite", 3), ("journal", 3)])
def test_any_number_of_processes_has_the_history_of_the_sequential_search(tmp_path, kind, n):
    study = make(place(tmp_path, kind))
    finish([start(place(tmp_path, kind)) for _ in range(n)])
    check(study)
    kinds = Counter(
        ticket.kind
        for trial, ticket in zip(study.trials, tickets(study), strict=True)
        if trial.state == TrialState.COMPLETE
    )
    log = ours(study).log(study)  # each candidate once, each step recorded once
    assert kinds == {"candidate": len(log.results), "incumbent": len(log.closed)}
    assert TrialState.RUNNING not in {trial.state for trial in study.trials}
    assert TrialState.FAIL not in {trial.state for trial in study.trials}
    workers = {ticket.worker for ticket in tickets(study)}
    assert len(workers) == n or (n > 1 and len(workers) > 1)


def n_trials(path: Path) -> int:
    with sqlite3.connect(path, timeout=60) as connection:
        return connection.execute("select count(*) from trials").fetchone()[0]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_workers_lose_nothing_and_change_nothing(tmp_path):
    storage = place(tmp_path, "sqlite")
    study = make(storage)
    rng = random.Random(0)
    workers = [start(storage, 0.03) for _ in range(2)]
    killed = []
    for threshold in (1, 6, 14, 25):
        deadline = time.monotonic() + 60
        while n_trials(tmp_path / "study.db") < threshold and time.monotonic() < deadline:
            time.sleep(0.003)
        time.sleep(rng.uniform(0, 0.04))  # anywhere within a candidate, its ticket or its record
        victim = workers.pop(rng.randrange(2))
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim)
        workers.append(start(storage, 0.03))
    for victim in killed:
        victim.communicate()
    assert [victim.returncode for victim in killed] == [-signal.SIGKILL] * 4
    for worker in workers:  # all dead at once, and one that resumes
        worker.kill()
        worker.communicate()
    finish([start(storage)])
    check(study)
    left = [
        ticket
        for trial, ticket in zip(study.trials, tickets(study), strict=True)
        if trial.state == TrialState.RUNNING
    ]
    assert set(left) <= {None}  # killed before its ticket: nobody can tell whose it was
    assert len(left) <= 6
