"""Candidates of a step are shared so that each worker stays in a part of the network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_optuna.search.order import by_depth, nearest, parts, share_of


def test_slots_are_ordered_by_the_first_variable_they_change():
    origin = (8, 8, 8)
    states = [(8, 8, 6), (6, 8, 8), (8, 8, 8), (8, 6, 10), (6, 8, 6)]
    assert by_depth(states, origin) == [1, 2, 4, 3, 0]
    assert by_depth(states[:2], None) == [0, 1]  # step 0 has no origin


@pytest.mark.parametrize(
    ("n", "expected"), [(0, []), (1, [0.0]), (2, [0.0, 1.0]), (3, [0.0, 0.5, 1.0])]
)
def test_workers_are_spread_over_the_network(n, expected):
    assert parts(n) == expected


def test_the_nearest_item_of_a_part():
    assert [nearest("abcde", part) for part in (0.0, 0.3, 0.5, 1.0)] == ["a", "b", "c", "e"]


@given(st.integers(0, 40), st.integers(1, 50))
def test_shares_are_disjoint_whole_and_as_equal_as_can_be(n, crew):
    shares = [share_of(range(n), place, crew) for place in range(crew)]
    assert [item for share in shares for item in share] == list(range(n))
    sizes = {len(share) for share in shares[: min(n, crew)]}
    assert not sizes or max(sizes) - min(sizes) <= 1
