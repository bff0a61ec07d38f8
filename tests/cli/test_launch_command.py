"""`hq-optuna launch` with real processes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch

from hq_optuna.cli import launch
from hq_optuna.cli.options import Place
from hq_optuna.dashboard import write_pages
from hq_optuna.dashboard.pages import NOTE, PLOT, STAMP, note_in
from hq_optuna.protocol.history import History, read_history
from hq_optuna.protocol.status import read_status
from hq_optuna.settings import RunSettings
from hq_optuna.workers.process import WorkerCommand

ROOT = Path(__file__).parents[2]
HOLD = """
import pathlib, time
from hq_optuna.scoring import Scorer
_score = Scorer.measure
def _held(self, config, *more):
    time.sleep(0.1)
    while pathlib.Path("hold").exists() and any(bits != (8, 8) for bits in config.values()):
        time.sleep(0.01)
    return _score(self, config, *more)
Scorer.measure = _held
"""


def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "hq_optuna", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        **options,
    )


def hold(study: Path) -> Path:
    """Let no candidate of step 1 end as long as there is the file that is returned."""
    study.write_text(study.read_text() + HOLD)
    held = study.parent / "hold"
    held.touch()
    return held


def loaded(name: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.load_study(study_name=name, storage=f"sqlite:///hq-optuna-runs/{name}/study.db")


def steps(found: History) -> list[object]:
    return [(r.step, r.winner.slot, r.winner.state, r.winner.score) for r in found.records]


def n_complete(name: str) -> int:
    try:
        with sqlite3.connect(f"hq-optuna-runs/{name}/study.db", timeout=30) as connection:
            rows = connection.execute("select count(*) from trials where state = 'COMPLETE'")
            return int(rows.fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def until(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_two_workers_have_the_history_of_one_though_one_is_killed(study: Path) -> None:
    held = hold(study)
    options = ("--candidates", 3, "--seed", 4)
    process = start("launch", study, "--workers", 2, "--json", *options)
    until(lambda: n_complete("tiny") >= 2, process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    held.unlink()
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "died (SIGKILL) and is started again" in errors
    data = json.loads(output)
    assert Path(data["report"]).exists()
    assert Path(data["result"], "recipe.json").exists()
    alone = start("run", study, "--name", "alone", *options)
    assert alone.wait(timeout=400) == 0, alone.communicate()
    mine, other = read_history(loaded("tiny")), read_history(loaded("alone"))
    assert steps(mine) == steps(other)
    assert mine.n_running == 0
    assert "preparing" in errors
    current = read_status(loaded("tiny"))
    assert current.reason == "the budget is met"


@pytest.mark.parametrize(("device", "seen"), [("cpu", [None] * 3), ("cuda:0", ["0", "1"])])
def test_workers_have_gpus_of_their_own_where_the_network_is_on_one(device, seen, monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "n_cores", lambda: 3)
    monkeypatch.setattr(launch, "Coordinator", lambda *_, **__: SimpleNamespace(receive=None))
    monkeypatch.setattr(WorkerCommand, "start", lambda _, *of: started.append(of[1]))
    objective = SimpleNamespace(device=torch.device(device))
    session = SimpleNamespace(
        file=Path("tiny.py"),
        arguments=[],
        run=RunSettings(),
        place=Place("tiny", Path("runs"), "sqlite:///study.db"),
        search=SimpleNamespace(objective=objective),
        threads=1,
    )
    supervisor, _, _ = launch._start_workers(session, None, None, None, print, print)
    supervisor.poll()
    assert started == seen


def test_the_launcher_writes_the_pages_of_the_dashboard(study: Path) -> None:
    process = start("launch", study, "--workers", 2, "--device", "cpu:0")
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    found = loaded("tiny")
    history = read_history(found)
    system = found._storage.get_study_system_attrs(found._study_id)
    note = note_in(system)
    assert "Finished: the budget is met" in note
    assert f"After step {history.records[-1].step}: [trial {history.records[-1].number}]" in note
    for name in ("report", "assignment (JSON)"):
        assert f"[{name}](/artifacts/" in note
    for name in ("steps", "bits", "sensitivity"):
        drawn = "".join(system[key] for key in sorted(system) if key.startswith(f"{PLOT}{name}:"))
        assert json.loads(drawn)["data"], name
        if name == "bits":
            assert json.loads(drawn)["data"][0]["x"][-1] == history.records[-1].step
    for record in history.records:
        trial_id = found.trials[record.number]._trial_id
        assert system[f"{NOTE}{trial_id}:note_str:0"].startswith(f"Closes step {record.step}; ")
    assert f"/{process.pid}/" in system[STAMP]["by"]  # and not one of its workers
    assert not write_pages(found)  # nothing is left to write


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_launcher(study: Path, end: signal.Signals) -> None:
    held = hold(study)
    process = start("launch", study, "--workers", 2, start_new_session=True)
    until(lambda: n_complete("tiny") >= 2, process)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(process.pid, end)
    _, errors = process.communicate(timeout=120)
    if end == signal.SIGTERM:
        assert process.returncode == 130
        assert "start the same command again" in errors
    deadline = time.monotonic() + 120
    while not all(map(gone, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    held.unlink()
    if end == signal.SIGKILL:  # nobody was left to give anything back: who comes next sees to it
        again = start("run", study)
        assert again.wait(timeout=300) == 0, again.communicate()
        assert read_status(loaded("tiny")).reason == "the budget is met"
    states = [trial.state for trial in loaded("tiny").trials]
    assert optuna.trial.TrialState.RUNNING not in states


def test_workers_that_die_at_once_end_in_an_error_with_their_last_words(study: Path) -> None:
    study.write_text(
        study.read_text() + "\nimport os, sys\nif os.environ.get('HQ_OPTUNA_ENDS_WITH_STDIN'):\n"
        "    print('ImportError: libfoo.so.1', file=sys.stderr)\n    os._exit(7)\n"
    )
    process = start("launch", study, "--workers", 1)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "The worker died 5 times without scoring a candidate" in errors
    assert "ImportError: libfoo.so.1" in errors
    assert "Traceback" not in errors


def test_bad_input_ends_before_any_worker(study: Path) -> None:
    process = start("launch", study, "--workers", 2, "--budget", "0.01 bops")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "is below the cheapest assignment" in errors
    assert not Path("hq-optuna-runs/tiny/study.db").exists()
