"""Peak activation memory: which tensors are in memory at each moment of a pass, and how wide.

A tensor is as wide as its readers need it: the activation bits of the layers that quantize it, the
largest where several read it with different bits, and 32 where nobody quantizes it. With
``output_bits`` it has these at least, but where one layer alone reads it. Tensors are packed: 3
bits take 3/8 byte. Weights, and what an operation needs for itself, are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import FLOAT_BITS


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor between layers.

    Attributes:
        name: What makes it: a module's name, or ``"input"``.
        n_elements: Elements for one sample.
        first: Moment at which it is made.
        last: Moment at which it is read last; the end of the pass for what the network returns.
        readers: Layers that quantize it.
        bits: Its width where no layer quantizes it.
        alone: Whether one layer alone reads it.
        least: Its least width.
    """

    name: str
    n_elements: int
    first: int
    last: int
    readers: tuple[str, ...] = ()
    bits: int = FLOAT_BITS
    alone: bool = False
    least: int = 0

    def width(self, config: Mapping[str, LayerBits]) -> int:
        """Return its bits an element: of several readers' the largest."""
        widest = max((config[name].activation_bits for name in self.readers), default=self.bits)
        return max(widest, self.least)


@dataclass(frozen=True)
class MemoryMap:
    """The tensors of one pass in the order the network runs (`T` of them), and its moments (`M`).

    Example:
        >>> tensors = (LiveTensor("input", 64, 0, 0, ("fc",)), LiveTensor("fc", 10, 0, 0))
        >>> MemoryMap(("fc",), tensors).peak({"fc": LayerBits(8, 4)})
        72.0
    """

    moments: tuple[str, ...] = ()
    tensors: tuple[LiveTensor, ...] = ()
    _alive: NDArray[np.float64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at = np.arange(len(self.moments))[:, None]  # (M, 1)
        first, last, size = (
            np.asarray([getattr(t, name) for t in self.tensors], dtype=np.int64)
            for name in ("first", "last", "n_elements")
        )
        alive = np.where((first <= at) & (at <= last), size / 8, 0.0)
        object.__setattr__(self, "_alive", alive)  # (M, T), bytes a bit

    def widths(self, config: Mapping[str, LayerBits]) -> NDArray[np.float64]:
        """Return the bits an element of each tensor, shape ``(T,)``."""
        return np.asarray([tensor.width(config) for tensor in self.tensors], dtype=np.float64)

    def profile(self, config: Mapping[str, LayerBits]) -> NDArray[np.float64]:
        """Return the bytes in memory at each moment, shape ``(M,)``."""
        found: NDArray[np.float64] = self._alive @ self.widths(config)
        return found

    def peak(self, config: Mapping[str, LayerBits]) -> float:
        """Return the most bytes at any moment. Eighths of a byte are exact in float64."""
        return float(self.profile(config).max(initial=0.0))

    def at_peak(
        self, config: Mapping[str, LayerBits]
    ) -> tuple[str, list[tuple[LiveTensor, float]]]:
        """Return the moment of the peak and what is in memory there with its bytes, largest first.

        Of several such moments the first.
        """
        if not self.moments:
            return "", []
        moment = int(self.profile(config).argmax())
        return self.moments[moment], self.held(config, moment)

    def held(self, config: Mapping[str, LayerBits], moment: int) -> list[tuple[LiveTensor, float]]:
        """Return what is in memory at a moment with its bytes, largest first."""
        sizes = self._alive[moment] * self.widths(config)
        found = [(t, float(size)) for t, size in zip(self.tensors, sizes, strict=True) if size]
        return sorted(found, key=lambda pair: -pair[1])

    @functools.cached_property
    def rows(self) -> tuple[MemoryRow, ...]:
        """Linear rows whose largest value is the peak: see `MemoryRow`.

        A tensor that several layers quantize takes part once for each of them, because the largest
        of sums is the sum of the largest. Rows that another one is never below are left out.

        Raises:
            ValueError: More than `MAX_ROWS`: too many tensors with several readers at one moment.
        """
        found: set[tuple[float, tuple[tuple[str, float], ...]]] = set()
        for alive in np.unique(self._alive, axis=0):
            partial: set[tuple[float, tuple[tuple[str, float], ...]]] = {(0.0, ())}
            for tensor, size in zip(self.tensors, alive.tolist(), strict=True):
                if not size:
                    continue
                at_least = tensor.least if tensor.readers else tensor.width({})
                held = (
                    {(fixed + size * at_least, by) for fixed, by in partial} if at_least else set()
                )
                partial = held | {
                    (fixed, tuple(sorted({**dict(by), r: dict(by).get(r, 0.0) + size}.items())))
                    for fixed, by in partial
                    for r in tensor.readers
                }
                if len(partial) + len(found) > MAX_ROWS:
                    raise ValueError(
                        f"Peak memory takes more than {MAX_ROWS:,} linear rows: too many tensors "
                        "are read by several layers at once. Search by steps instead "
                        "(method='default', verify=0)."
                    )
            found |= partial
        rows = [MemoryRow(fixed, dict(by)) for fixed, by in sorted(found)]
        return tuple(row for row in rows if not any(row.below(other) for other in rows))

    def read_by(self, layer: str) -> int:
        """Return the elements of the tensors that a layer quantizes, for one sample."""
        return sum(tensor.n_elements for tensor in self.tensors if layer in tensor.readers)

    def rounded(self, output_bits: int | None) -> MemoryMap:
        """Return the map of a network whose outputs are rounded to so many bits."""
        if output_bits is None:
            return self
        floats = [t.readers or t.bits == FLOAT_BITS for t in self.tensors]
        tensors = (
            replace(t, bits=output_bits, least=output_bits) if is_float and not t.alone else t
            for t, is_float in zip(self.tensors, floats, strict=True)
        )
        return MemoryMap(self.moments, tuple(tensors))

    def to_json(self) -> dict[str, Any]:
        """Return the map as JSON data, the inverse of `from_json`."""
        rows = [[getattr(t, one.name) for one in fields(t)] for t in self.tensors]
        return {"moments": list(self.moments), "tensors": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryMap:
        """Rebuild a map from `to_json`'s data."""
        known = [field.name for field in fields(LiveTensor)]
        rows = [dict(zip(known, row, strict=True)) for row in data["tensors"]]
        tensors = [LiveTensor(**{**row, "readers": tuple(row["readers"])}) for row in rows]
        return cls(tuple(data["moments"]), tuple(tensors))


MAX_ROWS = 20_000
"""Most linear rows that peak memory is written as."""


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Bytes at one moment: ``fixed`` + Σ ``by_layer[name]`` · activation bits of the layer."""

    fixed: float
    by_layer: Mapping[str, float]

    def layer_cost(self, name: str, bits: LayerBits) -> float:
        """Return what a layer adds with these bits, in bytes."""
        return self.by_layer.get(name, 0.0) * bits.activation_bits

    def below(self, other: MemoryRow) -> bool:
        """Return whether another row is never less than this one, whatever the bits."""
        if self == other or self.fixed > other.fixed:
            return False
        return all(x <= other.by_layer.get(name, 0.0) for name, x in self.by_layer.items())


def layer_bytes(
    memory: MemoryMap, config: Mapping[str, LayerBits], names: Sequence[str]
) -> NDArray[np.float64]:
    """Return the bytes at the peak by the layer that sets their width, shape ``(L,)``.

    A tensor with several readers counts for the one with the most bits, of equal ones the first.
    What nobody quantizes is no layer's, so the sum may be below the peak.
    """
    found = dict.fromkeys(names, 0.0)
    for tensor, size in memory.at_peak(config)[1]:
        if tensor.readers:
            found[max(tensor.readers, key=lambda n: config[n].activation_bits)] += size
    return np.asarray([found[name] for name in names])
