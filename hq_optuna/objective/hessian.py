"""`HessianObjective`: scores a trial's assignment by curvature, without training."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import Trial
from torch import Tensor, nn
from torch.nn import functional

from hq_optuna import attributes
from hq_optuna.artifacts.store import Artifacts
from hq_optuna.attributes import Beside, StudyInfo, Ticket
from hq_optuna.errors import NetworkError, ResumeError, SettingError, SpaceError
from hq_optuna.hardware import ANY, read_hardware
from hq_optuna.network.batches import Batches, check_sample_axis, read_batches
from hq_optuna.network.checks import check_forward, check_rise, look_over
from hq_optuna.network.copies import copied
from hq_optuna.network.devices import device_of
from hq_optuna.network.evaluation import Evaluate
from hq_optuna.network.loss_weights import as_mean
from hq_optuna.network.losses import LossFunction, own_loss
from hq_optuna.network.modes import own_modes
from hq_optuna.network.products import products_named
from hq_optuna.network.searchable import check_searchable
from hq_optuna.network.unfused import unfused
from hq_optuna.objective import fingerprint
from hq_optuna.objective.functions import name_of
from hq_optuna.objective.preparation import Progress, Shared
from hq_optuna.objective.publish import (
    budget_of,
    by_whom,
    publish,
    publish_facts,
    record,
    shown,
    stored_sensitivity,
)
from hq_optuna.objective.scorer_setup import ScorerSetup
from hq_optuna.objective.training_steps import TrainedSteps
from hq_optuna.optuna_internals import id_of, storage_of
from hq_optuna.protocol.claims import ClaimedTrial, NotNeeded, write_facts
from hq_optuna.protocol.history import read_history
from hq_optuna.protocol.tickets import closing, winner_of
from hq_optuna.quantization.outputs import find_places
from hq_optuna.quantization.prepare import check_preparable
from hq_optuna.rises import Rise, RiseLoss, decide, rise_of_loss
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.scoring import Score, Scorer
from hq_optuna.settings import SearchSettings, settings_of
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.search_space import SearchSpace, Variable, bits_needed
from hq_optuna.training.plan import TrainingPlan

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
"""How often a worker asks whether the candidate that it scores is still needed."""


class HessianObjective:
    """An Optuna objective: the predicted loss rise of a trial's bits, in nats.

    What all candidates share (ranges, rounded weights, the table of rises by layer and bits) is
    computed once, when it is first needed; a worker that joins an existing study takes the table
    from there, so all workers rank by the same numbers. With a scorer that is a sum over layers a
    candidate is a look-up; a finalist, and a candidate of another scorer, costs a forward pass.

    With `ProgressiveBitSampler` the trial's ticket says what to do. With any other sampler the
    objective asks for the bits of each variable of the space, so TPE or NSGA-II can be compared.

    Args:
        model: Trained network. Left exactly as it is.
        calibration: Labelled data, or inputs alone, see `read_batches`.
        space: Search space of this network.
        loss_fn: Mean loss of a batch from (outputs, labels); ``None``: cross-entropy, or, where
            there are no labels, none.
        settings: How candidates are scored (``scorer``, ``rounding``, ``correction``, ``observer``,
            ``output_bits``, ``precision``, ``quantizers``); the others are not read here.
        rise: How much worse outputs become that move, see `hq_optuna.rises`; a function returns
            it from (outputs, moved), summed over samples. By default that of the loss, or, where
            that is unknown or there is none, by the outputs.
        batch_size: Samples a batch, where ``calibration`` has no batches of its own; by default
            32, or fewer where a sample is large.
        training: When winners are trained, and how; the sampler must be told the same. ``None``:
            never.
        artifacts: Where a search that trains keeps weights.
        validation: Batches on which a training is measured before and after.
        evaluate: What is measured there beside the loss.
        skipped: ``(name, kind, reason)`` of modules that are not quantized, for the study.
        **changes: Settings by name, in place of those in ``settings``.

    Raises:
        SpaceError: An unknown quantizer, or one that cannot do the bits of its layers.
        SettingError: A setting has a value of another kind.
        DataError: Unusable calibration data or loss, or training data.
        NetworkError: Random or non-finite forward pass.

    Attributes:
        settings: As given, with the scorer that was chosen.
        verifies: Whether candidates are scored by a table, so that finalists are worth measuring.
        warnings: Sentences that a reader of the results must know.
    """

    @own_modes()
    def __init__(
        self,
        model: nn.Module,
        calibration: Any,
        space: SearchSpace,
        *,
        loss_fn: LossFunction | None = None,
        settings: SearchSettings | None = None,
        rise: Rise | Callable[[Any, Any], Any] | None = None,
        batch_size: int | None = None,
        training: TrainingPlan | None = None,
        artifacts: Artifacts | None = None,
        validation: Batches | None = None,
        evaluate: Evaluate | None = None,
        skipped: tuple[tuple[str, str, str], ...] = (),
        **changes: Any,
    ) -> None:
        for name in changes:
            one = settings_of(SearchSettings).get(name)
            if one is not None and one.group != "scoring":
                raise TypeError(f"{name} is a setting of the search, and not of its objective.")
        given = (settings or SearchSettings()).replace(**changes)
        check_searchable(model)
        products = [layer.name for layer in space.layers if layer.is_product]
        model = products_named(unfused(model), products)
        _check_space(space, model)
        self.model = model
        self.space = space
        self._loss = name_of(loss_fn)  # before it is called: it may count its calls
        self.device = device_of(model)
        read = read_batches(calibration, batch_size=batch_size, labelled=False).to(self.device)
        self.data, loss_fn, self.rise, reason = decide(
            model, read, None if loss_fn is None else own_loss(loss_fn), rise
        )
        if loss_fn is functional.cross_entropy or isinstance(loss_fn, RiseLoss):
            self._loss = name_of(None if isinstance(loss_fn, RiseLoss) else loss_fn)
        if not isinstance(calibration, Batches) and not isinstance(loss_fn, RiseLoss):
            check_sample_axis(copied(model), self.data[0])
        trains = training is not None and training.every > 0
        self.setup = ScorerSetup.checked(
            *(given, space, self.data, loss_fn, self.rise), trains=trains
        )
        self.settings = self.setup.settings
        self.verifies = self.setup.is_table and self.rise is not None
        self.warnings = check_forward(
            model, self.data, loss_fn, [x.name for x in space.layers if not x.is_product]
        )
        check_preparable(self.setup.prepared(model))
        self._check_outputs(training)
        if not self.data.is_looked_over:
            self.data = look_over(model, self.data, loss_fn)
        self.loss_fn, said = as_mean(model, self.data, loss_fn)
        self.setup = replace(self.setup, data=self.data, loss_fn=self.loss_fn)
        self.warnings += said + self.setup.order_warnings()
        if rise is not None and self.rise is not None and self.rise.reads_outputs:
            check_rise(model, self.data, self.rise)
        if reason and (given.scorer is None or self.settings.scorer == "hessian_trace"):
            self.warnings.append(reason)
        self.skipped = skipped
        self._progress: Progress = lambda what, done, of: None
        self.training: TrainedSteps | None = None
        if training is not None:
            self.training = TrainedSteps(
                *(training, model, self.setup),
                lambda what, done, of: self._progress(what, done, of),
                artifacts=artifacts,
                validation=validation,
                evaluate=evaluate,
            )
        self._scorer: Scorer | None = None
        self._lock = threading.RLock()  # threads of one process share one network
        self._facts: dict[str, float] = {}
        # By storage, as studies of two storages may have the same id.
        self._settled: WeakKeyDictionary[BaseStorage, dict[int, bool]] = WeakKeyDictionary()

    def _check_outputs(self, training: TrainingPlan | None) -> None:
        """Refuse output_bits where they could not act."""
        if self.settings.output_bits is None:
            return
        if training is not None:
            raise SettingError(
                "output_bits rounds outputs of a network that is not trained: training knows no "
                "ranges of outputs. Leave out output_bits, or the training."
            )
        if not any(activations for _, activations in bits_needed(self.space).values()):
            raise SettingError(
                "output_bits rounds what layers pass on, and activation_bits leaves what enters "
                "them in float, so nothing would run in integers. Give activation_bits."
            )
        names = [layer.name for layer in self.space.layers]
        find_places(self.setup.prepared(self.model), names, self.data[0].inputs)

    @own_modes()
    def quantized(self, config: BitConfig, scorer: Scorer | None = None) -> nn.Module:
        """Return a network of its own with these bits, its statistics corrected if they shall be.

        Args:
            config: The bits of all layers.
            scorer: Whose network; by default that of `prepare`, which was not trained.

        Raises:
            SpaceError: A layer has no bits.
        """
        scorer = self.prepare() if scorer is None else scorer
        missing = [layer.name for layer in self.space.layers if layer.name not in config]
        if missing:
            raise SpaceError(f"The assignment has no bits of {missing[0]!r}; it needs all layers'.")
        return scorer.network(config)

    @own_modes()
    def answer(self, study: Study, config: BitConfig) -> nn.Module:
        """Return the network of the last closed step: trained, where that step's record is."""
        records = read_history(study).records
        base = next((r.number for r in reversed(records) if r.trained is not None), None)
        network = self.quantized(config, self.scorer_at(study, base))
        if self.training is not None and base is not None and records[-1].number == base:
            fresh = self.setup.prepared(self.model)
            return self.training.network(study, base, fresh)
        return network

    @own_modes()
    def scorer_at(self, study: Study, base: int | None) -> Scorer:
        """Return the scorer of candidates made from a trained record, by its number.

        ``None`` stands for the network as it was given.
        """
        scorer = self.prepare(study)
        if base is None:
            return scorer
        if self.training is None:
            raise ResumeError(
                f"Study {study.study_name!r} trains its winners, and this objective was given no "
                "training plan. Give the plan that the study was started with.",
                changed=("training",),
            )
        return self.training.scorer(study, base).scorer

    @own_modes()
    def prepare(
        self,
        study: Study | None = None,
        *,
        artifacts: Artifacts | None = None,
        progress: Progress | None = None,
    ) -> Scorer:
        """Compute what all candidates share, unless that was done; return the scorer.

        The first trial does it otherwise.

        Args:
            study: Where sensitivities are taken from if another worker measured them, and where
                they are written otherwise.
            artifacts: Where a search that trains keeps weights, and where workers of a study
                share what they prepare; without it each prepares for itself.
            progress: Called with (what, done, of) from here on.

        Raises:
            ResumeError: The study belongs to another search.
        """
        if progress is not None:
            self._progress = progress
        if artifacts is not None and self.training is not None:
            self.training.keep_in(artifacts)
        settled = {} if study is None else self._settled.setdefault(storage_of(study), {})
        write_over: bool | None = None  # None: nothing to write
        if study is not None:
            another = self._met_another(study)
            if settled.get(id_of(study)) != another:
                write_over = self.settle(study)
        if self._scorer is None:
            known = None if study is None else stored_sensitivity(study)
            built = self.setup.build(
                *(copied(self.model), known, self._progress), shared=self._shared(study, artifacts)
            )
            self.warnings += built.warnings
            self._scorer, self._facts = built.scorer, built.facts
        if study is not None and write_over is not None:
            publish_facts(study, self._facts)
            table = self._scorer.sensitivity
            publish(study, self.space, self._info(study), table, again=write_over)
            settled[id_of(study)] = another
        return self._scorer

    def _shared(self, study: Study | None, artifacts: Artifacts | None) -> Shared | None:
        """Return where workers share what they prepare, if they can."""
        if study is None:
            return None
        if artifacts is None:
            logger.info("There is no artifact store, so this worker prepares for itself.")
            return None
        return Shared(study, artifacts, attributes.digest(self.fingerprint(study)))

    def settle(self, study: Study) -> bool:
        """Say in a new study which search it is of; return whether another was begun in it.

        What the study says of that one is to be written over.

        Raises:
            ResumeError: The study belongs to another search.
        """
        mine, sampler, is_mine = self.fingerprint(study), study.sampler, None
        if isinstance(sampler, ProgressiveBitSampler):
            sampler.name_search(study, attributes.digest(mine))
            sampler.log(study)
            is_mine = sampler.view(study).is_surely_mine
        return fingerprint.check_or_write(study, mine, is_mine=is_mine)

    @staticmethod
    def _met_another(study: Study) -> bool:
        sampler = study.sampler
        return isinstance(sampler, ProgressiveBitSampler) and sampler.view(study).met_another

    def fingerprint(self, study: Study) -> dict[str, Any]:
        """Return what this search depends on, by name."""
        mine: dict[str, Any] = {
            "network": fingerprint.network_digest(self.model),
            "data": self.data.digest(),
            "space": self.space.digest,
            "quantizers": fingerprint.quantizers(self.setup.quantizers),
            "loss": self._loss,
            **fingerprint.of_settings(self.settings, "scoring"),
        }
        if (target := read_hardware(self.settings.hardware)).name != ANY:
            mine["hardware"] = f"{target.name} {target.digest}"
        used = self.settings.scorer in ("gauss_newton", "hessian_trace")
        if used and name_of(self.rise) != name_of(rise_of_loss(self.loss_fn)):
            mine["rise"] = name_of(self.rise)
        if self.training is not None:
            mine["training"] = self.training.plan.digest()
        budget = budget_of(study)
        if budget is not None:
            mine["budget"] = str(budget)
        if isinstance(study.sampler, ProgressiveBitSampler):
            mine |= fingerprint.of_settings(study.sampler, "steps")
        return mine

    def _info(self, study: Study) -> StudyInfo:
        """Return what a study says of its search."""
        budget, sampler = budget_of(study), study.sampler
        metric = "bops" if budget is None else budget.metric
        model = self.space.costs(metric)
        settings = self.settings.to_json()
        if budget is not None:
            settings["budget"] = budget.text
        if isinstance(sampler, ProgressiveBitSampler):
            settings |= fingerprint.of_settings(sampler, "steps")
        else:
            settings |= {"rule": type(sampler).__name__, "n_candidates": 1}
        return StudyInfo(
            metric=metric,
            limit=model.uniform(32, 32) if budget is None else budget.limit(self.space),
            budget="none" if budget is None else str(budget),
            int8=model.int8,
            float32=model.float32,
            settings=settings,
            quantizers=dict(self.setup.quantizers),
            training=None if self.training is None else self.training.plan.to_json(),
            skipped=self.skipped,
            warnings=tuple(self.warnings),
            beside=tuple(
                Beside(b.metric, b.limit, b.text, b.model.int8)
                for b in ([] if budget is None else budget.bounds(self.space)[1:])
            ),
        )

    @own_modes()
    def __call__(self, trial: Trial) -> float:
        """Score one trial.

        Raises:
            optuna.TrialPruned: Its work is no longer needed.
        """
        with self._lock:
            return self._scored(trial)

    def _scored(self, trial: Trial) -> float:
        started = time.perf_counter()
        study = trial.study
        scorer = self.prepare(study)
        sampler, ticket = study.sampler, None
        if isinstance(sampler, ProgressiveBitSampler):
            ticket = sampler.ticket(study, trial)
        if ticket is None or ticket.kind == "free":
            bits = [_suggested(trial, variable) for variable in self.space.variables]
            config = self.space.config(bits)
            score = scorer.score(config)
            record(self.space, trial, config, shown(score, started), None)
            return score.total
        if ticket.kind == "surplus" or trial.should_prune():
            raise optuna.TrialPruned("its work is no longer needed")
        assert isinstance(sampler, ProgressiveBitSampler)
        if not isinstance(trial, ClaimedTrial):  # that one was created with its parameters
            for name, (_, choices) in sampler.parameters(ticket).items():
                with contextlib.suppress(ValueError):  # others gave it other choices: not shown
                    trial.suggest_categorical(name, choices)
        config = self.space.config(ticket.bits)
        if ticket.trains:
            return self._record_training(trial, ticket, config, started)
        if ticket.kind == "incumbent":
            return self._record_step(trial, ticket, config, started)
        pruned = optuna.TrialPruned("its work is no longer needed")
        look = _every(LOOK_EVERY_S, lambda: not trial.should_prune(), pruned)
        score = self._score(study, sampler.base(study), config, ticket.measures, look)
        record(self.space, trial, config, shown(score, started), ticket)
        return score.total

    def _score(
        self,
        study: Study,
        base: int | None,
        config: BitConfig,
        measures: bool,
        look: Callable[[], None],
    ) -> Score:
        """Score a candidate, or measure a finalist."""
        scorer = self.scorer_at(study, base)
        if measures:
            return scorer.measured(config, self.setup.set_aside_places, look)
        return scorer.score(config, look)

    @own_modes()
    def look_up(
        self, study: Study, base: int | None
    ) -> Callable[[BitConfig], dict[str, Any]] | None:
        """Return what scores candidates without a forward pass; ``None`` where each needs one.

        It returns the user attributes of a trial with these bits, whose value is the sum of both
        parts. ``base`` is as for `scorer_at`.
        """
        scorer = self.scorer_at(study, base)
        if not scorer.is_table:
            return None
        return lambda config: shown(scorer.score(config), time.perf_counter())

    @own_modes()
    def obey(
        self, study: Study, order: Mapping[str, Any], needed: Callable[[], bool]
    ) -> tuple[float, dict[str, Any]]:
        """Do what a coordinator orders for its own trial; return its score and user attributes.

        The study is read only for a network that was trained meanwhile, and written only while one
        is trained here. ``order`` is `hq_optuna.workers.dispatcher.Order.message`; ``needed`` is
        asked now and then, and `NotNeeded` raised when it is not.
        """
        started, base = time.perf_counter(), order.get("base")
        if "train" in order:
            trial = Trial(study, order["train"])
            sampler = study.sampler
            assert isinstance(sampler, ProgressiveBitSampler)
            sampler.log(study)
            ticket = sampler.ticket(study, trial)
            assert ticket is not None
            value, score, said = self.trained(trial, ticket, needed, NotNeeded())
            return value, {**shown(score, started), attributes.TRAINING: said}
        look = _every(0.0, needed, NotNeeded())
        config, measures = self.space.config(order["bits"]), "measures" in order
        score = self._score(study, base, config, measures, look)
        return score.total, shown(score, started)

    def _record_training(
        self, trial: Trial, ticket: Ticket, config: BitConfig, started: float
    ) -> float:
        pruned = optuna.TrialPruned("its work is no longer needed")
        value, score, facts = self.trained(trial, ticket, lambda: not trial.should_prune(), pruned)
        write_facts(trial, {attributes.TRAINING: facts})
        record(self.space, trial, config, shown(score, started), ticket)
        return value

    @own_modes()
    def trained(
        self, trial: Trial, ticket: Ticket, needed: Callable[[], bool], otherwise: Exception
    ) -> tuple[float, Score, dict[str, Any]]:
        """Train the bits of a step record; return its value, the score, and what to record.

        ``needed`` is asked after each epoch, and ``otherwise`` raised when it is not; the
        checkpoint stays. Raises `ArtifactError` where the artifact store fails.
        """
        study, sampler = trial.study, trial.study.sampler
        assert isinstance(sampler, ProgressiveBitSampler)
        log = sampler.log(study)
        scorer = self.scorer_at(study, log.base)
        assert self.training is not None
        network = self.quantized(self.space.config(ticket.bits), scorer)
        return self.training.train(trial, ticket, log, network, needed, otherwise)

    def _record_step(
        self, trial: Trial, ticket: Ticket, config: BitConfig, started: float
    ) -> float:
        assert ticket.origin is not None
        value, found = winner_of(trial.study, ticket.origin)
        if attributes.SCORE_WEIGHTS not in found:  # told by others before this was called
            raise optuna.TrialPruned("its work is no longer needed")
        sampler = trial.study.sampler
        assert isinstance(sampler, ProgressiveBitSampler)
        value, kept = closing(value, found, sampler.log(trial.study))
        record(self.space, trial, config, {**kept, **by_whom(started)}, ticket)
        return value


def _check_space(space: SearchSpace, network: nn.Module) -> None:
    """Refuse the space of another network."""
    modules = dict(network.named_modules(remove_duplicate=False))
    for layer in space.layers:
        if layer.is_product:
            continue
        weight = getattr(modules.get(layer.name), "weight", None)
        if not isinstance(weight, Tensor) or tuple(weight.shape) != layer.weight_shape:
            raise NetworkError(
                f"The space has a layer {layer.name!r} with weights of shape {layer.weight_shape}, "
                "and the network has none. Build the space from this network: "
                "SearchSpace.build(introspect(network, inputs).layers)."
            )


def _every(seconds: float, needed: Callable[[], bool], otherwise: Exception) -> Callable[[], None]:
    """Return a function that raises ``otherwise`` once the work is not needed any more.

    ``needed`` is asked every so many seconds at most.
    """
    last = time.monotonic()

    def look() -> None:
        nonlocal last
        if time.monotonic() - last < seconds:
            return
        if not needed():
            raise otherwise
        last = time.monotonic()

    return look


def _suggested(trial: Trial, variable: Variable) -> int:
    """Return the notch that Optuna suggests for a variable."""
    shown = trial.suggest_categorical(variable.name, tuple(map(variable.shown, variable.bits)))
    bits = variable.read(shown)
    assert bits is not None, "it is one of the choices"
    return bits
