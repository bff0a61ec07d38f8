"""`BitSearch`: the whole search from one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study
from torch import nn
from torch.nn import functional

from hq_optuna import attributes
from hq_optuna.answer.comparison import rows
from hq_optuna.answer.layer_errors import layer_errors
from hq_optuna.answer.measured_end import best_measured
from hq_optuna.answer.resolve import optimum, sums_for, sums_of
from hq_optuna.answer.result import SearchResult
from hq_optuna.answer.target import (
    Compare,
    Target,
    compare_with_float,
    least_cost,
    parse_target,
)
from hq_optuna.artifacts.store import Artifacts, open_artifacts
from hq_optuna.attributes import COMPARED, LAYER_ERRORS
from hq_optuna.dashboard import PageWriter, PreparationNote
from hq_optuna.errors import ArtifactError, DataError, ResumeError, SettingError
from hq_optuna.hardware import read_hardware, space_on
from hq_optuna.network import evaluation
from hq_optuna.network.batches import Batches, check_sample_axis, read_batches
from hq_optuna.network.checks import LookOver
from hq_optuna.network.copies import copied
from hq_optuna.network.devices import device_of
from hq_optuna.network.evaluation import Accuracy, Evaluate, before_and_after
from hq_optuna.network.introspection import introspect
from hq_optuna.network.loss_weights import observed_losses, weighed
from hq_optuna.network.losses import LossFunction, own_loss
from hq_optuna.network.modes import own_modes
from hq_optuna.network.products import with_products
from hq_optuna.network.searchable import check_searchable
from hq_optuna.network.unfused import unfused
from hq_optuna.objective.hessian import HessianObjective
from hq_optuna.objective.preparation import Progress
from hq_optuna.objective.publish import publish_artifacts, publish_facts, refuse_foreign_study
from hq_optuna.objective.training_steps import NO_STORE
from hq_optuna.optuna_internals import storage_of
from hq_optuna.protocol.history import TEST_OF, History, read_history
from hq_optuna.protocol.start_options import StartOptions
from hq_optuna.protocol.status import read_status
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.protocol.study_view import refuse_lower_limits, write_limits
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.rises import Rise, RiseLoss, decide, without_labels
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.search import Limits, check_reachable
from hq_optuna.settings import SearchSettings, settings_of
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.budget import Budget, parse_budget
from hq_optuna.space.cost import Metric
from hq_optuna.space.latency import read_latency
from hq_optuna.storages import RETRY_FOR_S, explain_errors_of, open_retrying
from hq_optuna.training.plan import TrainingPlan
from hq_optuna.workers.loop import Doing, work

_APART = COMPARED, LAYER_ERRORS
"""Facts that are no figures of the answer's network."""


class BitSearch:
    """Search the bits of a trained network's layers under a budget.

    Everything that can be wrong with the network, the data, the space and the budget is checked
    here, before any work.

    Args:
        model: Trained network. Left exactly as it is.
        calibration: Data that the scores read: ``(inputs, labels)`` tensors, a dataset, or batches;
            or inputs alone. Not the data the network is judged on later.
        loss_fn: Mean loss of a batch from (outputs, labels). ``None``: cross-entropy, or, where
            there are no labels, none.
        settings: What is searched and how, see `hq_optuna.SearchSettings`.
        rise: How much worse outputs become that move, one of `hq_optuna.rises`, or a function that
            returns it from (outputs, moved), summed over samples. By default that of the loss, or,
            where that is unknown or there is none, by the outputs; a warning says which and why.
        training: When winners are trained, how and on what, see `TrainingPlan`; ``None``: never.
        validation: Data on which the network is measured before and after.
        evaluate: What is measured there: a `hq_optuna.Metric`, or a function that returns figures
            by name from (network, batches); accuracy by default.
        batch_size: Samples a batch, where data come without batches; by default 32, or fewer where
            a sample is large.
        sample_axis: Axis of the input tensors along which samples lie, where labels do not tell:
            see `hq_optuna.network.batches.read_batches`.
        **changes: Settings by name, in place of those in ``settings``:
            ``bits=(8, 4), budget="0.2 bops"``.

    Raises:
        NetworkError: Nothing to quantize, NaN weights, random forward pass.
        DataError: Empty, unlabelled, unrepeatable or non-finite data; labels out of range.
        SpaceError: Unknown layers, impossible bits.
        HardwareError: The hardware is not known, its description is wrong, or knows no layers of a
            kind that the network has.
        BudgetError: The budget is below the cheapest assignment.
        SettingError: A setting, or a budget as text, that cannot be read.
        TypeError: There is no such setting.
    """

    @own_modes()
    def __init__(
        self,
        model: nn.Module,
        calibration: Any,
        loss_fn: LossFunction | None = None,
        *,
        settings: SearchSettings | None = None,
        rise: Rise | Callable[[Any, Any], Any] | None = None,
        training: TrainingPlan | None = None,
        validation: Any = None,
        evaluate: Evaluate | None = None,
        batch_size: int | None = None,
        sample_axis: int | None = None,
        **changes: Any,
    ) -> None:
        given = (settings or SearchSettings()).replace(**changes)
        self.settings = given if training is None else given.replace(train_every=training.every)
        self.budget = self.settings.budget
        if training is None and (self.settings.train_every or self.settings.final_epochs):
            raise SettingError(
                "train_every and final_epochs need training data: give BitSearch a plan, "
                "training=hq_optuna.TrainingPlan(data=…, every=…)."
            )
        self._sample_axis = sample_axis
        check_searchable(model)
        model = unfused(model)
        device = device_of(model)
        data = read_batches(
            calibration, batch_size=batch_size, sample_axis=sample_axis, labelled=False
        ).to(device)
        called = functional.cross_entropy if loss_fn is None else own_loss(loss_fn)
        reason, self._without_labels = "", any(batch.labels is None for batch in data)
        if self.settings.products:
            model = with_products(model, data[0].inputs)
        if self._without_labels:
            data, loss_fn, rise, reason = decide(model, data, loss_fn, rise)
            called = loss_fn
        look = LookOver(data, called)
        seen = self.seen = introspect(model, data, see=look.see)
        by_shape = sample_axis is None and not isinstance(calibration, Batches)
        if by_shape and not self._without_labels:
            check_sample_axis(copied(model), data[0])
        table = self.settings.latency
        self.space = space_on(
            *(read_hardware(self.settings.hardware), seen.layers, self.settings),
            memory=seen.memory.rounded(self.settings.output_bits),
            latency=None if table is None else read_latency(table),
        )
        check_reachable(self.space, self.budget)
        self.training = training
        self.validation: Batches | None = None
        self.evaluate: Evaluate = Accuracy(called) if evaluate is None else evaluate
        if validation is not None:
            read = self._read(validation, "validation").to(device)
            if isinstance(called, RiseLoss):
                read = without_labels(model, read, called.rise)
            evaluation.check_validation(self.evaluate, model, read, called)
            self.validation = weighed(
                read, called, observed_losses(model, read, called), "validation"
            )
        self.objective = HessianObjective(
            model,
            look.weighed(),
            self.space,
            loss_fn=loss_fn,
            settings=self.settings,
            rise=rise,
            training=training,
            validation=self.validation,
            evaluate=self.evaluate,
            skipped=tuple((s.name, s.kind, s.reason) for s in seen.skipped),
        )
        self.objective.warnings.extend(seen.warnings)
        self.objective.warnings.extend([reason] if reason else [])

    def _read(self, data: Any, what: str) -> Batches:
        return read_batches(
            data,
            batch_size=256,
            what=what,
            sample_axis=self._sample_axis,
            labelled=not self._without_labels,
        )

    def optimize(
        self,
        storage: str | Path | BaseStorage | None = None,
        study_name: str | None = None,
        *,
        on_progress: Callable[[StepLog], None] = lambda log: None,
        **options: Any,
    ) -> Study:
        """Search until the budget is met, or go on with a search that was interrupted.

        Several processes may call this on one storage: the history is the same as with one.

        Args:
            storage: Storage URL, the path of a file, an Optuna storage, or ``None`` for memory.
            study_name: Name of the study; an existing one is resumed.
            on_progress: Called with the record of the search after each trial.
            **options: As for `open`.

        Raises:
            StorageError: The storage cannot be opened, read or written.
            ResumeError: The study belongs to another search; the message names what changed.
            ArtifactError: The artifact store cannot be opened or written.
        """
        study = self.open(storage, study_name, **options)
        self.work(study, on_progress=on_progress)
        return study

    @own_modes()
    def open(
        self,
        storage: str | Path | BaseStorage | None = None,
        study_name: str | None = None,
        *,
        artifacts: str | Path | Artifacts | None = None,
        limits: Limits | None = None,
        retry_for_s: float = RETRY_FOR_S,
        start: StartOptions | None = None,
        progress: Progress | None = None,
        prepare: bool = True,
        **changes: Any,
    ) -> Study:
        """Open the study of this search, made if need be, with all that its workers share.

        Sensitivities are measured unless the study has them.

        Args:
            storage: Storage URL, the path of a file, an Optuna storage, or ``None`` for memory.
            study_name: Name of the study; an existing one is resumed.
            artifacts: A folder or ``s3://bucket/prefix`` for what is too large for the storage; a
                copy of the sensitivity table goes there, what training gives, and what workers
                prepare for each other. ``None``: nowhere; each worker prepares for itself then, and
                a search that trains is refused.
            limits: What the search may spend on itself. They are kept in the study; who goes on
                with it may raise them.
            retry_for_s: How long a storage given by URL is tried again when it does not answer, or
                its disk is full, before the worker ends with an error.
            start: What was given on the command line, for workers that join by theirs.
            progress: Called with (what, done, of), in one unit of work, while this is made.
            prepare: Whether it is made here and now; else `prepare` does.
            **changes: Settings of the steps in place of this search's: ``n_candidates``, ``rule``,
                ``seed``, ``refine``, ``verify``, ``encoding``.

        Raises:
            StorageError: The storage cannot be opened, read or written.
            ResumeError: The study belongs to another search; the message names what changed.
            ArtifactError: The artifact store cannot be opened or written.
        """
        sampler = self._sampler(changes)
        if isinstance(artifacts, (str, Path)):
            artifacts = open_artifacts(artifacts)
        if self.training is not None and artifacts is None:
            raise ArtifactError(NO_STORE)
        opened = open_retrying(storage, retry_for_s)
        with explain_errors_of(opened):
            study = optuna.create_study(
                storage=opened,
                study_name=study_name,
                sampler=sampler,
                pruner=CostBudgetPruner(self.space, self.budget, limits),
                load_if_exists=study_name is not None,
            )
        with explain_errors_of(opened, study):
            refuse_foreign_study(study)
            if limits is not None:
                refuse_lower_limits(study, limits)
                write_limits(study)
            if start is not None:
                start.remember(study)
            self.objective.settle(study)
        if prepare:
            self.prepare(study, artifacts=artifacts, progress=progress)
        return study

    @own_modes()
    def prepare(
        self,
        study: Study,
        *,
        artifacts: str | Path | Artifacts | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Make what all workers share, with those of them that are at work.

        Args:
            study: What `open` returned, with ``prepare=False``.
            artifacts: As for `open`.
            progress: As for `open`.

        Raises:
            StorageError: The storage cannot be read or written.
            ArtifactError: The artifact store cannot be opened or written.
        """
        if isinstance(artifacts, (str, Path)):
            artifacts = open_artifacts(artifacts)
        note = PreparationNote(study)

        def told(what: str, done: int, of: int) -> None:
            if progress is not None:
                progress(what, done, of)
            note()

        with explain_errors_of(storage_of(study), study):
            self.objective.prepare(study, artifacts=artifacts, progress=told)
            if artifacts is not None:
                publish_artifacts(study, artifacts)

    def _sampler(self, changes: Mapping[str, Any]) -> ProgressiveBitSampler:
        known = settings_of(SearchSettings)
        of_steps = ("n_candidates", "rule", "seed", "refine", "verify", "encoding")
        for name in changes:
            if name in known and name not in of_steps:
                raise TypeError(
                    f"{name} is fixed when BitSearch is made. Settings of the steps are "
                    f"{', '.join(of_steps)}."
                )
        settings = self.settings.replace(**changes)
        if not self.objective.verifies or settings.train_every:
            settings = settings.replace(verify=0)  # candidates are measured, or change by training
        plan = self.training
        return ProgressiveBitSampler(
            self.space,
            budget=self.budget,
            train_every=settings.train_every,
            final=plan is not None and plan.final is not None,
            **{name: getattr(settings, name) for name in of_steps},
        )

    @own_modes()
    def quantized(self, assignment: BitConfig) -> nn.Module:
        """Return a network with the bits of an assignment, fake-quantized and not trained.

        Args:
            assignment: Bits of all layers, such as `hq_optuna.load_assignment` returns.

        Raises:
            SpaceError: A layer has no bits.
        """
        return self.objective.quantized(assignment)

    @own_modes()
    def work(
        self,
        study: Study,
        *,
        on_progress: Callable[[StepLog], None] = lambda log: None,
        on_doing: Callable[[Doing], None] = lambda doing: None,
        pages: bool = True,
    ) -> None:
        """Run trials of a study that `open` returned until the search is over.

        Args:
            study: The study.
            on_progress: Called with the record of the search after each trial.
            on_doing: Called with what this worker does, see `hq_optuna.workers.loop.work`.
            pages: Whether this worker may keep the study's pages for optuna-dashboard current.

        Raises:
            StorageError: The storage cannot be read or written.
        """
        writer = PageWriter(study, then=on_progress, on=pages)
        with explain_errors_of(storage_of(study)), writer as progress:
            work(study, self.objective, on_progress=progress, on_doing=on_doing)

    @own_modes()
    def result(
        self,
        study: Study,
        *,
        test: Callable[[], Any] | None = None,
        artifacts: str | Path | Artifacts | None = None,
    ) -> SearchResult:
        """Return the answer of a finished search; of a running one, its incumbent.

        With validation data the network is measured before and after, uniform bits within the
        budget beside it, and the figures are written into the study.

        Args:
            study: What `optimize` returned.
            test: Returns the test data. They are read when the search is over and never before,
                once for each answer: figures that the study holds are not measured again.
            artifacts: As for `open`, for a study that `open` did not open.

        Raises:
            ResumeError: The study has no closed step yet.
        """
        if isinstance(artifacts, (str, Path)):
            artifacts = open_artifacts(artifacts)
        self.objective.prepare(study, artifacts=artifacts)
        history = read_history(study)
        record = history.incumbent
        if record is None:
            raise ResumeError(
                f"Study {study.study_name!r} has no closed step yet. If a limit ended it (trials, "
                "evaluations or seconds), raise the limit."
            )
        network = self.objective.answer(study, record.config)
        facts = self._measured(study, history, record.answer, network, test)
        PageWriter(study, always=True).close()
        now = record.current
        return self._result(
            study,
            history.info.metric,
            config=record.config,
            network=network,
            cost=record.winner.cost,
            met=history.met,
            score=now.score,
            score_weights=now.score_weights,
            score_activations=now.score_activations,
            steps=len(history.records),
            candidates=sum(candidate.counted for candidate in history.candidates),
            facts=facts,
        )

    @own_modes()
    def layer_errors(self, study: Study, result: SearchResult) -> dict[str, Any]:
        """Measure what each layer's bits do, write it into the study, and return it.

        Signal-to-noise ratios in dB, see `hq_optuna.answer.layer_errors.layer_errors`; two passes a
        layer over some calibration samples. The report shows those of its answer.

        Args:
            study: What `optimize` returned.
            result: What `result` returned of it.
        """
        found = layer_errors(self.objective, result.config, result.network)
        publish_facts(study, {LAYER_ERRORS: found})
        return found

    def _measured(
        self,
        study: Study,
        history: History,
        answer: Any,
        network: nn.Module,
        test: Callable[[], Any] | None,
    ) -> dict[str, Any]:
        """Measure the answer's network, write the figures into the study, and return them."""
        facts = {name: fact for name, fact in history.facts.items() if name not in _APART}
        if self.validation is not None:
            facts = {n: f for n, f in facts.items() if not evaluation.is_validation_fact(n)}
            facts |= self.before_and_after(network, self.validation, "validation")
            given = self.objective, history, self.validation, self.evaluate
            if compared := rows(*given, answer=network):
                publish_facts(study, {COMPARED: compared})
        over = history.met and read_status(study).state in ("finished", "stopped")
        if test is not None and over and "test_samples" not in facts:
            data = self._read(test(), "test").to(self.objective.device)
            facts |= self.before_and_after(network, data, "test")
            publish_facts(study, {TEST_OF: answer})
        publish_facts(study, facts)
        return facts

    def _result(self, study: Study, metric: Metric, **found: Any) -> SearchResult:
        costs = self.space.costs(metric)
        return SearchResult(
            space=self.space,
            metric=metric,
            cost_int8=costs.int8,
            cost_float32=costs.float32,
            fingerprint=study.user_attrs[attributes.FINGERPRINT],
            **found,
        )

    @own_modes()
    def exact(
        self,
        study: Study,
        budget: Budget | str | None = None,
        *,
        verify: int = 0,
        artifacts: str | Path | Artifacts | None = None,
    ) -> SearchResult:
        """Return the answer for a budget without a search: the least sum over layers.

        Solved on the table in the study. Nothing is written into the study.

        Args:
            study: What `optimize` returned, or any study of this search.
            budget: By default the search's own.
            verify: As in the end of a search: so many assignments within the budget are measured on
                set-aside samples, and the best is the answer. 0: the least sum is.
            artifacts: Where the search's workers left what they prepared, as for `open`.

        Raises:
            BudgetError: The budget is below the cheapest assignment.
            SettingError: ``verify`` where nothing tells what moved outputs cost.
        """
        if verify and self.objective.rise is None:
            raise SettingError(
                "verify measures what moved outputs cost, and no rise tells that of this network: "
                "give BitSearch rise=, one of hq_optuna.rises, or leave verify out."
            )
        if isinstance(artifacts, (str, Path)):
            artifacts = open_artifacts(artifacts)
        scorer = self.objective.prepare(study, artifacts=artifacts)
        budget = self.budget if budget is None else parse_budget(budget)
        sums, limit, found = optimum(read_history(study), budget)
        config, facts = found.config, dict[str, Any]()
        if verify:
            places = self.objective.setup.set_aside_places
            config, facts["measured_end"] = best_measured(scorer, places, sums, limit, verify)
        network = self.objective.quantized(config)
        score = scorer.score(config)
        if self.validation is not None:
            facts |= self.before_and_after(network, self.validation, "validation")
        return self._result(
            study,
            budget.metric,
            config=config,
            network=network,
            cost=sums.cost(config),
            met=True,
            score=score.total,
            score_weights=score.weights,
            score_activations=score.activations,
            steps=0,
            candidates=1,
            facts=facts,
        )

    @own_modes()
    def check_target(self, target: str | Target) -> None:
        """Refuse a target that `meet` could not measure, before any work.

        Args:
            target: As for `meet`.

        Raises:
            SettingError: Text that is no target, or of a metric that is not measured.
            DataError: No validation data, or none that tell the metric sample by sample.
        """
        self._comparison(target)

    def _comparison(self, target: str | Target) -> tuple[Target, Compare]:
        target = parse_target(target) if isinstance(target, str) else target
        if self.validation is None:
            raise DataError(
                "A target is measured on validation data. Give BitSearch validation=, or define "
                "validation() in the study file."
            )
        made = self.objective
        given = target, made.model, self.validation, self.evaluate, made.loss_fn
        return target, compare_with_float(*given)

    @own_modes()
    def meet(
        self,
        study: Study,
        target: str | Target,
        *,
        budget: Budget | str | Sequence[str] | None = None,
        artifacts: str | Path | Artifacts | None = None,
    ) -> SearchResult:
        """Return the cheapest answer whose measured metric stays within a target of float's.

        Optima of the table in the study are measured on the validation data, from the widest bits
        down, see `hq_optuna.answer.target`. Nothing is written into the study. ``facts["target"]``
        says what was measured, and how many samples would tell of the next cheaper one.

        Args:
            study: What `open` or `optimize` returned.
            target: How much worse than float's: ``"accuracy -0.5"``, ``"kl 0.01"``, or the study's
                own metric.
            budget: Limits that the answer is within too; what the first of them counts is to be
                least. By default that is what the study's budget counts, without its first limit.
            artifacts: Where the search's workers left what they prepared, as for `open`.

        Raises:
            SettingError: Text that is no target, or of a metric that is not measured.
            DataError: No validation data, or none that tell the metric sample by sample.
            BudgetError: The budget is below the cheapest assignment.
            TargetError: Not even the widest bits, or the best within the budget, are surely within
                the target.
        """
        target, compare = self._comparison(target)
        objective = self.objective
        if isinstance(artifacts, (str, Path)):
            artifacts = open_artifacts(artifacts)
        scorer = objective.prepare(study, artifacts=artifacts)
        history, most = read_history(study), math.inf
        if budget is None:
            sums = sums_of(history)
        else:
            limits = parse_budget(budget)
            check_reachable(self.space, limits)
            sums, most = sums_for(history, limits), limits.limit(self.space)
        assert self.validation is not None, "the comparison has samples"
        n = self.validation.n_samples
        within: list[nn.Module] = []  # the last network within the target, which is the answer's

        def measured(config: BitConfig) -> tuple[float, float, float]:
            network = objective.quantized(config)
            seen = compare(network)
            if seen[1] <= target.worse:
                within[:] = [network]
            return seen

        found = least_cost(sums, target, measured, n, most=most)
        score, network = scorer.score(found.config), within[0]
        facts = self.before_and_after(network, self.validation, "validation")
        return self._result(
            study,
            sums.model.metric,
            config=found.config,
            network=network,
            cost=found.cost,
            met=True,
            score=score.total,
            score_weights=score.weights,
            score_activations=score.activations,
            steps=0,
            candidates=len(found.tested),
            facts={**facts, "target": found.to_json()},
        )

    @own_modes()
    def measure(
        self,
        study: Study,
        assignments: Sequence[BitConfig],
        *,
        artifacts: str | Path | Artifacts | None = None,
    ) -> list[dict[str, float]]:
        """Return what the float network, and then each assignment, measures on validation data.

        Args:
            study: A study of this search, which has its table.
            assignments: Bits of all layers.
            artifacts: Where the search's workers left what they prepared, as for `open`.

        Raises:
            DataError: No validation data, or nothing is measured of them.
        """
        if self.validation is None:
            raise DataError(
                "Assignments are measured on validation data. Give BitSearch validation=, or "
                "define validation() in the study file."
            )
        if isinstance(artifacts, (str, Path)):
            artifacts = open_artifacts(artifacts)
        self.objective.prepare(study, artifacts=artifacts)
        data, found = self.validation, list[dict[str, float]]()
        found.append(evaluation.measured_figures(self.evaluate, copied(self.objective.model), data))
        if not found[0]:
            raise DataError("Nothing is measured of these validation data. Give evaluate a Metric.")
        for config in assignments:
            network = self.objective.quantized(config)
            found.append(evaluation.measured_figures(self.evaluate, network, data))
        return found

    @own_modes()
    def before_and_after(self, network: nn.Module, data: Batches, what: str) -> dict[str, Any]:
        """Return what is measured of the float network and of a quantized one."""
        return before_and_after(self.evaluate, self.objective.model, network, data, what)
