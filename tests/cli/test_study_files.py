"""What the command line makes of a study file, and what it says of one that is not right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from hq_optuna.errors import StudyFileError

Command = Callable[..., Result]

AROUND = """

def loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)
"""

RISE = """

def rise(outputs, moved):
    return (moved - outputs).square().sum()
"""


@pytest.mark.parametrize(
    ("more", "scorer"), [(AROUND, "hessian_trace"), (AROUND + RISE, "gauss_newton")]
)
def test_a_loss_that_is_not_known_is_warned_of_unless_its_rise_is_given(
    study: Path, command: Command, more: str, scorer: str
) -> None:
    study.write_text(study.read_text() + more)
    result = command("run", study, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["settings"]["scorer"] == scorer
    warned = "Warning: Nothing is known of this loss" in " ".join(result.stderr.split())
    assert warned == (scorer == "hessian_trace")


OPTION = '''

def validation(quick: int = 32):
    """Return data.

    Args:
        quick: Images that are looked at.
    """
    return _data(quick, 2)
'''


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--budgte", "--budget"), ("--quik", "--quick"), ("--no-refien", "--no-refine")],
)
def test_a_wrong_option_leads_to_the_one_that_was_meant(
    study: Path, command: Command, typed: str, meant: str
) -> None:
    study.write_text(study.read_text() + OPTION)
    result = command("run", study, typed, "1")
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert f"has no option '{typed}'. Did you mean {meant}? Its options:" in said
    assert "--quick INT Images that are looked at." in said
    assert "hq-optuna run --help" in said


def test_an_option_that_is_like_no_other_is_not_guessed(study: Path, command: Command) -> None:
    assert "Did you mean" not in command("run", study, "--xyzzy", "1").output


@pytest.mark.parametrize(("set_to", "kind"), [("", SystemExit), ("1", StudyFileError)])
def test_the_traceback_of_an_error_is_shown_on_request(
    study: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    set_to: str,
    kind: type[BaseException],
) -> None:
    monkeypatch.setenv("HQ_OPTUNA_TRACEBACK", set_to)
    study.write_text(study.read_text().replace("return net", "return net / 0"))
    result = command("run", study)
    assert result.exit_code == 1
    assert type(result.exception) is kind
    if kind is StudyFileError:
        assert isinstance(result.exception.__cause__, TypeError)  # what happened in the study
