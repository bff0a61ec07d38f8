"""Optuna samplers."""

from hq_optuna.protocol.tickets import Encoding
from hq_optuna.samplers.progressive import ProgressiveBitSampler

__all__ = ["Encoding", "ProgressiveBitSampler"]
