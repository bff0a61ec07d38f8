"""Exact allocation: the assignment with the least additive score within a budget.

An integer program with one choice per block of variables, solved by HiGHS through SciPy, as HAWQ-V3
(Yao et al., 2021) allocates bits. The score must be a sum over variables and the cost a sum over
layers. Variables that meet in a layer (its weights and its activations, or tied layers) form one
block, because the cost of a layer depends on both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from hq_optuna.bit_config import LayerBits
from hq_optuna.space import SearchSpace

MAX_CHOICES = 20_000
"""Most combinations of bits within one block that are enumerated."""

LayerCost = Callable[[str, LayerBits], float]
Rises = Sequence[Mapping[int, float]]
"""For each variable of a space: bits → predicted loss rise, nats."""


def exact_allocation(
    space: SearchSpace, rises: Rises, layer_cost: LayerCost, limit: float
) -> tuple[int, ...] | None:
    """Return the bits of each variable with the least total rise within the limit.

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
    fixed = sum(layer_cost(n, b) for n, b in space.start.items() if n not in touched)
    choices: list[tuple[int, tuple[int, ...]]] = []  # (block, bits of its variables)
    for index, block in enumerate(blocks):
        n = math.prod(len(space.variables[v].bits) for v in block)
        if n > MAX_CHOICES:
            raise ValueError(
                f"{n} combinations of bits in one group of {len(block)} variables are too many to "
                "enumerate; allow fewer bits or tie fewer layers."
            )
        every = itertools.product(*(space.variables[v].bits for v in block))
        choices += [(index, combination) for combination in every]
    rise = np.array(
        [
            sum(rises[v][b] for v, b in zip(blocks[index], bits, strict=True))
            for index, bits in choices
        ]
    )
    cost = np.array([_cost(space, blocks[index], bits, layer_cost) for index, bits in choices])
    one_each = csr_array(
        (np.ones(len(choices)), ([index for index, _ in choices], range(len(choices))))
    )
    # The solver's tolerances are absolute: scale both to about one.
    room = limit - fixed
    scale = max(abs(room), float(cost.max()))
    solved = milp(
        rise / max(float(np.abs(rise).max()), 1e-300),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost[None, :] / scale, -np.inf, room / scale * (1 + 1e-12)),
        ],
        integrality=np.ones(len(choices), dtype=np.uint8),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return None
    state = list(space.top)
    for (index, combination), chosen in zip(choices, solved.x, strict=True):
        if chosen > 0.5:
            for v, b in zip(blocks[index], combination, strict=True):
                state[v] = b
    return tuple(state)


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
