"""Workers on a real Dask scheduler with worker processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from typer.testing import CliRunner

from hq_optuna.cli.app import app
from hq_optuna.errors import WorkerError
from hq_optuna.protocol.history import read_history
from hq_optuna.workers.dask import Cluster
from hq_optuna.workers.process import WorkerCommand
from tests.cli.conftest import STUDY

distributed = pytest.importorskip("distributed", reason="needs the extra dask")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("OMP_NUM_THREADS", "1")
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster:
            yield cluster.scheduler_address


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.py"
    path.write_text(STUDY)
    return path


def storage_of(study: Path) -> str:
    return f"sqlite:///{study.parent / 'study.db'}"


def test_a_cluster_finds_what_one_process_finds(address: str, study: Path) -> None:
    storage = storage_of(study)
    for name, options in (("alone", ()), ("cluster", ("--scheduler", address, "--workers", "2"))):
        command = "launch" if options else "run"
        arguments = [command, str(study), "--storage", storage, "--name", name, *options]
        result = CliRunner().invoke(app, [*arguments, "--candidates", "3"])
        assert result.exit_code == 0, result.output
    found = {
        name: read_history(optuna.load_study(study_name=name, storage=storage))
        for name in ("alone", "cluster")
    }
    steps = {
        name: [(r.step, r.winner.slot, r.winner.state, r.winner.score) for r in history.records]
        for name, history in found.items()
    }
    assert steps["cluster"] == steps["alone"]
    by = {candidate.worker for candidate in found["cluster"].candidates}
    assert by.isdisjoint({candidate.worker for candidate in found["alone"].candidates})
    assert Path("hq-optuna-runs/cluster/report.html").exists()


def ended(handle: object) -> int:
    deadline = time.monotonic() + 120
    while (code := handle.poll()) is None:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return code


def test_a_study_file_that_is_not_on_the_workers_host_is_named(address: str) -> None:
    cluster = Cluster(address, WorkerCommand("/nowhere/study.py", "s", "runs", "sqlite:///x.db"))
    assert cluster.n_workers == 2
    handle = cluster.start(0)
    assert ended(handle) == 1
    (event,) = handle.events()
    assert event["error"] == "StudyFileError"
    assert "has no study file /nowhere/study.py" in event["message"]
    handle.close()
    cluster.close()


def test_events_and_last_words_come_back(address: str, study: Path) -> None:
    cluster = Cluster(address, WorkerCommand(str(study), "none", "runs", storage_of(study)))
    handle = cluster.start(1)
    code, told = None, []
    deadline = time.monotonic() + 120
    while code is None:
        code = handle.poll()
        told += handle.events()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert code == 1
    (message,) = {event["message"] for event in told if "error" in event}  # known with the end
    assert "holds no study 'none'" in message
    while not any("event" in event for event in told):  # the others may come later
        told += handle.events()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    said = next(event["event"] for event in told if "event" in event)
    assert said == "waiting for the study"
    handle.close()
    cluster.close()


@pytest.mark.parametrize("how", ["terminate", "client"])
def test_a_worker_ends_when_it_is_not_wanted_any_more(address: str, study: Path, how: str) -> None:
    pids = study.parent / "pids"
    study.write_text(
        f"import os, pathlib\npathlib.Path({str(pids)!r}).write_text(str(os.getpid()))\n"
        + STUDY
        + "\nimport time\ntime.sleep(600)\n"
    )
    cluster = Cluster(address, WorkerCommand(str(study), "s", "runs", storage_of(study)))
    handle = cluster.start(0)
    deadline = time.monotonic() + 120
    while not (pids.exists() and pids.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int(pids.read_text())
    if how == "terminate":
        handle.terminate()
    cluster.close()
    deadline = time.monotonic() + 120
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_scheduler_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from hq_optuna.workers import dask

    monkeypatch.setattr(dask, "CONNECT_FOR_S", 1)
    with pytest.raises(WorkerError, match=r"There is no Dask scheduler at tcp://127\.0\.0\.1:1:"):
        Cluster("tcp://127.0.0.1:1", WorkerCommand("s.py", "s", "runs", "sqlite:///x.db"))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(WorkerError, match=r"hq_optuna\[dask\]"):
        Cluster("tcp://127.0.0.1:1", WorkerCommand("s.py", "s", "runs", "sqlite:///x.db"))
