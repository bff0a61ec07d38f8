"""Optuna samplers."""

from hq_optuna.samplers.progressive import ProgressiveBitSampler

__all__ = ["ProgressiveBitSampler"]
