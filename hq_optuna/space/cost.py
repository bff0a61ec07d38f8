"""Compute cost of an assignment.

BOPs = Σ MACs · weight_bits · activation_bits; size = Σ weights · weight_bits / 8, as in HAQ
(Wang et al., 2019) and HAWQ-V3 (Yao et al., 2021), with 32 for float. A code takes its bits whether
all codes are used or not: ternary weights count 2. Biases, batch-norm parameters and layers that
are not quantized are not counted.

Peak activation memory is the most bytes of tensors between layers at any moment of a pass
(`space.memory`); latency is the sum of a table's rows and its rest (`space.latency`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from hq_optuna.errors import SpaceError
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.latency import LatencyTable
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec
from hq_optuna.space.memory import MemoryMap, layer_bytes

Metric = Literal["bops", "size_bytes", "activation_bytes", "latency_s"]
METRICS: tuple[Metric, ...] = get_args(Metric)
_BYTES = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10, "bytes": 1.0}
UNITS: dict[Metric, dict[str, float]] = {
    "bops": {"TBOPs": 1e12, "GBOPs": 1e9, "MBOPs": 1e6, "kBOPs": 1e3},
    "size_bytes": _BYTES,
    "activation_bytes": _BYTES,
    "latency_s": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
}
NOUNS: dict[Metric, str] = {
    "bops": "BOPs",
    "size_bytes": "size",
    "activation_bytes": "peak activation memory",
    "latency_s": "latency",
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
        metric: ``"bops"`` (bit operations for one sample), ``"size_bytes"`` (weights at rest),
            ``"activation_bytes"`` (the peak, for one sample) or ``"latency_s"``.
        memory: What is in memory when; needed for ``"activation_bytes"``.
        latency: Seconds by layer and bits; needed for ``"latency_s"``.

    Raises:
        ValueError: There is no such metric.
        SpaceError: What the metric needs is missing.

    Example:
        >>> from hq_optuna.space.assignment import BitConfig
        >>> from hq_optuna.space.layers import LayerSpec
        >>> fc = LayerSpec("fc", "Linear", (10, 64), 0, macs=640, n_calls=1, n_inputs=64)
        >>> CostModel([fc]).cost(BitConfig({"fc": (4, 8)}))
        20480.0
        >>> CostModel([fc], "size_bytes").cost(BitConfig({"fc": (4, 8)}))
        320.0
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        metric: Metric = "bops",
        *,
        memory: MemoryMap | None = None,
        latency: LatencyTable | None = None,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric is one of {', '.join(METRICS)}; got {metric!r}.")
        if metric == "activation_bytes" and (memory is None or not memory.moments):
            raise SpaceError(
                "The space does not say what is in memory when, which peak activation memory "
                "follows from. Build it with memory=introspect(network, inputs).memory."
            )
        if metric == "latency_s" and latency is None:
            raise SpaceError(
                "No latency is known of these layers. Give a table: --latency FILE, or latency= "
                "in Python; `hq-optuna profile` measures one."
            )
        self.layers = tuple(layers)
        self.metric: Metric = metric
        self._memory, self._latency = memory, latency
        self._names = [layer.name for layer in layers]
        counted = [layer.macs if metric == "bops" else layer.n_weights for layer in layers]
        self._unit = dict(zip(self._names, map(float, counted), strict=True))

    def per_layer(self, config: Mapping[str, LayerBits]) -> NDArray[np.float64]:
        """Return the cost of each layer, shape ``(L,)``, in network order.

        Of peak memory, what is there at the peak, by the layer that sets its width. What is no
        layer's, of memory in float or of the rest of a latency, is left out.
        """
        if self.metric == "activation_bytes":
            assert self._memory is not None
            return layer_bytes(self._memory, config, self._names)
        return np.asarray([self.layer_cost(name, config[name]) for name in self._names])

    def layer_cost(self, name: str, bits: LayerBits) -> float:
        """Return the cost of one layer with these bits; of memory, that of the tensors it reads."""
        if self.metric == "activation_bytes":
            assert self._memory is not None
            return self._memory.read_by(name) * bits.activation_bits / 8
        if self.metric == "latency_s":
            assert self._latency is not None
            return self._latency.seconds(name, bits)
        w, a = bits
        return self._unit[name] * w * (a if self.metric == "bops" else 1 / 8)

    def cost(self, config: Mapping[str, LayerBits]) -> float:
        """Return the cost of the assignment, in BOPs, bytes or seconds.

        But for latency every term is a whole number of bit operations, or of eighths of a byte, so
        the sum is exact in float64 up to 2⁵³ and the same on every machine.
        """
        if self.metric == "activation_bytes":
            assert self._memory is not None
            return self._memory.peak(config)
        of_layers = [self.layer_cost(name, config[name]) for name in self._names]
        return math.fsum([self._rest, *of_layers])

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """The sums over layers of which the cost is the largest: a single one where it adds up.

        Raises:
            ValueError: Peak memory takes too many, see `MemoryMap.rows`.
        """
        if self.metric == "activation_bytes":
            assert self._memory is not None
            return tuple(Row(row.layer_cost, row.fixed) for row in self._memory.rows)
        return (Row(self.layer_cost, self._rest),)

    @property
    def _rest(self) -> float:
        return self._latency.rest_s if self.metric == "latency_s" and self._latency else 0.0

    def excess(self, config: Mapping[str, LayerBits], limit: float) -> float:
        """Return by what share the assignment is over a limit; of a peak, summed over all moments.

        Lowering one of several equal peaks leaves the cost as it is, and this is less.
        """
        over = [self.cost(config)]
        if self.metric == "activation_bytes":
            assert self._memory is not None
            over = self._memory.profile(config).tolist()
        return math.fsum(max(each / limit - 1, 0.0) for each in over)

    def uniform(self, weight_bits: int, activation_bits: int) -> float:
        """Return the cost with the same bits everywhere, pinned layers too."""
        return self.cost(dict.fromkeys(self._names, LayerBits(weight_bits, activation_bits)))

    @property
    def int8(self) -> float:
        """Cost with 8 bits everywhere: what fractions of a budget refer to."""
        return self.uniform(8, 8)

    @property
    def float32(self) -> float | None:
        """Cost without quantization; ``None`` where the latency table does not have it."""
        return self.known_cost(dict.fromkeys(self._names, LayerBits(FLOAT_BITS, FLOAT_BITS)))

    def known_cost(self, config: Mapping[str, LayerBits]) -> float | None:
        """Return the cost, ``None`` where the latency table lacks a pair of the assignment."""
        if self.metric == "latency_s":
            assert self._latency is not None
            if not all(self._latency.knows(name, config[name]) for name in self._names):
                return None
        return self.cost(config)


def macs(layers: Sequence[LayerSpec]) -> int:
    """Return the multiply-accumulates of the layers for one sample."""
    return sum(layer.macs for layer in layers)


def shares(costs: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each cost as a fraction of their sum, shape ``(L,)``; zeros where the sum is zero."""
    values = np.asarray(costs, dtype=np.float64)
    total = float(values.sum())
    return values / total if total > 0 else values


def format_cost(cost: float, metric: Metric) -> str:
    """Return the cost for people: GBOPs, MBOPs, MiB, KiB, ms.

    Example:
        >>> format_cost(116.1e9, "bops"), format_cost(5.82 * 2**20, "size_bytes")
        ('116.1 GBOPs', '5.82 MiB')
    """
    for unit, scale in UNITS[metric].items():
        if cost >= scale:
            return f"{cost / scale:.4g} {unit}"
    if metric == "latency_s":
        return f"{cost / 1e-6:.4g} us"
    return f"{cost:.4g} {'BOPs' if metric == 'bops' else 'bytes'}"
