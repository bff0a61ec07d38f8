"""kill -9 at any moment; the same command goes on and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from hq_optuna.protocol.history import History, read_history

# Scoring is slowed down so that kills land inside candidates. A process with SCORES does so many
# and none after; of those with MEET none does one of step 1 before so many are at one.
SLOW = """
import os, sys, time
from pathlib import Path
from hq_optuna.scoring import Scorer
score, left, meet = Scorer.measure, float(os.environ.get("SCORES", "inf")), Path("met")
def slowly(self, config, *more):
    global left
    left -= 1
    time.sleep(0.2 if left >= 0 else 600)
    if "MEET" in os.environ and any(bits != (8, 8) for bits in config.values()):
        meet.mkdir(exist_ok=True)
        (meet / str(os.getpid())).touch()
        while len(list(meet.iterdir())) < int(os.environ["MEET"]):
            time.sleep(0.01)
    return score(self, config, *more)
Scorer.measure = slowly
from hq_optuna.cli import main
sys.argv[0] = "hq-optuna"
main()
"""


FINALISTS = """
import sys, time
from hq_optuna.scoring import Scorer
measured = Scorer.measured
def slowly(self, *more):
    time.sleep(0.3)
    return measured(self, *more)
Scorer.measured = slowly
from hq_optuna.cli import main
sys.argv[0] = "hq-optuna"
main()
"""


def start(*arguments: str, code: str = SLOW, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def history(name: str) -> History:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return read_history(
        optuna.load_study(study_name=name, storage=f"sqlite:///hq-optuna-runs/{name}/study.db")
    )


def steps(found: History) -> list[tuple[Any, ...]]:
    """Return what must not depend on kills or on the number of workers."""
    return [
        (r.step, r.winner.step, r.winner.slot, r.winner.state, r.winner.score, r.winner.cost)
        for r in found.records
    ]


def tried(found: History) -> set[tuple[Any, ...]]:
    return {(c.step, c.slot, c.state, c.score) for c in found.candidates if c.counted}


def n_complete(name: str) -> int:
    database = Path(f"hq-optuna-runs/{name}/study.db")
    if not database.exists():
        return -1
    import sqlite3

    try:
        with sqlite3.connect(database, timeout=30) as connection:
            rows = connection.execute("select count(*) from trials where state = 'COMPLETE'")
            return int(rows.fetchone()[0])
    except sqlite3.OperationalError:  # the tables are being made
        return -1


@pytest.fixture
def undisturbed(study: Path) -> History:
    process = start("run", str(study), "--name", "undisturbed", "--candidates", "3")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return history("undisturbed")


def test_a_killed_search_goes_on_at_its_candidate_and_ends_the_same(
    study: Path, undisturbed: History
) -> None:
    arguments = ("run", str(study), "--name", "killed", "--candidates", "3")
    # While the study is made; within a step; later. None comes to the end, at seven scores.
    for kill_after, scores in ((0, 1), (2, 1), (5, 3)):
        process = start(*arguments, SCORES=str(scores))
        deadline = time.monotonic() + 120
        while n_complete("killed") < kill_after:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()  # type: ignore[union-attr]
    before = n_complete("killed")
    assert before >= 5
    process = start(*arguments)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "Went on at step" in output
    found = history("killed")
    assert steps(found) == steps(undisturbed)
    assert tried(found) == tried(undisturbed)
    assert all(candidate.counted for candidate in found.candidates)  # nothing scored twice
    assert found.n_running == 0
    recipes = [
        json.loads(Path(f"hq-optuna-runs/{name}/result/recipe.json").read_text())
        for name in ("killed", "undisturbed")
    ]
    assert recipes[0]["layers"] == recipes[1]["layers"]
    assert recipes[0]["weights"] == recipes[1]["weights"]


def test_a_search_by_table_that_is_killed_among_its_finalists_ends_the_same(study: Path) -> None:
    by_table = study.read_text().replace(
        '"measure_candidates": True', '"activation_bits": (8, 4, 2)'
    )
    study.write_text(by_table)
    alone = start("run", str(study), "--name", "alone", code=FINALISTS)
    assert alone.wait(timeout=300) == 0, alone.communicate()[0]
    undisturbed = history("alone")
    finalists = [c for c in undisturbed.candidates if c.rises]
    assert len(finalists) >= 2
    n_before = len(undisturbed.candidates) - len(finalists) + len(undisturbed.records) - 1
    for done in (0, 1):
        process = start("run", str(study), "--name", "killed", code=FINALISTS)
        deadline = time.monotonic() + 120
        while n_complete("killed") < n_before + done:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    process = start("run", str(study), "--name", "killed", code=FINALISTS)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    found = history("killed")
    assert steps(found) == steps(undisturbed)
    assert tried(found) == tried(undisturbed)
    assert [c.rises for c in found.candidates if c.counted and c.rises] == [
        c.rises for c in finalists
    ]
    assert found.n_running == 0


def test_three_processes_on_one_sqlite_file_have_the_history_of_one(
    study: Path, undisturbed: History
) -> None:
    arguments = ("run", str(study), "--name", "shared", "--candidates", "3")
    processes = [start(*arguments, MEET="3") for _ in range(3)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    found = history("shared")
    assert steps(found) == steps(undisturbed)
    assert tried(found) == tried(undisturbed)
    assert len({candidate.worker for candidate in found.candidates}) == 3


def test_sigterm_gives_the_candidate_back(study: Path) -> None:
    process = start("run", str(study), "--name", "ended", SCORES="1")
    while n_complete("ended") < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130, output
    assert "start the same command again" in output
    assert "Traceback" not in output
    assert history("ended").n_running == 0
