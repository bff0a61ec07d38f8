"""From a float network to a scorer: ranges, rounding, sensitivities, statistics correction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn

from hq_optuna.curvature import probe_of
from hq_optuna.hardware import read_hardware
from hq_optuna.network.batches import Batches
from hq_optuna.network.losses import LossFunction
from hq_optuna.objective.preparation import Preparation, Progress, Shared
from hq_optuna.quantization import observe_inputs, prepare
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.in_order import InOrder, places_in_memory
from hq_optuna.quantization.observers import InputHistogram
from hq_optuna.quantization.prepare import set_bits
from hq_optuna.quantization.quantizers.choice import choose_quantizers, uncompensated_warnings
from hq_optuna.quantization.ranges import InputGrid
from hq_optuna.quantization.statistics import statistics_places
from hq_optuna.rises import Rise, RiseLoss
from hq_optuna.scoring import LAYER_SUMS, LayerSumName, Scorer, Sensitivity
from hq_optuna.settings import ScorerName, SearchSettings
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.training.trained import TrainedNetwork


def _classes(data: Batches) -> set[int]:
    """Return the labels of data with one whole number a sample; none of other data."""
    found = set[int]()
    for batch in data:
        labels = batch.labels
        if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
            found.update(labels.tolist())
    return found


def _default(rise: Rise | None, trains: bool) -> ScorerName:
    """Return the scorer that ranks best with what is known of the outputs."""
    if rise is None:
        return "diagonal"
    by_outputs = rise.reads_outputs and (trains or not rise.can_draw)
    return "gauss_newton" if by_outputs else "hessian_trace"


_KNOW_PRODUCTS: tuple[ScorerName, ...] = ("hessian_trace", "gauss_newton", "loss")


def _draws(rise: Rise | None) -> bool:
    return rise is not None and rise.can_draw


class BuiltScorer(NamedTuple):
    """A scorer, with sentences that a reader of the results must know, and figures for the record.

    There are no figures where sensitivities were known.
    """

    scorer: Scorer
    warnings: list[str]
    facts: dict[str, float]


@dataclass(frozen=True)
class ScorerSetup:
    """How assignments are scored, and on what; see `hq_optuna.settings`.

    ``settings`` have the scorer that was chosen, ``rise`` is that of the outputs, where there is
    one. ``data`` are calibration batches on the network's device. ``quantizers`` names
    those of layers whose weights are not rounded uniformly.
    """

    settings: SearchSettings
    space: SearchSpace
    data: Batches
    loss_fn: LossFunction
    rise: Rise | None
    quantizers: Mapping[str, str]

    @cached_property
    def grid(self) -> InputGrid:
        """Which ranges of inputs the hardware takes."""
        target = read_hardware(self.settings.hardware)
        return InputGrid(target.symmetric_bits, target.unsigned, target.power_of_two)

    @classmethod
    def checked(
        cls,
        settings: SearchSettings,
        space: SearchSpace,
        data: Batches,
        loss_fn: LossFunction,
        rise: Rise | None,
        *,
        trains: bool = False,
    ) -> ScorerSetup:
        """Return the set-up for a loss; the scorer is chosen where it is ``None``.

        Where a search ``trains`` winners and goes on from them, outputs tell what is left of their
        rise, and a table of the trained network does not.

        Raises `ValueError` for a scorer that does not know loss or rise, and `SpaceError` for an
        unknown quantizer, or one that cannot do the bits of its layers.
        """
        scorer = settings.scorer
        if scorer is None:
            scorer = _default(rise, trains)
        if scorer == "gauss_newton" and (rise is None or not rise.reads_outputs):
            raise ValueError(
                "The scorer 'gauss_newton' compares the network's outputs, and no rise tells how: "
                "give rise=, one of hq_optuna.rises or a function of (outputs, moved), or use "
                "scorer='diagonal'. In a study file that is rise = …"
            )
        if scorer == "hessian_trace" and (rise is None or not rise.can_draw):
            raise ValueError(
                "The scorer 'hessian_trace' needs a rise of the outputs: give rise=, one of "
                "hq_optuna.rises, or use scorer='diagonal'."
            )
        if scorer == "fisher" and probe_of(loss_fn) is None:
            raise ValueError(
                "The scorer 'fisher' knows cross-entropy and squared error. For another loss use "
                "scorer='hessian_trace', 'diagonal' or 'hutchinson'."
            )
        if scorer in ("diagonal", "trace") and isinstance(loss_fn, RiseLoss):
            raise ValueError(
                f"The scorer {scorer!r} needs gradients of a loss, and the data have no labels. "
                "Use scorer='hessian_trace' or 'gauss_newton', or give labels and a loss."
            )
        if trains and read_hardware(settings.hardware).power_of_two:
            raise ValueError(
                f"Training learns the scales of inputs, which are powers of two on "
                f"{settings.hardware!s}. Search without training (train_every=0, final_epochs=0)."
            )
        quantizers = choose_quantizers(settings.quantizers, space)
        products = any(layer.is_product for layer in space.layers)
        if products and (trains or scorer not in _KNOW_PRODUCTS or not _draws(rise)):
            raise ValueError(
                "Products of activations have no weights, and so no curvature of any: they are "
                f"searched with a rise of hq_optuna.rises, one of the scorers "
                f"{', '.join(_KNOW_PRODUCTS)}, and without training. Give these, or leave out "
                "products."
            )
        return cls(settings.replace(scorer=scorer), space, data, loss_fn, rise, quantizers)

    def build(
        self,
        network: nn.Module,
        known: Sensitivity | None,
        progress: Progress,
        *,
        base: TrainedNetwork | None = None,
        teacher: nn.Module | None = None,
        moments: Mapping[str, Tensor] | None = None,
        shared: Shared | None = None,
    ) -> BuiltScorer:
        """Return a scorer of a float network in eval mode.

        Sensitivities are measured, by ``shared`` pieces where other workers help, unless they are
        ``known``; what else it takes to measure an assignment then waits until one is. Of a trained
        network: what its training learned is ``base``, rises are measured against ``teacher``, and
        ``moments`` are the curvature of weights that the training told, by layer.
        """
        preparation = Preparation(
            *(self, network), base=base, moments=moments, shared=shared, progress=progress
        )
        facts: dict[str, float] = {"rounding_samples": self.rounding_data.n_samples}
        facts["set_aside_samples"] = sum(self.data[p].n for p in self.set_aside_places)
        compensated = self.settings.rounding != "nearest"
        warnings = uncompensated_warnings(self.quantizers) if compensated else []
        if known is None:
            table = preparation.table()
            known = table.sensitivity
            warnings += table.warnings
            facts |= table.facts
        in_order = self._in_order if self.settings.rounding == "in_order" and base is None else None
        scorer = self._scorer(preparation.network, known, teacher, in_order)
        return BuiltScorer(scorer, warnings, facts)

    def score_of_trained(self, base: TrainedNetwork, teacher: nn.Module) -> float | None:
        """Return the score of a trained network at its own bits, before a scorer of it is built.

        Digit for digit what that scorer says. ``None``: the score is a sum over layers, for which
        there is no way around their curvature.
        """
        if not self.told_by_outputs:
            return None
        nothing = Sensitivity(
            {name: {bits.weight_bits: 0.0} for name, bits in base.config.items()},
            {name: {bits.activation_bits: 0.0} for name, bits in base.config.items()},
        )
        names = [layer.name for layer in self.space.layers]
        prepared = self.prepared(
            base.network, observe_inputs(base.network, names, self.rounding_data)
        )
        base.restore_learned_(prepared)
        correction = None
        if self.settings.correction:
            given = prepared, self.data, self.settings.precision, base.config
            correction = StatisticsCorrection(*given, places=self.statistics_places)
        scorer = self._scorer(lambda: (prepared, correction), nothing, teacher)
        return scorer.score(base.config).total

    @property
    def told_by_outputs(self) -> bool:
        """Whether an assignment's outputs or loss are its score, and not a sum over layers."""
        return self.settings.scorer in ("gauss_newton", "loss")

    def _scorer(
        self,
        prepared: Callable[[], tuple[nn.Module, StatisticsCorrection | None]],
        known: Sensitivity,
        teacher: nn.Module | None,
        in_order: Callable[[nn.Module], InOrder] | None = None,
    ) -> Scorer:
        return Scorer(
            *(prepared, known, self.data, self.loss_fn),
            output_rise=self.rise if self.settings.scorer == "gauss_newton" else None,
            rise=self.rise,
            by_loss=self.settings.scorer == "loss",
            measures=self.settings.measure_candidates,
            precision=self.settings.precision,
            teacher=teacher,
            in_order=in_order,
        )

    def prepared(
        self, network: nn.Module, inputs: Mapping[str, InputHistogram] | None = None
    ) -> nn.Module:
        """Return a prepared copy of a network, without ranges for its inputs unless observed."""
        return prepare(
            *(network, self.space.layers, inputs),
            observer=self.settings.observer,
            quantizers=self.quantizers,
            grid=self.grid,
        )

    def vendors_default(self, network: nn.Module) -> tuple[BitConfig, nn.Module] | None:
        """Return what a tool of the hardware gives when nothing is asked of it.

        W8A8 in each layer that may have it, else its widest pair; ranges from the least to the
        largest input, weights to the nearest, nothing corrected. ``None``: no hardware is named.
        """
        if not read_hardware(self.settings.hardware).restricts:
            return None
        eight, layers = LayerBits(8, 8), self.space.layers
        config = BitConfig(
            {n: eight if eight in pairs else max(pairs) for n, pairs in self.space.pairs.items()}
        )
        inputs = observe_inputs(network, [layer.name for layer in layers], self.rounding_data)
        made = prepare(network, layers, inputs, observer="min_max", grid=self.grid)
        set_bits(made, config)
        return config, made

    @property
    def is_table(self) -> bool:
        """Whether candidates are scored by a table, which needs no forward pass of theirs."""
        return self.settings.scorer in LAYER_SUMS and not self.settings.measure_candidates

    @property
    def set_aside_places(self) -> tuple[int, ...]:
        """The batches that finalists are measured on: rounding has not read them if any are."""
        return tuple(sorted(self._table_places)) or self.statistics_places

    @property
    def layer_sum(self) -> LayerSumName:
        """The sum over layers that is recorded of each candidate."""
        if self.settings.scorer in LAYER_SUMS:
            return self.settings.scorer
        products = any(layer.is_product for layer in self.space.layers)
        if probe_of(self.loss_fn) is not None and not products:
            return "fisher"
        told = self.rise is not None and self.rise.can_draw
        return "hessian_trace" if told else "diagonal"

    @cached_property
    def _table_places(self) -> frozenset[int]:
        """The batches that ``hessian_trace`` reads and rounding does not: it fits its own."""
        if self.layer_sum != "hessian_trace":
            return frozenset()
        n = self.data.n_samples
        wanted = min(128, max(n // 4, min(64, n // 2)))
        return frozenset(statistics_places(self.data, 1, least_samples=wanted, least_batches=1))

    @property
    def table_data(self) -> Batches:
        """What layers' rises are measured on."""
        chosen = self._table_places or range(len(self.data))
        return Batches(batch for place, batch in enumerate(self.data) if place in chosen)

    def order_warnings(self) -> list[str]:
        """Return a sentence where the samples that the table reads lack half of the classes."""
        part, whole = (_classes(data) for data in (self.table_data, self.data))
        if not self._table_places or 2 * len(part) >= len(whole):
            return []
        return [
            f"The {self.table_data.n_samples} calibration samples that are set aside for the table "
            f"of rises have {len(part)} of {len(whole)} classes: the data come in the order of "
            "their labels. Shuffle them, so that the table stands for all classes."
        ]

    @property
    def rounding_data(self) -> Batches:
        """What ranges and rounding are found on: all else, or the one batch that there is."""
        rest = Batches(b for place, b in enumerate(self.data) if place not in self._table_places)
        return rest or self.data

    def _in_order(self, prepared: nn.Module) -> InOrder:
        """Return what fits copies of a network, on samples that the table does not read."""
        rest = [p for p in range(len(self.data)) if p not in self._table_places]
        places = places_in_memory(self.data, rest or range(len(self.data)), self._largest)
        given = prepared, self.data, places, self.settings.precision
        return InOrder(*given, corrects=self.settings.correction)

    @property
    def _largest(self) -> int:
        """Elements of a sample's largest input of a layer."""
        return max(layer.n_inputs // layer.n_calls for layer in self.space.layers)

    @property
    def statistics_places(self) -> tuple[int, ...]:
        """The calibration batches that statistics are measured on."""
        return statistics_places(self.data, self._largest)
