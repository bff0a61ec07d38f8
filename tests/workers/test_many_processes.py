"""Several processes on one storage, killed or not, have the history of one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.study import Study
from optuna.trial import TrialState

from tests.samplers.tables import expected, history, ours, tickets
from tests.servers import KINDS, place
from tests.workers.table_worker import NAME, by, opened

ROOT = Path(__file__).parents[2]


def make(storage: str) -> Study:
    with contextlib.suppress(KeyError):
        optuna.delete_study(study_name=NAME, storage=opened(storage))
    return optuna.create_study(study_name=NAME, storage=opened(storage), sampler=by())


def start(storage: str, seconds: float = 0.01, *waits_at: int) -> subprocess.Popen[str]:
    arguments = map(str, (storage, seconds, *waits_at))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.workers.table_worker", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_together(storage: str, n: int) -> list[subprocess.Popen[str]]:
    """Start workers of which none goes on with its first candidate before all have one."""
    workers = [start(storage, 0.01, 1) for _ in range(n)]
    assert [worker.stdout.readline() for worker in workers] == ["at work\n"] * n
    for worker in workers:
        worker.stdin.close()
        worker.stdin = None  # so that `communicate` does not look at it
    return workers


def finish(processes: list[subprocess.Popen[str]]) -> None:
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors


@pytest.fixture(scope="module", params=KINDS)
def storage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    with place(request.param, tmp_path_factory.mktemp(request.param)) as url:
        yield url


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


@pytest.mark.parametrize("n", [2, 4])  # one is in tests/storages, 16 in benchmarks/many.py
def test_any_number_of_processes_has_the_history_of_the_sequential_search(storage, n):
    study = make(storage)
    finish(start_together(storage, n))
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
    assert len({ticket.worker for ticket in tickets(study)}) == n


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("storage", ["sqlite", "postgresql"], indirect=True)
def test_killed_workers_lose_nothing_and_change_nothing(storage):
    study = make(storage)
    rng = random.Random(0)
    last = expected(study)[-1].step  # nobody gets past it before it is killed
    workers = [start(storage, 0.03, last) for _ in range(2)]
    killed = []
    for threshold in (1, 6, 14, 25):
        deadline = time.monotonic() + 120
        while ours(study).log(study).cursor.n < threshold:
            assert time.monotonic() < deadline
            time.sleep(0.003)
        time.sleep(rng.uniform(0, 0.04))  # anywhere within a candidate, its ticket or its record
        victim = workers.pop(rng.randrange(2))
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim)
        workers.append(start(storage, 0.03, last))
    for victim in killed:
        victim.communicate()
    assert [victim.returncode for victim in killed] == [-signal.SIGKILL] * 4
    for worker in workers:  # all dead at once, and one that resumes
        worker.kill()
        worker.communicate()
    finish([start(storage)])
    check(study)
    assert TrialState.RUNNING not in {trial.state for trial in study.trials}
