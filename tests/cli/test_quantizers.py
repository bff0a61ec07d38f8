"""Quantizers from the command line and from a study file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Command = Callable[..., Result]
RUN = Path("hq-optuna-runs/tiny")


def named() -> dict[str, str]:
    """Return layer → quantizer that the saved result names."""
    layers = json.loads((RUN / "result/recipe.json").read_text())["layers"]
    return {name: entry["weight_quantizer"].get("name", "") for name, entry in layers.items()}


def test_quantizers_are_given_as_globs_and_a_resumed_run_knows_them(
    study: Path, command: Command
) -> None:
    options = ("--quantizer", "[02]=midrise", "--quantizer", "4=dorefa")
    result = command("run", study, *options)
    assert result.exit_code == 0, result.output
    assert named() == {"0": "midrise", "2": "midrise", "4": "dorefa"}
    again = command("run", study)
    assert "This search was finished before; no candidate was scored anew." in again.output
    refused = command("run", study, "--quantizer", "4=uniform")
    assert refused.exit_code == 1
    assert "Changed: the quantizers" in " ".join(refused.output.split())


def test_status_and_report_say_which_layers_are_rounded_otherwise(
    study: Path, command: Command
) -> None:
    run = command("run", study, "--quantizer", "[02]=midrise", "--quantizer", "4=dorefa")
    words = "midrise: 0, 2; dorefa: 4; all others uniform"
    assert words in run.output
    assert f"weights   {words}" in command("status", study).output
    found = json.loads(command("status", study, "--json").output)
    assert found["quantizers"] == {"0": "midrise", "2": "midrise", "4": "dorefa"}
    report = command("report", study, "--format", "markdown").output
    assert f"| quantizers | {words} |" in report


def test_status_says_nothing_of_quantizers_where_all_are_uniform(
    study: Path, command: Command
) -> None:
    assert command("run", study).exit_code == 0
    assert "uniform;" not in command("status", study).output
    assert "midrise" not in command("status", study).output
    assert json.loads(command("status", study, "--json").output)["quantizers"] == {}


def test_a_study_file_may_choose_and_the_command_line_comes_first(
    study: Path, command: Command
) -> None:
    study.write_text(
        study.read_text().replace("SETTINGS = {", "SETTINGS = {'quantizers': {'0': 'midrise'}, ")
    )
    assert command("run", study).exit_code == 0
    assert named() == {"0": "midrise", "2": "", "4": ""}
    assert (
        command("run", study, "--name", "b", "--folder", RUN, "--quantizer", "2=dorefa").exit_code
        == 0
    )
    assert named() == {"0": "", "2": "dorefa", "4": ""}


@pytest.mark.parametrize(
    "given, says",
    [
        ("4=xnor", "one of uniform, binary, ternary, midrise, dorefa; got 'xnor'"),
        ("head=dorefa", "'head' matches no layer. The layers are: 0, 2, 4."),
        ("4=ternary", "'ternary' can do 2 bits, but the weights of layer '4' may have 4, 8 bits"),
        ("dorefa", "'dorefa' names no quantizer of a layer. Write 'layer3.*=midrise'."),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    study: Path, command: Command, given: str, says: str
) -> None:
    result = command("run", study, "--quantizer", given)
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert not (RUN / "study.db").exists()
