"""Fake quantization: pure functions, ranges, modules with state, and `prepare` / `set_bits`."""

from hq_optuna.quantization.observers import InputHistogram, observe_inputs
from hq_optuna.quantization.prepare import get_bits, prepare, set_bits
from hq_optuna.quantization.quantizers import QUANTIZERS, WeightQuantizer
from hq_optuna.quantization.ranges import AffineRange, weight_scale

__all__ = [
    "QUANTIZERS",
    "AffineRange",
    "InputHistogram",
    "WeightQuantizer",
    "get_bits",
    "observe_inputs",
    "prepare",
    "set_bits",
    "weight_scale",
]
