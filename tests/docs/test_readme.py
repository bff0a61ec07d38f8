"""The README holds what it says: its blocks run, and print what it shows."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """Return the fenced block under the comment ``<!-- name -->``."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, name
    return found[1]


def shape_of(text: str) -> str:
    """Return the text with every figure that a machine's arithmetic may change replaced.

    Scores and accuracies come from a network trained on the spot; names and counts do not.
    """
    text = re.sub(r"\d+(\.\d+)?e-\d+|\d+\.\d+", "#", text)
    return re.sub(r"[ \t]+", " ", text).strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_the_example_runs_and_prints_what_the_readme_shows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = block("example")
    assert len(code.strip().splitlines()) <= 12
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README", "exec"), names)
    assert shape_of(printed.getvalue()) == shape_of(block("example output"))
    shares = [
        float(re.search(r"([\d.]+) % of all-8-bit", text)[1])  # type: ignore[index]
        for text in (printed.getvalue(), block("example output"))
    ]
    assert max(shares) <= 25
    assert (folder / "digits-25" / "recipe.json").exists()


def test_the_run_command_prints_the_lines_that_the_readme_shows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from hq_optuna.cli.app import app

    monkeypatch.chdir(folder)
    command = shlex.split(block("run command").split("&&")[-1])
    assert Path(command[0]).name == "hq-optuna"
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    printed = shape_of(result.output).splitlines()
    for line in shape_of(block("run output")).splitlines():
        # Progress lines come by the clock, and bits may differ where arithmetic does.
        start = line.split("#")[0].strip()
        if not start.startswith(("search", "layers ")) and "Conv2d" not in start:
            assert any(other.startswith(start) for other in printed), line


def test_the_readme_says_how_the_plain_commands_of_all_pages_are_reached() -> None:
    said = README.index("`. .venv/bin/activate`")
    assert README.index("<!-- run output -->") < said
    plain = re.search(r"(?<!bin/)hq-optuna (run|dashboard|status) ", README)
    assert plain is None or said < plain.start()


def test_every_file_the_readme_names_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_run_and_the_example_show_the_same_answer() -> None:
    shown, printed = block("run output"), block("example output")
    cost, share = re.search(r"^cost +(.*?), ([\d.]+) % of all-8-bit", shown, re.M).groups()  # type: ignore[union-attr]
    rise = re.search(r"^score +([\d.]+) nats", shown, re.M)[1]  # type: ignore[index]
    assert f"{cost}, {share} % of all-8-bit; predicted loss rise {rise} nats" in printed


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 92


def test_every_option_the_readme_names_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from hq_optuna.cli.app import app

    monkeypatch.setenv("COLUMNS", "200")
    for command, words in re.findall(r"hq-optuna (\w+)([^`\n]*)", README):
        shown = CliRunner().invoke(app, [command, "--help"]).output
        for option in re.findall(r"--[a-z-]+", words):
            assert option in shown
