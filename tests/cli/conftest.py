from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hq_optuna.cli.app import app

STUDY = '''
"""A tiny network on noise."""

import torch
from torch import nn

SETTINGS = {"bits": (8, 4, 2), "budget": "0.3 bops", "n_candidates": 2, "pin_first_last": None,
            "measure_candidates": True}  # a forward pass each, so that tests can interrupt them


def network(seed_of_weights: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed_of_weights)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(),
                        nn.Linear(16, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return net


def calibration(n: int = 16):
    return _data(n, 1)


def validation():
    return _data(32, 2)


def test():
    return _data(48, 3)


def _data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.arange(n) % 3
'''


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study file in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.py"
    path.write_text(STUDY)
    return path


@pytest.fixture
def command() -> Callable[..., Result]:
    """Run `hq-optuna` in this process."""

    def call(*arguments: Any) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call
