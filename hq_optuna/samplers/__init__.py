"""Optuna samplers."""

from hq_optuna.samplers.progressive import ProgressiveBitSampler
from hq_optuna.samplers.tickets import Encoding

__all__ = ["Encoding", "ProgressiveBitSampler"]
