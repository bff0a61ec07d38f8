"""Curvature of the loss: the Hessian's diagonal, estimated from gradients."""

from hq_optuna.curvature.adam import Curvature, InputCurvature, calibration_adam

__all__ = ["Curvature", "InputCurvature", "calibration_adam"]
