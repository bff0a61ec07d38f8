"""Scoring a candidate: its predicted loss rise, and one forward pass for its measured loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from hq_optuna.batches import (
    Batch,
    Batches,
    Precision,
    autocast,
    check_precision,
    cloned,
    forward,
)
from hq_optuna.bit_config import BitConfig, LayerBits
from hq_optuna.copies import copied
from hq_optuna.curvature import LossFunction
from hq_optuna.errors import ScoreError
from hq_optuna.layers import FLOAT_BITS
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.prepare import get_bits, set_bits
from hq_optuna.scoring.graph import UncuttableError
from hq_optuna.scoring.outputs import CrossEntropyRise, OutputRise, squared_error_rise
from hq_optuna.scoring.reuse import DEFAULT_MEMORY, Reuse
from hq_optuna.scoring.sensitivity import Sensitivity

ScorerName = Literal[
    "gauss_newton", "loss", "diagonal", "trace", "fisher", "hutchinson", "fit", "hawq_v2"
]
SCORERS: tuple[ScorerName, ...] = get_args(ScorerName)


FEWEST_TOGETHER = 4
"""Candidates for which one pass is tried."""


class Score(NamedTuple):
    """What is recorded of a candidate.

    Attributes:
        total: What candidates are ranked by, nats: weights' and activations' part together, or
            what was measured of its outputs or its loss.
        weights: The weights' part of the sum of sensitivities, nats.
        activations: The activations' part, nats.
        calibration_loss: Measured mean loss on the calibration set.
    """

    total: float
    weights: float
    activations: float
    calibration_loss: float


class Scorer:
    """Scores assignments of one prepared network.

    Args:
        prepared: The prepared network; scoring sets its bits.
        sensitivity: Predicted loss rises of the space's layers and bits.
        data: Calibration batches on the network's device.
        loss_fn: Mean loss of a batch from outputs and labels.
        output_rise: Ranks by the loss rise that a candidate's own outputs tell, instead of by the
            sum of its layers' sensitivities.
        by_loss: Ranks by the measured rise of the loss on the calibration set over that of the
            float network. A network may be better by chance with fewer bits: rises can be negative.
        correction: Corrects the statistics of each candidate in its forward pass.
        memory: Bytes of an incumbent's activations that are kept, so that its candidates run only
            what depends on the layers they change. 0 runs every candidate whole. Scores are the
            same, bit for bit.
        precision: Of candidates' forward passes, see `hq_optuna.batches.Precision`.
        teacher: Whose outputs a rise is measured against, where that is not the prepared network
            in float: the network as it was before it was trained at fewer bits.

    Attributes:
        reuse: Runs candidates on what is kept; ``None`` where they run whole.
        warnings: Why a network's candidates run whole, in a sentence.
        between_batches: Called between the batches of a candidate; what it raises ends the scoring.
    """

    def __init__(
        self,
        prepared: nn.Module,
        sensitivity: Sensitivity,
        data: Batches,
        loss_fn: LossFunction,
        *,
        output_rise: OutputRise | None = None,
        by_loss: bool = False,
        correction: StatisticsCorrection | None = None,
        memory: int = DEFAULT_MEMORY,
        precision: Precision = "float32",
        teacher: nn.Module | None = None,
    ) -> None:
        check_precision(precision)
        self._teacher = teacher
        self.prepared = prepared
        self.sensitivity = sensitivity
        self.data = data
        self.loss_fn = loss_fn
        self.output_rise = output_rise
        self.correction = correction
        self.by_loss = by_loss
        self.between_batches: Callable[[], None] = lambda: None
        self._float_outputs: list[Any] | None = None
        self._float_loss: float | None = None
        self.precision: Precision = precision
        self.warnings: list[str] = []
        self.reuse: Reuse | None = None
        self._one_pass: bool | None = None  # whether one for several takes less time, once tried
        if memory:
            try:
                with autocast(prepared, precision):
                    self.reuse = Reuse(
                        prepared, data, _searched(sensitivity), correction=correction, memory=memory
                    )
            except UncuttableError as error:
                self.warnings.append(
                    f"Each candidate runs the whole network, because {error}. Scores are the same; "
                    "they only take longer."
                )

    def score(
        self,
        config: Mapping[str, LayerBits],
        incumbent: Mapping[str, LayerBits] | None = None,
    ) -> Score:
        """Score an assignment with one forward pass over the calibration set. Nothing is trained.

        Args:
            config: Bits of the layers; those not named keep theirs.
            incumbent: The assignment of all layers that this one and the following ones were made
                from. Its activations are kept; the score does not depend on it.

        Raises:
            ScoreError: The predicted rise is NaN or infinite.
        """
        return self._scored(config, *self.measure(config, incumbent))

    def _scored(self, config: Mapping[str, LayerBits], loss: float, rise: float | None) -> Score:
        weights, activations = self.sensitivity.score(config)
        total = weights + activations if rise is None else rise
        if self.by_loss:
            total = round(loss - self.float_loss(), 9)  # as `measure` rounds
        if not math.isfinite(total):
            raise ScoreError(f"The score of an assignment is {total}; candidates cannot be ranked.")
        return Score(total, weights, activations, loss)

    def score_together(
        self, configs: Sequence[Mapping[str, LayerBits]], incumbent: Mapping[str, LayerBits]
    ) -> list[Score]:
        """Score several assignments in one pass, if that is possible and quicker.

        Scores are those of `score`, bit for bit. Whether one pass is quicker is tried with the
        first few assignments.

        Args:
            configs: Bits of the layers, of each; those not named are as they are before the first.
            incumbent: The assignment of all layers that all of them were made from.

        Raises:
            ScoreError: A predicted rise is NaN or infinite.
        """
        bits = get_bits(self.prepared)
        wholes = [BitConfig({**bits, **config}) for config in configs]
        measured = self._measure_all(wholes, incumbent)
        return [self._scored(c, *m) for c, m in zip(configs, measured, strict=True)]

    def _measure_all(
        self, configs: Sequence[BitConfig], incumbent: Mapping[str, LayerBits]
    ) -> list[tuple[float, float | None]]:
        most = self.most_together
        if len(configs) < FEWEST_TOGETHER or most == 1:
            return [self.measure(config, incumbent) for config in configs]
        if self._one_pass is None:
            return self._try_one_pass(configs, incumbent)
        groups = (configs[first : first + most] for first in range(0, len(configs), most))
        return [found for group in groups for found in self._measure_together(group, incumbent)]

    @property
    def most_together(self) -> int:
        """How many assignments may be scored in one pass; 1 where that is impossible or slower."""
        if self.reuse is None or self._hooked() or self._one_pass is False:
            return 1
        return self.reuse.most_together

    def _try_one_pass(
        self, configs: Sequence[BitConfig], incumbent: Mapping[str, LayerBits]
    ) -> list[tuple[float, float | None]]:
        """Measure assignments alone and together, and remember what took less time."""
        several = configs[: self.most_together]
        self._measure_together(several, incumbent)  # which finds out what may run together
        started = time.perf_counter()
        together = self._measure_together(several, incumbent)
        half = time.perf_counter()
        alone = [self.measure(config, incumbent) for config in several]
        self._one_pass = together == alone and half - started < time.perf_counter() - half
        return alone + self._measure_all(configs[len(several) :], incumbent)

    @torch.no_grad()
    def measure(
        self,
        config: Mapping[str, LayerBits],
        incumbent: Mapping[str, LayerBits] | None = None,
    ) -> tuple[float, float | None]:
        """Return the mean loss with these bits, and the rise its outputs tell, nats.

        The rise is rounded to nine digits, so that what another processor adds up in another order
        ranks the same.
        """
        with autocast(self.prepared, self.precision):  # which keeps losses in single precision
            expected = self._outputs_in_float() if self.output_rise is not None else None
            set_bits(self.prepared, config)
            return self._sums(([outputs] for outputs in self._run(incumbent)), expected)[0]

    @torch.no_grad()
    def _measure_together(
        self, configs: Sequence[BitConfig], incumbent: Mapping[str, LayerBits]
    ) -> list[tuple[float, float | None]]:
        assert self.reuse is not None
        with autocast(self.prepared, self.precision):
            expected = self._outputs_in_float() if self.output_rise is not None else None
            return self._sums(self.reuse.run_together(configs, BitConfig(incumbent)), expected)

    def _sums(
        self, batches: Iterable[list[Any]], expected: list[Any] | None
    ) -> list[tuple[float, float | None]]:
        """Return loss and rise of each candidate from its outputs on each batch."""
        found: list[list[tuple[float, float]]] = []
        for index, several in enumerate(batches):
            if index > 0:
                self.between_batches()
            batch = self.data[index]
            found.append([])
            for outputs in several:
                loss = float(self.loss_fn(cloned(outputs), batch.labels)) * batch.n
                rise = 0.0 if expected is None else self._rise(expected[index], outputs, batch)
                found[-1].append((loss, rise))
        n, sums = self.data.n_samples, list[tuple[float, float | None]]()
        for each in zip(*found, strict=True):
            losses, rises = zip(*each, strict=True)
            total = None if expected is None else float(f"{math.fsum(rises) / n:.9g}")
            sums.append((math.fsum(losses) / n, total))
        return sums

    def _rise(self, expected: Any, outputs: Any, batch: Batch) -> float:
        """Return what a batch's outputs tell of the rise, summed over its samples."""
        assert self.output_rise is not None
        if isinstance(self.output_rise, CrossEntropyRise):
            rise = float(self.output_rise(expected, outputs, batch.labels))
        else:
            rise = float(self.output_rise(cloned(expected), cloned(outputs)))
            if self.output_rise is not squared_error_rise:
                return rise  # the user's own, who knows what a sample is
        # A sample may have several rows of outputs, such as its tokens.
        return rise if len(outputs) == batch.n else rise * batch.n / len(outputs)

    @torch.no_grad()
    def float_loss(self) -> float:
        """Return the mean loss of the float network over the calibration set, computed once."""
        if self._float_loss is None:
            with autocast(self.prepared, self.precision):
                losses = [
                    float(self.loss_fn(cloned(outputs), batch.labels)) * batch.n
                    for outputs, batch in zip(self._outputs_in_float(), self.data, strict=True)
                ]
            self._float_loss = math.fsum(losses) / self.data.n_samples
        return self._float_loss

    def calibration_loss(self, config: Mapping[str, LayerBits]) -> float:
        """Return the mean loss over the calibration set with these bits."""
        return self.measure(config)[0]

    def _run(self, incumbent: Mapping[str, LayerBits] | None) -> Iterator[Any]:
        """Yield the outputs of each batch with the bits set now."""
        if self.reuse is not None and not self._hooked():
            origin = None if incumbent is None else BitConfig(incumbent)
            yield from self.reuse.run(get_bits(self.prepared), origin)
            return
        for index, batch in enumerate(self.data):
            if index == 0 and self.correction is not None:
                yield self.correction.apply()
            else:
                yield forward(self.prepared, batch.inputs)

    def _hooked(self) -> bool:
        """Say whether the network has hooks: they would not see a pass that is made of parts."""
        return bool(self.prepared._forward_hooks or self.prepared._forward_pre_hooks)

    def _outputs_in_float(self) -> list[Any]:
        if self._float_outputs is None:
            if self._teacher is not None:
                teacher = copied(self._teacher)
                self._float_outputs = [forward(teacher, batch.inputs) for batch in self.data]
            else:
                before = get_bits(self.prepared)
                set_bits(self.prepared, dict.fromkeys(before, LayerBits(FLOAT_BITS, FLOAT_BITS)))
                if self.correction is not None:
                    self.correction.reset()
                self._float_outputs = [forward(self.prepared, b.inputs) for b in self.data]
                set_bits(self.prepared, before)
            if isinstance(self.output_rise, CrossEntropyRise):
                self.output_rise = self.output_rise.calibrated(
                    self._float_outputs, [batch.labels for batch in self.data]
                )
        return self._float_outputs


def _searched(sensitivity: Sensitivity) -> list[str]:
    """Return the layers that may have several bits."""
    weights, inputs = sensitivity.weights, sensitivity.activations
    return [name for name in weights if len(weights[name]) > 1 or len(inputs.get(name, ())) > 1]
