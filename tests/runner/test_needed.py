"""A candidate that takes long ends soon after its work is not needed any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from hq_optuna.runner import needed
from hq_optuna.runner.needed import LOOK_EVERY_S, while_needed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(needed.time, "monotonic", lambda: now[0])
    return now


def test_it_is_asked_between_batches_but_not_between_all(clock: list[float]) -> None:
    asked: list[float] = []
    over = [False]

    def should_prune() -> bool:
        asked.append(clock[0])
        return over[0]

    before = lambda: None  # noqa: E731
    scorer: Any = SimpleNamespace(between_batches=before)
    ends = optuna.TrialPruned("no longer needed")
    watched = while_needed(scorer, lambda: not should_prune(), ends)
    with pytest.raises(optuna.TrialPruned, match="no longer needed"), watched:
        for batch in range(100):
            clock[0] += 0.5
            over[0] = batch >= 10
            scorer.between_batches()
    assert asked == [LOOK_EVERY_S, 2 * LOOK_EVERY_S, 3 * LOOK_EVERY_S]
    assert scorer.between_batches is before
