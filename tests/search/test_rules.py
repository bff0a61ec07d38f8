"""Winner rules on numbers one can check in the head."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_optuna.search.rules import RULES, choose, keeps
from tests.reference.progressive import rank


def pick(rule: Any, scores: list[float], costs: list[float], **at: float) -> int:
    where = {"incumbent_score": 0.0, "incumbent_cost": 100.0, "limit": -math.inf, **at}
    return choose(rule, scores, costs, **where)


def test_min_picks_the_smallest_score_whatever_the_cost() -> None:
    assert pick("min", [3.0, 1.0, 2.0], [1.0, 99.0, 50.0]) == 1


def test_ratio_picks_the_smallest_rise_per_cost_saved() -> None:
    # 1/2, 3/10 and 2/5 nats per unit.
    assert pick("ratio", [1.0, 3.0, 2.0], [98.0, 90.0, 95.0]) == 1


def test_the_rise_is_measured_from_the_incumbent_not_from_zero() -> None:
    # Rises per saving 1/10 and 0.05/1; whole scores per saving, 1001/10 and 1000.05/1, would
    # choose the other.
    assert pick("ratio", [1001.0, 1000.05], [90.0, 99.0], incumbent_score=1000.0) == 1


def test_what_is_saved_beyond_the_budget_is_not_counted() -> None:
    # Needed: 10. Candidate 0 saves 80 for 4 (0.05 per unit, but 0.4 per needed unit),
    # candidate 1 saves 10 for 3 (0.3 per unit).
    scores, costs = [4.0, 3.0], [20.0, 90.0]
    assert pick("ratio", scores, costs) == 0
    assert pick("ratio", scores, costs, limit=90.0) == 1


def test_a_saving_that_ends_at_the_budget_counts_in_full() -> None:
    assert pick("ratio", [4.0, 2.1], [80.0, 90.0], limit=80.0) == 0


def test_an_incumbent_within_the_budget_counts_savings_in_full() -> None:
    # Never needed by the search, which has stopped, but a negative need must not turn the signs.
    assert pick("ratio", [4.0, 3.0], [20.0, 90.0], limit=200.0) == 0
    assert pick("ratio", [4.0, 3.0], [20.0, 90.0], limit=100.0) == 0


@pytest.mark.parametrize("cost", [100.0, 130.0])
def test_a_candidate_that_saves_nothing_loses_even_with_the_better_score(cost: float) -> None:
    assert pick("ratio", [-5.0, 7.0], [cost, 99.0]) == 1


def test_when_nothing_saves_the_first_candidate_wins() -> None:
    assert pick("ratio", [9.0, 1.0], [100.0, 101.0]) == 0


@pytest.mark.parametrize("rule", RULES)
def test_ties_go_to_the_lowest_index(rule: str) -> None:
    assert pick(rule, [2.0, 1.0, 1.0, 1.0], [95.0, 95.0, 95.0, 95.0]) == 1


def test_equal_ratios_of_different_sizes_are_a_tie() -> None:
    assert pick("ratio", [2.0, 1.0], [80.0, 90.0]) == 0
    assert pick("ratio", [1.0, 2.0], [90.0, 80.0]) == 0


def test_a_falling_score_beats_every_rise() -> None:
    assert pick("ratio", [0.1, -0.1], [1.0, 99.0]) == 1


def test_of_two_that_lower_the_score_the_one_that_also_saves_more_wins() -> None:
    where = {"incumbent_score": 0.0, "incumbent_cost": 100.0, "limit": -math.inf}
    assert choose("ratio", [-0.001, -0.05], [99.0, 0.0], **where) == 1
    assert choose("ratio", [-0.05, -0.05, 0.0], [50.0, 40.0, 0.0], **where) == 1


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rule is one of min, ratio; got 'best'"):
        pick("best", [1.0], [1.0])


def test_scores_and_costs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pick("ratio", [1.0, 2.0], [1.0])


WHOLE = st.integers(-1000, 1000)


@given(
    st.lists(st.tuples(WHOLE, WHOLE), min_size=1, max_size=8),
    WHOLE,
    WHOLE,
    st.none() | WHOLE,
    st.sampled_from(RULES),
)
def test_the_winner_is_the_one_exact_fractions_choose(
    candidates: list[tuple[int, int]], score: int, cost: int, limit: int | None, rule: Any
) -> None:
    # Quotients of whole numbers below 2001 round to different floats when they differ.
    keys: list[tuple[int, Fraction]] = [
        rank(rule, s, c, score_before=score, cost_before=cost, limit=limit) for s, c in candidates
    ]
    winner = pick(
        rule,
        [float(s) for s, _ in candidates],
        [float(c) for _, c in candidates],
        incumbent_score=float(score),
        incumbent_cost=float(cost),
        limit=-math.inf if limit is None else float(limit),
    )
    assert winner == keys.index(min(keys))


@pytest.mark.parametrize("before", [0.5, -0.5, 0.0])
def test_a_training_is_kept_where_it_lowers_the_score_by_more_than_machines_differ(
    before: float,
) -> None:
    assert keeps(before - 1e-5, before)
    assert not keeps(before, before)
    assert not keeps(math.nextafter(before, -math.inf), before)  # what an untrained record has
    assert not keeps(before + 1e-5, before)
    assert not keeps(math.nan, before) and not keeps(math.inf, before)
