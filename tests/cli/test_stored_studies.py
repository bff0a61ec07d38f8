"""Commands that read a stored study, whatever its name and state."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from sqlalchemy.exc import OperationalError
from typer.testing import Result

from hq_optuna import attributes
from hq_optuna.cli import dashboard
from hq_optuna.cli.options import place_of
from hq_optuna.errors import StudyFileError
from hq_optuna.settings import RunSettings
from hq_optuna.storages import open_storage
from tests.fake_search import fake_study

Command = Callable[..., Result]
URL = "sqlite:///study.db"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stored(name: str = "fake") -> tuple[str, ...]:
    """Make a finished search and return the options that name it."""
    storage = open_storage(URL)
    fake_study(4, storage=storage, name=name)
    storage.remove_session()
    return ("--storage", URL, "--name", name)


@pytest.mark.parametrize("seconds", [0, 60])
def test_status_tries_a_storage_that_does_not_answer_again_for_as_long_as_is_said(
    seconds: float, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, read, failures = stored(), RDBStorage.get_study_system_attrs, [True]

    def once(self: Any, *arguments: Any, **named: Any) -> Any:
        if failures:
            failures.pop()
            raise OperationalError("SELECT", {}, Exception("server closed the connection"))
        return read(self, *arguments, **named)

    monkeypatch.setattr(RDBStorage, "get_study_system_attrs", once)
    result = command("status", *named, "--retry-for", seconds)
    assert not failures
    assert result.exit_code == (1 if seconds == 0 else 0), result.output


@pytest.mark.parametrize("folder", ["runs[a]", "runs[", "[bold]"])
def test_a_path_with_brackets_is_shown_as_it_is(folder: str, command: Command) -> None:
    result = command("report", *stored(), "--out", f"{folder}/[/x]/report.html")
    assert result.exit_code == 0, result.output
    assert result.output == f"Report: {folder}/[/x]/report.html\n"


@pytest.mark.parametrize(
    "options",
    [["status"], ["report"], ["resolve", "--budget", "0.5 bops"], ["pareto"]],
)
def test_a_damaged_database_is_named_in_one_sentence(options: list[str], command: Command) -> None:
    named = stored()
    with sqlite3.connect("study.db") as connection:
        connection.execute("pragma wal_checkpoint(truncate)")
        query = "select rootpage from sqlite_master where name = 'trials'"
        page = connection.execute(query).fetchone()[0] - 1
    content = bytearray(Path("study.db").read_bytes())
    content[4096 * page : 4096 * (page + 1)] = b"\7" * 4096
    Path("study.db").write_bytes(content)
    result = command(*options, *named)
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    words = "Storage sqlite:///study.db: database disk image is malformed. The file is damaged"
    assert words in result.output


def test_a_study_from_python_may_have_a_slash_in_its_name(command: Command) -> None:
    result = command("status", *stored("team/resnet"))
    assert result.exit_code == 0, result.output
    assert result.output.startswith("team/resnet  finished")
    _, found, files, _ = dashboard._open(None, RunSettings(storage=URL, name="team/resnet"))
    assert found is not None
    assert (found.study_name, files) == ("team/resnet", "hq-optuna-runs/team/resnet/artifacts")


def test_a_run_whose_folder_is_given_may_have_any_name() -> None:
    assert (
        place_of("tiny.py", RunSettings(name="a/b", folder=Path("here"))).storage
        == "sqlite:///here/study.db"
    )
    with pytest.raises(StudyFileError, match=r"is no name for a study.*--folder"):
        place_of("tiny.py", RunSettings(storage=URL, name="a/b"))
    with pytest.raises(StudyFileError, match="'' is no name"):
        place_of("tiny.py", RunSettings(storage=URL, name="", folder=Path("here")), reads=True)


def test_a_search_that_is_being_prepared_says_so(command: Command) -> None:
    # As in a loop of Optuna's own, whose first trial measures.
    study = optuna.create_study(storage=open_storage(URL), study_name="mine")
    study.set_user_attr(attributes.FINGERPRINT, {"network": "0" * 12})
    study.ask()
    named = ("--storage", URL, "--name", "mine")
    result = command("status", *named)
    assert (result.exit_code, result.output[:10]) == (0, "preparing:")
    assert "'mine' is being prepared" in command("report", *named).output
