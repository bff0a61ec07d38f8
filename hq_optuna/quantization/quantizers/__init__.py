"""Quantizers of weights by name, one a file, each with formula, source and gradient."""

from __future__ import annotations

from hq_optuna.errors import SpaceError
from hq_optuna.quantization.quantizers.base import ByGroup, WeightQuantizer
from hq_optuna.quantization.quantizers.binary import Binary
from hq_optuna.quantization.quantizers.dorefa import Dorefa
from hq_optuna.quantization.quantizers.midrise import Midrise
from hq_optuna.quantization.quantizers.ternary import Ternary
from hq_optuna.quantization.quantizers.uniform import Uniform

UNIFORM = Uniform()
QUANTIZERS: dict[str, WeightQuantizer] = {
    quantizer.name: quantizer for quantizer in (UNIFORM, Binary(), Ternary(), Midrise(), Dorefa())
}

__all__ = ["QUANTIZERS", "UNIFORM", "ByGroup", "WeightQuantizer", "quantizer_named"]


def quantizer_named(name: str) -> WeightQuantizer:
    """Return the quantizer of this name; refuse a name that none has."""
    if name not in QUANTIZERS:
        raise SpaceError(f"A quantizer is one of {', '.join(QUANTIZERS)}; got {name!r}.")
    return QUANTIZERS[name]
