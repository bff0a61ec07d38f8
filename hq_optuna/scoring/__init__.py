"""Scores: the predicted loss rise of an assignment, in nats, without training."""

from hq_optuna.scoring.outputs import OutputRise, output_rise_of
from hq_optuna.scoring.scorer import SCORERS, Score, Scorer, ScorerName
from hq_optuna.scoring.sensitivity import Sensitivity, measure_sensitivity

__all__ = [
    "SCORERS",
    "OutputRise",
    "Score",
    "Scorer",
    "ScorerName",
    "Sensitivity",
    "measure_sensitivity",
    "output_rise_of",
]
