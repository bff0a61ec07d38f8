"""Observers: what values enter each layer, seen on the calibration set.

One pass over the data fills a histogram between the extremes seen so far, which widens with them.
From the histogram any number of bits gets its range without another look at the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batches, forward
from hq_optuna.quantization.calls import uncounted
from hq_optuna.quantization.ranges import (
    ANY_GRID,
    AffineRange,
    InputGrid,
    affine_range,
    fitted_range,
    histogram_range,
)
from hq_optuna.settings import Observer

N_BINS = 2048
PERCENTILE = 99.99


@dataclass(frozen=True)
class InputHistogram:
    """Histogram of the values that entered a layer, all calls together.

    ``counts`` are ``(bins,)``, ``edges`` ``(bins + 1,)``; the first and last are the extremes seen.
    """

    counts: NDArray[np.float64]
    edges: NDArray[np.float64]

    def range(
        self, bits: int, observer: Observer = "squared_error", grid: InputGrid = ANY_GRID
    ) -> AffineRange:
        """Return scale and zero point for a number of bits.

        They have the least squared error (``"squared_error"``), cover all values seen
        (``"min_max"``), or all but 0.01 % of the values at either end (``"percentile"``), as far
        as the target's grid allows.
        """
        found = self._any_range(bits, observer)
        if not grid.constrains(bits):
            return found
        covers = observer != "squared_error"
        return fitted_range(found, grid, self.counts, self.edges, bits, covers)

    def _any_range(self, bits: int, observer: Observer) -> AffineRange:
        """Return scale and zero point without a target's limits."""
        if observer == "squared_error":
            return histogram_range(self.counts, self.edges, bits)
        if observer == "min_max":
            return affine_range(float(self.edges[0]), float(self.edges[-1]), bits)
        if observer == "percentile":
            share = np.cumsum(self.counts) / max(self.counts.sum(), 1.0)
            tail = 1 - PERCENTILE / 100
            last = len(self.counts) - 1  # also where no value was ever seen
            low = float(self.edges[min(int(np.searchsorted(share, tail)), last)])
            high = float(self.edges[min(int(np.searchsorted(share, 1 - tail)), last) + 1])
            return affine_range(low if self.edges[0] < 0 else 0.0, high, bits)
        raise ValueError(f"observer is one of {', '.join(get_args(Observer))}; got {observer!r}.")


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the tensor a quantizable layer is called with."""
    value = args[0] if args else kwargs[_first_name(kwargs)]
    assert isinstance(value, Tensor)
    return value


def with_first_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a layer's arguments with another tensor in the place of `first_input`."""
    if args:
        return (x, *args[1:]), dict(kwargs)
    return args, {**kwargs, _first_name(kwargs): x}


def _first_name(kwargs: Mapping[str, Any]) -> str:
    """Return PyTorch's name of a layer's input, or that which a class of the user's gave it."""
    if "input" in kwargs:
        return "input"
    return next(name for name, value in kwargs.items() if isinstance(value, Tensor))


@contextmanager
def watch_inputs(
    network: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, input)`` whenever a named layer is called."""
    handles = []
    try:
        for name in names:

            def hook(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                with uncounted():
                    see(name, first_input(args, kwargs))

            module = network.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def observe_inputs(
    network: nn.Module, names: Sequence[str], data: Batches
) -> dict[str, InputHistogram]:
    """Return the histogram of what enters each named layer of a network in eval mode.

    Raises `DataError` where a layer receives NaN or infinity.
    """
    with observed_inputs(network, names) as found:
        for batch in data:
            forward(network, batch.inputs)
    return found


@contextmanager
def observed_inputs(
    network: nn.Module, names: Sequence[str]
) -> Iterator[dict[str, InputHistogram]]:
    """Give the histograms of `observe_inputs`, which are there when the body has run the network.

    Raises `DataError` where a layer receives NaN or infinity.
    """
    found, histograms = dict[str, InputHistogram](), Histograms(names)
    with watch_inputs(network, names, histograms.see):
        yield found
    found |= histograms.found()


class Histograms:
    """Histograms by name of what is seen."""

    def __init__(self, names: Sequence[str]) -> None:
        self._seen = {name: _Counted() for name in names}

    def see(self, name: str, x: Tensor) -> None:
        """Count values. Raises `DataError` for NaN and infinity."""
        if not x.numel():
            return
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(
                f"Layer {name!r} receives NaN or infinity on the calibration data. "
                "Check the data's normalization and the checkpoint."
            )
        self._seen[name].add(x.detach(), low, high)

    def found(self) -> dict[str, InputHistogram]:
        """Return the histograms."""
        return {n: InputHistogram(one.counts, one.edges) for n, one in self._seen.items()}


class _Counted:
    """A histogram that grows with what is seen; 0 lies within it."""

    def __init__(self) -> None:
        self.counts = np.zeros(N_BINS)
        self.edges = np.linspace(0.0, TINY_RANGE, N_BINS + 1)

    def add(self, x: Tensor, low: float, high: float) -> None:
        """Count values, whose extremes are given."""
        low, high = min(low, float(self.edges[0])), max(high, float(self.edges[-1]))
        if (low, high) != (self.edges[0], self.edges[-1]):
            edges = np.linspace(low, high, N_BINS + 1)
            # What was counted is spread evenly over its narrower bin.
            below = np.interp(edges, self.edges, np.concatenate([[0.0], self.counts.cumsum()]))
            self.counts, self.edges = np.diff(below), edges
        values = x.float().flatten()
        if torch.are_deterministic_algorithms_enabled():
            values = values.cpu()  # where `histc` is
        for part in torch.split(values, MOST_COUNTED):
            self.counts += torch.histc(part, N_BINS, low, high).double().cpu().numpy()


MOST_COUNTED = 2**24
"""`torch.histc` counts in single precision: a bin stops growing there."""

TINY_RANGE = 1e-6
"""A layer that only ever sees zeros still needs a range."""
