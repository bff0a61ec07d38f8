"""Commands that read a stored study, whatever its name and state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

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


@pytest.mark.parametrize("folder", ["runs[a]", "runs[", "[bold]"])
def test_a_path_with_brackets_is_shown_as_it_is(folder: str, command: Command) -> None:
    result = command("report", *stored(), "--out", f"{folder}/[/x]/report.html")
    assert result.exit_code == 0, result.output
    assert result.output == f"Report: {folder}/[/x]/report.html\n"
