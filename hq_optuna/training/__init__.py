"""Quantization-aware training of one assignment: a network, data and settings, no search."""

from hq_optuna.training.data import Augment, TrainingData
from hq_optuna.training.optimizer import SecondMoments
from hq_optuna.training.settings import TrainingSettings
from hq_optuna.training.trained import load_trained_, rounded_copy, trained_tensors
from hq_optuna.training.trainer import Epoch, Trainer

__all__ = [
    "Augment",
    "Epoch",
    "SecondMoments",
    "Trainer",
    "TrainingData",
    "TrainingSettings",
    "load_trained_",
    "rounded_copy",
    "trained_tensors",
]
