"""A search on a small convolutional network and made-up data: a fraction of a second."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import Tensor, nn

import hq_optuna as hq
from hq_optuna.protocol.history import read_history

optuna.logging.set_verbosity(optuna.logging.WARNING)

LAYERS = ("first", "middle", "last")
BUDGET = hq.Budget.fraction(bops=0.3)


class Network(nn.Module):
    """Three layers and a batch-norm, in training mode as users leave their networks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.middle = nn.Conv2d(4, 4, 3, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(16, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
            self.norm.running_mean.copy_(torch.randn(4, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.last(self.dropout(self.middle(x).relu().flatten(1)))


def data(n: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 7, 7, generator=generator), torch.arange(n) % 3


def search(**options: Any) -> hq.BitSearch:
    """Return a search of all three layers at 8, 4 and 2 bits, down to 30 % of the BOPs."""
    base = {"bits": (8, 4, 2), "pin_first_last": None, "budget": BUDGET}
    return hq.BitSearch(**{"model": Network(), "calibration": data(), **base, **options})


def facts(study: optuna.Study) -> list[Any]:
    """Return what must not depend on interruptions, workers and storages."""
    found = read_history(study)
    candidates = {
        (c.step, c.slot, c.state, c.score, c.score_weights, c.score_activations, c.calibration_loss)
        for c in found.candidates
        if c.counted
    }
    records = [(r.step, r.config, r.winner.step, r.winner.slot) for r in found.records]
    return [sorted(candidates), records]


def dump(path: Path) -> list[str]:
    """Return every table of a SQLite file as text."""
    with sqlite3.connect(path) as connection:
        return list(connection.iterdump())
