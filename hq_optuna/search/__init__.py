"""The mind of the sampler: states, moves, winner rules. No PyTorch, no Optuna."""

from hq_optuna.search.moves import Move, propose
from hq_optuna.search.progressive import Incumbent, ProgressiveSearch, Result
from hq_optuna.search.rules import RULES, Rule, choose

__all__ = [
    "RULES",
    "Incumbent",
    "Move",
    "ProgressiveSearch",
    "Result",
    "Rule",
    "choose",
    "propose",
]
