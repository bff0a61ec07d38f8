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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.curvature import Curvature
from hq_optuna.curvature.sweep import Call, Calls
from hq_optuna.network.batches import Batch, Batches
from hq_optuna.network.layer_types import has_known_axes
from hq_optuna.quantization.correction import StatisticsCorrection, channel_axis
from hq_optuna.quantization.observers import first_input, with_first_input
from hq_optuna.quantization.prepare import get_bits, set_bits
from hq_optuna.rises.base import Rise
from hq_optuna.scoring.sensitivity import Sensitivity
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.space.search_space import SearchSpace, bits_needed

PROBES = 2
"""Random vectors a sample; its places are many more."""


@dataclass(eq=False)
class _Seen:
    """A layer's call: what it was given, what it returned, and gradients of the probes there."""

    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    y: Tensor
    gradients: list[Tensor] = field(default_factory=list)


class _Part:
    """What was summed of one layer at one number of bits of its weights, or of its inputs."""

    def __init__(self) -> None:
        self.changes: list[Tensor] = []  # ⟨g, Δy⟩, (probes, samples) a batch
        self.sum: Tensor | float = 0.0  # of Δy by channel
        self.product: Tensor | float = 0.0  # of Δy · y by channel

    def add(self, change: Tensor, moved: Tensor | None, rows: Tensor | None) -> None:
        """Add ⟨g, Δy⟩ of a batch, and Δy and y as ``(samples, places, channels)``."""
        self.changes.append(change)
        if moved is not None and rows is not None:
            self.sum = self.sum + moved.sum((0, 1), dtype=torch.float64)
            self.product = self.product + (moved * rows).sum((0, 1), dtype=torch.float64)


class _Layer:
    """What was summed of one layer over all batches; channels are None where they are not known."""

    def __init__(self, space_bits: tuple[set[int], set[int]]) -> None:
        self.weights = {b: _Part() for b in sorted(space_bits[0])}
        self.inputs = {b: _Part() for b in sorted(space_bits[1])}
        self.g0: list[Tensor] = []  # (probes, samples, channels) a batch
        self.gy: list[Tensor] = []
        self.n = 0
        self.sum: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def add(self, rows: Tensor, grads: Tensor) -> None:
        """Add y and g of a batch, ``(samples, places, channels)``, g for each probe."""
        self.g0.append(grads.sum(2).double())
        self.gy.append((grads * rows).sum(2).double())
        self.n += rows.shape[0] * rows.shape[1]
        self.sum = self.sum + rows.sum((0, 1), dtype=torch.float64)
        self.square = self.square + rows.double().square().sum((0, 1))

    def rises(self, takes: int) -> tuple[dict[int, float], dict[int, float]]:
        """Return the rises of weights and inputs by bits.

        ``takes`` is 2 where a correction takes mean and slope away, 1 for the mean alone.
        """
        weights = {b: self._rise(part, takes) for b, part in self.weights.items()}
        inputs = {
            b: (self._rise(part, takes) + self._rise(part, 0)) / 2
            for b, part in self.inputs.items()
        }
        return weights, inputs

    def _rise(self, part: _Part, takes: int) -> float:
        if not part.changes:
            return 0.0
        c = torch.cat(part.changes, 1)
        if takes and self.n:
            g0 = torch.cat(self.g0, 1)
            mean = part.sum / self.n
            c = c - (g0 * mean).sum(2)
        if takes > 1 and self.n:
            mu, square = torch.as_tensor(self.sum) / self.n, torch.as_tensor(self.square) / self.n
            variance = square - mu.square()
            slope = (part.product / self.n - mean * mu) / variance.clamp_min(1e-30)
            slope = torch.where(variance > 1e-12 * square, slope, 0.0)
            c = c - ((torch.cat(self.gy, 1) - g0 * mu) * slope).sum(2)
        return 0.5 * float(c.square().mean())


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

    Costs, for the data given, two passes forward and back, and a forward pass of each layer for
    each number of bits of its weights and of its inputs. The network's bits are restored.
    ``progress`` is called with (batches done, batches). Raises `ValueError` for a rise that draws
    no probes.
    """
    if not rise.can_draw:
        raise ValueError("'hessian_trace' needs a rise of hq_optuna.rises; got a function.")
    before = get_bits(prepared)
    in_float = dict.fromkeys(before, LayerBits(FLOAT_BITS, FLOAT_BITS))
    set_bits(prepared, in_float)
    needed = bits_needed(space)
    layers = {layer.name: _Layer(needed[layer.name]) for layer in space.layers}
    unreached: dict[str, frozenset[str]] = {}
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            rise = rise.fitted((rise.run(prepared, batch.inputs) for batch in data), data)
        for index, batch in enumerate(data):
            seen = _probed(prepared, list(layers), batch, rise, probes, generator, unreached)
            for name, layer in layers.items():
                _add(prepared, [one for one in seen if one.call.layer == name], batch.n, layer)
            progress(index + 1, len(data))
    finally:
        set_bits(prepared, before)
    takes = {} if correction is None else correction.takes
    rises = {name: layer.rises(takes.get(name, 0)) for name, layer in layers.items()}
    idle = tuple(n for n, (w, a) in rises.items() if not any((*w.values(), *a.values())))
    weights, inputs = ({n: pair[part] for n, pair in rises.items()} for part in (0, 1))
    return Sensitivity(weights, inputs), Curvature(
        {}, {}, data[0].n, data.n_samples, idle, unreached
    )


def _probed(
    network: nn.Module,
    names: Sequence[str],
    batch: Batch,
    rise: Rise,
    probes: int,
    generator: torch.Generator,
    unreached: dict[str, frozenset[str]],
) -> list[_Seen]:
    """Return the calls of layers in a batch with the gradients of all probes in their outputs."""
    found: dict[tuple[str, int], _Seen] = {}
    for _ in range(probes):
        calls = Calls()
        with _watched(network, names, calls) as seen, torch.enable_grad():
            told = rise.projected(rise.run(network, batch.inputs), batch, generator)
            if told.requires_grad:
                with calls.going_back():
                    told.backward()  # type: ignore[no-untyped-call]
        for layer, earlier in calls.unreached().items():
            unreached[layer] = unreached.get(layer, frozenset()) | earlier
        for one in seen:
            if one.call.reached and one.gradients:
                key = one.call.layer, one.call.place
                if key in found:
                    found[key].gradients.extend(one.gradients)
                else:
                    found[key] = one
    return [one for one in found.values() if len(one.gradients) == probes]


@contextmanager
def _watched(network: nn.Module, names: Sequence[str], calls: Calls) -> Iterator[list[_Seen]]:
    """Note the calls of layers, with the gradients in what they return when these come."""
    seen: list[_Seen] = []
    running: list[tuple[Call | None, tuple[Any, ...], dict[str, Any]]] = []
    frozen = [p for p in network.parameters() if p.requires_grad]
    handles = []

    def enter(_module: nn.Module, args: Any, kwargs: Any, name: str) -> Any:
        x = first_input(args, kwargs)
        call = calls.add(name, x)
        running.append((call, *with_first_input(args, kwargs, x.detach().clone())))
        if not x.requires_grad and x.is_floating_point():
            return with_first_input(args, kwargs, x.detach().requires_grad_(True))
        return None

    def leave(_module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        call, given, named = running.pop()
        if call is None or not isinstance(y, Tensor):
            return
        one = _Seen(call, given, named, y.detach().clone())  # an activation may write into it
        seen.append(one)
        if not y.requires_grad:
            return

        def keep(gradient: Tensor) -> None:
            call.reach()
            one.gradients.append(gradient.detach())

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


@torch.no_grad()
def _add(network: nn.Module, seen: Sequence[_Seen], n: int, layer: _Layer) -> None:
    """Add what the calls of a layer in a batch say of each number of bits."""
    seen = [one for one in seen if one.y.dim() and one.y.shape[0] % n == 0]
    if not seen:
        return
    name = seen[0].call.layer
    module = network.get_submodule(name)
    ys = [one.y.to(torch.promote_types(one.y.dtype, torch.float32)) for one in seen]
    gradients = [torch.stack(one.gradients).to(y.dtype) for one, y in zip(seen, ys, strict=True)]
    # A module called twice has one set of statistics, which the correction leaves alone.
    axis = channel_axis(module, ys[0]) if len(seen) == 1 and has_known_axes(module) else None

    def by_channel(values: Tensor) -> Tensor:  # (…, samples, places, channels)
        assert axis is not None
        moved = values.movedim(axis - ys[0].dim(), -1)
        return moved.reshape(*values.shape[: values.dim() - ys[0].dim()], n, -1, moved.shape[-1])

    rows = None
    if axis is not None:
        rows, grads = by_channel(ys[0]), by_channel(gradients[0])
        layer.add(rows, grads)
    chosen = [(LayerBits(b, FLOAT_BITS), part) for b, part in layer.weights.items()]
    chosen += [(LayerBits(FLOAT_BITS, b), part) for b, part in layer.inputs.items()]
    for bits, part in chosen:
        set_bits(network, {name: bits})
        total = torch.zeros(len(gradients[0]), n, dtype=torch.float64, device=ys[0].device)
        for one, y, g in zip(seen, ys, gradients, strict=True):
            change = module(*one.args, **one.kwargs).to(y.dtype) - y
            total += (g * change).reshape(len(g), n, -1).sum(2, dtype=torch.float64)
        part.add(total, None if rows is None else by_channel(change), rows)
    set_bits(network, {name: LayerBits(FLOAT_BITS, FLOAT_BITS)})
