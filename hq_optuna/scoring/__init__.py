"""Scores: the predicted loss rise of an assignment, in nats, without training."""

from hq_optuna.scoring.scorer import Score, Scorer
from hq_optuna.scoring.sensitivity import (
    SCORERS,
    ScorerName,
    Sensitivity,
    measure_sensitivity,
)

__all__ = ["SCORERS", "Score", "Scorer", "ScorerName", "Sensitivity", "measure_sensitivity"]
