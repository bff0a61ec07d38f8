"""Rounding in the order of running: each layer knows that its inputs are quantized.

The float and the quantized network run side by side, all batches in lockstep. Where they meet a
layer, four things are settled before they go on:

1. *Range.* That of the layer's input with the least error of the layer's output, against its own
   input before it is rounded, which earlier layers have degraded.
2. *Target.* The float output is regressed on the quantized input, W' = W + W B (C + λI)⁻¹ with
   C = E[q qᵀ] and B = E[(x − q) qᵀ], for inputs x of the float and q of the quantized network: what
   earlier layers lost is made up for as far as it can be told. The ridge λ is cross-validated over
   samples for each layer; none of them leaves W as it is.
3. *Rounding* of W' with the moments C (`hq_optuna.quantization.compensation`).
4. *Statistics* behind the layer (`hq_optuna.quantization.correction`).

No training, no labels, no gradient. What is found depends on the bits of all earlier layers, so it
is found for one assignment at a time.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hq_optuna.network.batches import Batches, autocast, forward
from hq_optuna.network.copies import copied
from hq_optuna.quantization.compensation import MOST_BITS, Compensated, compensated
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.functional import activation_grid, quantize_activation
from hq_optuna.quantization.lockstep import Lockstep
from hq_optuna.quantization.moments import (
    MOST_ELEMENTS,
    PLACES_PER_INPUT,
    LayerPlaces,
    can_have_moments,
    columns,
    products,
)
from hq_optuna.quantization.observers import first_input
from hq_optuna.quantization.prepare import (
    float_weight,
    get_bits,
    input_quantizer,
    prepared_layers,
    set_bits,
    weight_quantizer,
)
from hq_optuna.quantization.ranges import ANY_GRID, AffineRange, affine_range
from hq_optuna.quantization.statistics import statistics_of, statistics_places
from hq_optuna.settings import Precision
from hq_optuna.space.layers import FLOAT_BITS

RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Ridges that are tried, as shares of the mean of E[q²]; the best rises from the first to the last
in the order of layers."""
FOLDS = 4
WIDE = 256
"""Weights per channel above which two folds do."""
RANGE_ELEMENTS, LEAST_RANGE_PLACES, MOST_RANGE_PLACES = 2**21, 256, 4096
"""How much of a layer's input tells the error of a range."""
STEPS, MOST_STEPS = (0.15, 0.05), 8
"""By which the ends of a range are moved, and how often."""
LEAST_PLACES = 2048
MOST_IN_MEMORY = 2**27
"""Elements of the largest input, all samples together, of either network."""
_TINY = 1e-12


class InOrder:
    """Fits prepared networks to the bits they have, from batches ``places`` of the data.

    ``prepared`` is in float, as `prepare` returned it or with weights rounded before: what they are
    rounded to stays where a layer cannot be fitted (a transposed convolution, a layer called twice,
    a very wide one, one whose quantizer allows no compensation). It stays as it is.
    """

    def __init__(
        self,
        prepared: nn.Module,
        data: Batches,
        places: Sequence[int],
        precision: Precision = "float32",
        *,
        corrects: bool = True,
    ) -> None:
        self.data, self.places, self.precision = data, tuple(places), precision
        self.corrects = corrects
        self._prepared = prepared

    @cached_property
    def _correction(self) -> StatisticsCorrection:
        """The correction of a float copy, by which copies of the prepared network are told."""
        network = copied(self._prepared)
        set_bits(network, dict.fromkeys(get_bits(network), (FLOAT_BITS, FLOAT_BITS)))
        return StatisticsCorrection(network, self.data, self.precision, places=self.places)

    @torch.no_grad()
    def fit_(self, network: nn.Module) -> None:
        """Fit a copy of the prepared network, whose statistics are the stored ones, in place."""
        in_float, correction = self._correction.prepared, self._correction.of(network)
        called = self._correction.called_once
        layers = [name for name in prepared_layers(network) if name in called]
        order = [e for n in called for e in ((_entry(n), n) if n in layers else (n,))]
        n = len(self.places)

        def settle(event: str, parts: list[_Part]) -> None:
            if event.startswith(_ENTRY):
                name = event.removeprefix(_ENTRY)
                pairs = _paired(parts, n)
                normed = self.corrects and correction.takes.get(name) == 2
                _fit_layer_(network.get_submodule(name), pairs, self._samples, normed)
            else:
                found = [statistics_of(p.x, p.axis) for p in parts if p.at >= n]
                correction.settle_(event, found)

        steps = Lockstep(order, settle)

        def run(at: int) -> Any:
            _AT.set(at)
            chosen = in_float if at < n else network
            with autocast(chosen, self.precision):
                return forward(chosen, self.data[self.places[at % n]].inputs)

        def see(event: str, x: Tensor, axis: int = 0) -> None:
            steps.wait(event, _Part(_AT.get(), x, axis))

        with ExitStack() as stack:
            for chosen in (in_float, network):
                stack.enter_context(_watched_entries(chosen, layers, see))
            if self.corrects:
                stack.enter_context(correction.watched(see))
            steps.run([partial(run, at) for at in range(2 * n)])

    @property
    def _samples(self) -> list[int]:
        return [self.data[place].n for place in self.places]


def places_in_memory(data: Batches, places: Sequence[int], largest: int) -> tuple[int, ...]:
    """Return as many of the batches, in a seeded order, as can be fitted to at once.

    ``largest`` are the elements of a sample's largest input of a layer.
    """
    part = Batches(data[place] for place in places)
    fitting = statistics_places(
        part, largest, least_samples=part.n_samples, most_elements=MOST_IN_MEMORY
    )
    return tuple(places[place] for place in fitting)


class _Part(NamedTuple):
    """What one pass hands over: passes of the float network are the first half."""

    at: int
    x: Tensor
    axis: int


_Pair = tuple[int, _Part, _Part]

_AT: contextvars.ContextVar[int] = contextvars.ContextVar("the pass of this thread, by number")
_ENTRY = "what enters "


def _entry(name: str) -> str:
    return _ENTRY + name


def _paired(parts: Sequence[_Part], n: int) -> list[_Pair]:
    """Return (batch, of the float network, of the quantized one) where both are of one shape."""
    by = {part.at: part for part in parts}
    return [
        (at, by[at], by[at + n])
        for at in range(n)
        if at in by and at + n in by and by[at].x.shape == by[at + n].x.shape
    ]


@contextmanager
def _watched_entries(
    network: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see`` with what enters each named layer, before it is rounded."""
    with ExitStack() as stack:
        for name in names:

            def hook(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                see(_entry(name), first_input(args, kwargs))

            module = network.get_submodule(name)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


class _Rows(NamedTuple):
    """Inputs of a layer at the same places in both networks, ``(groups, places, d)``, by fold."""

    x: Tensor
    q: Tensor
    fold: Tensor


def _rows(
    module: nn.Module, pairs: Sequence[_Pair], samples: Sequence[int], wanted: int
) -> Iterator[_Rows]:
    """Yield about so many rows in all, at a seeded random part of each batch's places."""
    d, total = columns(module), sum(samples)
    for at, float_part, part in pairs:
        x, q = LayerPlaces(module, float_part.x), LayerPlaces(module, part.x)
        most = math.ceil(wanted * samples[at] / total)
        picked = torch.arange(q.n, device="cpu")
        if q.n > most:
            generator = torch.Generator().manual_seed(at)
            drawn = torch.rand(most, generator=generator, dtype=torch.float64, device="cpu")
            picked = ((picked[:most] + drawn) * (q.n / most)).long().clamp_max(q.n - 1)
        sample = sum(samples[:at]) + picked * samples[at] // max(q.n, 1)
        for part_of, fold in zip(
            *(torch.split(t, max(1, MOST_ELEMENTS // (2 * d))) for t in (picked, sample)),
            strict=True,
        ):
            yield _Rows(x.rows(part_of).float(), q.rows(part_of).float(), fold)


def _fit_layer_(
    module: nn.Module, pairs: Sequence[_Pair], samples: Sequence[int], normed: bool
) -> None:
    """Settle the range of a layer's input and what its weight is rounded to.

    A range stays where the target does not take every grid.
    ``normed``: a batch-norm behind it brings its channels to one size.
    """
    if not pairs or not can_have_moments(module):
        return
    holder, inputs = weight_quantizer(module), input_quantizer(module)
    weight: Tensor = float_weight(module).detach()
    w = weight.float().reshape(getattr(module, "groups", 1), -1, columns(module))
    if inputs.bits != FLOAT_BITS and inputs.grid == ANY_GRID:
        wanted = min(
            MOST_RANGE_PLACES, max(LEAST_RANGE_PLACES, RANGE_ELEMENTS // (len(w) * w.shape[2]))
        )
        some = torch.cat([rows.q for rows in _rows(module, pairs, samples, wanted)], 1)
        before = inputs.range(inputs.bits)
        inputs.ranges[inputs.bits] = output_range(w, some, inputs.bits, before, normed=normed)
    if holder.bits > MOST_BITS or not holder.quantizer.compensates:
        return
    seen = _Seen(w, min(FOLDS if w.shape[2] <= WIDE and len(w) == 1 else 2, sum(samples)))
    wanted = max(PLACES_PER_INPUT * w.shape[2], LEAST_PLACES)
    for rows in _rows(module, pairs, samples, wanted):
        q = rows.q if inputs.bits == FLOAT_BITS else inputs.quantized(rows.q, inputs.bits)
        seen.add(rows.x, q, rows.fold)
    ridge = seen.ridge()

    def fitted(part: _Sums) -> Compensated:
        target = weight + part.change(ridge).reshape(weight.shape).to(weight.dtype)
        scale = holder.quantizer.scale(target, holder.bits, holder.channel_axis)
        return compensated(target, part.moment, scale, holder.bits, holder.quantizer)

    rest, held_back = seen.split(0)
    now = holder.quantized(weight, holder.bits)
    if held_back.error(fitted(rest).weight - weight) < held_back.error(now - weight):
        found = fitted(seen.whole)
        holder.keep(weight, holder.bits, found.weight, found.scale)


class _Sums(NamedTuple):
    """Sums over places: q qᵀ, ``(groups, d, d)``, and W (x − q) qᵀ, ``(groups, channels, d)``."""

    moment: Tensor
    lost: Tensor

    def change(self, ridge: float) -> Tensor:
        """Return W' − W for a ridge in shares of the mean of q², infinite where nothing changes."""
        if math.isinf(ridge):
            return torch.zeros_like(self.lost)
        level = ridge * self.moment.diagonal(dim1=1, dim2=2).mean(1)
        level = torch.where(level > 0, level, 1.0)  # an input that is always zero
        added = torch.diag_embed(level[:, None].expand(self.moment.shape[:2]))
        root, failed = torch.linalg.cholesky_ex(self.moment + added)
        found = torch.cholesky_solve(self.lost.mT, root).mT
        return torch.where((failed == 0)[:, None, None] & found.isfinite(), found, 0.0)

    def error(self, change: Tensor) -> float:
        """Return the sum of ‖(W + Δ) q − W x‖² over that of Δ = 0."""
        delta = change.double().reshape(self.lost.shape)
        return float((delta * (delta @ self.moment - 2 * self.lost)).sum())


class _Seen:
    """`_Sums` of a layer by fold of samples."""

    def __init__(self, weight: Tensor, folds: int) -> None:
        self._weight, (groups, _, d) = weight, weight.shape
        moments = weight.new_zeros(folds, groups, d, d, dtype=torch.float64)
        lost = torch.zeros_like(weight, dtype=torch.float64).repeat(folds, 1, 1, 1)
        self._folds = [_Sums(*one) for one in zip(moments, lost, strict=True)]

    def add(self, x: Tensor, q: Tensor, sample: Tensor) -> None:
        """Add rows ``(groups, places, d)`` of samples ``(places,)``."""
        lost = (x - q) @ self._weight.mT
        for fold, sums in enumerate(self._folds):
            mine = (sample % len(self._folds) == fold).to(q.device)
            sums.moment.add_(products(q[:, mine]))
            sums.lost.add_((lost[:, mine].mT @ q[:, mine]).double())

    @property
    def whole(self) -> _Sums:
        """All folds together."""
        return _Sums(*(sum(parts) for parts in zip(*self._folds, strict=True)))

    def split(self, fold: int) -> tuple[_Sums, _Sums]:
        """Return all but a fold, and the fold; the same twice where there is one alone."""
        whole, part = self.whole, self._folds[fold]
        if len(self._folds) == 1:
            return whole, whole
        return _Sums(whole.moment - part.moment, whole.lost - part.lost), part

    def ridge(self) -> float:
        """Return the ridge that is best on samples it was not fitted to."""
        errors = {math.inf: 0.0}
        if len(self._folds) > 1:
            splits = [self.split(fold) for fold in range(len(self._folds))]
            for ridge in RIDGES:
                errors[ridge] = sum(held.error(rest.change(ridge)) for rest, held in splits)
        return min(errors, key=errors.__getitem__)


def output_range(
    weight: Tensor, rows: Tensor, bits: int, before: AffineRange, *, normed: bool
) -> AffineRange:
    """Return a range with a small error of a layer's output; ``before`` where none has a smaller.

    Ends are moved in turn while the error on half of the rows falls, and what is found counts if
    it falls on the other half too. The mean of a channel's error is left out, because statistics
    correction takes it away. Where the output is ``normed``, the error of each channel counts in
    units of the channel's variance.

    Args:
        weight: ``(groups, channels of one, d)``.
        rows: What it is multiplied with, before it is rounded, ``(groups, places, d)``.
        bits: Of the input.
        before: The range to start from.
        normed: Whether batch-norm brings the output's channels to one size.
    """
    halves = rows[:, ::2], rows[:, 1::2]
    units = [(half @ weight.mT).var(1, correction=0).clamp_min(_TINY) for half in halves]

    def error(found: AffineRange, which: int) -> float:
        moved = quantize_activation(halves[which], *found, bits) - halves[which]
        var = (moved @ weight.mT).var(1, correction=0)
        return float((var / units[which] if normed else var).sum())

    top = activation_grid(bits)[1]
    best, least = before, error(before, 0)
    low, high = (before.scale * (end - before.zero_point) for end in (0, top))
    for step in STEPS:
        for ends in ((0, 1), (1, 0)) if low < 0 < high else ((1, 1),):
            for way in (1 + step, 1 / (1 + step)):
                for _ in range(MOST_STEPS):
                    moved = low * way ** ends[0], high * way ** ends[1]
                    found = affine_range(*moved, bits)
                    now = error(found, 0)
                    if not now < least:
                        break
                    best, least, (low, high) = found, now, moved
    return best if error(best, 1) < error(before, 1) else before
