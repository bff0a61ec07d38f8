"""What an assignment costs: BOPs, size, and the budgets drawn from them. Plain numbers only."""

from hq_optuna.cost.budget import Budget, check_reachable
from hq_optuna.cost.model import METRICS, CostModel, Metric, format_cost, macs

__all__ = ["METRICS", "Budget", "CostModel", "Metric", "check_reachable", "format_cost", "macs"]
