"""Exact allocation: the assignment with the least additive score within a budget.

One choice per block of variables, as HAWQ-V3 (Yao et al., 2021) allocates bits: a multiple-choice
knapsack. The score must be a sum over variables and the cost a sum over layers. Variables that meet
in a layer (its weights and its activations, or tied layers) form one block, because the cost of a
layer depends on both.

Solved by dynamic programming over the blocks (Kellerer, Pferschy, Pisinger, Knapsack Problems,
2004, chapter 11): partial assignments that another one beats in cost and rise are dropped, and so
are those that cannot beat a greedy assignment even if the rest could be mixed (the bound of linear
programming). SciPy's `milp` gives the same assignments, and tests hold this against it; but it is
slower, its gap is absolute, its limit a tolerance, and ties depend on its version. It is used where
several limits hold at once, see `several.SeveralLimits`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.cost import LayerCost
from hq_optuna.space.search_space import SearchSpace

MAX_CHOICES = 20_000
"""Most combinations of bits within one block that are enumerated."""

Rises = Sequence[Mapping[int, float]]
"""For each variable of a space: bits → predicted loss rise, nats."""


class _Choice(NamedTuple):
    """One combination of bits of a block's variables: its cost, its rise, the bits."""

    cost: float
    rise: float
    bits: tuple[int, ...]


class Allocation:
    """Exact allocation for several limits: what does not depend on the limit is computed once.

    ``rises`` are those of each variable at each of its bits, ``layer_cost`` is the cost of one
    layer at given bits. Raises `ValueError` where a block of variables has more than `MAX_CHOICES`
    combinations.
    """

    def __init__(self, space: SearchSpace, rises: Rises, layer_cost: LayerCost) -> None:
        self.space = space
        self._blocks = blocks_of(space)
        touched = {n for block in self._blocks for v in block for n in space.variables[v].layers}
        self._fixed = math.fsum(
            layer_cost(n, b) for n, b in space.start.items() if n not in touched
        )
        fronts = [_front(space, block, rises, layer_cost) for block in self._blocks]
        # Blocks with much to spend come first, so that little is left open early.
        self._order = sorted(range(len(fronts)), key=lambda b: (-fronts[b][0].cost, b))
        self._fronts = [fronts[b] for b in self._order]
        pieces = _pieces(self._fronts)
        self._rest = [
            _Relaxed(self._fronts[level:], [p for p in pieces if p.block >= level], level)
            for level in range(len(fronts) + 1)
        ]

    def best(self, limit: float) -> tuple[int, ...] | None:
        """Return the bits of each variable with the least total rise; ``None`` where nothing fits.

        ``limit`` is what all layers together may cost, fixed ones included. The same arguments give
        the same bits on every machine, also among equal totals.
        """
        room = limit - self._fixed
        known = self._rest[0].rounded(room)
        if known is None:
            return None
        known = _filled(self._fronts, room, known)
        found = self._solve(room, _total(known))
        if found is not None and _total(found) < _total(known):
            known = found
        state = list(self.space.top)
        for index, choice in zip(self._order, known, strict=True):
            for v, b in zip(self._blocks[index], choice.bits, strict=True):
                state[v] = b
        return tuple(state)

    def _solve(self, room: float, best: float) -> list[_Choice] | None:
        """Return the optimum, or ``None`` where nothing is better than ``best``."""
        costs, rises = np.zeros(1), np.zeros(1)
        trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
        for front, rest in zip(self._fronts, self._rest[1:], strict=True):
            cost = np.add.outer(costs, [choice.cost for choice in front])  # (states, choices)
            rise = np.add.outer(rises, [choice.rise for choice in front])
            before, choice = np.nonzero(rise + rest.least_rise(room - cost) < best)
            if not len(before):
                return None
            cost, rise = cost[before, choice], rise[before, choice]
            # Of partial assignments only those stay that no other beats in cost and rise.
            ranked = np.lexsort((rise, cost))
            least = np.minimum.accumulate(rise[ranked])
            kept = ranked[np.concatenate(([True], least[1:] < least[:-1]))]
            costs, rises = cost[kept], rise[kept]
            trail.append((before[kept], choice[kept]))
        at = int(np.argmin(rises))
        found = []
        for front, (before, choice) in zip(reversed(self._fronts), reversed(trail), strict=True):
            found.append(front[choice[at]])
            at = int(before[at])
        found.reverse()
        return found if math.fsum(c.cost for c in found) <= room else None


def _total(chosen: Sequence[_Choice]) -> float:
    return math.fsum(choice.rise for choice in chosen)


def choices_of(space: SearchSpace, block: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Return all combinations of bits of a block's variables; refuse too many of them."""
    n = math.prod(len(space.variables[v].bits) for v in block)
    if n > MAX_CHOICES:
        raise ValueError(
            f"{n} combinations of bits in one group of {len(block)} variables are too many to "
            "enumerate; allow fewer bits or tie fewer layers."
        )
    return itertools.product(*(space.variables[v].bits for v in block))


def _front(
    space: SearchSpace, block: Sequence[int], rises: Rises, layer_cost: LayerCost
) -> list[_Choice]:
    """Return a block's choices that no other beats in cost and rise, the least rise first."""
    choices = [
        _Choice(
            cost_of_block(space, block, bits, layer_cost),
            math.fsum(rises[v][b] for v, b in zip(block, bits, strict=True)),
            bits,
        )
        for bits in choices_of(space, block)
    ]
    front: list[_Choice] = []
    for choice in sorted(choices, key=lambda c: (c.rise, c.cost)):
        if not front or choice.cost < front[-1].cost:
            front.append(choice)
    return front


def _filled(
    fronts: Sequence[Sequence[_Choice]], room: float, chosen: Sequence[_Choice]
) -> list[_Choice]:
    """Return the assignment with what room is left spent on the largest falls that fit."""
    now = list(chosen)
    while True:
        spare = room - math.fsum(choice.cost for choice in now)
        better = [
            (choice.rise - now[block].rise, block, place)
            for block, front in enumerate(fronts)
            for place, choice in enumerate(front)
            if choice.rise < now[block].rise and choice.cost - now[block].cost <= spare
        ]
        if not better:
            return now
        _, block, place = min(better)
        now[block] = fronts[block][place]
        if math.fsum(choice.cost for choice in now) > room:  # by rounding
            return list(chosen)


class _Piece(NamedTuple):
    """From one choice of a block to the next on its lower hull; sorts by rise per saving."""

    rise_per_saving: float
    block: int
    place: int
    before: _Choice
    after: _Choice


def _pieces(fronts: Sequence[Sequence[_Choice]]) -> list[_Piece]:
    """Return the pieces of all blocks, the cheapest rise per saving first."""
    return sorted(
        _Piece((b.rise - a.rise) / (a.cost - b.cost), block, place, a, b)
        for block, front in enumerate(fronts)
        for place, (a, b) in enumerate(itertools.pairwise(_hull(front)))
    )


class _Relaxed:
    """Some blocks when choices may be mixed: the bound of linear programming.

    Along the ``pieces`` of the lower hulls of the blocks from ``level`` on.
    """

    def __init__(
        self, fronts: Sequence[Sequence[_Choice]], pieces: Sequence[_Piece], level: int
    ) -> None:
        self.first = [front[0] for front in fronts]
        self.cost = math.fsum(choice.cost for choice in self.first)
        self.rise = math.fsum(choice.rise for choice in self.first)
        self.pieces, self.level = pieces, level
        self.saved = np.cumsum([0.0, *(p.before.cost - p.after.cost for p in pieces)])
        self.risen = np.cumsum([0.0, *(p.after.rise - p.before.rise for p in pieces)])

    def least_rise(self, rooms: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a lower bound of the rise within each room; infinite where nothing fits."""
        # Rounding must not exclude what fits exactly, so the bound is taken a little lower.
        needed = self.cost - rooms - 1e-12 * max(self.cost, float(np.abs(rooms).max(initial=0.0)))
        bound = self.rise + np.interp(needed, self.saved, self.risen)
        return np.where(needed > self.saved[-1], np.inf, bound - 1e-12 * np.abs(bound))

    def rounded(self, room: float) -> list[_Choice] | None:
        """Return the assignment of the first whole pieces that fit, ``None`` where none does."""
        now = list(self.first)
        for piece in self.pieces:
            if math.fsum(c.cost for c in now) <= room:
                return now
            now[piece.block - self.level] = piece.after
        return now if math.fsum(c.cost for c in now) <= room else None


def _hull(front: Sequence[_Choice]) -> list[_Choice]:
    """Return the choices on the lower convex hull of rise against saving, the least rise first."""
    hull: list[_Choice] = []
    for c in front:
        while len(hull) > 1:
            a, b = hull[-2:]
            if (b.rise - a.rise) * (b.cost - c.cost) < (c.rise - b.rise) * (a.cost - b.cost):
                break
            hull.pop()
        hull.append(c)
    return hull


def blocks_of(space: SearchSpace) -> list[tuple[int, ...]]:
    """Return variables in groups that share layers."""
    block_of: dict[str, int] = {}
    blocks: list[list[int]] = []
    for index, variable in enumerate(space.variables):
        known = sorted({block_of[name] for name in variable.layers if name in block_of})
        if not known:
            known = [len(blocks)]
            blocks.append([])
        first, *others = known
        blocks[first].append(index)
        for other in others:
            blocks[first] += blocks[other]
            blocks[other] = []
        for member in blocks[first]:
            block_of |= dict.fromkeys(space.variables[member].layers, first)
    return [tuple(sorted(block)) for block in blocks if block]


def cost_of_block(
    space: SearchSpace, block: Sequence[int], bits: Sequence[int], layer_cost: LayerCost
) -> float:
    """Return the cost of the layers that a block of variables sets."""
    pairs: dict[str, LayerBits] = {}
    for v, b in zip(block, bits, strict=True):
        variable = space.variables[v]
        for name in variable.layers:
            pairs[name] = variable.applied(pairs.get(name, space.start[name]), b)
    return sum(layer_cost(name, pair) for name, pair in pairs.items())
