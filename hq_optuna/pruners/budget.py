"""`CostBudgetPruner`: stops runs that hit the compute-cost budget, or the search's own limits."""

from __future__ import annotations

from typing import Any

from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial

from hq_optuna.attributes import Ticket
from hq_optuna.search import Limits, check_reachable
from hq_optuna.space.budget import Budget
from hq_optuna.space.search_space import SearchSpace


class CostBudgetPruner(BasePruner):
    """Prune trials whose work is no longer needed, and hold the study's budget and limits.

    A trial is pruned when the search has met its budget or spent its limits, or when its slot was
    completed by another worker meanwhile. The objective asks with ``trial.should_prune()`` before
    expensive work, and now and then during it. With another sampler than `ProgressiveBitSampler`
    nothing is pruned: there, cost over budget is a constraint and no reason to stop.

    Args:
        space: The search space, for the check that the budget can be met.
        budget: The budget.
        limits: What the search may spend on itself. They become part of the study; where it has
            some already, the larger ones count.

    Raises:
        BudgetError: The budget is below the cheapest assignment of the space.
    """

    def __init__(self, space: SearchSpace, budget: Budget, limits: Limits | None = None) -> None:
        check_reachable(space, budget)
        self.space = space
        self.budget = budget
        self.limits = Limits() if limits is None else limits

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Return whether the trial's work is no longer needed."""
        sampler: Any = study.sampler  # samplers import pruners, so its class is not known here
        if not hasattr(sampler, "ticket"):
            return False
        ticket: Ticket | None = sampler.ticket(study, trial)
        if ticket is None or ticket.kind in ("free", "surplus"):
            return ticket is not None and ticket.kind == "surplus"
        step = sampler.log(study).open
        return step is None or not step.needs(ticket)
