"""Whether limits can be met at all, found before any work."""

from __future__ import annotations

import math

from hq_optuna.errors import BudgetError
from hq_optuna.search.several import SeveralLimits
from hq_optuna.space.budget import Bound, Budget
from hq_optuna.space.cost import CostModel, format_cost
from hq_optuna.space.search_space import SearchSpace


def least_cost(space: SearchSpace, model: CostModel) -> float:
    """Return the cost of the cheapest assignment, in the metric's unit."""
    zeros = [dict.fromkeys(variable.bits, 0.0) for variable in space.variables]
    n = len(model.rows)
    found = SeveralLimits(space, zeros, model.rows).least(slice(0, n), [math.inf] * n)
    assert found is not None, "nothing is limited"
    return found


def check_reachable(space: SearchSpace, budget: Budget) -> None:
    """Refuse limits that no assignment of the space is within, alone or together.

    Raises:
        TypeError: The budget is no `Budget`.
        BudgetError: With the limit, the least that can be reached, and what to change.
    """
    if not isinstance(budget, Budget):
        raise TypeError(f"budget is a Budget such as Budget.fraction(bops=0.25); got {budget!r}.")
    bounds = budget.bounds(space)
    cheapest = space.config(space.bottom)
    if all(bound.cost(cheapest) <= bound.limit for bound in bounds):
        return  # the usual case takes no solver
    for bound in bounds:
        if (minimum := least_cost(space, bound.model)) > bound.limit:
            raise BudgetError(
                f"Budget {_said(bound, bound.limit)} is below the cheapest assignment, "
                f"{_said(bound, minimum)[:-1]}; every searched layer at its cheapest). Raise the "
                "budget, allow fewer bits, or pin fewer layers.",
                limit=bound.limit,
                minimum=minimum,
            )
    _check_together(space, bounds)


def _check_together(space: SearchSpace, bounds: tuple[Bound, ...]) -> None:
    """Refuse limits of which each can be met, but not all at once."""
    zeros = [dict.fromkeys(variable.bits, 0.0) for variable in space.variables]
    rows = [row for bound in bounds for row in bound.model.rows]
    limits = [bound.limit for bound in bounds for _ in bound.model.rows]
    several = SeveralLimits(space, zeros, rows)
    if several.best(limits) is not None:
        return
    at, said, first = 0, [], None
    for bound in bounds:
        n = len(bound.model.rows)
        least = several.least(slice(at, at + n), limits)
        at += n
        if least is not None:  # else the others contradict each other already
            first = first or (bound.limit, least)
            said.append(
                f"with the others held, {_said(bound, least)} is the least, and "
                f"{format_cost(bound.limit, bound.metric)} is asked for"
            )
    limit, minimum = first or (bounds[0].limit, least_cost(space, bounds[0].model))
    raise BudgetError(
        f"No assignment meets all limits at once ({'; '.join(b.text for b in bounds)}). "
        + (
            "Each alone can be met: " + "; or ".join(said) + ". Raise one of them"
            if said
            else "Already without one of them the others contradict each other. Raise two of them"
        )
        + ", allow fewer bits, or pin fewer layers.",
        limit=limit,
        minimum=minimum,
    )


def _said(bound: Bound, cost: float) -> str:
    """Return a cost in words, with its share of the all-8-bit cost."""
    share = cost / bound.model.int8
    return f"{format_cost(cost, bound.metric)} ({share:.4g} of all-8-bit)"
