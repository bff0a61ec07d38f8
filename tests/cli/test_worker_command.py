"""`hq-optuna worker`: joins with nothing but the study file and the storage."""

from __future__ import annotations

import gc
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from typer.testing import Result

from hq_optuna import attributes
from hq_optuna.cli import session, worker
from hq_optuna.cli.options import Place, place_of
from hq_optuna.errors import StorageError
from hq_optuna.protocol.history import History, read_history
from hq_optuna.scoring import Scorer
from hq_optuna.settings import RunSettings

Command = Callable[..., Result]
STARTED = ("--seed", 5, "--candidates", 3, "--n", 12, "--budget", "0.4 bops")


@pytest.fixture
def begun(study: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A search with options of its own that was interrupted after a few candidates."""
    score, calls = Scorer.measure, []

    def interrupted(self: Scorer, *arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "measure", interrupted)
        assert command("run", study, *STARTED).exit_code == 130
    return study


def history(name: str) -> History:
    url = f"sqlite:///hq-optuna-runs/{name}/study.db"
    return read_history(optuna.load_study(study_name=name, storage=url))


def steps(found: History) -> list[object]:
    return [(r.step, r.winner.slot, r.winner.state, r.winner.score) for r in found.records]


def test_a_worker_needs_no_option_that_the_search_was_started_with(begun, command):
    result = command("worker", begun)
    assert result.exit_code == 0, result.output
    assert "as the study says: " in result.output
    assert "seed 5" in result.output
    assert "The search is over. This worker" in result.output
    command("run", begun, "--name", "undisturbed", *STARTED)
    assert history("tiny").met
    assert steps(history("tiny")) == steps(history("undisturbed"))
    assert not Path("hq-optuna-runs/tiny/report.html").exists()  # of `run` and `launch`


def test_a_resumed_run_needs_no_option_either_and_writes_the_report(begun, command):
    result = command("run", begun)
    assert result.exit_code == 0, result.output
    assert "Went on at step" in result.output
    assert Path("hq-optuna-runs/tiny/report.html").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", 6), "the seed (study: 5, now: 6)"),
        (("--budget", "0.5 bops"), "the budget"),
        (("--n", 16), "the calibration data"),
        (("--seed-of-weights", 1), "the network's weights"),
    ],
)
def test_a_worker_with_other_options_is_refused_and_leaves_the_study_alone(
    begun, command, options, words
):
    before = len(history("tiny").candidates)
    result = command("worker", begun, *options)
    assert result.exit_code == 1
    assert words in result.output
    assert len(history("tiny").candidates) == before


def test_settings_that_changed_in_the_study_file_are_refused(begun, command):
    begun.write_text(begun.read_text().replace('"bits": (8, 4, 2)', '"bits": (8, 4)'))
    assert "the search space" in command("worker", begun).output


def test_options_of_a_search_that_never_began_bind_nobody(study, command):
    url = f"sqlite:///{study.parent / 'study.db'}"
    empty = optuna.create_study(storage=url, study_name="tiny")
    empty.set_user_attr(attributes.STARTED, {"settings": {"seed": 9}, "options": {}})
    assert command("worker", study, "--storage", url).exit_code == 0
    found = optuna.load_study(study_name="tiny", storage=url)
    started = found.user_attrs[attributes.STARTED]
    assert (started["settings"], started["options"]) == ({}, {})
    assert read_history(found).info.settings["seed"] == 0


def test_a_study_that_does_not_exist_is_refused_and_not_made(study, command):
    result = command("worker", study)
    assert result.exit_code == 1
    for words in ("holds no study 'tiny'", "--create", "--wait-for"):
        assert words in " ".join(result.output.split())
    assert not Path("hq-optuna-runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--create", "--wait-for", 5), "does not wait for it"),
        (("--create", "--folder", "what?"), "a database's URL ends at a '?'"),
    ],
)
def test_what_would_be_without_effect_is_refused(study, command, options, words):
    result = command("worker", study, *options)
    assert result.exit_code != 0
    assert words in " ".join(result.output.replace("│", " ").split())
    assert not Path("what").exists()


def test_a_worker_may_create_the_study(study, command):
    result = command("worker", study, "--create", "--seed", 2)
    assert result.exit_code == 0, result.output
    assert history("tiny").info.settings["seed"] == 2
    assert history("tiny").met


def test_the_storage_may_be_named_by_the_environment(study, command, monkeypatch):
    monkeypatch.setenv("HQ_OPTUNA_STORAGE", f"sqlite:///{study.parent / 'elsewhere.db'}")
    assert command("worker", study, "--create").exit_code == 0
    with sqlite3.connect("elsewhere.db") as connection:
        assert connection.execute("select study_name from studies").fetchall() == [("tiny",)]


def test_events_are_one_json_object_a_line(study, command):
    lines = command("worker", study, "--create", "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    names = [event["event"] for event in events]
    assert names[:3] == ["loading", "preparing", "scoring"]
    assert names[-1] == "done"
    assert {"scored", "recording"} <= set(names)
    assert events[-1]["scored"] == sum(c.counted for c in history("tiny").candidates)
    assert {event["worker"] for event in events} == {events[0]["worker"]}


def test_an_error_is_the_last_of_the_events(study, command):
    result = command("worker", study, "--json")
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["error"] == "StorageError"
    assert result.exit_code == 1


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return place_of("tiny", RunSettings(storage=f"sqlite:///{tmp_path / 'study.db'}"))


def during_waits(monkeypatch: pytest.MonkeyPatch, *happens: Callable[[], object]) -> list[float]:
    """Let something happen in each pause; return the pauses."""
    slept: list[float] = []
    steps: Iterator[Callable[[], object]] = iter(happens)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        next(steps, lambda: None)()

    monkeypatch.setattr(session.time, "sleep", sleep)
    return slept


def test_a_study_is_waited_for_until_it_says_of_which_search_it_is(place, monkeypatch):
    made: list[optuna.Study] = []
    slept = during_waits(
        monkeypatch,
        lambda: None,
        lambda: made.append(optuna.create_study(storage=place.storage, study_name="tiny")),
        lambda: None,
        lambda: made[0].set_user_attr(attributes.FINGERPRINT, {}),
    )
    session.wait_for_study(place, 60)
    assert len(slept) == 4
    assert slept == sorted(slept)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_who_waits_holds_no_more_connections_the_longer_it_waits(place, monkeypatch):
    study = optuna.create_study(storage=place.storage, study_name="tiny")
    folder, counts = Path(place.storage.removeprefix("sqlite:///")).parent, []

    def look() -> None:
        links = Path("/proc/self/fd").iterdir()
        counts.append(sum(link.exists() and link.readlink().parent == folder for link in links))
        if len(counts) == 12:
            study.set_user_attr(attributes.INFO, {})

    during_waits(monkeypatch, *[look] * 12)
    gc.disable()
    try:
        session.wait_for_study(place, 60)
    finally:
        gc.enable()
    assert len(set(counts)) == 1


def test_a_database_that_fails_while_a_study_is_waited_for_is_looked_at_again(place, monkeypatch):
    study = optuna.create_study(storage=place.storage, study_name="tiny")
    study.set_user_attr(attributes.INFO, {})
    fails = iter([StorageInternalError("away"), KeyError("deleted")])

    class Failing:
        @property
        def user_attrs(self):
            raise error

    def load(*_: object) -> object:
        nonlocal error
        error = next(fails, None)
        return study if error is None else Failing()

    error: Exception | None = None
    monkeypatch.setattr(session, "load_study", load)
    slept = during_waits(monkeypatch)
    session.wait_for_study(place, 60)
    assert len(slept) == 2


def test_a_study_that_nobody_starts_is_not_waited_for_for_ever(place):
    with pytest.raises(StorageError, match=r"no study 'tiny' after 0.2 s"):
        session.wait_for_study(place, 0.2)


def test_a_study_whose_starter_died_while_measuring_is_joined(place):
    optuna.create_study(storage=place.storage, study_name="tiny")
    session.wait_for_study(place, 0.2)


def test_a_worker_ends_with_its_launcher(monkeypatch):
    read, write = os.pipe()
    signals, exits = [], []
    monkeypatch.setattr(worker.os, "kill", lambda *arguments: signals.append(arguments))
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: None)
    os.write(write, b"alive")
    os.close(write)
    worker._end_with(read, exits.append)
    os.close(read)
    assert signals == [(os.getpid(), worker.signal.SIGTERM)]
    assert exits == [1]
