"""Scoring a candidate: by its layers' rises alone, or by a forward pass of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from hq_optuna.errors import ScoreError
from hq_optuna.network.batches import Batch, Batches, autocast, check_precision, forward
from hq_optuna.network.copies import copied
from hq_optuna.network.loss_weights import batch_loss
from hq_optuna.network.losses import LossFunction
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.in_order import InOrder
from hq_optuna.quantization.prepare import get_bits, set_bits
from hq_optuna.rises.base import Rise
from hq_optuna.scoring.sensitivity import Sensitivity
from hq_optuna.settings import Precision, ScorerName
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.layers import FLOAT_BITS

SCORERS: tuple[ScorerName, ...] = get_args(ScorerName)


class Score(NamedTuple):
    """What is recorded of a candidate, in nats.

    Candidates are ranked by ``total``: the sum of both parts, which are sums over layers, or the
    rise of the outputs or of the measured loss. ``calibration_loss`` is the measured mean loss,
    ``None`` where no forward pass measured it. Of a finalist ``total`` is the mean of ``rises``, by
    blocks of samples.
    """

    total: float
    weights: float
    activations: float
    calibration_loss: float | None = None
    rises: tuple[float, ...] = ()


BLOCKS = 32
"""Blocks of samples that a finalist's rises are recorded by: enough for a standard error."""


class _Smooth(NamedTuple):
    """What smooth rises on some batches are measured with."""

    places: tuple[int, ...]
    rise: Rise
    expected: list[Any]  # outputs of the float network
    correction: StatisticsCorrection | None


class Scorer:
    """Scores assignments of one prepared network, whose bits it sets.

    Candidates are ranked by the sum of their layers' sensitivities, which needs no forward pass
    unless it ``measures`` their loss as well; with ``output_rise`` by the loss rise computed from
    their own outputs; with ``by_loss`` by the measured rise of the loss over that of the float
    network, which is negative where fewer bits do better by chance. ``correction`` corrects the
    statistics of each candidate in its pass. A rise is measured against the outputs of ``teacher``,
    the network before it was trained at fewer bits, if that is not the prepared one in float.
    Finalists are measured by ``rise``; with ``in_order`` they, and the answer, are fitted in the
    order of running, and candidates are not.

    ``prepared`` may be a function that returns the network and the correction: it is called when
    something is first measured, which a table may never do. ``in_order`` is called with the network
    then.
    """

    def __init__(
        self,
        prepared: nn.Module | Callable[[], tuple[nn.Module, StatisticsCorrection | None]],
        sensitivity: Sensitivity,
        data: Batches,
        loss_fn: LossFunction,
        *,
        output_rise: Rise | None = None,
        rise: Rise | None = None,
        by_loss: bool = False,
        measures: bool = False,
        correction: StatisticsCorrection | None = None,
        precision: Precision = "float32",
        teacher: nn.Module | None = None,
        in_order: Callable[[nn.Module], InOrder] | None = None,
    ) -> None:
        check_precision(precision)
        self._teacher = teacher
        self._made = (prepared, correction) if isinstance(prepared, nn.Module) else prepared
        self.sensitivity = sensitivity
        self.data = data
        self.loss_fn = loss_fn
        self.output_rise = output_rise
        self.rise = rise
        self._fits = in_order
        self._in_order: InOrder | None = None
        self.by_loss = by_loss
        self.is_table = output_rise is None and not by_loss and not measures
        self.precision: Precision = precision
        self._float_outputs: list[Any] | None = None
        self._float_loss: float | None = None
        self._smooth: _Smooth | None = None

    @property
    def prepared(self) -> nn.Module:
        """The prepared network."""
        return self._parts[0]

    @property
    def correction(self) -> StatisticsCorrection | None:
        """What corrects its statistics."""
        return self._parts[1]

    @property
    def _parts(self) -> tuple[nn.Module, StatisticsCorrection | None]:
        if not isinstance(self._made, tuple):
            self._made = self._made()
        return self._made

    def network(self, config: Mapping[str, LayerBits], *, in_order: bool = True) -> nn.Module:
        """Return a network of its own with these bits, corrected.

        Where that was chosen, it is fitted in the order of running, unless ``in_order`` is false.
        """
        prepared, correction = self.prepared, self.correction
        if correction is not None:
            correction.reset()
        set_bits(prepared, config)
        if in_order and self._fits is not None:
            self._in_order = self._in_order or self._fits(prepared)
            network = copied(prepared)
            self._in_order.fit_(network)
            return network
        if correction is not None:
            correction.apply()
        network = copied(prepared)
        if correction is not None:
            correction.reset()
        return network

    def score(
        self, config: Mapping[str, LayerBits], between_batches: Callable[[], None] = lambda: None
    ) -> Score:
        """Score an assignment. Nothing is trained; layers that are not named keep their bits.

        ``between_batches`` is called between the batches of a forward pass; what it raises ends the
        scoring. Raises `ScoreError` where the predicted rise is not finite.
        """
        weights, activations = self.sensitivity.score(config)
        if self.is_table:
            return Score(weights + activations, weights, activations)
        loss, rise = self.measure(config, between_batches)
        total = weights + activations if rise is None else rise
        if self.by_loss:
            total = significant(loss - self.float_loss())
        if not math.isfinite(total):
            raise ScoreError(f"The score of an assignment is {total}; candidates cannot be ranked.")
        return Score(total, weights, activations, loss)

    def measured(
        self,
        config: Mapping[str, LayerBits],
        places: Sequence[int],
        between_batches: Callable[[], None] = lambda: None,
    ) -> Score:
        """Return a finalist's score: its smooth rise on the batches ``places``, by blocks.

        The same samples are in the same block, whatever the bits, so that finalists compare in
        pairs. Raises `ScoreError` where it is not finite.
        """
        rises = self.rises(config, places, between_batches)
        order = torch.randperm(len(rises), generator=torch.Generator().manual_seed(0), device="cpu")
        blocks = torch.tensor_split(rises[order], min(BLOCKS, max(len(rises) // 4, 1)))
        # Sizes may differ by one; so their mean is that of the samples all the same.
        share = len(rises) / len(blocks)
        found = tuple(significant(float(block.sum()) / share) for block in blocks)
        total = significant(math.fsum(found) / len(found))
        if not math.isfinite(total):
            raise ScoreError(f"The measured rise of a finalist is {total}.")
        return Score(total, *self.sensitivity.score(config), rises=found)

    @torch.no_grad()
    def rises(
        self,
        config: Mapping[str, LayerBits],
        places: Sequence[int],
        between_batches: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Return the smooth loss rise of each sample of some batches, nats, ``(n,)`` float64.

        That is ½ Δzᵀ H̄ Δz, with H̄ the mean over these samples of the loss's Hessian in the outputs.
        Of a rise that tells only the sum of a batch, the mean of each batch.
        """
        assert self.rise is not None, "finalists are measured where there is a rise"
        with autocast(self.prepared, self.precision):
            if self._smooth is None or self._smooth.places != tuple(places):
                some = Batches(self.data[place] for place in places)
                outputs = self._in_float(places, self.rise.run)
                rise = self.rise.fitted(outputs, some).averaged()
                # Statistics of the same samples: each finalist passes over them once.
                again = self.correction is not None and self._fits is None
                correction = self.correction.on(places) if again and self.correction else None
                self._smooth = _Smooth(tuple(places), rise, outputs, correction)
            _, rise, expected, correction = self._smooth
            network = self.prepared if self._fits is None else self.network(config)
            set_bits(self.prepared, config)
            seen = {} if correction is None else correction.apply()
            found = []
            for place, before in zip(places, expected, strict=True):
                between_batches()
                batch = self.data[place]
                known = rise.reads_outputs and place in seen
                moved = seen[place] if known else rise.run(network, batch.inputs)
                told = rise.of_samples(before, moved, batch)
                found.append(told * batch.share / (1 if len(told) == batch.n else batch.n))
            if correction is not None:
                correction.reset()
            return torch.cat(found).cpu()

    @torch.no_grad()
    def measure(
        self, config: Mapping[str, LayerBits], between_batches: Callable[[], None] = lambda: None
    ) -> tuple[float, float | None]:
        """Return the mean loss with these bits, and the rise computed from its outputs, nats.

        The rise is rounded to nine significant digits, so that what another processor adds up in
        another order ranks the same.
        """
        with autocast(self.prepared, self.precision):  # which keeps losses in single precision
            expected = self._outputs_in_float() if self.output_rise is not None else None
            set_bits(self.prepared, config)
            losses, rises = list[float](), list[float]()
            for index, outputs in enumerate(self._run()):
                if index > 0:
                    between_batches()
                batch = self.data[index]
                losses.append(float(batch_loss(self.loss_fn, outputs, batch)) * batch.n)
                if expected is not None:
                    rises.append(self._rise(expected[index], outputs, batch))
        n = self.data.n_samples
        rise = None if expected is None else significant(math.fsum(rises) / n)
        return math.fsum(losses) / n, rise

    def _rise(self, expected: Any, outputs: Any, batch: Batch) -> float:
        """Return the rise computed from a batch's outputs, summed over its samples."""
        assert self.output_rise is not None
        return self.output_rise.of_batch(expected, outputs, batch)

    @torch.no_grad()
    def float_loss(self) -> float:
        """Return the mean loss of the float network over the calibration set, computed once."""
        if self._float_loss is None:
            with autocast(self.prepared, self.precision):
                losses = [
                    float(batch_loss(self.loss_fn, outputs, batch)) * batch.n
                    for outputs, batch in zip(self._outputs_in_float(), self.data, strict=True)
                ]
            self._float_loss = math.fsum(losses) / self.data.n_samples
        return self._float_loss

    def _run(self) -> Iterator[Any]:
        """Yield the outputs of each batch with the bits set now."""
        seen = {} if self.correction is None else self.correction.apply()
        for index, batch in enumerate(self.data):
            yield seen.pop(index) if index in seen else forward(self.prepared, batch.inputs)

    def _outputs_in_float(self) -> list[Any]:
        if self._float_outputs is None:
            self._float_outputs = self._in_float(range(len(self.data)))
            if self.output_rise is not None:
                self.output_rise = self.output_rise.fitted(self._float_outputs, self.data)
        return self._float_outputs

    def _in_float(
        self, places: Sequence[int], run: Callable[[nn.Module, Any], Any] = forward
    ) -> list[Any]:
        """Return the outputs of some batches that rises are measured against."""
        if self._teacher is not None:
            teacher = copied(self._teacher)
            return [run(teacher, self.data[place].inputs) for place in places]
        before = get_bits(self.prepared)
        set_bits(self.prepared, dict.fromkeys(before, LayerBits(FLOAT_BITS, FLOAT_BITS)))
        if self.correction is not None:
            self.correction.reset()
        outputs = [run(self.prepared, self.data[place].inputs) for place in places]
        set_bits(self.prepared, before)
        return outputs


def significant(value: float, digits: int = 9) -> float:
    """Return a value rounded to significant digits, however small it is.

    Example:
        >>> significant(1.23456789012e-12), significant(0.0)
        (1.23456789e-12, 0.0)
    """
    return float(f"{value:.{digits}g}")
