"""Compute cost of an assignment.

BOPs = Σ MACs · weight_bits · activation_bits; size = Σ weights · weight_bits / 8, as in HAQ
(Wang et al., 2019) and HAWQ-V3 (Yao et al., 2021), with 32 for float. A code takes its bits whether
all codes are used or not: ternary weights count 2. Biases, batch-norm parameters and layers that
are not quantized are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec

Metric = Literal["bops", "size_bytes"]
METRICS: tuple[Metric, ...] = get_args(Metric)
UNITS: dict[Metric, dict[str, float]] = {
    "bops": {"TBOPs": 1e12, "GBOPs": 1e9, "MBOPs": 1e6, "kBOPs": 1e3},
    "size_bytes": {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10, "bytes": 1.0},
}

LayerCost = Callable[[str, LayerBits], float]
"""From a layer's name and bits to its part of a cost."""


class Row(NamedTuple):
    """A sum over layers that a limit holds: what is fixed, and what each layer adds."""

    layer_cost: LayerCost
    fixed: float = 0.0


class CostModel:
    """The cost of assignments of one network in one metric.

    Args:
        layers: All quantizable layers (`L` of them), pinned ones included.
        metric: ``"bops"`` (bit operations for one sample) or ``"size_bytes"`` (weights at rest).

    Example:
        >>> from hq_optuna.space.assignment import BitConfig
        >>> from hq_optuna.space.layers import LayerSpec
        >>> fc = LayerSpec("fc", "Linear", (10, 64), 0, macs=640, n_calls=1, n_inputs=64)
        >>> CostModel([fc]).cost(BitConfig({"fc": (4, 8)}))
        20480.0
        >>> CostModel([fc], "size_bytes").cost(BitConfig({"fc": (4, 8)}))
        320.0
    """

    def __init__(self, layers: Sequence[LayerSpec], metric: Metric = "bops") -> None:
        if metric not in METRICS:
            raise ValueError(f"metric is one of {', '.join(METRICS)}; got {metric!r}.")
        self.layers = tuple(layers)
        self.metric: Metric = metric
        self._names = [layer.name for layer in layers]
        unit = [layer.macs if metric == "bops" else layer.n_weights for layer in layers]
        self._unit: NDArray[np.float64] = np.asarray(unit, dtype=np.float64)  # (L,)

    def per_layer(self, config: Mapping[str, LayerBits]) -> NDArray[np.float64]:
        """Return the cost of each layer, shape ``(L,)``, in network order."""
        pairs = np.asarray([config[name] for name in self._names], dtype=np.float64)  # (L, 2)
        return self._unit * pairs[:, 0] * (pairs[:, 1] if self.metric == "bops" else 1 / 8)

    def layer_cost(self, name: str, bits: LayerBits) -> float:
        """Return the cost of one layer with these bits."""
        unit = float(self._unit[self._names.index(name)])
        return unit * bits.weight_bits * (bits.activation_bits if self.metric == "bops" else 1 / 8)

    def cost(self, config: Mapping[str, LayerBits]) -> float:
        """Return the cost of the assignment, in BOPs or bytes.

        Every term is a whole number of bit operations, or of eighths of a byte, so the sum is
        exact in float64 up to 2⁵³ and the same on every machine.
        """
        return float(self.per_layer(config).sum())

    def uniform(self, weight_bits: int, activation_bits: int) -> float:
        """Return the cost with the same bits everywhere, pinned layers too."""
        return self.cost(dict.fromkeys(self._names, LayerBits(weight_bits, activation_bits)))

    @property
    def rows(self) -> tuple[Row, ...]:
        """The sums over layers of which the cost is the largest: a single one where it adds up."""
        return (Row(self.layer_cost),)

    @property
    def int8(self) -> float:
        """Cost with 8 bits everywhere: what fractions of a budget refer to."""
        return self.uniform(8, 8)

    @property
    def float32(self) -> float:
        """Cost without quantization."""
        return self.uniform(FLOAT_BITS, FLOAT_BITS)


def macs(layers: Sequence[LayerSpec]) -> int:
    """Return the multiply-accumulates of the layers for one sample."""
    return sum(layer.macs for layer in layers)


def shares(costs: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each cost as a fraction of their sum, shape ``(L,)``; zeros where the sum is zero."""
    values = np.asarray(costs, dtype=np.float64)
    total = float(values.sum())
    return values / total if total > 0 else values


def format_cost(cost: float, metric: Metric) -> str:
    """Return the cost for people: GBOPs, MBOPs, MiB, KiB.

    Example:
        >>> format_cost(116.1e9, "bops"), format_cost(5.82 * 2**20, "size_bytes")
        ('116.1 GBOPs', '5.82 MiB')
    """
    for unit, scale in UNITS[metric].items():
        if cost >= scale:
            return f"{cost / scale:.4g} {unit}"
    return f"{cost:.4g} {'BOPs' if metric == 'bops' else 'bytes'}"
