"""Curvature of the loss: the Hessian's diagonal, estimated from gradients."""

from hq_optuna.curvature.adam import LossFunction, calibration_adam
from hq_optuna.curvature.estimate import Curvature, InputCurvature
from hq_optuna.curvature.fisher import (
    OutputProbe,
    empirical_fisher,
    output_curvature,
    probe_of,
)
from hq_optuna.curvature.hutchinson import hutchinson
from hq_optuna.curvature.known_losses import is_cross_entropy, is_squared_error

__all__ = [
    "Curvature",
    "InputCurvature",
    "LossFunction",
    "OutputProbe",
    "calibration_adam",
    "empirical_fisher",
    "hutchinson",
    "is_cross_entropy",
    "is_squared_error",
    "output_curvature",
    "probe_of",
]
