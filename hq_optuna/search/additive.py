"""Additive scores: a table of rises by layer and bits, summed; what can be solved exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from hq_optuna.search.exact import Allocation, Rises
from hq_optuna.search.reachable import least_cost
from hq_optuna.search.several import SeveralLimits
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.budget import Bound
from hq_optuna.space.cost import CostModel, Row
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


class Trade(NamedTuple):
    """An assignment by two costs, and by what it is predicted to do."""

    cost: float
    other: float
    score: float
    config: BitConfig


class Price(NamedTuple):
    """What a limit does to an optimum.

    ``used`` is what the optimum spends of ``limit``; ``nats_per_unit`` is what one more unit would
    take off its score, where choices may be mixed: 0 for a limit that does not bind.
    """

    metric: str
    limit: float
    used: float
    nats_per_unit: float


class Additive:
    """A search space with an additive score, a cost, and limits of other costs beside it.

    ``table`` holds predicted loss rises, nats; ``model`` is the cost that limits are asked for, and
    the limits ``beside`` it always hold. Raises `ValueError` where the table lacks a layer or a
    number of bits of the space, or holds NaN.
    """

    def __init__(
        self, space: SearchSpace, table: Table, model: CostModel, beside: Sequence[Bound] = ()
    ) -> None:
        self.space = space
        self.table = table
        self.model = model
        self.beside = tuple(beside)
        self.rises = [
            {
                bits: math.fsum(
                    self._rise(name, part, _bits_of(pair, part))
                    for name in variable.layers
                    for pair in [variable.applied(space.start[name], bits)]
                    for part in _parts(variable.part)
                )
                for bits in variable.bits
            }
            for variable in space.variables
        ]
        self._solve: Callable[[float], tuple[int, ...] | None] | None = None
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
        return self.model.cost(config)

    def fits(self, config: Mapping[str, LayerBits], limit: float) -> bool:
        """Return whether an assignment is within a limit, and within those beside it."""
        return self.cost(config) <= limit and all(b.cost(config) <= b.limit for b in self.beside)

    def point(self, config: BitConfig) -> Point:
        """Return an assignment with its cost and score."""
        return Point(self.cost(config), self.score(config), config)

    def exact(self, limit: float) -> Point | None:
        """Return the assignment with the least sum within the limit; ``None`` where none is."""
        state = self.best(limit)
        return None if state is None else self.point(self.space.config(state))

    def best(self, limit: float) -> tuple[int, ...] | None:
        """Return its bits of each variable."""
        if self._solve is None:
            self._solve = self._solver(self.rises)
        return self._solve(limit)

    def best_for(self, rises: Rises, limit: float) -> tuple[int, ...] | None:
        """Return the bits of each variable with the least sum of other rises, by variable."""
        return self._solver(rises)(limit)

    def _solver(self, rises: Rises) -> Callable[[float], tuple[int, ...] | None]:
        rows = self.model.rows
        if len(rows) == 1 and not self.beside and not rows[0].fixed:
            return Allocation(self.space, rises, rows[0].layer_cost).best
        several = SeveralLimits(self.space, rises, self._rows)
        return lambda limit: several.best(self._limits(limit))

    @property
    def _rows(self) -> list[Row]:
        return [
            row for model in (self.model, *(b.model for b in self.beside)) for row in model.rows
        ]

    def _limits(self, limit: float) -> list[float]:
        """Return what each row may come to."""
        held = [(self.model, limit), *((b.model, b.limit) for b in self.beside)]
        return [most for model, most in held for _ in model.rows]

    def prices(self, limit: float) -> tuple[Price, ...]:
        """Return which limits bind the optimum, and what one more unit of each would bring.

        Empty where nothing fits.
        """
        optimum = self.exact(limit)
        relaxed = SeveralLimits(self.space, self.rises, self._rows).relaxed(self._limits(limit))
        if optimum is None or relaxed is None:
            return ()
        found, at = [], 0
        for model, most in [(self.model, limit), *((b.model, b.limit) for b in self.beside)]:
            price = float(relaxed.prices[at : at + len(model.rows)].sum())
            at += len(model.rows)
            found.append(Price(model.metric, most, model.cost(optimum.config), price))
        return tuple(found)

    def frontier(
        self, limits: Iterable[float] = (), *, n: int = N_POINTS, most: float = math.inf
    ) -> list[Point]:
        """Return the exact Pareto curve of score against cost, the cheapest first.

        Each point is the optimum of one budget. ``n`` budgets are spaced evenly in the logarithm of
        the cost, from the cheapest assignment to the widest bits, or to ``most``; ``limits`` are
        further ones.
        """
        low = least_cost(self.space, self.model)
        high = min(self.cost(self.space.config(self.space.top)), most)
        ratio = (high / low) ** (1 / (n - 1)) if low > 0 else 1.0
        grid = [low, *(low * ratio**i for i in range(1, n - 1)), high]
        solved = [self.exact(limit) for limit in sorted({*grid, *limits})]
        best: list[Point] = []
        for point in solved:
            if point is not None and (not best or point.score < best[-1].score):
                best.append(point)
        return best

    def trades(self, other: CostModel, most: float, *, n: int = N_POINTS) -> list[Trade]:
        """Return the exact Pareto curve of another cost against the cost, the cheapest first.

        Each point costs the least of ``other`` within a limit of the cost and a sum of ``most``
        nats, and of such assignments has the least sum. ``n`` limits are spaced evenly in the
        logarithm of the cost. Empty where no assignment has such a sum.
        """
        n_first, n_other = len(self.model.rows), len(other.rows)
        sums = Row(lambda name, bits: self.score({name: bits}), 0.0)
        solver = SeveralLimits(self.space, self.rises, [*self._rows, *other.rows, sums])
        first, second = slice(0, n_first), slice(len(self._rows), len(self._rows) + n_other)
        beside = self._limits(math.inf)[n_first:]

        def limits(cost: float, of_other: float) -> list[float]:
            return [*[cost] * n_first, *beside, *[of_other] * n_other, most * (1 + 1e-12)]

        low = solver.least(first, limits(math.inf, math.inf))
        least_other = solver.least(second, limits(math.inf, math.inf))
        if low is None or least_other is None:
            return []
        high = solver.least(first, limits(math.inf, least_other * _ROUNDED))
        assert high is not None, "it was reached"
        ratio = (high / low) ** (1 / (n - 1)) if low > 0 else 1.0
        found: list[Trade] = []
        for limit in sorted({low, *(low * ratio**i for i in range(1, n - 1)), high}):
            within = limit * _ROUNDED
            least = solver.least(second, limits(within, math.inf))
            state = None if least is None else solver.best(limits(within, least * _ROUNDED))
            if state is None:
                continue
            config = self.space.config(state)
            made = Trade(self.cost(config), other.cost(config), self.score(config), config)
            if not found or made.other < found[-1].other:
                found.append(made)
        return found


_ROUNDED = 1 + 1e-9
"""What limits are loosened by that were themselves found by a solver with tolerances."""


def _bits_of(pair: LayerBits, part: str) -> int:
    return pair.weight_bits if part == "weights" else pair.activation_bits


def _parts(part: str) -> tuple[str, ...]:
    whole = part in ("both", "factors", "pair")
    return ("weights", "activations") if whole else (part,)
