"""Additive scores: a table of rises by layer and bits, summed; what can be solved exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hq_optuna.search.exact import Allocation, LayerCost
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.space.search_space import SearchSpace

Table = Mapping[str, Mapping[str, Mapping[int, float]]]
"""``{layer: {"weights": {bits: nats}, "activations": {bits: nats}}}``."""

N_POINTS = 33
"""Budgets that `Additive.frontier` solves for."""


class Point(NamedTuple):
    """An assignment by what it costs and what it is predicted to do."""

    cost: float
    score: float
    config: BitConfig


class Additive:
    """A search space with an additive score and an additive cost.

    ``table`` holds predicted loss rises, nats; ``layer_cost`` is the cost of one layer at given
    bits. Raises `ValueError` where the table lacks a layer or a number of bits of the space, or
    holds NaN.
    """

    def __init__(self, space: SearchSpace, table: Table, layer_cost: LayerCost) -> None:
        self.space = space
        self.table = table
        self.layer_cost = layer_cost
        self.rises = [
            {
                bits: math.fsum(
                    self._rise(name, part, bits)
                    for name in variable.layers
                    for part in _parts(variable.part)
                )
                for bits in variable.bits
            }
            for variable in space.variables
        ]
        self._allocation: Allocation | None = None
        self.score(space.start)  # what is fixed is in the table too

    def _rise(self, layer: str, part: str, bits: int) -> float:
        if bits == FLOAT_BITS:
            return 0.0
        rise = self.table.get(layer, {}).get(part, {}).get(bits, math.nan)
        if not math.isfinite(rise):
            raise ValueError(
                f"The table of sensitivities has no value for the {part} of {layer!r} at {bits} "
                "bits. Sums over layers are not known for this search."
            )
        return rise

    def score(self, config: Mapping[str, LayerBits]) -> float:
        """Return the sum over layers, nats; the order of the layers does not matter."""
        weights, activations = self.parts(config)
        return weights + activations

    def parts(self, config: Mapping[str, LayerBits]) -> tuple[float, float]:
        """Return the sums of the weights' and of the activations' rises, nats."""
        weights = math.fsum(self._rise(n, "weights", b.weight_bits) for n, b in config.items())
        inputs = ((n, b.activation_bits) for n, b in config.items())
        return weights, math.fsum(self._rise(n, "activations", b) for n, b in inputs)

    def cost(self, config: Mapping[str, LayerBits]) -> float:
        """Return the cost of an assignment."""
        return math.fsum(self.layer_cost(name, pair) for name, pair in config.items())

    def point(self, config: BitConfig) -> Point:
        """Return an assignment with its cost and score."""
        return Point(self.cost(config), self.score(config), config)

    def exact(self, limit: float) -> Point | None:
        """Return the assignment with the least sum within the limit; ``None`` where none is."""
        state = self.best(limit)
        return None if state is None else self.point(self.space.config(state))

    def best(self, limit: float) -> tuple[int, ...] | None:
        """Return its bits of each variable."""
        if self._allocation is None:
            self._allocation = Allocation(self.space, self.rises, self.layer_cost)
        return self._allocation.best(limit)

    def best_for(
        self, rises: Sequence[Mapping[int, float]], limit: float
    ) -> tuple[int, ...] | None:
        """Return the bits of each variable with the least sum of other rises, by variable."""
        return Allocation(self.space, rises, self.layer_cost).best(limit)

    def frontier(self, limits: Iterable[float] = (), *, n: int = N_POINTS) -> list[Point]:
        """Return the exact Pareto curve of score against cost, the cheapest first.

        Each point is the optimum of one budget. ``n`` budgets are spaced evenly in the logarithm of
        the cost, from the cheapest assignment to the widest bits; ``limits`` are further ones.
        """
        low = self.cost(self.space.config(self.space.bottom))
        high = self.cost(self.space.config(self.space.top))
        ratio = (high / low) ** (1 / (n - 1)) if low > 0 else 1.0
        grid = [low, *(low * ratio**i for i in range(1, n - 1)), high]
        solved = [self.exact(limit) for limit in sorted({*grid, *limits})]
        best: list[Point] = []
        for point in solved:
            if point is not None and (not best or point.score < best[-1].score):
                best.append(point)
        return best


def _parts(part: str) -> tuple[str, ...]:
    return ("weights", "activations") if part == "both" else (part,)
