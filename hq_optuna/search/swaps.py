"""Swap refinement: once the budget is met, raise here and lower there.

One-way lowering cannot take back an early move that later turned out dear. A swap raises one
variable by a notch, or two, and pays for it by lowering another, or two, so that the cost stays
within the budget. What each notch costs in score was measured on the way down, in every candidate
that was ever tried; swaps are ranked by that, and only the most promising are scored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hq_optuna.space.search_space import SearchSpace

MAX_PARTS = 30
"""Most variables that are looked at for raising, and for lowering, when they are combined."""

Notch = tuple[int, int]
"""A variable and the fewer bits of two neighbouring notches."""


def learn_rises(
    space: SearchSpace, scored: Sequence[tuple[tuple[int, ...], float, tuple[int, ...], float]]
) -> dict[Notch, float]:
    """Return what each notch was seen to add to the score, nats.

    Args:
        space: The search space.
        scored: For each candidate, in the order of the record: state and score of the incumbent it
            was made from, its own state and score.

    A candidate that changed one notch tells its rise directly, one that changed several tells the
    rise of the one that was unknown. Later candidates are nearer to the answer and overrule.
    """
    rises: dict[Notch, float] = {}
    for before, score_before, after, score_after in scored:
        signed: list[tuple[Notch, int]] = []
        for v, (a, b) in enumerate(zip(before, after, strict=True)):
            if a == b:
                continue
            bits = space.variables[v].bits
            low, high = sorted((bits.index(a), bits.index(b)), reverse=True)
            signed += [((v, bits[i]), 1 if b < a else -1) for i in range(high + 1, low + 1)]
        unknown = [entry for entry in signed if entry[0] not in rises]
        if len(signed) == 1:
            unknown = signed
        if len(unknown) == 1:
            notch, sign = unknown[0]
            known = sum(s * rises[n] for n, s in signed if n != notch)
            rises[notch] = sign * (score_after - score_before - known)
    return rises


def expected_rise(space: SearchSpace, rises: Mapping[Notch, float], notch: Notch) -> float:
    """Return the rise of a notch: as seen, or scaled from the nearest notch of its variable.

    Rounding error goes with 4⁻ᵇ, so the notch from a to b bits rises like 4⁻ᵇ − 4⁻ᵃ. Of a variable
    that was never tried nothing is known: 0, so that it is tried.
    """
    if notch in rises:
        return rises[notch]
    v, low = notch
    bits = space.variables[v].bits

    def weight(b: int) -> float:
        return 4.0**-b - 4.0 ** -bits[bits.index(b) - 1]

    seen = [b for b in bits if (v, b) in rises]
    if not seen:
        return 0.0
    nearest = min(seen, key=lambda b: (abs(b - low), b))
    return rises[v, nearest] * weight(low) / weight(nearest)


def propose_swaps(
    space: SearchSpace,
    state: Sequence[int],
    rises: Mapping[Notch, float],
    *,
    cost: Callable[[Sequence[int]], float],
    limit: float,
    score: float,
    n: int,
) -> tuple[tuple[int, ...], ...]:
    """Return the ``n`` states, at most, that promise the largest fall of the score.

    Tries one up, one up and one or two down, and two up and one down, each by one notch.

    Args:
        space: The search space.
        state: The incumbent, within the limit.
        rises: What notches were seen to add, from `learn_rises`.
        cost: Cost of a state.
        limit: The budget; no proposal costs more.
        score: The incumbent's score; a promise below a billionth of it is rounding.
        n: How many.

    Returns:
        States, the most promising first, ties by the state; empty where no swap helps.
    """
    now = cost(state)
    ups: list[_Part] = []
    downs: list[_Part] = []
    for v, bits in enumerate(state):
        choices = space.variables[v].bits
        place = choices.index(bits)
        for step, parts in ((-1, ups), (1, downs)):
            if not 0 <= place + step < len(choices):
                continue
            other = choices[place + step]
            rise = step * expected_rise(space, rises, (v, min(bits, other)))
            change = cost([other if u == v else b for u, b in enumerate(state)]) - now
            parts.append(_Part(rise, change, v, other))
    ups = sorted(ups)[:MAX_PARTS]
    downs = sorted(downs, key=lambda part: (part.rise / max(-part.cost, 1e-300), part))[:MAX_PARTS]
    pairs = list(itertools.combinations(downs, 2))
    groups: list[tuple[_Part, ...]] = [(up,) for up in ups]
    groups += [(up, down) for up in ups for down in downs]
    groups += [(up, *two) for up in ups for two in pairs]
    groups += [(*two, down) for two in itertools.combinations(ups, 2) for down in downs]
    promises = []
    for group in groups:
        rise = math.fsum(part.rise for part in group)
        # Costs of single changes add up unless they meet in a layer; the sum is only a sieve.
        apart = len({part.variable for part in group}) == len(group)
        fits = now + sum(part.cost for part in group) <= limit * 1.05
        if rise < -1e-9 * abs(score) and fits and apart:
            after = list(state)
            for part in group:
                after[part.variable] = part.bits
            promises.append((rise, tuple(after)))
    promises.sort()
    fitting = (after for _, after in promises if cost(after) <= limit)
    return tuple(itertools.islice(fitting, n))


class _Part(NamedTuple):
    """One notch up or down: its rise, its change of the cost, the variable, its bits after."""

    rise: float
    cost: float
    variable: int
    bits: int
