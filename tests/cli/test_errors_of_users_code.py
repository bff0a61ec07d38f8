"""An error of the user's own code keeps its traceback; one of ours is a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import Result

from hq_optuna.errors import calling_user_code

Command = Callable[..., Result]

FAILS_LATER = """

class Late(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x):
        Late.passes = getattr(Late, "passes", 0) + 1
        if Late.passes > {after}:
            raise {error}("the user's own words")
        return self.inner(x)


made = network


def network(seed_of_weights: int = 0) -> nn.Module:
    return Late(made(seed_of_weights))
"""


def failing_at(study: Path, after: int, error: str = "ValueError") -> None:
    study.write_text(study.read_text() + FAILS_LATER.format(after=after, error=error))


@pytest.mark.parametrize("error", ["ValueError", "OSError"])
def test_an_error_in_the_network_keeps_its_traceback_and_says_who_called(
    error: str, study: Path, command: Command
) -> None:
    failing_at(study, 15, error)
    result = command("run", study)
    assert result.exit_code == 1
    assert type(result.exception).__name__ == error  # as it is, and not an exit in one sentence
    assert "the user's own words" in str(result.exception)
    (note,) = result.exception.__notes__
    assert note.startswith("hq_optuna called the code that raised this from hq_optuna.")


def test_for_machines_it_is_a_json_object_too(study: Path, command: Command) -> None:
    failing_at(study, 15)
    result = command("run", study, "--json")
    assert isinstance(result.exception, ValueError)
    said = json.loads(result.stdout.splitlines()[-1])
    assert said == {"error": "ValueError", "message": "the user's own words"}


def test_an_error_of_ours_is_a_sentence(study: Path, command: Command) -> None:
    result = command("run", study, "--budget", "much")
    assert isinstance(result.exception, SystemExit)
    assert result.output.startswith("Error: 'much' is no budget.")
    assert result.output.count("\n") == 1


def raised(function: Callable[..., Any], *arguments: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return caught.value


def module(name: str, text: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(names)
    exec(text, made.__dict__)
    return made


def test_whose_code_raised_is_told_by_the_innermost_frames() -> None:
    user = module("theirs", "def f():\n    raise ValueError('x')\n\ndef g():\n    import json\n"
                  "    json.loads('{')\n")  # fmt: skip
    call = "def call(f):\n    return f()\n"
    ours = module("hq_optuna.scoring.fake", call)
    trusted = module("optuna.fake", "def f():\n    raise ValueError('x')\n")
    for function, caller in (
        (user.f, "hq_optuna.scoring.fake.call"),
        (user.g, "hq_optuna.scoring.fake.call"),  # though the standard library raised it
        (trusted.f, ""),
        (lambda: int("x"), "hq_optuna.scoring.fake.call"),  # of this test, which is not ours
    ):
        error = raised(ours.call, function)
        assert calling_user_code(error.__traceback__) == caller
    through = module("hq_optuna.scoring.other", "def back():\n    raise ValueError('x')\n")
    error = raised(ours.call, lambda: through.back())
    assert calling_user_code(error.__traceback__) == ""  # the user's code called ours
    assert "theirs" not in sys.modules
