"""What the command line makes of a study file, and what it says of one that is not right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Command = Callable[..., Result]

AROUND = """

def loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)
"""

RISE = """

def output_rise(outputs, moved):
    return (moved - outputs).square().sum()
"""


@pytest.mark.parametrize(
    ("more", "scorer"), [(AROUND, "diagonal"), (AROUND + RISE, "gauss_newton")]
)
def test_a_loss_that_is_not_known_is_warned_of_unless_its_rise_is_given(
    study: Path, command: Command, more: str, scorer: str
) -> None:
    study.write_text(study.read_text() + more)
    result = command("run", study, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["settings"]["scorer"] == scorer
    warned = "Warning: The scorer is 'diagonal'" in " ".join(result.stderr.split())
    assert warned == (scorer == "diagonal")
