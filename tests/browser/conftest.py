"""A finished and a running search, the dashboard on them, and a browser."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.browser import missing
from tests.cli.conftest import STUDY

TRAIN = """

def train():
    return _data(64, 4)
"""
SLOW = """
import pathlib, sys, time
from hq_optuna.scoring import Scorer
score = Scorer.measure
def slowly(self, *configs):
    time.sleep(1.5)
    while pathlib.Path("hold").exists():
        time.sleep(0.1)
    return score(self, *configs)
Scorer.measure = slowly
from hq_optuna.cli import main
sys.argv[0] = "hq-optuna"
main()
"""
FAST = "import sys; from hq_optuna.cli import main; sys.argv[0] = 'hq-optuna'; main()"


@dataclass
class Site:
    """Where a search was run, and the dashboard that shows it.

    Attributes:
        url: Of the page of its study.
        base: Of the dashboard.
        folder: The run's folder.
    """

    url: str
    base: str
    folder: Path


def start(code: str, where: Path, *arguments: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=where,
        env=environment,
    )


def end(process: subprocess.Popen[str]) -> str:
    """Interrupt a process as Ctrl-C does, and return what it said."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


def serve(where: Path, name: str) -> tuple[subprocess.Popen[str], Site]:
    """Start `hq-optuna dashboard` and wait for the address it prints."""
    process = start(FAST, where, "dashboard", "tiny.py", "--name", name, "--port", "0")
    assert process.stdout is not None
    said = process.stdout.readline()
    found = re.search(r"Dashboard: ((http://\S+?)/dashboard/studies/\d+)", said)
    assert found is not None, said + end(process)
    return process, Site(found[1], found[2], where / "hq-optuna-runs" / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study file."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "tiny.py").write_text(STUDY + TRAIN)
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Iterator[Site]:
    """A search that trained its winners and ended."""
    missing.skip()
    options = ("--train-every", "2", "--train-epochs", "1", "--final-epochs", "2")
    run = start(FAST, place, "run", "tiny.py", "--name", "finished", *options)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    process, site = serve(place, "finished")
    yield site
    assert "The dashboard is closed." in end(process)


@pytest.fixture(scope="module")
def running(place: Path) -> Iterator[Site]:
    """A search that still runs, some steps after its start, and comes no further."""
    missing.skip()
    options = ("--candidates", "8", "--bits", "2-8", "--budget", "0.07 bops")
    run = start(SLOW, place, "run", "tiny.py", "--name", "running", *options)
    database = place / "hq-optuna-runs" / "running" / "study.db"
    until = time.monotonic() + 240
    while not _has_pages(database) and run.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    (place / "hold").touch()
    assert run.poll() is None, run.communicate()[0]
    process, site = serve(place, "running")
    yield site
    still = run.poll() is None
    end(process)
    said = end(run)
    assert still, f"the search had ended before the tests were done: {said}"


def _has_pages(database: Path) -> bool:
    """Return whether the search has some steps, and a note that says so."""
    from hq_optuna.dashboard.pages import note_in
    from hq_optuna.errors import HqOptunaError
    from hq_optuna.protocol.history import read_history
    from hq_optuna.storages import load_study, sqlite_url

    try:
        study = load_study(sqlite_url(database), "running")
        system = study._storage.get_study_system_attrs(study._study_id)
        return len(read_history(study).records) >= 2 and "Latest steps" in note_in(system)
    except HqOptunaError:
        return False
