"""Training a step's winner, and scoring the next steps' candidates from where that led.

The owner of a step's record trains once, whatever the number of workers. After each epoch a
checkpoint goes into the artifact store and its reference to the record's trial, so that whoever
takes the record up after a death goes on from there. What the record says when it is told is what
every worker goes on from: the trained weights with the optimizer's second moments, and the
sensitivities at them, both by content hash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import Trial
from torch import Tensor, nn

from hq_optuna import attributes
from hq_optuna.artifacts.store import Artifacts, Reference
from hq_optuna.attributes import Ticket
from hq_optuna.errors import (
    ArtifactError,
    CheckpointError,
    DataError,
    ResumeError,
    ScoreError,
    TrainingError,
)
from hq_optuna.network.batches import Batches
from hq_optuna.network.copies import copied
from hq_optuna.network.evaluation import Evaluate, mean_loss, measured_figures
from hq_optuna.objective.preparation import Progress
from hq_optuna.objective.scorer_setup import BuiltScorer, ScorerSetup
from hq_optuna.objective.tensors import get_tensors, put_tensors
from hq_optuna.optuna_internals import id_of, place_of, storage_of, trial_id_of
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.tickets import closing, winner_of
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.scoring import Score, Scorer, Sensitivity
from hq_optuna.search.rules import keeps
from hq_optuna.space.assignment import BitConfig
from hq_optuna.training import Trainer, TrainingSettings, load_trained_, trained_tensors
from hq_optuna.training.plan import TrainingPlan
from hq_optuna.training.trained import TrainedNetwork, fold_shifts_, layers_without_bias, part_of
from hq_optuna.training.trainer import check_trainable

logger = logging.getLogger(__name__)

NO_STORE = (
    "A search that trains keeps weights in an artifact store. Give one: artifacts=, a folder or "
    "s3://bucket/prefix."
)


class _Trained(NamedTuple):
    """A training that is kept: its tensors, the scorer of what is made from it, its own score."""

    tensors: dict[str, Tensor]
    built: BuiltScorer
    score: Score


_CURVATURE = "curvature."
"""Tensors ``curvature.<layer>``: batch size times the second moment of the weight's gradient."""


class TrainedSteps:
    """Trains winners of one search, and builds scorers of trained networks.

    The float network ``model`` is the teacher. Weights are kept in ``artifacts``; `keep_in` may
    name another place later. On validation data a network is measured before and after: the loss,
    and what ``evaluate`` returns. Raises `DataError` where the network cannot be trained as the
    plan says.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        model: nn.Module,
        setup: ScorerSetup,
        progress: Progress,
        *,
        artifacts: Artifacts | None = None,
        validation: Batches | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.plan, self.model, self.setup, self.progress = plan, model, setup, progress
        self.artifacts, self.validation, self.evaluate = artifacts, validation, evaluate
        self._built: tuple[tuple[BaseStorage, int, int], BuiltScorer] | None = None
        for settings in plan.used:
            check_trainable(model, plan.data, settings, setup.loss_fn, plan.augment)

    def keep_in(self, artifacts: Artifacts) -> None:
        """Keep weights in this store from here on."""
        self.artifacts = artifacts

    # Going on from a trained record

    def scorer(self, study: Study, number: int) -> BuiltScorer:
        """Return the scorer of the network that a record trained, built once."""
        at = _at(study, number)
        if self._built is None or self._built[0] != at:
            self._built = None  # frees its memory first
            said = self._said(study, number)
            tensors = get_tensors(self._store, Reference.from_json(said["weights"]))
            table = self._store.get_json(Reference.from_json(said["sensitivity"]))
            self._built = (at, self._build(tensors, Sensitivity.from_json(table)))
        return self._built[1]

    def network(self, study: Study, number: int, prepared: nn.Module) -> nn.Module:
        """Give a freshly prepared network what a record trained, and return it."""
        said = self._said(study, number)
        load_trained_(prepared, get_tensors(self._store, Reference.from_json(said["weights"])))
        return prepared

    def _build(self, tensors: Mapping[str, Any], known: Sensitivity | None) -> BuiltScorer:
        base, moments = self._base(tensors), part_of(tensors, _CURVATURE)
        given = base.network, known, self.progress
        return self.setup.build(*given, base=base, teacher=self.model, moments=moments)

    def _base(self, tensors: Mapping[str, Any]) -> TrainedNetwork:
        layers = self.setup.space.layers
        return TrainedNetwork.rebuild(self.model, layers, tensors, self.setup.quantizers)

    def _said(self, study: Study, number: int) -> Mapping[str, Any]:
        storage = storage_of(study)
        trial_id = storage.get_trial_id_from_study_id_trial_number(id_of(study), number)
        said = storage.get_trial(trial_id).user_attrs.get(attributes.TRAINING)
        if said is None:
            raise ResumeError(
                f"Trial {number} of study {study.study_name!r} recorded a training, and does not "
                "say where its weights are. Was the attribute deleted?"
            )
        found: Mapping[str, Any] = said
        return found

    @property
    def _store(self) -> Artifacts:
        if self.artifacts is None:
            raise ArtifactError(NO_STORE)
        return self.artifacts

    # Training

    def train(
        self,
        trial: Trial,
        ticket: Ticket,
        log: StepLog,
        network: nn.Module,
        needed: Callable[[], bool] = lambda: True,
        otherwise: Exception | None = None,
    ) -> tuple[float, Score, dict[str, Any]]:
        """Train a record's bits; return the record's value, the score, and what is recorded.

        The value is the trained network's score. A winner that training made worse is kept as it
        was, and its record is as if it had not been trained; so is one whose training failed. The
        answer's training is always kept, and its value is below all within the budget, so that
        `study.best_trial` is the answer. Raises `TrainingError` where the answer's training fails.

        ``network`` is prepared, at these bits, with its statistics corrected, and trained in place.
        ``needed`` is asked after each epoch; ``otherwise`` is raised when it is not, or when the
        trial was taken for dead and ended.
        """
        final = log.open is not None and log.open.final
        settings = self._settings_of(ticket.step, final)
        facts: dict[str, Any] = {"kind": "final" if final else "step", "epochs": settings.epochs}
        facts |= {f"{name}_before": value for name, value in self._measured(network).items()}
        if not self.setup.told_by_outputs:
            facts["calibration_loss_before"] = self._calibration_loss(network)
        self._correct_(network, settings)
        trainer = Trainer(
            *(network, self.plan.data, settings),
            teacher=self.model,
            loss_fn=self.setup.loss_fn,
            augment=self.plan.augment,
        )
        facts["samples"] = trainer.data.steps * trainer.data.batch_size
        last = self._last_epoch(trial, log.attempts(ticket), trainer)
        trained: _Trained | None = None
        try:
            for epoch in trainer.epochs():
                self.progress("training", epoch.epoch, settings.epochs)
                if epoch.epoch < settings.epochs:
                    last = self._checkpointed(trial, trainer, last, otherwise)
                if not needed():
                    raise otherwise or optuna.TrialPruned("its work is no longer needed")
            self._correct_(network, settings)
            trained = self._judged(trainer, network, log, ticket, trial.study, final, facts)
        except (TrainingError, DataError, ScoreError) as error:
            if final:
                raise
            # The same would come of it each time, and would hold up the search for ever.
            logger.warning("The training of step %d is not kept: %s", ticket.step, error)
            facts["failed"] = str(error)
        facts |= {"kept": trained is not None, **_summary(trainer)}
        if "failed" not in facts:
            facts |= {f"{name}_after": value for name, value in self._measured(network).items()}
        if trained is None:
            self._discard(last, None)
            return *_untrained(trial.study, ticket, log), facts
        facts |= self._keep(trial, trained, last)
        value = trained.score.total
        if final:
            value = min(value, math.nextafter(log.best_within_budget(), -math.inf))
        return value, trained.score, facts

    def _settings_of(self, step: int, final: bool) -> TrainingSettings:
        """Return how the winner of a step is trained, or the answer; each step has its own seed."""
        settings = self.plan.final if final and self.plan.final is not None else self.plan.settings
        return dataclasses.replace(settings, seed=settings.seed + 1000 * step)

    def _keep(self, trial: Trial, trained: _Trained, last: Reference | None) -> dict[str, Any]:
        """Store what a training gave; return where it is, for the record."""
        self._built = _at(trial.study, trial.number), trained.built
        weights = put_tensors(self._store, trained.tensors)
        table = self._store.put_json(trained.built.scorer.sensitivity.to_json())
        self._discard(last, weights)
        return {"weights": weights.to_json(), "sensitivity": table.to_json()}

    def _judged(
        self,
        trainer: Trainer,
        network: nn.Module,
        log: StepLog,
        ticket: Ticket,
        study: Study,
        final: bool,
        facts: dict[str, Any],
    ) -> _Trained | None:
        """Return what training made of a winner, or ``None`` where it is not kept."""
        assert ticket.origin is not None
        winner = log.score_of(ticket.origin)
        moments = trainer.second_moments()
        facts["curvature"] = "calibration" if moments is None else "second moments of training"
        facts["clipped"] = 0 if moments is None else sum(moments.clipped.values())
        tensors = trained_tensors(network)
        told = None if final else self._score(tensors)
        if told is not None:
            facts["score"] = told
            if not keeps(told, winner):
                return None
        if moments is not None:
            tensors |= {f"{_CURVATURE}{name}": h for name, h in moments.by_layer.items()}
        built = self._build(tensors, None)
        score = self._score_of(built.scorer, self.setup.space.config(ticket.bits), final)
        facts["score"] = score.total
        kept = keeps(score.total, winner)
        if not self.setup.told_by_outputs:
            # A sum over layers is of the trained network, and cannot tell harm.
            facts["calibration_loss_after"] = self._calibration_loss(network)
            before = facts["calibration_loss_before"]
            kept = kept and keeps(facts["calibration_loss_after"], before)
        return _Trained(tensors, built, score) if kept or final else None

    def _score_of(self, scorer: Scorer, config: BitConfig, final: bool) -> Score:
        """Return the score of what training made: of the answer, as its finalists were measured."""
        if final and self.setup.is_table:
            return scorer.measured(config, self.setup.set_aside_places)
        return scorer.score(config)

    def _checkpointed(
        self, trial: Trial, trainer: Trainer, last: Reference | None, otherwise: Exception | None
    ) -> Reference:
        """Put a checkpoint into the store, and say in the trial where it is."""
        reference = self._store.put(trainer.dump())
        storage = trial.storage
        try:
            storage.set_trial_system_attr(
                trial_id_of(trial), attributes.CHECKPOINT, reference.to_json()
            )
        except UpdateFinishedTrialError as error:
            # Who was taken for dead, as after a pause, finds its trial ended and goes on.
            logger.info("The training of trial %d was taken over.", trial.number)
            raise (otherwise or optuna.TrialPruned("it was taken over")) from error
        self._discard(last, reference)
        return reference

    def _score(self, tensors: Mapping[str, Any]) -> float | None:
        """Return a trained network's score where its outputs tell it: most are not kept."""
        return self.setup.score_of_trained(self._base(tensors), self.model)

    def _correct_(self, network: nn.Module, settings: TrainingSettings) -> None:
        """Correct statistics by their difference to the float network's, shifts within biases.

        A layer without bias has no place for a shift: what follows is corrected without it. Labels
        alone lead to other statistics, and nothing is corrected.
        """
        fold_shifts_(network)
        if not self.setup.settings.correction or settings.label_weight == 1:
            return
        setup, of = self.setup, copied(self.model)
        correction = StatisticsCorrection(
            *(network, setup.data, setup.settings.precision), of=of, places=setup.statistics_places
        )
        correction.apply(only=set(correction.modules) - layers_without_bias(network))
        fold_shifts_(network)

    def _last_epoch(self, trial: Trial, attempts: list[int], trainer: Trainer) -> Reference | None:
        """Go on from the last epoch that an earlier owner of this record finished."""
        for trial_id in attempts:
            if trial_id == trial_id_of(trial):
                continue
            said = trial.storage.get_trial(trial_id).system_attrs.get(attributes.CHECKPOINT)
            if said is None:
                continue
            try:
                reference = Reference.from_json(said)
                trainer.restore(self._store.get(reference))
            except (ArtifactError, CheckpointError) as error:
                logger.warning("Training begins again, as a checkpoint is of no use: %s", error)
                continue
            logger.info("Training goes on after epoch %d.", len(trainer.history))
            return reference
        return None

    def _discard(self, old: Reference | None, new: Reference | None) -> None:
        if old is not None and old != new:
            with contextlib.suppress(ArtifactError):  # it only takes room
                self._store.discard(old)

    def _calibration_loss(self, network: nn.Module) -> float:
        return mean_loss(network, self.setup.data, self.setup.loss_fn)["loss"]

    def _measured(self, network: nn.Module) -> dict[str, float]:
        """Return loss and what else is measured on the validation data."""
        if self.validation is None:
            return {}
        found = mean_loss(network, self.validation, self.setup.loss_fn)
        if self.evaluate is not None:
            found |= measured_figures(self.evaluate, network, self.validation)
        return found


def _untrained(study: Study, ticket: Ticket, log: StepLog) -> tuple[float, Score]:
    """Return value and score of a record whose winner stays as it was."""
    assert ticket.origin is not None
    _, found = winner_of(study, ticket.origin)
    winner = log.score_of(ticket.origin)
    parts = found[attributes.SCORE_WEIGHTS], found[attributes.SCORE_ACTIVATIONS]
    score = Score(winner, *parts, found.get(attributes.CALIBRATION_LOSS))
    return closing(winner, found, log)[0], score


def _at(study: Study, number: int) -> tuple[BaseStorage, int, int]:
    """Return what names a record among those of all studies."""
    return *place_of(study), number


def _summary(trainer: Trainer) -> dict[str, float]:
    """Return how long a training took, and its loss in the first epoch and in the last."""
    epochs = trainer.history
    found = {"seconds": round(math.fsum(epoch.seconds for epoch in epochs), 3)}
    return found | ({"loss_first": epochs[0].loss, "loss_last": epochs[-1].loss} if epochs else {})
