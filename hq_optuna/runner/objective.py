"""`HessianObjective`: scores a trial's assignment by curvature, without training."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import Trial
from torch import nn
from torch.nn import functional

from hq_optuna import attrs, workers
from hq_optuna.attrs import Ticket
from hq_optuna.batches import Precision, check_precision, merge_first, read_batches
from hq_optuna.bit_config import BitConfig
from hq_optuna.checks import check_forward
from hq_optuna.cost import Budget, CostModel
from hq_optuna.curvature import LossFunction, probe_of
from hq_optuna.layers import LayerSpec
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.quantization import Observer, observe_inputs, prepare, set_bits
from hq_optuna.quantization.compensation import ROUNDINGS, Rounding, compensate_weights
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.runner import fingerprint
from hq_optuna.runner.needed import while_needed
from hq_optuna.runner.publish import publish, publish_facts, stored_sensitivity
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.samplers.claims import ClaimedTrial, write_facts
from hq_optuna.samplers.tickets import excess, facts
from hq_optuna.scoring import (
    LAYER_SUMS,
    SCORERS,
    LayerSumName,
    OutputRise,
    Score,
    Scorer,
    ScorerName,
    measure_layer_sums,
    output_rise_of,
)
from hq_optuna.scoring.reuse import DEFAULT_MEMORY
from hq_optuna.scoring.sensitivity import bits_needed, unknown_layers
from hq_optuna.space import SearchSpace

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of)."""


class HessianObjective:
    """An Optuna objective: the predicted loss rise of a trial's bits, in nats.

    One candidate costs one forward pass over the calibration set. What all candidates share
    (ranges, curvature, sensitivities) is computed once, at the first trial; a worker that joins an
    existing study takes the sensitivities from there, so all workers rank by the same numbers.

    With `ProgressiveBitSampler` the trial's ticket says what to do. With any other sampler the
    objective asks for the bits of each variable of the space, so TPE or NSGA-II can be compared.

    Args:
        model: Trained network. Left exactly as it is.
        calibration: Labelled data, see `read_batches`.
        space: Search space of this network.
        loss_fn: Mean loss of a batch from (outputs, labels); cross-entropy by default.
        scorer: ``"gauss_newton"``: the rise that a candidate's own outputs tell. ``"loss"``: its
            measured loss. Else a sum over layers, see `hq_optuna.scoring.layer_sums`.
            ``None``: Gauss-Newton where the loss is cross-entropy or squared error or
            ``output_rise`` is given, else ``"diagonal"``.
        rounding: ``"compensated"``: the rounding error of a weight is made up for by others of its
            channel, see `hq_optuna.quantization.compensation`. ``"nearest"``: each by itself.
        correction: Whether each candidate's statistics are corrected in its forward pass.
        output_rise: For Gauss-Newton with another loss: the loss rise, summed over samples, from
            the outputs of the float network and of a candidate.
        observer: How activation ranges are found: ``"squared_error"``, ``"min_max"`` or
            ``"percentile"``.
        batch_size: Samples a batch, where ``calibration`` has no batches of its own.
        memory: Bytes of an incumbent's activations to keep, see `Scorer`.
        precision: ``"float32"``: candidates run in the network's own precision. ``"bfloat16"``:
            in bfloat16 where PyTorch's autocast allows it, which is quick on GPUs and coarse: it
            has 8 significant bits.

    Raises:
        DataError: Unusable calibration data or loss.
        NetworkError: Random or non-finite forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Any,
        space: SearchSpace,
        *,
        loss_fn: LossFunction = functional.cross_entropy,
        scorer: ScorerName | None = None,
        rounding: Rounding = "compensated",
        correction: bool = True,
        output_rise: OutputRise | None = None,
        observer: Observer = "squared_error",
        batch_size: int = 32,
        memory: int = DEFAULT_MEMORY,
        precision: Precision = "float32",
    ) -> None:
        if output_rise is None:
            output_rise = output_rise_of(loss_fn)
        if scorer is None:
            scorer = "diagonal" if output_rise is None else "gauss_newton"
        if scorer not in SCORERS:
            raise ValueError(f"scorer is one of {', '.join(SCORERS)}; got {scorer!r}.")
        if scorer == "gauss_newton" and output_rise is None:
            raise ValueError(
                "The scorer 'gauss_newton' knows cross-entropy and squared error. For another loss "
                "give output_rise, or use scorer='diagonal'."
            )
        self.model = model
        self.space = space
        self.loss_fn = loss_fn
        if scorer == "fisher" and probe_of(loss_fn) is None:
            raise ValueError(
                "The scorer 'fisher' knows cross-entropy and squared error. For another loss use "
                "scorer='diagonal' or 'hutchinson'."
            )
        self.scorer_name: ScorerName = scorer
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding is one of {', '.join(ROUNDINGS)}; got {rounding!r}.")
        self.rounding: Rounding = rounding
        self.correct = correction
        self.output_rise = output_rise if scorer == "gauss_newton" else None
        self.observer: Observer = observer
        self.memory = memory
        self.precision: Precision = precision
        check_precision(precision)
        if memory < 0:
            raise ValueError(f"memory is a number of bytes, 0 or more; got {memory}.")
        self.device = next(model.parameters()).device
        self.data = read_batches(calibration, batch_size=batch_size).to(self.device)
        self.warnings = check_forward(model, self.data, loss_fn)
        self.skipped: tuple[tuple[str, str, str], ...] = ()
        self.progress: Progress = lambda what, done, of: None
        self._scorer: Scorer | None = None
        self._facts: dict[str, float] = {}
        # By storage, as studies of two storages may have the same id.
        self._settled: WeakKeyDictionary[BaseStorage, dict[int, bool]] = WeakKeyDictionary()

    def quantized(self, config: BitConfig) -> nn.Module:
        """Return a network of its own with these bits, its statistics corrected if they shall be.

        Call `prepare` first.
        """
        assert self._scorer is not None, "call prepare() first"
        prepared, correction = self._scorer.prepared, self._scorer.correction
        set_bits(prepared, config)
        if correction is not None:
            correction.apply()
        network = copy.deepcopy(prepared)
        if correction is not None:
            correction.reset()
        return network

    def prepare(self, study: Study | None = None) -> Scorer:
        """Compute what all candidates share; called by the first trial if not before.

        Args:
            study: Where sensitivities are taken from if another worker measured them, and where
                they are written otherwise.

        Raises:
            ResumeError: The study belongs to another search.
        """
        settled = {} if study is None else self._settled.setdefault(study._storage, {})
        write_over: bool | None = None  # None: nothing to write
        if study is not None:
            another = self._met_another(study)
            if settled.get(study._study_id) != another:
                write_over = self._settle(study)
        if self._scorer is None:
            self._scorer = self._prepare(study)
        if study is not None and write_over is not None:
            info = self._info(study)
            publish_facts(study, self._facts)
            publish(study, self.space, info, self._scorer.sensitivity, again=write_over)
            settled[study._study_id] = another
        return self._scorer

    def _settle(self, study: Study) -> bool:
        """Refuse the study of another search; return whether what it says must be written over."""
        mine, sampler, is_mine = self.fingerprint(study), study.sampler, None
        if isinstance(sampler, ProgressiveBitSampler):
            sampler.name_search(study, attrs.digest(mine))
            sampler.log(study)
            is_mine = sampler.known(study).is_surely_mine
        return fingerprint.check_or_write(study, mine, is_mine=is_mine)

    @staticmethod
    def _met_another(study: Study) -> bool:
        sampler = study.sampler
        return isinstance(sampler, ProgressiveBitSampler) and sampler.known(study).met_another

    def _prepare(self, study: Study | None) -> Scorer:
        network = self._eval_copy()
        names = [layer.name for layer in self.space.layers]
        histograms = observe_inputs(network, names, self.data)
        prepared = prepare(network, self.space.layers, histograms, observer=self.observer)
        if self.rounding == "compensated":
            compensate_weights(
                prepared,
                self.space.layers,
                self.data,
                {name: weights for name, (weights, _) in bits_needed(self.space).items()},
                progress=lambda done, of: self.progress("rounding", done, of),
            )
        sensitivity = None if study is None else stored_sensitivity(study)
        if sensitivity is None:
            name = self.scorer_name
            known: LayerSumName = "fisher" if probe_of(self.loss_fn) is not None else "diagonal"
            sums: LayerSumName = name if name in LAYER_SUMS else known
            sensitivity, curvature = measure_layer_sums(
                sums,
                network,
                prepared,
                self.space,
                self.data,
                self.loss_fn,
                progress=lambda what, done, of: self.progress(what, done, of),
            )
            self.warnings += unknown_layers(curvature, self.space.layers)
            self._facts = {"curvature_samples": curvature.n_samples}
            if math.isfinite(curvature.largest_error):  # one batch alone has none
                self._facts["curvature_standard_error"] = round(curvature.largest_error, 4)
        data = merge_first(self.data, statistics_samples(self.space.layers))
        scorer = Scorer(
            prepared,
            sensitivity,
            data,
            self.loss_fn,
            output_rise=self.output_rise,
            by_loss=self.scorer_name == "loss",
            correction=StatisticsCorrection(prepared, data, self.precision)
            if self.correct
            else None,
            memory=self.memory,
            precision=self.precision,
        )
        self.warnings += scorer.warnings
        return scorer

    def _eval_copy(self) -> nn.Module:
        return copy.deepcopy(self.model).eval()

    def fingerprint(self, study: Study) -> dict[str, str | int]:
        """Return what this search depends on, by name."""
        loss = getattr(self.loss_fn, "__qualname__", type(self.loss_fn).__name__)
        mine: dict[str, str | int] = {
            "network": fingerprint.network_digest(self.model),
            "data": self.data.digest(),
            "space": self.space.digest,
            "quantizers": fingerprint.QUANTIZERS,
            "scorer": self.scorer_name,
            "rounding": self.rounding,
            "correction": self.correct,
            "observer": self.observer,
            "precision": self.precision,
            "loss": loss,
        }
        budget = budget_of(study)
        if budget is not None:
            mine["budget"] = str(budget)
        if isinstance(study.sampler, ProgressiveBitSampler):
            sampler = study.sampler
            mine |= {
                "rule": sampler.rule,
                "n_candidates": sampler.n_candidates,
                "seed": sampler.seed,
                "refine": sampler.refine,
                "encoding": sampler.encoding,
            }
        return mine

    def _info(self, study: Study) -> attrs.StudyInfo:
        budget = budget_of(study)
        metric = "bops" if budget is None else budget.metric
        model = CostModel(self.space.layers, metric)
        sampler = study.sampler
        ours = sampler if isinstance(sampler, ProgressiveBitSampler) else None
        return attrs.StudyInfo(
            metric=metric,
            limit=model.float32 if budget is None else budget.limit(self.space.layers),
            budget="none" if budget is None else str(budget),
            int8=model.int8,
            float32=model.float32,
            scorer=self.scorer_name,
            rounding=self.rounding,
            correction=self.correct,
            rule=type(sampler).__name__ if ours is None else ours.rule,
            n_candidates=1 if ours is None else ours.n_candidates,
            seed=0 if ours is None else ours.seed,
            skipped=self.skipped,
            warnings=tuple(self.warnings),
        )

    def __call__(self, trial: Trial) -> float:
        """Score one trial.

        Raises:
            optuna.TrialPruned: Its work is no longer needed.
        """
        started = time.perf_counter()
        study = trial.study
        scorer = self.prepare(study)
        sampler, ticket = study.sampler, None
        if isinstance(sampler, ProgressiveBitSampler):
            ticket = sampler.ticket(study, trial._trial_id)
        if ticket is None or ticket.kind == "free":
            bits = [trial.suggest_categorical(v.name, v.bits) for v in self.space.variables]
            config = self.space.config(bits)
            return self._record(trial, config, scorer.score(config), None, started)
        if ticket.kind == "surplus" or trial.should_prune():
            raise optuna.TrialPruned("its work is no longer needed")
        assert isinstance(sampler, ProgressiveBitSampler)
        if not isinstance(trial, ClaimedTrial):  # that one was created with its parameters
            for name, (_, choices) in sampler.parameters(ticket).items():
                trial.suggest_categorical(name, choices)
        config = self.space.config(ticket.bits)
        if ticket.kind == "incumbent":
            return self._record_step(trial, ticket, config, started)
        origin = sampler.origin(study)
        with while_needed(scorer, trial):
            score = scorer.score(config, config if origin is None else self.space.config(origin))
        return self._record(trial, config, score, ticket, started)

    def _record_step(
        self, trial: Trial, ticket: Ticket, config: BitConfig, started: float
    ) -> float:
        storage, study_id = trial.study._storage, trial.study._study_id
        assert ticket.origin is not None
        winner = storage.get_trial(
            storage.get_trial_id_from_study_id_trial_number(study_id, ticket.origin)
        )
        assert winner.value is not None
        kept = (attrs.SCORE_WEIGHTS, attrs.SCORE_ACTIVATIONS, attrs.CALIBRATION_LOSS)
        parts = (winner.user_attrs[name] for name in kept)
        self._record(trial, config, Score(winner.value, *parts), ticket, started)
        # One unit in the last place below its candidate, so that `study.best_trial` is the record,
        # which has the bits of all layers, and not the candidate it repeats.
        return math.nextafter(winner.value, -math.inf)

    def _record(
        self,
        trial: Trial,
        config: BitConfig,
        score: Score,
        ticket: Ticket | None,
        started: float,
    ) -> float:
        budget = budget_of(trial.study)
        cost = CostModel(self.space.layers, "bops" if budget is None else budget.metric).cost(
            config
        )
        shown: dict[str, Any] = {} if ticket is None else facts(ticket, self.space, cost)
        shown |= {
            attrs.SCORE_WEIGHTS: score.weights,
            attrs.SCORE_ACTIVATIONS: score.activations,
            attrs.CALIBRATION_LOSS: score.calibration_loss,
            attrs.COST: cost,
            attrs.SECONDS: round(time.perf_counter() - started, 6),
            attrs.WORKER: workers.short_name(workers.worker_id()),
        }
        write_facts(trial, shown)
        over = None if budget is None else excess(cost, budget.limit(self.space.layers))
        if budget is not None and over is not None and not isinstance(trial, ClaimedTrial):
            trial.set_constraint(budget.metric, over)
            # optuna-dashboard up to 0.21 reads only the older form.
            trial.study._storage.set_trial_system_attr(
                trial._trial_id, attrs.OLD_CONSTRAINTS, [over]
            )
        return score.total


def statistics_samples(layers: Sequence[LayerSpec]) -> int:
    """Return how many samples statistics are measured on at once.

    Statistics want many, memory and caches do not: about 64 MiB a tensor. More than 128 made no
    difference (docs/scores.md).
    """
    largest = max(layer.n_inputs // layer.n_calls for layer in layers)
    return max(1, min(128, 2**24 // largest))


def budget_of(study: Study) -> Budget | None:
    """Return the budget of a study: its sampler's, or its pruner's."""
    if isinstance(study.sampler, ProgressiveBitSampler) and study.sampler.budget is not None:
        return study.sampler.budget
    return study.pruner.budget if isinstance(study.pruner, CostBudgetPruner) else None
