"""The Hessian trace of each layer's error, seen from the outputs: what its bits cost, all at once.

Rounding a layer moves the outputs z by Δz, which costs ½ Δzᵀ H̄ Δz, with H̄ the mean over samples of
the loss's Hessian in the outputs (softened, as in `hq_optuna.rises`). With random u of
covariance H̄ that is the mean of ½ ⟨u, Δz⟩²: half the trace of H̄ E[Δz Δzᵀ], by random probes. One
backward pass from ⟨u, z⟩ gives the gradient g in every layer's output y, and ⟨u, Δz⟩ = ⟨g, Δy⟩ to
first order, whatever moved y: a rounded weight, or a rounded input, at any number of bits.

A sample's change is the sum over places, in which errors cancel or add up as they really do. What
the statistics correction will take away is taken away here too. Batch-norm that follows its input
undoes the part of Δy that is linear in y, channel by channel, so that with the regression
Δy ≈ a + b · (y − μ), and the sums g0 = Σ g and g1 = Σ g · (y − μ) over places,

    c = ⟨g, Δy⟩ − g0 · a − g1 · b,        rise = ½ · mean over samples and probes of c².

Without batch-norm behind it only the mean is corrected, and only a is taken away. What rounds an
input is undone in part, as the mean of both ways served best.

Sources: Hutchinson 1989 (probes); Schraudolph 2002 (Gauss-Newton).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.curvature import Curvature
from hq_optuna.curvature.sweep import Call, Calls
from hq_optuna.errors import DataError
from hq_optuna.network.batches import Batch, Batches
from hq_optuna.network.containers import map_tensors
from hq_optuna.network.layer_types import has_known_axes
from hq_optuna.network.products import Product
from hq_optuna.quantization.correction import StatisticsCorrection, channel_axis
from hq_optuna.quantization.observers import first_input, with_first_input
from hq_optuna.quantization.prepare import (
    float_weight,
    get_bits,
    input_quantizer,
    set_bits,
    weight_quantizer,
)
from hq_optuna.quantization.statistics import ChannelStatistics, pooled, statistics_of
from hq_optuna.rises.base import Rise
from hq_optuna.scoring.first_order import (
    applied,
    by_outer_products,
    input_changes,
    is_plain,
    outer,
    weight_changes,
)
from hq_optuna.scoring.sensitivity import Sensitivity
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.space.search_space import SearchSpace, bits_needed

PROBES = 2
"""Random vectors a sample; its places are many more."""
LINE_SAMPLES, LINE_PLACES = 16, 2**15
"""Samples at least on which Δy of a rounded input is regressed on y, and places that are enough.
With 8 samples, of 125 places each, a keyword network's assignments ranked 0.82 in place of 0.88; 16
made no clear difference."""


@dataclass(eq=False)
class _Seen:
    """A layer's call: what it was given, what it returned, and gradients of the probes there."""

    call: Call | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    y: Tensor = field(init=False)
    gradients: list[Tensor] = field(default_factory=list)
    input_gradients: list[Tensor] = field(default_factory=list)

    def returned(self, y: Tensor) -> None:
        """Keep what came out, which an activation may write into."""
        self.y = y.detach().clone()

    def in_single_(self) -> None:
        """Have outputs and their gradients in single precision at least."""
        self.y = self.y.to(torch.promote_types(self.y.dtype, torch.float32))
        self.gradients = [g.to(self.y.dtype) for g in self.gradients]

    def unsqueeze_(self) -> None:
        """Give all tensors an axis of one sample."""
        self.x, self.y = self.x[None], self.y[None]
        self.gradients = [g[None] for g in self.gradients]
        self.input_gradients = [g[None] for g in self.input_gradients]

    def is_plain(self, weight: Tensor) -> bool:
        """Say whether input and output are laid out by samples, in the weight's precision."""
        laid_out = self.y.dim() == max(weight.dim(), self.x.dim()) and len(self.x) == len(self.y)
        return laid_out and self.x.dtype == weight.dtype == self.y.dtype


class _Side:
    """What was summed of one layer's weights, or of its inputs, at ``B`` numbers of bits."""

    def __init__(self, bits: set[int]) -> None:
        self.bits = sorted(bits)
        self._changes: list[Tensor] = []  # ⟨g, Δy⟩ of a batch, (B, probes, samples)
        self._y: list[ChannelStatistics] = []
        self._sums: Tensor | float = 0.0  # of Δy, and of Δy · y, by channel, (2, B, channels)

    def add(self, changes: Tensor, n: int) -> None:
        """Add ⟨g, Δy⟩ of a batch of ``n`` samples, ``(B, probes, rows)``."""
        self._changes.append(changes.double().reshape(*changes.shape[:2], n, -1).sum(3))

    def add_line(self, y: ChannelStatistics, sums: Tensor, products: Tensor) -> None:
        """Add what a line needs: Σ Δy and Σ Δy · (y − mean of this batch), ``(B, channels)``."""
        sums = sums.double()
        self._y.append(y)
        self._sums = self._sums + torch.stack([sums, products + sums * y.mean.double()])

    def tensors(self) -> dict[str, Tensor]:
        """Return what was summed in one batch, by name."""
        found = {"changes": self._changes[0]} if self._changes else dict[str, Tensor]()
        for y in self._y:
            n = torch.tensor(float(y.n), dtype=torch.float64, device="cpu")
            found |= {"n": n, "mean": y.mean, "var": y.var, "sums": torch.as_tensor(self._sums)}
        return found

    def add_tensors(self, found: Mapping[str, Tensor]) -> None:
        """Add what `tensors` returned of a batch."""
        if "changes" in found:
            self._changes.append(found["changes"])
        if "n" in found:
            self._y.append(ChannelStatistics(int(found["n"]), found["mean"], found["var"]))
            self._sums = self._sums + found["sums"]

    def rises(self, takes: int, g0: Tensor, gy: Tensor) -> Tensor:
        """Return the rises, ``(B,)``; Σ g and Σ g · y are ``(probes, samples, channels)``.

        ``takes`` is 2 where a correction takes mean and slope away, 1 for the mean alone.
        """
        if not self._changes:
            return torch.zeros(len(self.bits), device="cpu")
        c = torch.cat(self._changes, 2)
        n_values = sum(part.n for part in self._y)
        if takes and n_values:  # no sample may have come here
            mean, product = torch.as_tensor(self._sums) / n_values
            undone = g0 @ mean.mT
            if takes > 1:
                mu, variance = (torch.as_tensor(v).double() for v in pooled(self._y))
                slope = (product - mean * mu) / variance.clamp_min(1e-30)
                slope = torch.where(variance > 1e-12 * mu.square(), slope, 0.0)
                undone = undone + (gy - g0 * mu) @ slope.mT
            c = c - undone.movedim(2, 0)
        return 0.5 * c.square().mean((1, 2))


class _Layer:
    """What was summed of one layer over all batches; see `_Side.rises` for ``takes``."""

    def __init__(self, bits: tuple[set[int], set[int]], takes: int) -> None:
        self.weights, self.inputs = _Side(bits[0]), _Side(bits[1])
        self.takes = takes
        self._g: list[Tensor] = []  # Σ g and Σ g · y of a batch, (2, probes, samples, channels)

    def tensors(self) -> dict[str, Tensor]:
        """Return what was summed in one batch, by name; empty where no call was seen."""
        found = {f"weights.{name}": v for name, v in self.weights.tensors().items()}
        found |= {f"inputs.{name}": v for name, v in self.inputs.tensors().items()}
        found |= {"g": self._g[0]} if self._g else {}
        return {**found, "takes": torch.tensor(self.takes, device="cpu")}

    def add_tensors(self, found: Mapping[str, Tensor]) -> None:
        """Add what `tensors` returned of a batch."""
        for name, side in (("weights.", self.weights), ("inputs.", self.inputs)):
            side.add_tensors({n.removeprefix(name): v for n, v in found.items() if name in n})
        if "g" in found:
            self._g.append(found["g"])
        # A module called twice in any batch is left alone by the correction.
        self.takes = min(self.takes, int(found["takes"]))

    def rises(self) -> tuple[dict[int, float], dict[int, float]]:
        """Return the rises of weights and inputs by bits."""
        takes = self.takes if self._g else 0
        g0, gy = torch.cat(self._g, 2) if takes else torch.zeros(2, 1, 1, 1, device="cpu")
        of_weights = self.weights.rises(takes, g0, gy)
        of_inputs = (self.inputs.rises(takes, g0, gy) + self.inputs.rises(0, g0, gy)) / 2
        return (
            dict(zip(self.weights.bits, of_weights.tolist(), strict=True)),
            dict(zip(self.inputs.bits, of_inputs.tolist(), strict=True)),
        )

    @torch.no_grad()
    def add(self, module: Any, seen: list[_Seen], n: int, data: Batches) -> None:
        """Add what the layer's calls in a batch of ``n`` samples say of each number of bits.

        What rounded inputs do is regressed on y in a part of the samples of all ``data``.
        """
        seen = [one for one in seen if one.y.dim() and one.y.shape[0] % n == 0]
        if not seen:
            return
        for one in seen:
            one.in_single_()
        axis = channel_axis(module, seen[0].y) if has_known_axes(module) else -1
        if axis == 0:  # called without an axis of samples
            if n > 1:
                return
            for one in seen:
                one.unsqueeze_()
            axis = 1
        # A module called twice has one set of statistics, which the correction leaves alone.
        if len(seen) > 1 or axis < 0:
            self.takes = 0
        line = axis if self.takes else None
        if line is not None:
            g = torch.stack(seen[0].gradients)
            both = torch.stack([_by_channel(v, line + 1, 2).double() for v in (g, g * seen[0].y)])
            self._g.append(both.reshape(2, len(g), n, -1, both.shape[-1]).sum(3))
        if isinstance(module, Product):
            if self.inputs.bits:
                self._add_moved(self.inputs, seen, n, line, _again(module, False))
            return
        weight = float_weight(module).detach()
        plain = is_plain(module) and all(one.is_plain(weight) for one in seen)
        if self.weights.bits:
            self._add_weights(module, seen, n, line, weight if plain else None)
        if self.inputs.bits and plain and all(one.input_gradients for one in seen):
            self._add_inputs(module, seen, n, line, _step(seen[0].y, line, data), weight)
        elif self.inputs.bits:
            self._add_moved(self.inputs, seen, n, line, _again(module, False))

    def _add_weights(
        self, module: Any, seen: list[_Seen], n: int, axis: int | None, weight: Tensor | None
    ) -> None:
        side, rounded = self.weights, weight_quantizer(module)
        if weight is None:
            self._add_moved(side, seen, n, axis, _again(module, True))
            return
        changes = torch.stack([rounded.quantized(weight, b) - weight for b in side.bits])
        if not all(by_outer_products(module, one.y) for one in seen):
            at = dict(zip(side.bits, changes, strict=True))
            self._add_moved(side, seen, n, axis, lambda one, b: applied(module, one.x, at[b]))
            return
        found = [weight_changes(module, one.x, one.gradients, changes) for one in seen]
        side.add(torch.stack(found).sum(0), n)
        if axis is not None:
            x, y = seen[0].x, seen[0].y
            statistics = statistics_of(y, axis)
            centred = y - _along(statistics.mean, y, axis)
            # What W x sums up to: Σ Δy = ΔW Σ x, and Σ Δy · y = ΔW Σ x y.
            sums = outer(module, x.sum(0, keepdim=True), torch.ones_like(y[:1]), weight.shape)[0]
            products = outer(module, x, centred, weight.shape, summed=True)
            by_bits = [(changes * v).flatten(2).sum(2) for v in (sums, products)]
            side.add_line(statistics, *by_bits)

    def _add_inputs(
        self, module: Any, seen: list[_Seen], n: int, axis: int | None, step: int, weight: Tensor
    ) -> None:
        side, rounded = self.inputs, input_quantizer(module)
        found = [input_changes(o.x, o.input_gradients, side.bits, rounded.quantized) for o in seen]
        side.add(torch.stack(found).sum(0), n)
        if axis is not None:
            x, y = seen[0].x[::step], seen[0].y[::step]
            moved = (applied(module, rounded.quantized(x, b) - x, weight) for b in side.bits)
            _add_line(side, moved, y, axis)

    def _add_moved(
        self,
        side: _Side,
        seen: list[_Seen],
        n: int,
        axis: int | None,
        moved: Callable[[_Seen, int], Tensor],
    ) -> None:
        """Add Δy that ``moved(call, bits)`` computes."""
        gradients = [torch.stack(one.gradients, 1).flatten(2) for one in seen]

        def each() -> Iterator[Tensor]:
            for b in side.bits:
                change = [moved(one, b) for one in seen]
                pairs = zip(gradients, change, strict=True)
                found.append(sum((g @ v.flatten(1)[:, :, None]).squeeze(2).mT for g, v in pairs))
                yield change[0]

        found: list[Any] = []
        if axis is None:
            for _ in each():
                pass
        else:
            _add_line(side, each(), seen[0].y, axis)
        side.add(torch.stack(found), n)


def _step(y: Tensor, axis: int | None, data: Batches) -> int:
    """Return of how many samples one is enough for a regression on outputs ``(rows, …)``."""
    n = data.n_samples
    places = y.numel() // max(len(y) * (1 if axis is None else y.shape[axis]), 1)
    return max(1, min(n // LINE_SAMPLES, n * places // LINE_PLACES))


def _again(module: nn.Module, weights: bool) -> Callable[[_Seen, int], Tensor]:
    """Return what calls a layer again with its weights, or its inputs, rounded to some bits."""

    def moved(one: _Seen, b: int) -> Tensor:
        in_float = LayerBits(FLOAT_BITS, FLOAT_BITS)
        set_bits(module, {"": LayerBits(b, FLOAT_BITS) if weights else LayerBits(FLOAT_BITS, b)})
        try:
            y: Tensor = module(*one.args, **one.kwargs)
        finally:
            set_bits(module, {"": in_float})
        return y.to(one.y.dtype) - one.y

    return moved


def _add_line(side: _Side, moved: Iterable[Tensor], y: Tensor, axis: int) -> None:
    """Regress Δy at each number of bits on y."""
    statistics = statistics_of(y, axis)
    centred = y - _along(statistics.mean, y, axis)
    sums = [(_by_channel(v, axis, 1), _by_channel(v * centred, axis, 1)) for v in moved]
    both = (
        torch.stack([v.sum(0, dtype=torch.float64) for v in part])
        for part in zip(*sums, strict=True)
    )
    side.add_line(statistics, *both)


def _by_channel(values: Tensor, axis: int, first: int) -> Tensor:
    """Return the sums over all axes behind the ``first`` ones but that of channels."""
    others = [a for a in range(first, values.dim()) if a != axis]
    return values.sum(others) if others else values


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.to(like.dtype).reshape(shape)


class HessianTrace:
    """The table of a network in float, batch by batch; see `hessian_trace`.

    Workers may take a batch each: a batch's `part` is the same whoever measures it, and `table`
    adds parts in the order of the batches. ``takes`` is `StatisticsCorrection.takes`, of all
    layers that are corrected. Raises `ValueError` for a rise that draws no probes.
    """

    def __init__(
        self,
        prepared: nn.Module,
        space: SearchSpace,
        data: Batches,
        rise: Rise,
        takes: Mapping[str, int],
        *,
        probes: int = PROBES,
        seed: int = 0,
    ) -> None:
        if not rise.can_draw:
            raise ValueError("'hessian_trace' needs a rise of hq_optuna.rises; got a function.")
        self.data = data
        self._prepared, self._rise, self._probes = prepared, rise, probes
        self._needed, self._takes = bits_needed(space), takes
        self._names = [layer.name for layer in space.layers]
        self._products = {layer.name for layer in space.layers if layer.is_product}
        self._generator = torch.Generator().manual_seed(seed)
        self._states: list[Tensor] = []  # of the generator, before each batch

    def part(self, index: int) -> dict[str, Tensor]:
        """Return what a batch says, by name: tensors on the CPU, and JSON as bytes.

        The network's bits are restored.
        """
        prepared, batch = self._prepared, self.data[index]
        before = get_bits(prepared)
        set_bits(prepared, dict.fromkeys(before, LayerBits(FLOAT_BITS, FLOAT_BITS)))
        unreached: dict[str, frozenset[str]] = {}
        found: dict[str, Tensor] = {}
        try:
            self._fit()
            self._generator.set_state(self._states[index])
            given = self._rise, self._probes, self._generator, unreached
            seen = _probed(prepared, self._names, batch, *given)
            for place, name in enumerate(self._names):
                layer = self._layer(name)
                # What is no longer needed is let go layer by layer.
                layer.add(prepared.get_submodule(name), seen.pop(name, []), batch.n, self.data)
                found |= {f"{place}.{what}": v.cpu() for what, v in layer.tensors().items()}
        finally:
            set_bits(prepared, before)
        said = json.dumps({name: sorted(earlier) for name, earlier in sorted(unreached.items())})
        found["unreached"] = torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8)
        return found

    def table(self, parts: Sequence[Mapping[str, Tensor]]) -> tuple[Sensitivity, Curvature]:
        """Return the table from the parts of all batches, in their order."""
        unreached: dict[str, frozenset[str]] = {}
        by_place: dict[str, list[dict[str, Tensor]]] = {}
        for part in parts:
            for name, earlier in json.loads(bytes(part["unreached"].tolist())).items():
                unreached[name] = unreached.get(name, frozenset()) | frozenset(earlier)
            of_layers: dict[str, dict[str, Tensor]] = {}
            for key, value in part.items():
                place, _, what = key.partition(".")
                of_layers.setdefault(place, {})[what] = value
            for place, tensors in of_layers.items():
                by_place.setdefault(place, []).append(tensors)
        rises = {}
        for at, name in enumerate(self._names):
            layer = self._layer(name)
            for tensors in by_place[str(at)]:
                layer.add_tensors(tensors)
            rises[name] = layer.rises()
            if name in self._products:  # what has no weights moves nothing by them
                rises[name] = dict.fromkeys(rises[name][1], 0.0), rises[name][1]
        idle = tuple(n for n, (w, a) in rises.items() if not any((*w.values(), *a.values())))
        weights, inputs = ({n: pair[part] for n, pair in rises.items()} for part in (0, 1))
        return Sensitivity(weights, inputs), Curvature(
            {}, {}, self.data[0].n, self.data.n_samples, idle, unreached
        )

    def _layer(self, name: str) -> _Layer:
        return _Layer(self._needed[name], self._takes.get(name, 0))

    @torch.no_grad()
    def _fit(self) -> None:
        """Fit the rise to all batches, and note with which random numbers each one begins."""
        if self._states:
            return
        seen: list[Any] = []

        def outputs() -> Iterator[Any]:
            for batch in self.data:
                z = self._rise.run(self._prepared, batch.inputs)
                seen.append(_shapes(z))
                yield z

        self._rise = self._rise.fitted(outputs(), self.data)
        for index, z in enumerate(seen):
            self._states.append(self._generator.get_state())
            if index + 1 < len(seen):  # how many numbers are drawn depends on shapes alone
                like = map_tensors(z, Tensor.contiguous)
                for _ in range(self._probes):
                    self._rise.projected(like, self.data[index], self._generator)


def _shapes(outputs: Any) -> Any:
    """Return outputs of zeros that take no memory, or those of a class of their own as they are."""
    try:
        return map_tensors(outputs, lambda x: x.new_zeros(()).expand(x.shape))
    except DataError:
        return outputs


def hessian_trace(
    prepared: nn.Module,
    space: SearchSpace,
    data: Batches,
    rise: Rise,
    correction: StatisticsCorrection | None,
    *,
    probes: int = PROBES,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Sensitivity, Curvature]:
    """Return the predicted loss rises of all layers, and which layers no gradient reaches.

    Costs, for the data given, two passes forward, one back for each probe, and about as much again
    for all numbers of bits together. Layers that compute in a way of their own cost a forward pass
    of theirs for each number of bits instead. The network's bits are restored. ``progress`` is
    called with (batches done, batches). Raises `ValueError` for a rise that draws no probes.
    """
    takes = {} if correction is None else correction.takes
    trace = HessianTrace(prepared, space, data, rise, takes, probes=probes, seed=seed)
    parts = []
    for index in range(len(data)):
        parts.append(trace.part(index))
        progress(index + 1, len(data))
    return trace.table(parts)


def _probed(
    network: nn.Module,
    names: Sequence[str],
    batch: Batch,
    rise: Rise,
    probes: int,
    generator: torch.Generator,
    unreached: dict[str, frozenset[str]],
) -> dict[str, list[_Seen]]:
    """Return the calls of layers in a batch with the gradients of all probes there."""
    found: dict[tuple[str, int], _Seen] = {}
    left = probes
    while left:
        calls = Calls()
        with _watched(network, names, calls) as seen, torch.enable_grad():
            z = rise.run(network, batch.inputs)
            # What the backward pass calls once more is called so once.
            again = any(call.trace is not None for call in calls.forward)
            now = 1 if again else left
            for i in range(now):
                told = rise.projected(z, batch, generator)
                if told.requires_grad:
                    with calls.going_back():
                        told.backward(retain_graph=i + 1 < now)  # type: ignore[no-untyped-call]
        left -= now
        for layer, earlier in calls.unreached().items():
            unreached[layer] = unreached.get(layer, frozenset()) | earlier
        for one in seen:
            if one.call is not None and one.call.reached and one.gradients:
                first = found.setdefault((one.call.layer, one.call.place), one)
                if first is not one:
                    first.gradients.extend(one.gradients)
                    first.input_gradients.extend(one.input_gradients)
    by_layer: dict[str, list[_Seen]] = {}
    for (layer, _), one in found.items():
        if len(one.gradients) == probes:
            by_layer.setdefault(layer, []).append(one)
    return by_layer


@contextmanager
def _watched(network: nn.Module, names: Sequence[str], calls: Calls) -> Iterator[list[_Seen]]:
    """Note the calls of layers, with the gradients in what they get and return when these come."""
    seen: list[_Seen] = []
    running: list[_Seen] = []
    frozen = [p for p in network.parameters() if p.requires_grad]
    handles = []

    def enter(module: nn.Module, args: Any, kwargs: Any, name: str) -> Any:
        x = first_input(args, kwargs)
        call = calls.add(name, x)
        if not x.requires_grad and x.is_floating_point():
            x = x.detach().requires_grad_(True)
        # A tensor of the layer's own: no other writes into it, or adds to its gradient.
        own = x.clone()
        kept = own.detach() if has_known_axes(module) else own.detach().clone()
        one = _Seen(call, *with_first_input(args, kwargs, kept), kept)
        if own.requires_grad:
            own.register_hook(one.input_gradients.append)  # type: ignore[no-untyped-call]
        running.append(one)
        return with_first_input(args, kwargs, own)

    def leave(_module: nn.Module, _args: Any, _kwargs: Any, y: Any) -> None:
        one = running.pop()
        call = one.call
        if call is None or not isinstance(y, Tensor):
            return
        one.returned(y)
        seen.append(one)
        if not y.requires_grad:
            return

        def keep(gradient: Tensor) -> None:
            call.reach()
            one.gradients.append(gradient)

        y.register_hook(keep)  # type: ignore[no-untyped-call]

    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for name in names:
            module = network.get_submodule(name)

            def before(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
                return enter(m, args, kwargs, name)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
