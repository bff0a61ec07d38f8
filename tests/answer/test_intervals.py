"""Intervals of accuracies and of their differences."""

from __future__ import annotations

import math

import pytest

from hq_optuna.answer.intervals import paired, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17: 857, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_an_accuracy_is_the_published_one(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def coverage(lost: float, gained: float, n: int) -> float:
    """Return how often the interval holds the true difference, by enumeration of all outcomes."""
    total = 0.0
    for i in range(n + 1):
        for j in range(n + 1 - i):
            low, high = paired(i, j, n)
            if low <= gained - lost <= high:
                ways = math.comb(n, i) * math.comb(n - i, j)
                total += ways * lost**i * gained**j * (1 - lost - gained) ** (n - i - j)
    return total


@pytest.mark.parametrize("n", [30, 60])
@pytest.mark.parametrize(
    ("lost", "gained"), [(0.3, 0.3), (0.1, 0.1), (0.15, 0.05), (0.05, 0.02), (0.02, 0.0)]
)
def test_the_interval_of_a_difference_holds_the_true_one_as_often_as_it_says(lost, gained, n):
    # Few samples cannot give 95 % exactly; near 0 the interval is too wide rather than too narrow.
    assert 0.94 <= coverage(lost, gained, n) <= 1.0
    if min(lost, gained) >= 0.1:
        assert coverage(lost, gained, n) <= 0.97


def test_the_difference_of_exchanged_networks_is_the_other_way_round():
    low, high = paired(7, 2, 100)
    assert paired(2, 7, 100) == pytest.approx((-high, -low))


def test_no_difference_leaves_the_range_of_accuracies():
    assert paired(1, 0, 1)[0] >= -1
    assert paired(0, 1, 1)[1] <= 1
