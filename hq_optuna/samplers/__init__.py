"""Optuna samplers."""

from hq_optuna.samplers.progressive import Encoding, ProgressiveBitSampler

__all__ = ["Encoding", "ProgressiveBitSampler"]
