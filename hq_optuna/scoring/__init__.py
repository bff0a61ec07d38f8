"""Scores: the predicted loss rise of an assignment, in nats, without training."""

from hq_optuna.scoring.layer_sums import LAYER_SUMS, LayerSumName, measure_layer_sums
from hq_optuna.scoring.scorer import SCORERS, Score, Scorer
from hq_optuna.scoring.sensitivity import Sensitivity, measure_sensitivity

__all__ = [
    "LAYER_SUMS",
    "SCORERS",
    "LayerSumName",
    "Score",
    "Scorer",
    "Sensitivity",
    "measure_layer_sums",
    "measure_sensitivity",
]
