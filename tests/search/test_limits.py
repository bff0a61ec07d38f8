from __future__ import annotations

import json

import numpy as np
import pytest

from hq_optuna.search import Limits


def test_a_step_is_begun_only_if_all_of_it_is_allowed() -> None:
    limits = Limits(max_evaluations=9)
    assert limits.forbid_step(8, 1, 1) is None
    assert limits.forbid_step(8, 2, 1) == "at most 9 evaluations (--max-evaluations)"
    trials = Limits(max_trials=11)  # the start and its record, 8 candidates and their record
    assert trials.forbid_step(8, 1, 1) is None
    assert trials.forbid_step(9, 1, 1) == "at most 11 trials (--max-trials)"
    assert Limits().forbid_step(10**9, 10**9, 10**9) is None


def test_seconds_end_at_their_limit() -> None:
    assert Limits(max_seconds=2).forbid_second(1.99) is None
    assert Limits(max_seconds=2).forbid_second(2.0) == "at most 2 s of work (--max-seconds)"
    assert Limits(max_evaluations=1).forbid_second(1e9) is None


def test_limits_are_raised_and_what_is_lowered_is_named() -> None:
    stored, given = Limits(max_trials=10, max_seconds=5), Limits(max_trials=7, max_evaluations=3)
    assert stored.raised_to(given) == Limits(10, 3, 5)
    assert given.raised_to(stored) == Limits(10, 3, 5)
    assert stored.lowered_by(given) == ("max_trials",)
    assert given.lowered_by(stored) == ()


@pytest.mark.parametrize("limits", [Limits(), Limits(3), Limits(1, 2, 0.5)])
def test_limits_come_back_from_json(limits: Limits) -> None:
    assert Limits.from_json(limits.to_json()) == limits
    assert Limits.from_json({**limits.to_json(), "of a later version": 1}) == limits
    assert Limits.from_json(None) == Limits()


@pytest.mark.parametrize("bad", [{"max_trials": 0}, {"max_seconds": -1.0}])
def test_limits_are_positive(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive number; got"):
        Limits(**bad)  # type: ignore[arg-type]


def test_limits_are_numbers_of_any_kind_and_kept_as_plain_ones() -> None:
    limits = Limits(np.int64(3), np.int32(2), np.float32(0.5))  # type: ignore[arg-type]
    assert limits == Limits(3, 2, 0.5)
    assert json.dumps(limits.to_json()) == json.dumps(Limits(3, 2, 0.5).to_json())
