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
4. *Statistics* behind the layer (`hq_optuna.quantization.correction`). The gain of a channel is the
   geometric mean of the one that matches its variance and the one of least squared error: the first
   keeps the noise of quantization, the second shrinks what is noisy.

No training, no labels, no gradient. What is found depends on the bits of all earlier layers, so it
is found for one assignment at a time.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hq_optuna.network.batches import Batches, autocast, forward
from hq_optuna.network.copies import copied
from hq_optuna.quantization.compensation import MOST_BITS, compensated
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.functional import quantize_activation
from hq_optuna.quantization.lockstep import Lockstep
from hq_optuna.quantization.moments import (
    LEAST_PLACES,
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
from hq_optuna.quantization.ranges import AffineRange, affine_range
from hq_optuna.quantization.statistics import statistics_of
from hq_optuna.settings import Precision
from hq_optuna.space.layers import FLOAT_BITS

RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Ridges that are tried, as shares of the mean of E[q²]; the best rises from the first to the last
in the order of layers."""
FOLDS = 4
WIDE = 256
"""Weights per channel above which two folds do."""
RANGE_PLACES = 1024
"""Places whose output tells the error of a range."""
SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.29, 0.24, 0.2)
COARSE_STEPS = (0.9, 0.95, 1.05, 1.1)
FINE_STEPS = (0.975, 1.025)
LEAST_AGREEMENT = 0.1
RANGE, RIDGE, HALF = "output", True, True
ERROR = "centred_norm"
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
        self._float = copied(prepared)
        set_bits(self._float, dict.fromkeys(get_bits(prepared), (FLOAT_BITS, FLOAT_BITS)))
        self._correction = StatisticsCorrection(self._float, data, precision, places=places)

    @torch.no_grad()
    def fit_(self, network: nn.Module) -> None:
        """Fit a copy of the prepared network, whose statistics are the stored ones, in place."""
        correction = self._correction.of(network)
        called = correction.called_once
        layers = [name for name in prepared_layers(network) if name in called]
        order = [e for n in called for e in ((_entry(n), n) if n in layers else (n,))]
        n = len(self.places)

        def settle(event: str, parts: list[_Part]) -> None:
            if event.startswith(_ENTRY):
                name = event.removeprefix(_ENTRY)
                pairs = _paired(parts, n)
                _fit_layer_(network.get_submodule(name), pairs, self._samples)
            else:
                found = [statistics_of(p.x, p.axis) for p in parts if p.at >= n]
                correction.settle_(event, found, _agreement(_paired(parts, n)) if HALF else None)

        steps = Lockstep(order, settle)

        def run(at: int) -> Any:
            _AT.set(at)
            chosen = self._float if at < n else network
            with autocast(chosen, self.precision):
                return forward(chosen, self.data[self.places[at % n]].inputs)

        def see(event: str, x: Tensor, axis: int = 0) -> None:
            steps.wait(event, _Part(_AT.get(), x, axis))

        with ExitStack() as stack:
            for chosen in (self._float, network):
                stack.enter_context(_watched_entries(chosen, layers, see))
                if self.corrects:
                    stack.enter_context(correction.watched(chosen, see))
            steps.run([partial(run, at) for at in range(2 * n)])

    @property
    def _samples(self) -> list[int]:
        return [self.data[place].n for place in self.places]


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


def _agreement(pairs: Sequence[_Pair]) -> Tensor | None:
    """Return the correlation of both networks' values, ``(channels,)``; ``None`` without pairs."""
    if not pairs:
        return None
    sums = None
    count = 0
    for _, a, b in pairs:
        x, y = (p.x.float().movedim(p.axis, 0).flatten(1) for p in (a, b))
        found = torch.stack([(x * y).sum(1), x.sum(1), y.sum(1)]).double()
        squares = torch.stack([x.square().sum(1), y.square().sum(1)]).double()
        found = torch.cat([found, squares])
        sums = found if sums is None else sums + found
        count += x.shape[1]
    assert sums is not None
    xy, x, y, xx, yy = sums / max(count, 1)
    spread = ((xx - x.square()).clamp_min(0) * (yy - y.square()).clamp_min(0)).sqrt()
    found = torch.where(spread > _TINY, (xy - x * y) / spread.clamp_min(_TINY), 1.0)
    return found.clamp(LEAST_AGREEMENT, 1.0)


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


def _fit_layer_(module: nn.Module, pairs: Sequence[_Pair], samples: Sequence[int]) -> None:
    """Settle the range of a layer's input and what its weight is rounded to."""
    if not pairs or not can_have_moments(module):
        return
    holder, inputs = weight_quantizer(module), input_quantizer(module)
    weight: Tensor = float_weight(module).detach()
    w = weight.float().reshape(getattr(module, "groups", 1), -1, columns(module))
    if inputs.bits != FLOAT_BITS and RANGE == "output":
        some = torch.cat([rows.q for rows in _rows(module, pairs, samples, RANGE_PLACES)], 1)
        inputs.ranges[inputs.bits] = output_range(w, some, inputs.bits)
    if holder.bits > MOST_BITS or not holder.quantizer.compensates:
        return
    folds = min(FOLDS if columns(module) <= WIDE else 2, sum(samples))
    seen = _Seen(w, folds)
    wanted = max(PLACES_PER_INPUT * columns(module), LEAST_PLACES)
    for rows in _rows(module, pairs, samples, wanted):
        q = rows.q if inputs.bits == FLOAT_BITS else inputs.quantized(rows.q, inputs.bits)
        seen.add(rows.x, q, rows.fold)
    target = w.double() + (seen.ridge() if RIDGE else 0)
    target = target.reshape(weight.shape).to(weight.dtype)
    scale = holder.quantizer.scale(target, holder.bits, holder.channel_axis)
    found = compensated(target, seen.moment, scale, holder.bits, holder.quantizer)
    before = holder.quantized(weight, holder.bits)
    if seen.error(found.weight - weight) < seen.error(before - weight):
        holder.keep(weight, holder.bits, found.weight, found.scale)


class _Seen:
    """Sums over places, by fold of samples: q qᵀ, and W (x − q) qᵀ."""

    def __init__(self, weight: Tensor, folds: int) -> None:
        self.weight, (groups, _, d) = weight, weight.shape
        self.moments = weight.new_zeros(folds, groups, d, d, dtype=torch.float64)
        self.lost = torch.zeros_like(weight, dtype=torch.float64).repeat(folds, 1, 1, 1)
        self.n = 0

    def add(self, x: Tensor, q: Tensor, sample: Tensor) -> None:
        """Add rows ``(groups, places, d)`` of samples ``(places,)``."""
        self.n += q.shape[1]
        residual = (x - q) @ self.weight.mT
        for fold in range(len(self.moments)):
            mine = (sample % len(self.moments) == fold).to(q.device)
            self.moments[fold] += products(q[:, mine])
            self.lost[fold] += (residual[:, mine].mT @ q[:, mine]).double()

    @property
    def moment(self) -> Tensor:
        """E[q qᵀ], ``(groups, d, d)``."""
        return self.moments.sum(0) / max(self.n, 1)

    def ridge(self) -> Tensor:
        """Return W' − W for the ridge that is best on samples it was not fitted to."""
        errors = dict.fromkeys(RIDGES, 0.0)
        whole, lost = self.moments.sum(0), self.lost.sum(0)
        for moment, part in zip(self.moments, self.lost, strict=True):
            for ridge in RIDGES if len(self.moments) > 1 else ():
                change = _solved(whole - moment, lost - part, ridge)
                errors[ridge] += _error(change, moment, part)
        best = min(RIDGES, key=errors.__getitem__)
        if not errors[best] < 0:
            return torch.zeros_like(lost)
        return _solved(whole, lost, best)

    def error(self, change: Tensor) -> float:
        """Return E‖(W + Δ) q − W x‖² over that of W itself, less 1 unit of it."""
        delta = change.double().reshape(self.lost[0].shape)
        return _error(delta, self.moments.sum(0), self.lost.sum(0))


def _solved(moment: Tensor, lost: Tensor, ridge: float) -> Tensor:
    """Return the change of least error with a ridge: lost (moment + λ I)⁻¹, by group."""
    level = ridge * moment.diagonal(dim1=1, dim2=2).mean(1)
    level = torch.where(level > 0, level, 1.0)
    damped = moment + torch.diag_embed(level[:, None].expand(moment.shape[:2]))
    root, failed = torch.linalg.cholesky_ex(damped)
    if bool((failed > 0).any()):
        return torch.zeros_like(lost)
    return torch.cholesky_solve(lost.mT, root).mT


def _error(change: Tensor, moment: Tensor, lost: Tensor) -> float:
    """Return E‖(W + Δ) q − W x‖² less that of Δ = 0, from sums."""
    return float((change * (change @ moment - 2 * lost)).sum())


def output_range(weight: Tensor, rows: Tensor, bits: int) -> AffineRange:
    """Return the range with the least error of a layer's output, among shrunk ones.

    Args:
        weight: ``(groups, channels of one, d)``.
        rows: What it is multiplied with, before it is rounded, ``(groups, places, d)``.
        bits: Of the input.
    """
    low, high = (float(v) for v in torch.aminmax(rows))
    low, high = min(low, 0.0), max(high, 0.0)
    buffer = torch.empty_like(rows)

    plain = rows @ weight.mT  # (groups, places, channels of one)
    centred = plain - plain.mean(1, keepdim=True)
    var = centred.square().mean(1)

    def error(ends: tuple[float, float]) -> float:
        moved = quantize_activation(rows, *affine_range(*ends, bits), bits, buffer).sub_(rows)
        if ERROR == "plain":
            return float(torch.linalg.vector_norm(moved @ weight.mT))
        e = moved @ weight.mT
        if ERROR == "plain_norm":
            return float((e.square().mean(1) / var.clamp_min(1e-12)).sum())
        e = e - e.mean(1, keepdim=True)
        if ERROR == "centred":
            return float(e.square().sum())
        if ERROR == "centred_norm":
            return float((e.square().mean(1) / var.clamp_min(1e-12)).sum())
        y = centred + e
        cov = (y * centred).mean(1)
        rest = 1 - cov.square() / (var * y.square().mean(1)).clamp_min(1e-20)
        if ERROR == "rho":
            return float((rest * var).sum())
        return float(rest.sum())

    tried: dict[tuple[float, float], float] = {}

    def consider(ends: Iterable[tuple[float, float]]) -> tuple[float, float]:
        for pair in ends:
            if pair not in tried:
                tried[pair] = error(pair)
        return min(tried, key=tried.__getitem__)

    best = consider((low * s, high * s) for s in SHRINKS)
    for steps in (COARSE_STEPS, FINE_STEPS):
        if low < 0 < high:
            best = consider((best[0] * s, best[1]) for s in steps)
            best = consider((best[0], best[1] * s) for s in steps)
        else:
            best = consider((best[0] * s, best[1] * s) for s in steps)
    return affine_range(*best, bits)
