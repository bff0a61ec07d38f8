"""`hq-optuna dashboard`: where it looks, what it says, how it ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from hq_optuna.cli.dashboard import _is_loopback
from hq_optuna.storages import open_storage
from tests.dashboard.answers import dashboard
from tests.fake_search import fake_space, fake_study
from tests.fake_search import score as go_on
from tests.searches import dump
from tests.servers import database, place, server

SPACE = fake_space(5)


def make_search(url: str) -> None:
    study = fake_study(SPACE, storage=open_storage(url), n_trials=0)
    go_on(study, SPACE)
    study._storage.remove_session()


def serve(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Start the command, and return the process and the two lines it prints."""
    dashboard()
    process = subprocess.Popen(
        [sys.executable, "-m", "hq_optuna", "dashboard", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline() + process.stdout.readline()


def answers(said: str) -> bytes:
    found = re.search(r"Dashboard: (\S+)", said)
    assert found, said
    with urllib.request.urlopen(found[1], timeout=120) as answer:
        return answer.read()


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.mark.parametrize("ends_with", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_the_search_of_a_study_file_until_it_is_interrupted(study, ends_with):
    make_search("sqlite:///hq-optuna-runs/fake/study.db")
    process, said = serve("fake")
    assert "/dashboard/studies/1\n" in said
    assert "storage sqlite:///hq-optuna-runs/fake/study.db" in said
    assert b"<html" in answers(said).lower()
    process.send_signal(ends_with)
    assert "The dashboard is closed." in process.communicate(timeout=120)[0]
    assert process.returncode == 0


def test_it_serves_postgresql_and_never_shows_the_password(study):
    with database(server("HQ_OPTUNA_POSTGRESQL")) as url:
        make_search(url)
        with_password = url.replace("postgres@", "postgres:secret@", 1)  # trusted without, too
        process, said = serve("--storage", with_password, "--name", "fake")
        try:
            assert b"<html" in answers(said).lower()
            assert "postgres:***@" in said
            assert "secret" not in said
        finally:
            process.send_signal(signal.SIGINT)
            assert "secret" not in process.communicate(timeout=120)[0]


def test_a_journal_by_its_url_shows_all_its_studies(study, tmp_path):
    with place("journal", tmp_path) as url:
        make_search(url)
        process, said = serve(url)
        try:
            assert re.search(r"Dashboard: http://127.0.0.1:\d+\n", said)
            assert b"fake" in answers(said.replace("\n", "/api/studies\n", 1))
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=120)


def test_pages_that_nobody_wrote_are_shown_and_the_study_is_only_read(study):
    url, file = "sqlite:///hq-optuna-runs/fake/study.db", Path("hq-optuna-runs/fake/study.db")
    make_search(url)
    before = dump(file)
    process, said = serve("fake")
    page = said.replace("/dashboard/studies/1\n", "/api/studies/1\n", 1)
    deadline = time.monotonic() + 120
    while b"Finished: the budget is met" not in answers(page):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert dump(file) == before


def test_a_study_that_is_not_there_is_said_in_a_sentence(study, command):
    found = command("dashboard", "fake")
    assert found.exit_code == 1
    assert "There is no database at sqlite:///hq-optuna-runs/fake/study.db" in found.output
    found = command("dashboard", "sqlite:///nowhere.db")
    assert found.exit_code == 1
    assert "Was a search started?" in found.output
    assert not Path("nowhere.db").exists()


def test_a_port_that_is_taken_is_said_in_a_sentence(study, command):
    dashboard()
    make_search("sqlite:///hq-optuna-runs/fake/study.db")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        found = command("dashboard", "fake", "--port", str(other.getsockname()[1]))
    assert found.exit_code == 1
    assert "is taken, perhaps by another dashboard" in found.output


def test_it_asks_for_a_study_or_a_storage(command):
    found = command("dashboard")
    assert found.exit_code == 2
    assert "Give a study or a storage URL" in found.output


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_it_warns_where_others_may_reach_it(host, expected):
    assert _is_loopback(host) is expected


def test_an_interrupt_right_after_the_address_is_said_closes_it_too(study, command, monkeypatch):
    dashboard()
    make_search("sqlite:///hq-optuna-runs/fake/study.db")
    print_ = Console.print

    def interrupted(self, text, **options):
        print_(self, text, **options)
        if text.startswith("Dashboard: "):
            raise KeyboardInterrupt

    monkeypatch.setattr(Console, "print", interrupted)
    found = command("dashboard", "fake", "--port", "0")
    assert "The dashboard is closed." in found.output
    assert found.exit_code == 0
