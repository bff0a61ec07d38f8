"""Every command in docs/guides/workers.md is one the command line understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hq_optuna.cli.app import load

TEXT = (Path(__file__).parents[2] / "docs" / "guides" / "workers.md").read_text(encoding="utf-8")
OF_STUDY = ["--data", "/other/path"]
"""What the page names as an option of a study file."""


def shell_commands() -> list[list[str]]:
    """Return the words of every line of the page's code and text that calls hq-optuna."""
    lines = [
        line.strip()
        for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
        for line in block.splitlines()
    ]
    lines += re.findall(r"`(hq-optuna [^`]+)`", TEXT)
    calls = [line.removeprefix("exec ") for line in lines]
    return [shlex.split(line)[1:] for line in calls if line.startswith("hq-optuna ")]


def yaml_commands() -> list[list[str]]:
    found = re.findall(r"command: \[(.*?)\]", TEXT)
    return [[word.strip() for word in line.split(",")][1:] for line in found]


COMMANDS = shell_commands() + yaml_commands()


def test_the_page_has_commands_of_every_kind() -> None:
    assert {command[0] for command in COMMANDS} == {"run", "worker", "launch", "status"}
    assert len(COMMANDS) >= 10
    assert len(yaml_commands()) == 1


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_is_understood(words: list[str]) -> None:
    context = load(words[0]).make_context(words[0], list(words[1:]))
    assert context.params["study"]
    assert context.args in ([], OF_STUDY)


def test_options_that_the_page_names_are_options() -> None:
    known = {
        option
        for name in ("run", "worker", "launch", "status")
        for parameter in load(name).params
        for option in parameter.opts
    }
    named = set(re.findall(r"`(--[a-z-]+)", TEXT)) - {"--data"}
    assert named
    assert named <= known


def test_the_job_is_yaml_that_kubernetes_would_read() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML, which distributed brings")
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    job = yaml.safe_load(text)
    assert job["kind"] == "Job"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["hq-optuna", "worker"]
    assert container["command"][-1] == "0.25 bops"
    assert container["env"][0]["name"] == "HQ_OPTUNA_STORAGE"


def test_every_file_the_page_names_exists() -> None:
    folder = Path(__file__).parents[2] / "docs" / "guides"
    for target in re.findall(r"\]\((?!http)([^)#]+)", TEXT):
        assert (folder / target).exists(), target
