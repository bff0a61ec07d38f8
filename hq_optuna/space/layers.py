"""What the search knows of a layer: names, sizes and counts, nothing of PyTorch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

FLOAT_BITS = 32
"""Bits that stand for "not quantized" in assignments and in costs (IEEE single precision)."""

MIN_BITS = 1
MAX_BITS = 16
"""Narrowest and widest integer grid a user may ask for."""


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer of any kind, such as NumPy's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One quantizable layer, as seen on the example input.

    A product of activations is a layer without weights: its "weight bits" are those of its second
    factor.

    Attributes:
        name: Qualified name of the module in the network, ``"layer1.0.conv1"``. A module that
            stands in several places goes by the first of its names.
        kind: Class of the module, ``"Conv2d"``.
        weight_shape: Shape of the weight tensor; empty for a product of activations.
        channel_axis: Axis of the weight that holds the output channels (1 for transposed
            convolutions, where it holds those of one group, else 0).
        macs: Multiply-accumulates for one sample, summed over all calls.
        n_calls: How often one forward pass calls the layer.
        n_inputs: Input elements for one sample, summed over all calls.
        aliases: Further names of the same module.
        input_of: The first linear layer of the same module that reads the very same tensor, as
            the projections to queries, keys and values do; empty where none or itself does.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    channel_axis: int
    macs: int
    n_calls: int
    n_inputs: int
    aliases: tuple[str, ...] = ()
    input_of: str = ""

    @property
    def n_weights(self) -> int:
        """Number of weights, without the bias."""
        return math.prod(self.weight_shape) if self.weight_shape else 0

    @property
    def is_product(self) -> bool:
        """Whether it multiplies two activations."""
        return not self.weight_shape

    def to_json(self) -> dict[str, Any]:
        """Return the layer as JSON data, the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerSpec:
        """Rebuild a layer from `to_json`'s data (lists may stand for tuples)."""
        lists = {k: tuple(data[k]) for k in ("weight_shape", "aliases")}
        return cls(**{**data, **lists})


@dataclass(frozen=True, slots=True)
class SkippedModule:
    """A module with weights that is not quantized, and why."""

    name: str
    kind: str
    reason: str
