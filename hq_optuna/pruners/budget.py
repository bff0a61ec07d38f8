"""`CostBudgetPruner`: stops runs that hit the compute-cost budget."""

from __future__ import annotations

from typing import Any

from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial

from hq_optuna.attrs import Ticket
from hq_optuna.cost import Budget, check_reachable
from hq_optuna.space import SearchSpace


class CostBudgetPruner(BasePruner):
    """Prune trials whose work is no longer needed, and hold the study's budget.

    A trial is pruned when the search has met its budget, or when its slot was completed by another
    worker meanwhile. The objective asks with ``trial.should_prune()`` before expensive work. With
    another sampler than `ProgressiveBitSampler` nothing is pruned: there, cost over budget is a
    constraint and no reason to stop.

    Args:
        space: The search space, for the check that the budget can be met.
        budget: The budget.

    Raises:
        BudgetError: The budget is below the cheapest assignment of the space.
    """

    def __init__(self, space: SearchSpace, budget: Budget) -> None:
        check_reachable(space, budget)
        self.space = space
        self.budget = budget

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Return whether the trial's work is no longer needed."""
        ticket = Ticket.read(trial.system_attrs)
        if ticket is None:
            ticket = Ticket.read(study._storage.get_trial(trial._trial_id).system_attrs)
        log_of: Any = getattr(study.sampler, "log", None)
        if ticket is None or log_of is None:
            return False
        if ticket.kind == "surplus":
            return True
        log = log_of(study)
        step = log.open
        if step is None or (step.step, step.parent) != (ticket.step, ticket.parent):
            return True
        return ticket.kind == "candidate" and ticket.slot in step.done
