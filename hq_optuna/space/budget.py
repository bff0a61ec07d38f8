"""Budgets: the cost a user allows, absolute or as a fraction of the all-8-bit network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hq_optuna.errors import BudgetError
from hq_optuna.space.cost import METRICS, CostModel, Metric, format_cost
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace

_MOST = 16
"""Float operations, 32 by 32 bits, in those of 8 bits."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The most an assignment may cost.

    Make one with `fraction` or `absolute`.

    Example:
        >>> Budget.fraction(bops=0.25)
        Budget(metric='bops', value=0.25, relative=True)
        >>> Budget.absolute(size_bytes=64_000)
        Budget(metric='size_bytes', value=64000.0, relative=False)
    """

    metric: Metric
    value: float
    relative: bool

    @classmethod
    def fraction(cls, **limit: float) -> Budget:
        """Allow a fraction of the cost with 8 bits everywhere: ``bops=0.25``."""
        return cls._one(limit, relative=True)

    @classmethod
    def absolute(cls, **limit: float) -> Budget:
        """Allow an absolute cost: ``bops=24e9`` or ``size_bytes=64_000``."""
        return cls._one(limit, relative=False)

    @classmethod
    def _one(cls, limit: dict[str, float], *, relative: bool) -> Budget:
        if len(limit) != 1:
            raise ValueError(
                f"A budget limits one metric, for example bops=0.25; got {sorted(limit) or 'none'}."
            )
        ((name, value),) = limit.items()
        for metric in METRICS:
            if name == metric:
                if not math.isfinite(value) or value <= 0:
                    raise ValueError(f"A budget is a positive number; got {metric}={value!r}.")
                if relative and value > _MOST:
                    raise ValueError(
                        f"{metric}={value!r} would be {100 * value:g} % of the cost with 8 bits "
                        f"everywhere, and {100 * _MOST} % is that of float. For a share write "
                        "0.25; for a number of bit operations or bytes use Budget.absolute."
                    )
                return cls(metric, float(value), relative)
        raise ValueError(f"A budget limits one of {', '.join(METRICS)}; got {name!r}.")

    def limit(self, layers: Sequence[LayerSpec]) -> float:
        """Return the absolute limit for this network, in BOPs or bytes."""
        if not self.relative:
            return self.value
        limit = self.value * CostModel(layers, self.metric).int8
        # Costs are whole bit operations or eighths of a byte. A fraction made by dividing a cost by
        # the all-8-bit cost shall mean that cost, and not the float just below it.
        nearest = round(8 * limit) / 8
        return nearest if math.isclose(limit, nearest, rel_tol=1e-12) else limit

    @property
    def text(self) -> str:
        """The budget as it is typed: ``"0.25 bops"``, ``"64000.0 size_bytes absolute"``."""
        return f"{self.value!r} {self.metric}{'' if self.relative else ' absolute'}"

    def __str__(self) -> str:
        if self.relative:
            what = "BOPs" if self.metric == "bops" else "size"
            return f"{100 * self.value:.6g} % of the all-8-bit {what}"
        return format_cost(self.value, self.metric)


def check_reachable(space: SearchSpace, budget: Budget) -> None:
    """Refuse a budget below the cheapest assignment of the space.

    Raises:
        TypeError: The budget is no `Budget`.
        BudgetError: With the limit, the minimum, and both as fractions of the all-8-bit cost.
    """
    if not isinstance(budget, Budget):
        raise TypeError(f"budget is a Budget such as Budget.fraction(bops=0.25); got {budget!r}.")
    model = CostModel(space.layers, budget.metric)
    limit, minimum = budget.limit(space.layers), model.cost(space.config(space.bottom))
    if minimum > limit:
        raise BudgetError(
            f"Budget {format_cost(limit, budget.metric)} ({limit / model.int8:.4g} of all-8-bit) "
            f"is below the cheapest assignment, {format_cost(minimum, budget.metric)} "
            f"({minimum / model.int8:.4g} of all-8-bit; every searched layer at its fewest bits). "
            "Raise the budget, allow fewer bits, or pin fewer layers.",
            limit=limit,
            minimum=minimum,
        )
