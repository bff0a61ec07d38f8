"""Training a step's winner, and scoring the next steps' candidates from where that led.

The owner of a step's record trains once, whatever the number of workers. After each epoch a
checkpoint goes into the artifact store and its reference to the record's trial, so that whoever
takes the record up after a death goes on from there. What the record says when it is told is what
every worker goes on from: the trained weights with the optimizer's second moments, and the
sensitivities at them, both by content hash.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from optuna.study import Study
from optuna.trial import Trial
from torch import nn

from hq_optuna import attrs
from hq_optuna.artifacts import Artifacts, Reference
from hq_optuna.attrs import Ticket
from hq_optuna.batches import Batches, merge_first
from hq_optuna.bit_config import BitConfig
from hq_optuna.curvature import LossFunction
from hq_optuna.errors import ArtifactError, CheckpointError, ResumeError
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.runner.evaluation import Evaluate, mean_loss
from hq_optuna.runner.recording import KEPT, closing, winner_of
from hq_optuna.runner.scoring_setup import (
    BuiltScorer,
    Progress,
    ScoringSetup,
    statistics_samples,
)
from hq_optuna.runner.tensors import get_tensors, put_tensors
from hq_optuna.runner.training_plan import TrainingPlan
from hq_optuna.samplers.log import StepLog
from hq_optuna.scoring import Score, Sensitivity
from hq_optuna.search.rules import keeps
from hq_optuna.space import SearchSpace
from hq_optuna.training import Trainer, load_trained_, trained_tensors
from hq_optuna.training.base import TrainedBase, fold_shifts_, trained_base

logger = logging.getLogger(__name__)

_CURVATURE = "curvature."
"""Tensors ``curvature.<layer>``: batch size times the second moment of the weight's gradient."""


class TrainedSteps:
    """Trains winners of one search, and builds scorers of trained networks.

    Args:
        plan: When and how.
        model: The float network; the teacher.
        space: The search space.
        setup: How assignments are scored.
        data: Calibration batches.
        loss_fn: Mean loss of a batch.
        progress: Told what is done.

    Attributes:
        artifacts: Where weights are kept; set before anything is trained or loaded.
        validation: Data on which a network is measured before and after, or ``None``.
        evaluate: What is measured there beside the loss.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        model: nn.Module,
        space: SearchSpace,
        setup: ScoringSetup,
        data: Batches,
        loss_fn: LossFunction,
        progress: Progress,
    ) -> None:
        self.plan, self.model, self.space, self.setup = plan, model, space, setup
        self.data, self.loss_fn, self.progress = data, loss_fn, progress
        self.artifacts: Artifacts | None = None
        self.validation: Batches | None = None
        self.evaluate: Evaluate | None = None
        self._built: tuple[int, BuiltScorer] | None = None

    # Going on from a trained record

    def scorer(self, study: Study, number: int) -> BuiltScorer:
        """Return the scorer of the network that a record trained, built once.

        Raises:
            ArtifactError: Its artifacts are missing or altered.
        """
        if self._built is None or self._built[0] != number:
            self._built = None  # frees its memory first
            said = self._said(study, number)
            tensors = get_tensors(self._store, Reference.from_json(said["weights"]))
            table = self._store.get_json(Reference.from_json(said["sensitivity"]))
            self._built = (number, self._build(tensors, Sensitivity.from_json(table)))
        return self._built[1]

    def network(self, study: Study, number: int, prepared: nn.Module) -> nn.Module:
        """Give a freshly prepared network what a record trained, and return it."""
        said = self._said(study, number)
        load_trained_(prepared, get_tensors(self._store, Reference.from_json(said["weights"])))
        return prepared

    def _build(self, tensors: Mapping[str, Any], known: Sensitivity | None) -> BuiltScorer:
        base = self._base(tensors)
        moments = {
            name.removeprefix(_CURVATURE): tensor
            for name, tensor in tensors.items()
            if name.startswith(_CURVATURE)
        }
        return self.setup.build(
            base.network, self.space, self.data, self.loss_fn, known, self.progress,
            base=base, teacher=self.model, moments=moments,
        )  # fmt: skip

    def _base(self, tensors: Mapping[str, Any]) -> TrainedBase:
        return trained_base(self.model, self.space.layers, tensors, self.setup.quantizers)

    def _said(self, study: Study, number: int) -> Mapping[str, Any]:
        storage = study._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        said = storage.get_trial(trial_id).user_attrs.get(attrs.TRAINING)
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
            raise ArtifactError(
                "A search that trains keeps weights in an artifact store. Give one: artifacts=, a "
                "folder or s3://bucket/prefix."
            )
        return self.artifacts

    # Training

    def train(
        self,
        trial: Trial,
        ticket: Ticket,
        log: StepLog,
        network: nn.Module,
        between: Callable[[], None] = lambda: None,
    ) -> tuple[float, Score, dict[str, Any]]:
        """Train a record's bits; return the record's value, the score, and what is recorded.

        The value is the trained network's score. A winner that training made worse is kept as it
        was, and its record is as if it had not been trained. The answer's training is always kept,
        and its value is below all within the budget, so that `study.best_trial` is the answer.

        Args:
            trial: The record's trial, which is this process's.
            ticket: Its ticket.
            log: The record of the search.
            network: Prepared, at these bits, with its statistics corrected; trained in place.
            between: Called after each epoch; what it raises ends the training.
        """
        store, final = self._store, log.open is not None and log.open.final
        settings = self.plan.final if final and self.plan.final is not None else self.plan.settings
        settings = dataclasses.replace(settings, seed=settings.seed + 1000 * ticket.step)
        fold_shifts_(network)
        before = self._measured(network)
        trainer = Trainer(
            network,
            self.plan.data,
            settings,
            teacher=self.model,
            loss_fn=self.loss_fn,
            augment=self.plan.augment,
        )
        last = self._resume(trial, log.attempts(ticket.step, ticket.parent), trainer)
        for epoch in trainer.epochs():
            self.progress("training", epoch.epoch, settings.epochs)
            if epoch.epoch < settings.epochs:
                reference = store.put(trainer.dump())
                trial.study._storage.set_trial_system_attr(
                    trial._trial_id, attrs.CHECKPOINT, reference.to_json()
                )
                self._discard(last, reference)
                last = reference
            between()
        if self.setup.correction and settings.label_weight < 1:  # labels lead to other statistics
            self._correct_(network)
        moments = trainer.second_moments()
        tensors = trained_tensors(network)
        assert ticket.origin is not None
        winner, found = winner_of(trial.study, ticket.origin)
        told = None if final else self._score(tensors)
        score = Score(winner, *(found[name] for name in KEPT))
        built: BuiltScorer | None = None
        if told is None or keeps(told, winner):
            if moments is not None:  # the sum over a batch, as curvature is, and not its mean
                for name, moment in moments.moments.items():
                    if name not in moments.no_gradient:
                        tensors[f"{_CURVATURE}{name}"] = moment * moments.batch_size
            built = self._build(tensors, None)
            trained = built.scorer.score(BitConfig(self.space.config(ticket.bits)))
            told = trained.total
            if final or keeps(told, winner):
                score = trained
            else:
                built = None
        facts: dict[str, Any] = {
            "kind": "final" if final else "step",
            "kept": built is not None,
            "score": told,
            "epochs": settings.epochs,
            "seconds": round(math.fsum(e.seconds for e in trainer.history), 3),
            "samples": trainer.data.steps * trainer.data.batch_size,
            "loss_first": trainer.history[0].loss,
            "loss_last": trainer.history[-1].loss,
            "curvature": "calibration" if moments is None else "second moments of training",
            "clipped": 0 if moments is None else sum(moments.clipped.values()),
            **{f"{name}_before": value for name, value in before.items()},
            **{f"{name}_after": value for name, value in self._measured(network).items()},
        }
        if built is None:
            self._discard(last, None)
            return closing(winner, found)[0], score, facts
        self._built = (trial.number, built)
        weights = put_tensors(store, tensors)
        table = store.put_json(built.scorer.sensitivity.to_json())
        facts |= {"weights": weights.to_json(), "sensitivity": table.to_json()}
        self._discard(last, weights)
        value = score.total
        if final:
            value = min(value, math.nextafter(log.best_within_budget(), -math.inf))
        return value, score, facts

    def _score(self, tensors: Mapping[str, Any]) -> float | None:
        """Return a trained network's score where its outputs tell it: most are not kept."""
        return self.setup.score_of_trained(
            self._base(tensors), self.space, self.data, self.loss_fn, self.model
        )

    def _correct_(self, network: nn.Module) -> None:
        """Correct a trained network's statistics by their difference to the float network's."""
        data = merge_first(self.data, statistics_samples(self.space.layers))
        of = copy.deepcopy(self.model).eval()
        StatisticsCorrection(network, data, self.setup.precision, of=of).apply()
        fold_shifts_(network)

    def _resume(self, trial: Trial, attempts: list[int], trainer: Trainer) -> Reference | None:
        """Go on from the last epoch that an earlier owner of this record finished."""
        for trial_id in attempts:
            if trial_id == trial._trial_id:
                continue
            said = trial.study._storage.get_trial(trial_id).system_attrs.get(attrs.CHECKPOINT)
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

    def _measured(self, network: nn.Module) -> dict[str, float]:
        """Return loss and what else is measured on the validation data."""
        if self.validation is None:
            return {}
        found = dict(mean_loss(network, self.validation, self.loss_fn))
        if self.evaluate is not None:
            found |= self.evaluate(network, self.validation)
        return {name: float(value) for name, value in found.items()}
