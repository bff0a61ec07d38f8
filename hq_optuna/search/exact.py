"""Exact allocation: the assignment with the least additive score within a budget.

An integer program with one choice per block of variables, solved by HiGHS through SciPy, as HAWQ-V3
(Yao et al., 2021) allocates bits. The score must be a sum over variables and the cost a sum over
layers. Variables that meet in a layer (its weights and its activations, or tied layers) form one
block, because the cost of a layer depends on both.

The solver's tolerances are absolute, 1e-6. A greedy assignment is found first; what is worse alone
than all of that is left out, and the objective is scaled by the rest, so that the optimum is exact
to ten digits however small it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from hq_optuna.bit_config import LayerBits
from hq_optuna.space import SearchSpace

MAX_CHOICES = 20_000
"""Most combinations of bits within one block that are enumerated."""

OBJECTIVE_SCALE = 1e4
"""Size of the objective for the solver, whose absolute gap of 1e-6 is then a relative one of 1e-10.
"""

LayerCost = Callable[[str, LayerBits], float]
Rises = Sequence[Mapping[int, float]]
"""For each variable of a space: bits → predicted loss rise, nats."""


class _Choice(NamedTuple):
    """One combination of bits of a block's variables: its cost, its rise, the bits."""

    cost: float
    rise: float
    bits: tuple[int, ...]


def exact_allocation(
    space: SearchSpace, rises: Rises, layer_cost: LayerCost, limit: float
) -> tuple[int, ...] | None:
    """Return the bits of each variable with the least total rise within the limit.

    Of several assignments with the same total the solver's version may decide.

    Args:
        space: What may be chosen.
        rises: Rise of each variable at each of its bits.
        layer_cost: Cost of one layer with given bits.
        limit: What all layers together may cost, fixed ones included.

    Returns:
        One number of bits per variable, or ``None`` where no assignment is within the limit.

    Raises:
        ValueError: A block of variables has more than `MAX_CHOICES` combinations.
    """
    blocks = _blocks(space)
    touched = {name for block in blocks for v in block for name in space.variables[v].layers}
    fixed = math.fsum(layer_cost(n, b) for n, b in space.start.items() if n not in touched)
    fronts = [_front(space, block, rises, layer_cost) for block in blocks]
    room = limit - fixed
    best = _greedy(fronts, room)
    if best is None:
        return None
    better = _solve(fronts, room, best)
    if better is not None and _total(better) < _total(best):
        best = better
    state = list(space.top)
    for block, choice in zip(blocks, best, strict=True):
        for v, b in zip(block, choice.bits, strict=True):
            state[v] = b
    return tuple(state)


def _total(chosen: Sequence[_Choice]) -> float:
    return math.fsum(choice.rise for choice in chosen)


def _front(
    space: SearchSpace, block: Sequence[int], rises: Rises, layer_cost: LayerCost
) -> list[_Choice]:
    """Return a block's choices that no other beats in cost and rise, the least rise first."""
    n = math.prod(len(space.variables[v].bits) for v in block)
    if n > MAX_CHOICES:
        raise ValueError(
            f"{n} combinations of bits in one group of {len(block)} variables are too many to "
            "enumerate; allow fewer bits or tie fewer layers."
        )
    choices = [
        _Choice(
            _cost(space, block, bits, layer_cost),
            math.fsum(rises[v][b] for v, b in zip(block, bits, strict=True)),
            bits,
        )
        for bits in itertools.product(*(space.variables[v].bits for v in block))
    ]
    front: list[_Choice] = []
    for choice in sorted(choices, key=lambda c: (c.rise, c.cost)):
        if not front or choice.cost < front[-1].cost:
            front.append(choice)
    return front


def _greedy(fronts: Sequence[Sequence[_Choice]], room: float) -> list[_Choice] | None:
    """Return a good assignment: from the least rises down, always the cheapest rise per saving."""
    places = [0] * len(fronts)
    while math.fsum(f[p].cost for f, p in zip(fronts, places, strict=True)) > room:
        moves = [
            ((after.rise - now.rise) / (now.cost - after.cost), block, place)
            for block, (front, at) in enumerate(zip(fronts, places, strict=True))
            for now in (front[at],)
            for place, after in enumerate(front[at + 1 :], start=at + 1)
        ]
        if not moves:
            return None
        _, block, place = min(moves)
        places[block] = place
    return [front[place] for front, place in zip(fronts, places, strict=True)]


def _solve(
    fronts: Sequence[Sequence[_Choice]], room: float, known: Sequence[_Choice]
) -> list[_Choice] | None:
    """Return the optimum, or ``None`` where nothing is better than what is known."""
    least = [front[0].rise for front in fronts]
    spare = math.fsum(c.rise - low for c, low in zip(known, least, strict=True))
    if spare <= 0:
        return None
    # A choice that alone adds more than all of the known assignment is in no better one.
    kept = [
        (block, choice)
        for block, front in enumerate(fronts)
        for choice in front
        if choice.rise - least[block] <= spare
    ]
    one_each = csr_array(
        (np.ones(len(kept)), ([block for block, _ in kept], range(len(kept)))),
        shape=(len(fronts), len(kept)),
    )
    rise = np.array([(choice.rise - least[block]) / spare for block, choice in kept])
    scale = max(abs(room), max(choice.cost for _, choice in kept))
    cost = np.array([choice.cost for _, choice in kept]) / scale
    allowed = room
    for _ in range(20):
        solved = milp(
            rise * OBJECTIVE_SCALE,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(cost[None, :], -np.inf, allowed / scale),
            ],
            integrality=np.ones(len(kept), dtype=np.uint8),
            bounds=Bounds(0, 1),
            # Presolve scales rows until rounding breaks them, and HiGHS then writes to stdout.
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        if solved.x is None:
            return None
        chosen = [choice for (_, choice), x in zip(kept, solved.x, strict=True) if x > 0.5]
        excess = math.fsum(choice.cost for choice in chosen) - room
        if excess <= 0:
            return chosen
        allowed -= excess  # within the solver's tolerance, but not within the limit
    return None


def _blocks(space: SearchSpace) -> list[tuple[int, ...]]:
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


def _cost(
    space: SearchSpace, block: Sequence[int], bits: Sequence[int], layer_cost: LayerCost
) -> float:
    """Return the cost of the layers that a block of variables sets."""
    pairs: dict[str, LayerBits] = {}
    for v, b in zip(block, bits, strict=True):
        variable = space.variables[v]
        for name in variable.layers:
            old = pairs.get(name, space.start[name])
            pairs[name] = LayerBits(
                old.weight_bits if variable.part == "activations" else b,
                old.activation_bits if variable.part == "weights" else b,
            )
    return sum(layer_cost(name, pair) for name, pair in pairs.items())
