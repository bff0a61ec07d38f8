"""Budgets: the cost a user allows, absolute or as a fraction of the all-8-bit network.

People type them as ``0.25 bops``, ``25% size_bytes`` or ``24 GBOPs``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real

from hq_optuna.errors import BudgetError, SettingError
from hq_optuna.space.cost import METRICS, UNITS, Metric, format_cost
from hq_optuna.space.search_space import SearchSpace

_MOST = 16
"""Cost of float (32 by 32 bits) over that of 8 bits, in bit operations."""

_ABSOLUTE = {
    unit.lower(): (metric, scale) for metric in METRICS for unit, scale in UNITS[metric].items()
}
_HOW = (
    f"Write a fraction of the all-8-bit cost, '0.25 bops' or '25% size_bytes' (metrics: "
    f"{', '.join(METRICS)}), or an absolute cost, '24e9 bops absolute', '24 GBOPs' or "
    f"'5.8 MiB' (units: {', '.join(unit for metric in METRICS for unit in UNITS[metric])})."
)
_BUDGET = re.compile(
    r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(%?)\s*([a-z_]*?)\s*(\babsolute)?\s*", re.I
)


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
        metric = next((metric for metric in METRICS if metric == name), None)
        if metric is None:
            raise ValueError(f"A budget limits one of {', '.join(METRICS)}; got {name!r}.")
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"A budget is a positive number; got {metric}={value!r}.")
        if relative and value > _MOST:
            raise ValueError(
                f"{metric}={value!r} would be {100 * value:g} % of the cost with 8 bits "
                f"everywhere, and {100 * _MOST} % is that of float. For a share write 0.25; for a "
                "number of bit operations or bytes use Budget.absolute."
            )
        return cls(metric, float(value), relative)

    def limit(self, space: SearchSpace) -> float:
        """Return the absolute limit for this network, in BOPs or bytes."""
        if not self.relative:
            return self.value
        limit = self.value * space.costs(self.metric).int8
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


def parse_budget(text: str | float | Budget) -> Budget:
    """Read a budget as people type it; a `Budget` is returned as it is.

    A number up to 1, or one with ``%``, is a fraction of the all-8-bit cost; what has a unit or the
    word ``absolute`` is absolute.

    Raises:
        SettingError: The text is no budget, or could mean either.

    Example:
        >>> parse_budget("25% size_bytes")
        Budget(metric='size_bytes', value=0.25, relative=True)
        >>> parse_budget("24 GBOPs") == parse_budget("24e9 bops absolute")
        True
    """
    if isinstance(text, Budget):
        return text
    said = repr(str(text))
    match = _BUDGET.fullmatch(str(text))
    if match is None:
        raise SettingError(f"{said} is no budget. {_HOW}")
    value, percent, unit = float(match[1]), bool(match[2]), match[3].lower()
    if not math.isfinite(value) or value <= 0:
        raise SettingError(f"A budget is a positive number; got {said}. {_HOW}")
    metric, scale = _ABSOLUTE.get(unit, (unit or "bops", 1.0))
    known = metric in METRICS
    if unit in _ABSOLUTE or match[4]:
        if percent or not known:
            raise SettingError(f"{said} is no absolute budget. {_HOW}")
        return Budget.absolute(**{metric: value * scale})
    if not known:
        raise SettingError(f"{match[3]!r} in {said} is neither metric nor unit. {_HOW}")
    if value > 1 and not percent:
        raise SettingError(f"{said} is more than all of the all-8-bit cost. {_HOW}")
    return Budget.fraction(**{metric: value / 100 if percent else value})


def check_reachable(space: SearchSpace, budget: Budget) -> None:
    """Refuse a budget below the cheapest assignment of the space.

    Raises:
        TypeError: The budget is no `Budget`.
        BudgetError: With the limit, the minimum, and both as fractions of the all-8-bit cost.
    """
    if not isinstance(budget, Budget):
        raise TypeError(f"budget is a Budget such as Budget.fraction(bops=0.25); got {budget!r}.")
    model = space.costs(budget.metric)
    limit, minimum = budget.limit(space), model.cost(space.config(space.bottom))
    if minimum > limit:
        raise BudgetError(
            f"Budget {format_cost(limit, budget.metric)} ({limit / model.int8:.4g} of all-8-bit) "
            f"is below the cheapest assignment, {format_cost(minimum, budget.metric)} "
            f"({minimum / model.int8:.4g} of all-8-bit; every searched layer at its fewest bits). "
            "Raise the budget, allow fewer bits, or pin fewer layers.",
            limit=limit,
            minimum=minimum,
        )
