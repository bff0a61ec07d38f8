"""Swap refinement: once the budget is met, raise here and lower there.

One-way lowering cannot take back an early move that later turned out dear. A swap raises one
variable by a notch, or two, and pays for it by lowering another, or two, so that the cost stays
within the budget. What each notch costs in score was measured on the way down, in every candidate
that was ever tried; swaps are ranked by that, and only the most promising are scored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hq_optuna.space.search_space import SearchSpace

MAX_PARTS = 30
"""Most variables that are looked at for raising, and for lowering, when they are combined."""

SIEVE, EXACT = 0.05, 1e-9
"""Shares of a limit by which sums of changes may be over it: where they are a guess, or exact."""

Notch = tuple[int, int]
"""A variable and the fewer bits of two neighbouring notches."""


def learn_rises(
    space: SearchSpace, scored: Sequence[tuple[tuple[int, ...], float, tuple[int, ...], float]]
) -> dict[Notch, float]:
    """Return what each notch was seen to add to the score, nats.

    ``scored`` holds of each candidate, in the order of the record: state and score of the incumbent
    it was made from, its own state and score. A candidate that changed one notch tells its rise
    directly, one that changed several tells the rise of the one that was unknown. Later candidates
    are nearer to the answer and overrule.
    """
    rises: dict[Notch, float] = {}
    both = np.array([(before, after) for before, _, after, _ in scored], dtype=int)
    both = both.reshape(len(scored), 2, len(space.variables))  # also where nothing is scored
    changed: list[list[int]] = [[] for _ in scored]
    for place, v in np.argwhere(both[:, 0] != both[:, 1]).tolist():
        changed[place].append(v)
    for (before, score_before, after, score_after), moved in zip(scored, changed, strict=True):
        signed: list[tuple[Notch, int]] = []
        for v in moved:
            a, b = before[v], after[v]
            bits = space.variables[v].bits
            low, high = sorted((bits.index(a), bits.index(b)), reverse=True)
            down = bits.index(b) > bits.index(a)
            signed += [((v, bits[i]), 1 if down else -1) for i in range(high + 1, low + 1)]
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
    variable, bits = space.variables[v], space.variables[v].bits

    def weight(b: int) -> float:
        return variable.error(b) - variable.error(bits[bits.index(b) - 1])

    seen = [b for b in bits[1:] if (v, b) in rises]
    if not seen:
        return 0.0
    place = bits.index(low)
    near = (lambda b: abs(bits.index(b) - place)) if variable.part == "pair" else None
    nearest = min(seen, key=lambda b: (near(b) if near else abs(b - low), b))
    return rises[v, nearest] * weight(low) / weight(nearest) if weight(nearest) else 0.0


def propose_swaps(
    space: SearchSpace,
    state: Sequence[int],
    rises: Mapping[Notch, float],
    *,
    costs: Callable[[Sequence[int]], tuple[float, ...]],
    limits: Sequence[float],
    score: float,
    n: int,
    additive: Sequence[bool] = (),
) -> tuple[tuple[int, ...], ...]:
    """Return the ``n`` states, at most, that promise the largest fall of the score, best first.

    Tries one up, one up and one or two down, and two up and one down, each by one notch. No
    proposal costs more than ``limits``, one for each of ``costs``; ``additive`` says which of these
    are sums over layers, which saves counting most of those that are over. A promise below a
    billionth of the incumbent's score is rounding; ties go by the state.
    """
    now = costs(state)
    ups = sorted(_parts(space, state, rises, costs, step=-1))[:MAX_PARTS]
    downs = _parts(space, state, rises, costs, step=1)

    def price(part: _Part) -> float:
        saved = -part.costs[0] if len(now) == 1 else -_shares(part.costs, limits)
        return part.rise / max(saved, 1e-300)

    downs = sorted(downs, key=lambda part: (price(part), part))[:MAX_PARTS]
    promises = []
    least = -1e-9 * abs(score)
    known = additive or [False] * len(limits)
    for group in _promising(space, ups, downs, now, limits, known, least):
        after = list(state)
        for part in group:
            after[part.variable] = part.bits
        promises.append((math.fsum(part.rise for part in group), tuple(after)))
    promises = sorted(promise for promise in promises if promise[0] < least)
    fitting = (
        after
        for _, after in promises
        if all(cost <= limit for cost, limit in zip(costs(after), limits, strict=True))
    )
    return tuple(itertools.islice(fitting, n))


def _shares(costs: Sequence[float], limits: Sequence[float]) -> float:
    """Return the sum of costs as shares of their limits."""
    return math.fsum(cost / limit for cost, limit in zip(costs, limits, strict=True))


class _Part(NamedTuple):
    """One notch up or down: its rise, its change of each cost, the variable, its bits after."""

    rise: float
    costs: tuple[float, ...]
    variable: int
    bits: int


def _parts(
    space: SearchSpace,
    state: Sequence[int],
    rises: Mapping[Notch, float],
    costs: Callable[[Sequence[int]], tuple[float, ...]],
    step: int,
) -> list[_Part]:
    """Return every variable's next notch up (``step`` −1) or down (1) that there is."""
    parts, now = [], costs(state)
    for v, bits in enumerate(state):
        choices = space.variables[v].bits
        place = choices.index(bits) + step
        if 0 <= place < len(choices):
            lower = choices[max(place, place - step)]
            rise = step * expected_rise(space, rises, (v, lower))
            after = [*state[:v], choices[place], *state[v + 1 :]]
            change = tuple(c - n for c, n in zip(costs(after), now, strict=True))
            parts.append(_Part(rise, change, v, choices[place]))
    return parts


def _promising(
    space: SearchSpace,
    ups: Sequence[_Part],
    downs: Sequence[_Part],
    now: Sequence[float],
    limits: Sequence[float],
    additive: Sequence[bool],
    least: float,
) -> Iterator[tuple[_Part, ...]]:
    """Yield the groups of different variables whose rises add up to less than ``least``.

    Left out are those whose costs add up to more than a limit. They do add up unless changes meet
    in a layer, or the cost is no sum: then what they add up to is only a sieve.
    """
    parts = [*ups, *downs]
    if not parts:
        return
    groups = _groups(len(ups), len(downs))  # (G, 3); −1: none
    there = groups >= 0
    variables = np.array([part.variable for part in parts])[groups]
    reads = np.array(
        [[v in each.layers for v in space.start] for each in space.variables], dtype=int
    )
    shares = reads @ reads.T > 0  # variables that meet in a layer
    passed = np.ones(len(groups), dtype=bool)
    meets = np.zeros(len(groups), dtype=bool)
    for i, j in itertools.combinations(range(3), 2):
        both = there[:, i] & there[:, j]
        passed &= ~both | (variables[:, i] != variables[:, j])
        meets |= both & shares[variables[:, i], variables[:, j]]

    def total(values: Sequence[float]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.where(there, np.array(values)[groups], 0.0).sum(1)
        return found

    rises = [part.rise for part in parts]
    slack = 1e-12 * max(map(abs, rises))  # of rounding: who asked adds up exactly
    passed &= total(rises) < least + slack
    for i, limit in enumerate(limits):
        cost = now[i] + total([part.costs[i] for part in parts])
        over = ~meets & (cost > limit * (1 + EXACT)) if additive[i] else np.zeros_like(meets)
        passed &= (cost <= limit * (1 + SIEVE)) & ~over
    for group in groups[passed]:
        yield tuple(parts[place] for place in group if place >= 0)


def _groups(n_ups: int, n_downs: int) -> NDArray[np.intp]:
    """Return one up, one up and one or two down, two up and one down; ups come before downs."""
    ups, downs, pairs = range(n_ups), range(n_ups, n_ups + n_downs), itertools.combinations
    found = [(up, -1, -1) for up in ups]
    found += [(up, down, -1) for up, down in itertools.product(ups, downs)]
    found += [(up, *two) for up, two in itertools.product(ups, list(pairs(downs, 2)))]
    found += [(*two, down) for two, down in itertools.product(pairs(ups, 2), downs)]
    return np.array(found, dtype=np.intp).reshape(-1, 3)
