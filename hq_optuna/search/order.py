"""In which order the candidates of a step are best shared among workers.

A candidate runs what is behind the first layer it changes, on what its incumbent left before it. So
workers that each stay in one part of the network compute little of an incumbent that another one
computes too. Which result counts, and the history, do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def by_depth(states: Sequence[tuple[int, ...]], origin: tuple[int, ...] | None) -> list[int]:
    """Return the slots of states, ordered by the first variable that they change."""

    def first(slot: int) -> int:
        pairs = zip(states[slot], origin or (), strict=origin is not None)
        return next((place for place, (bits, before) in enumerate(pairs) if bits != before), 0)

    return sorted(range(len(states)), key=lambda slot: (first(slot), slot))


def parts(n: int) -> list[float]:
    """Return for each of n workers where in the network it works: 0 at its beginning, 1 at its end.

    Example:
        >>> parts(3)
        [0.0, 0.5, 1.0]
    """
    return [place / max(n - 1, 1) for place in range(n)]


def nearest(items: Sequence[Item], part: float) -> Item:
    """Return the item of an ordered sequence at a part of it."""
    return items[round(part * (len(items) - 1))]


def share_of(items: Sequence[Item], place: int, n: int) -> Sequence[Item]:
    """Return what the worker at one of n places has of an ordered sequence, one each at least.

    Example:
        >>> [share_of("abcde", place, 2) for place in range(2)]
        ['abc', 'de']
        >>> [share_of("ab", place, 3) for place in range(3)]
        ['a', 'b', '']
    """
    n = max(min(n, len(items)), 1)
    return items[-(-place * len(items) // n) : -(-(place + 1) * len(items) // n)]
