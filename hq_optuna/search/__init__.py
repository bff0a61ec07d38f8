"""The mind of the sampler: states, moves, winner rules. No PyTorch, no Optuna."""

from hq_optuna.search.additive import Additive, Point, Price, Trade
from hq_optuna.search.exact import Allocation
from hq_optuna.search.limits import Limits
from hq_optuna.search.moves import Move, changes, propose
from hq_optuna.search.progressive import (
    Incumbent,
    Past,
    ProgressiveSearch,
    Result,
    to_lower,
    way,
)
from hq_optuna.search.rank_correlation import MEASURED, rank_correlation
from hq_optuna.search.reachable import check_reachable
from hq_optuna.search.rules import RULES, choose
from hq_optuna.search.uniform import uniform_states, uniform_within

__all__ = [
    "MEASURED",
    "RULES",
    "Additive",
    "Allocation",
    "Incumbent",
    "Limits",
    "Move",
    "Past",
    "Point",
    "Price",
    "ProgressiveSearch",
    "Result",
    "Trade",
    "changes",
    "check_reachable",
    "choose",
    "propose",
    "rank_correlation",
    "to_lower",
    "uniform_states",
    "uniform_within",
    "way",
]
