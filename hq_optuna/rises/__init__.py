"""Rises: what it costs that a network's outputs move, with labels or without."""

from hq_optuna.rises.base import Given, Probe, Rise
from hq_optuna.rises.choice import (
    Decided,
    RiseLoss,
    decide,
    rise_of_loss,
    rise_of_outputs,
    without_labels,
)
from hq_optuna.rises.heads import At, Detection, Heads, parts_of
from hq_optuna.rises.places import Binary, Cosine, CrossEntropy, OfPlaces, SquaredError

__all__ = [
    "At",
    "Binary",
    "Cosine",
    "CrossEntropy",
    "Decided",
    "Detection",
    "Given",
    "Heads",
    "OfPlaces",
    "Probe",
    "Rise",
    "RiseLoss",
    "SquaredError",
    "decide",
    "parts_of",
    "rise_of_loss",
    "rise_of_outputs",
    "without_labels",
]
