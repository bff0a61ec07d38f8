"""Options that would be without effect are refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Command = Callable[..., Result]


@pytest.mark.parametrize(
    ("name", "device", "said"),
    [
        ("run", "gpu", "The network cannot be moved to 'gpu': Expected one of cpu, cuda"),
        ("worker", "cuda:9", "The network cannot be moved to 'cuda:9': "),
        ("launch", "cuda:1", "Each worker sees one GPU, its own; got --device cuda:1."),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    name: str, device: str, said: str, study: Path, command: Command
) -> None:
    create = ["--create"] if name == "worker" else []
    result = command(name, study, "--device", device, *create)
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
    assert not Path("hq-optuna-runs/tiny/study.db").exists()
