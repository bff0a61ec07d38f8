"""Optuna pruners."""

from hq_optuna.pruners.budget import CostBudgetPruner

__all__ = ["CostBudgetPruner"]
