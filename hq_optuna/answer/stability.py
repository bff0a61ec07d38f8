"""How much calibration data is enough: do halves of what the table read choose the same bits?"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batches
from hq_optuna.objective.hessian import HessianObjective
from hq_optuna.scoring import Sensitivity, measure_layer_sums
from hq_optuna.search import Additive, check_reachable
from hq_optuna.space.budget import Budget

RESAMPLES = 4
"""Ways to deal batches into halves."""

ENOUGH = 0.05
"""Excess rise between halves, relative, below which more data change little."""


@dataclass(frozen=True)
class Stability:
    """How far the answers of two halves of the data agree.

    Attributes:
        n_samples: Samples that the table reads, both halves together.
        same_bits: Share of the searched bits that both halves choose alike, mean over deals.
        excess: How much more one half's answer costs by the other half's table than that half's
            own answer, relative; mean over deals and both directions.
    """

    n_samples: int
    same_bits: float
    excess: float

    def __str__(self) -> str:
        advice = "more calibration data would change little"
        if self.excess > ENOUGH:
            advice = "give more calibration data"
        return (
            f"Answers from halves of the {self.n_samples:,} samples that the table reads agree in "
            f"{100 * self.same_bits:.0f} % of the bits, and cost {100 * self.excess:.1f} % more on "
            f"the other half than its own answer does: {advice}."
        )


def stability(objective: HessianObjective, budget: Budget) -> Stability:
    """Return how far exact answers of random halves of the data agree.

    Costs as many passes as four tables of Hessian traces. What rounding and ranges read stays the
    same.

    Raises:
        DataError: The table reads a single batch, which has no halves.
        BudgetError: The budget is below the cheapest assignment.
    """
    check_reachable(objective.space, budget)
    data = objective.setup.table_data
    if len(data) < 2:
        raise DataError(
            f"The table reads one batch of {data.n_samples} samples, which has no halves. Give "
            "calibration data in smaller batches (batch_size)."
        )
    chance = random.Random(0)
    same, excess = list[float](), list[float]()
    for _ in range(RESAMPLES):
        order = chance.sample(range(len(data)), len(data))
        parts = (order[::2], order[1::2])
        sums = [_table(objective, Batches(data[i] for i in sorted(part)), budget) for part in parts]
        limit = budget.limit(objective.space)
        found = [one.exact(limit) for one in sums]
        assert found[0] is not None and found[1] is not None, "the budget is reachable"
        ours, theirs = found[0].config, found[1].config
        pairs = [(ours[x.name], theirs[x.name]) for x in objective.space.layers]
        bits = [a == b for one, other in pairs for a, b in zip(one, other, strict=True)]
        same.append(sum(bits) / len(bits))
        for judge, own, other in ((0, ours, theirs), (1, theirs, ours)):
            least = sums[judge].score(own)
            excess.append(sums[judge].score(other) / least - 1 if least > 0 else 0.0)
    return Stability(data.n_samples, math.fsum(same) / len(same), math.fsum(excess) / len(excess))


def _table(objective: HessianObjective, data: Batches, budget: Budget) -> Additive:
    """Return the sums over layers from a part of the data."""
    scorer, setup = objective.prepare(), objective.setup
    found: Sensitivity = measure_layer_sums(
        *("hessian_trace", objective.model, scorer.prepared, objective.space, data),
        setup.loss_fn,
        correction=scorer.correction,
        rise=setup.rise,
    ).sensitivity
    table = {
        name: {"weights": found.weights[name], "activations": found.activations[name]}
        for name in found.weights
    }
    first, *beside = budget.bounds(objective.space)
    return Additive(objective.space, table, first.model, beside)
