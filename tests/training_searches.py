"""Searches that train their winners, and what of one must not depend on who did it."""

from __future__ import annotations

from typing import Any

import optuna

import hq_optuna as hq
from hq_optuna.protocol.history import read_history
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.training import TrainingSettings
from hq_optuna.training.plan import TrainingPlan
from tests.searches import data
from tests.searches import search as any_search

TRAIN = data(40, seed=5)
SHORT = TrainingSettings(
    epochs=2,
    batch_size=8,
    learning_rate=2e-3,
    warmup_epochs=0,
)


def search(**options: Any) -> hq.BitSearch:
    """Return a search that goes on to bits at which training has something to win."""
    return any_search(**{"budget": hq.Budget.fraction(bops=0.1), **options})


def plan(**options: Any) -> TrainingPlan:
    return TrainingPlan(**{"data": TRAIN, "every": 1, "settings": SHORT, "final": SHORT, **options})


def log_of(study: optuna.Study) -> Any:
    assert isinstance(study.sampler, ProgressiveBitSampler)
    return study.sampler.log(study)


def said(study: optuna.Study) -> list[Any]:
    """Return what must not depend on who did it: bits, scores to the bit, hashes of weights."""
    found = read_history(study)
    candidates = sorted(
        (c.step, c.slot, c.state, c.score.hex()) for c in found.candidates if c.counted
    )
    return [
        candidates,
        [
            (r.step, r.winner.step, r.winner.slot, r.training and r.training.get("weights"))
            for r in found.records
        ],
        [(c.incumbent.score.hex(), c.trained) for c in log_of(study).closed],
    ]
