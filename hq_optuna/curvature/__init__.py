"""Curvature of the loss: the Hessian's diagonal, estimated from gradients."""

from hq_optuna.curvature.adam import calibration_adam
from hq_optuna.curvature.estimate import Curvature, InputCurvature
from hq_optuna.curvature.fisher import OutputProbe, output_curvature, probe_of
from hq_optuna.curvature.hutchinson import hutchinson

__all__ = [
    "Curvature",
    "InputCurvature",
    "OutputProbe",
    "calibration_adam",
    "hutchinson",
    "output_curvature",
    "probe_of",
]
