"""Statistics correction: batch-norm absorbs what quantization shifts and rescales. No training.

Quantization moves the mean and the spread of every channel. A batch-norm layer can take that back
if its stored statistics follow. Re-estimating them on clean images would be wrong, because they
were gathered on augmented ones; they are corrected by the *difference* to the float network on the
same images instead, so that each channel leaves batch-norm with the mean and the spread that it has
in the float network:

    variance = σ²_stored · σ²_quantized / σ²_float
    mean     = μ_quantized − (μ_float − μ_stored) · σ_quantized / σ_float

All layers are corrected in one forward pass, each before it passes its output on, so that a later
layer sees its input as it will be; several batches go through the network in lockstep. Correcting
all layers from the statistics of one uncorrected pass does harm instead (ResNet-20 at uniform 3
bits: 68 % without, 9 % so, 90 % in order).

A quantized layer without batch-norm behind it gets its output's mean per channel back by a shift,
which is bias correction (Nagel et al., 2019) with measured means.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hq_optuna.network.batches import Batches, autocast, forward
from hq_optuna.network.layer_types import has_known_axes, has_statistics
from hq_optuna.network.products import Product
from hq_optuna.quantization.calls import uncounted
from hq_optuna.quantization.lockstep import Lockstep
from hq_optuna.quantization.observers import watch_inputs
from hq_optuna.quantization.prepare import (
    get_bits,
    prepared_layers,
    remove_hook_,
    set_bits,
)
from hq_optuna.quantization.statistics import (
    ChannelStatistics,
    follows_statistics,
    pooled,
    statistics_of,
)
from hq_optuna.settings import Precision
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import FLOAT_BITS

SHIFT = "output_shift"
_EPSILON = 1e-12


class _Norm(NamedTuple):
    """A batch-norm layer's stored statistics, and those of its input in the float network."""

    stored_mean: Tensor
    stored_var: Tensor
    mean: Tensor
    var: Tensor


class StatisticsCorrection:
    """Corrects one prepared network's statistics for the bits it has at the moment.

    Statistics are those of the batches ``places`` of the data, by default of all, which go through
    the network in lockstep, so they may differ in shape. The stored ones are right at the bits
    ``reference``, those the network was trained at, or in float; with ``of`` they are those of that
    network, in eval mode, which a trained one imitates.

    What was measured is ``known`` where another copy of the network tells it (`tensors`).

    The network keeps what `apply` set until `reset`, which restores the stored values bit for bit.

    Attributes:
        called_once: Modules that no pass calls twice, in the order of their calls; none where what
            is right was ``known``.
        takes: Layer → 2 where the mean and the spread of its output's channels are corrected, by
            the batch-norm behind it, or 1 for the mean alone. Layers not named are not corrected.
    """

    def __init__(
        self,
        prepared: nn.Module,
        data: Batches,
        precision: Precision = "float32",
        reference: Mapping[str, LayerBits] | None = None,
        of: nn.Module | None = None,
        places: Sequence[int] | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.prepared = prepared
        self.precision: Precision = precision
        self.data = data
        self.places = tuple(range(len(data))) if places is None else tuple(places)
        self._norms: dict[str, _Norm] = {}
        self._means: dict[str, Tensor] = {}  # float output means of layers without batch-norm
        for layer in prepared_layers(prepared).values():
            add_shift(layer)
        self._reference = reference
        self.called_once: tuple[str, ...] = ()
        if known is not None:
            told = json.loads(bytes(known["told"].tolist()))
            device = next(iter(prepared.parameters())).device
            pairs = {n: (known[f"mean.{n}"], known[f"var.{n}"]) for n in told["order"]}
            right = {n: (m.to(device), v.to(device)) for n, (m, v) in pairs.items()}
            self._take(prepared if of is None else of, right, told["order"], told["normed"])
            return
        before = get_bits(prepared)
        in_float = dict.fromkeys(before, LayerBits(FLOAT_BITS, FLOAT_BITS))
        set_bits(prepared, in_float if reference is None else reference)
        try:
            self._measure(prepared if of is None else of)
        finally:
            set_bits(prepared, before)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that are corrected, in the order of their first calls."""
        return self._order

    @torch.no_grad()
    def _measure(self, network: nn.Module) -> None:
        """Read the statistics that are right; find the layers with batch-norm behind them."""
        norms = {name: m for name, m in network.named_modules() if has_statistics(m)}
        layers = {name: network.get_submodule(name) for name in prepared_layers(self.prepared)}
        seen = _Outputs(norms)
        watched = watch_inputs(network, list(norms), seen.norm)
        with autocast(network, self.precision), watched, _watch_outputs(layers, seen.layer):
            for place in self.places:
                forward(network, self.data[place].inputs)
                seen.end_batch()
        right = seen.statistics()
        order = common_order([[name for name in way if name in right] for way in seen.ways])
        self.called_once = common_order(seen.called_once())
        self._take(network, right, order, seen.normed)

    def _take(
        self,
        network: nn.Module,
        right: Mapping[str, tuple[Tensor, Tensor]],
        order: Sequence[str],
        normed: Mapping[str, str],
    ) -> None:
        """Take what is right, in the order of the calls; ``normed`` is `_Outputs.normed`."""
        self._order, self._normed = tuple(order), dict(normed)
        self._right = {name: right[name] for name in order}
        layers = prepared_layers(self.prepared)
        for name in self._order:
            mean, var = right[name]
            if name in layers:
                self._means[name] = mean
            else:
                module: Any = network.get_submodule(name)
                stored = module.running_mean.clone(), module.running_var.clone()
                self._norms[name] = _Norm(*stored, mean, var)
        self.takes = {n: 2 for n, norm in normed.items() if norm in self._norms}
        self.takes |= dict.fromkeys(self._means, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return what was measured, on the CPU, for another copy of the network."""
        said = json.dumps({"order": self._order, "normed": self._normed})
        found = {"told": torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8)}
        for name, (mean, var) in self._right.items():
            found |= {f"mean.{name}": mean.cpu(), f"var.{name}": var.cpu()}
        return found

    @torch.no_grad()
    def apply(self, *, only: Container[str] | None = None) -> dict[int, Any]:
        """Correct the network for its present bits; return its outputs on each of the batches.

        Modules that ``only`` does not name stay as they are now.
        """
        chosen = [name for name in self.modules if only is None or name in only]
        for name in chosen:
            self._set(name, self._stored(name))

        steps = Lockstep(chosen, self.settle_)

        def see(name: str, x: Tensor, axis: int) -> None:
            steps.wait(name, statistics_of(x, axis))

        def run(place: int) -> Any:
            with autocast(self.prepared, self.precision):
                return forward(self.prepared, self.data[place].inputs)

        with self.watched(see, only):
            found = steps.run([partial(run, place) for place in self.places])
        return dict(zip(self.places, found, strict=True))

    def _corrected(self, name: str, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, ...]:
        """Return what a module is to hold: from a batch-norm's input, or an unshifted output."""
        if mean is None or var is None:  # at these bits no sample comes here
            return self._stored(name)
        if name in self._norms:
            seen = self._norms[name]
            stored, right = (seen.stored_mean, seen.stored_var), (seen.mean, seen.var)
            return corrected_statistics(stored, right, (mean, var))
        return (self._means[name] - mean,)

    def of(self, network: nn.Module) -> StatisticsCorrection:
        """Return this correction for another copy of the prepared network."""
        told = network, self.data, self.precision, self._reference
        return StatisticsCorrection(*told, places=self.places, known=self.tensors())

    @contextmanager
    def watched(
        self, see: Callable[[str, Tensor, int], None], only: Container[str] | None = None
    ) -> Iterator[None]:
        """Call ``see(name, values, channel axis)`` at each module, before it is used."""
        chosen = [name for name in self.modules if only is None or name in only]
        norms = [name for name in chosen if name in self._norms]
        layers = {n: self.prepared.get_submodule(n) for n in chosen if n in self._means}

        def shift(name: str, module: nn.Module, output: Tensor) -> Tensor:
            see(name, output, channel_axis(module, output))
            return _shifted(module, output)

        with (
            watch_inputs(self.prepared, norms, lambda name, x: see(name, x, 1)),
            _watch_outputs(layers, shift),
        ):
            yield

    def settle_(self, name: str, parts: Sequence[ChannelStatistics]) -> None:
        """Correct a module from what it sees in all batches."""
        self._set(name, self._corrected(name, *pooled(parts)))

    def on(self, places: Sequence[int]) -> StatisticsCorrection:
        """Return the correction of the same network by the statistics of other batches.

        The network is reset; of the two, one is applied at a time.
        """
        self.reset()
        told = self.prepared, self.data, self.precision, self._reference
        return StatisticsCorrection(*told, places=places)

    def reset(self) -> None:
        """Restore the stored statistics and take shifts away."""
        for name in self.modules:
            self._set(name, self._stored(name))

    def _stored(self, name: str) -> tuple[Tensor, ...]:
        if name in self._norms:
            return self._norms[name].stored_mean, self._norms[name].stored_var
        return (torch.zeros_like(self._means[name]),)

    @torch.no_grad()
    def _set(self, name: str, values: tuple[Tensor, ...]) -> None:
        """Write a module's statistics or shift, in the precision in which it holds them."""
        module: Any = self.prepared.get_submodule(name)
        shift = name in self._means
        held = (module.get_buffer(SHIFT),) if shift else (module.running_mean, module.running_var)
        for buffer, value in zip(held, values, strict=True):
            buffer.copy_(value)


class _Outputs:
    """What enters the norms, and leaves the layers, of a network that runs batch by batch.

    ``ways`` are the modules that each batch calls, in order; ``normed`` names the norm behind each
    layer that has one.
    """

    def __init__(self, norms: Mapping[str, nn.Module]) -> None:
        self.ways: list[list[str]] = []
        self.normed: dict[str, str] = {}
        self._norms = norms
        self._calls = Counter[str]()
        self._left: set[str] = set()  # of which nothing can be told
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # an id names a tensor while it lives
        self._found: dict[str, list[ChannelStatistics]] = {}

    def norm(self, name: str, x: Tensor) -> None:
        """Take in what enters a norm."""
        self._calls[name] += 1
        if self._calls[name] == 1 and not follows_statistics(self._norms[name], x):
            self._left.add(name)
        self._found.setdefault(name, []).append(statistics_of(x, 1))
        if id(x) in self._outputs and name not in self._left:
            self.normed[self._outputs[id(x)][0]] = name

    def layer(self, name: str, module: nn.Module, output: Any) -> None:
        """Take in what a layer returns; some return several tensors."""
        self._calls[name] += 1
        if isinstance(output, Tensor) and has_known_axes(module):
            self._outputs[id(output)] = name, output
            if name not in self.normed:  # else the norm takes it in
                axis = channel_axis(module, output)
                self._found.setdefault(name, []).append(statistics_of(output, axis))
        else:
            self._left.add(name)

    def end_batch(self) -> None:
        """A module called twice has one set of statistics for two inputs, so it is left alone."""
        self._left |= {name for name, n in self._calls.items() if n > 1}
        self.ways.append(list(self._calls))
        self._calls.clear()
        self._outputs.clear()

    def called_once(self) -> list[list[str]]:
        """Return the modules of each way of which something can be told."""
        return [[name for name in way if name not in self._left] for way in self.ways]

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return means and variances of what can be corrected.

        That is nothing that no sample reached (an expert, regions of which there are none), and no
        mean of one value: with it, outputs would be right whatever the bits.
        """
        chosen = self._found.keys() - self._left - self.normed.keys()
        told = {n: parts for n, parts in self._found.items() if n in chosen}
        both = {n: pooled(parts) for n, parts in told.items() if sum(p.n for p in parts) > 1}
        return {n: (m, v) for n, (m, v) in both.items() if m is not None and v is not None}


def common_order(ways: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return names in an order that agrees with all of the given ones; leave out what has none.

    Example:
        >>> common_order([["a", "c"], ["a", "b", "c"]])
        ('a', 'b', 'c')
    """
    left: set[str] = set()
    while True:
        kept = [[name for name in way if name not in left] for way in ways]
        sorter = TopologicalSorter[str]({name: () for way in kept for name in way})
        for way in kept:
            for before, after in pairwise(way):
                sorter.add(after, before)
        try:
            return tuple(sorter.static_order())
        except CycleError as error:
            left |= set(error.args[1])


def corrected_statistics(
    stored: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the statistics that a batch-norm layer should store, by the formula above.

    Each argument is mean and variance, ``(C,)``: those that are right for the float network, those
    of its input on a batch, and those of the quantized network's input on the same batch.
    """
    # A dead channel has no spread to match; its stored one stays.
    alive = (right[1] > _EPSILON) & (found[1] > _EPSILON)
    ratio = torch.where(alive, found[1] / right[1].clamp_min(_EPSILON), 1.0)
    # In this order a network that nothing moved keeps what it stored, bit for bit.
    return (found[0] - right[0] * ratio.sqrt()) + stored[0] * ratio.sqrt(), stored[1] * ratio


def add_shift(layer: nn.Module) -> None:
    """Give a prepared layer an output shift, zero for each channel."""
    if SHIFT in dict(layer.named_buffers(recurse=False)) or isinstance(layer, Product):
        return
    weight: Any = layer.weight
    n = getattr(layer, "out_channels", None) or weight.shape[0]
    layer.register_buffer(SHIFT, torch.zeros(n, dtype=weight.dtype, device=weight.device))
    layer.register_forward_hook(_add_shift)


def without_shift_(layer: nn.Module) -> None:
    """Take a layer's output shift away."""
    if SHIFT in dict(layer.named_buffers(recurse=False)):
        delattr(layer, SHIFT)
        remove_hook_(layer._forward_hooks, _add_shift)


def _add_shift(module: nn.Module, _args: Any, output: Any) -> Tensor | None:
    if not bool(module.get_buffer(SHIFT).any()):
        return None  # the output itself: float stays float bit for bit
    with uncounted():
        return _shifted(module, output)


def _shifted(module: nn.Module, output: Tensor) -> Tensor:
    """Return a layer's output with its channels shifted, in the output's own precision."""
    shape = [1] * output.dim()
    shape[channel_axis(module, output)] = -1
    return (output + module.get_buffer(SHIFT).reshape(shape)).to(output.dtype)


def channel_axis(module: nn.Module, output: Tensor) -> int:
    """Return the axis of a layer's output that holds its channels, from the end where it can be."""
    return output.dim() - 1 - len(getattr(module, "kernel_size", ()))


@contextmanager
def _watch_outputs(modules: Mapping[str, nn.Module], see: Any) -> Iterator[None]:
    """Call ``see(name, module, output)`` after each call; what it returns replaces the output."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def hook(m: nn.Module, args: Any, output: Any, name: str = name) -> Any:
                with uncounted():
                    return see(name, m, output)

            stack.callback(module.register_forward_hook(hook).remove)
        yield
