"""What a study is told of its search, and a trial of its scoring: readers need no network."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import time
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import Trial

from hq_optuna import attributes
from hq_optuna.artifacts.store import Artifacts, attach, attached
from hq_optuna.attributes import Ticket
from hq_optuna.errors import ResumeError
from hq_optuna.network.evaluation import is_validation_fact
from hq_optuna.optuna_internals import id_of, storage_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.claims import write_constraint, write_facts
from hq_optuna.protocol.study_view import write_user_attrs
from hq_optuna.protocol.tickets import costs_shown, facts
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.scoring import Score, Sensitivity
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import Metric
from hq_optuna.space.search_space import SearchSpace

SENSITIVITY = "sensitivity"
"""Name of the artifact that holds the table of predicted loss rises, by layer and bits."""

SENSITIVITY_CSV = "sensitivity_csv"
"""Name of the artifact that holds the same table for people."""

METRIC_NAME = "score_nats"
"""Name of the trials' value in the dashboard and in `study.trials_dataframe()`."""


def publish(
    study: Study,
    space: SearchSpace,
    info: attributes.StudyInfo,
    sensitivity: Sensitivity,
    *,
    again: bool = False,
) -> None:
    """Write space, sensitivities and description into the study, if not there or ``again``.

    The description comes last: a study that has it is complete.
    """
    if attributes.INFO in study.user_attrs and not again:
        return
    parts = {
        **attributes.split(attributes.SPACE, space.to_json()),
        **attributes.split(attributes.SENSITIVITY, sensitivity.to_json()),
    }
    for key, value in parts.items():
        storage_of(study).set_study_system_attr(id_of(study), key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([METRIC_NAME])
    study.set_user_attr(attributes.INFO, dataclasses.asdict(info))


def publish_artifacts(study: Study, artifacts: Artifacts) -> None:
    """Put copies of the sensitivity table into the artifact store, unless the study names them.

    One is JSON for programs, one CSV, which optuna-dashboard shows as a table. Workers read the
    study's own attributes: they need nothing but the storage.
    """
    system = storage_of(study).get_study_system_attrs(id_of(study))
    table = attributes.join(attributes.SENSITIVITY, system) or {}
    if attached(study, SENSITIVITY) is None:
        stored = artifacts.put_json(table)
        attach(study, SENSITIVITY, stored, filename="sensitivity.json", mimetype="application/json")
    if attached(study, SENSITIVITY_CSV) is None:
        stored = artifacts.put(as_csv(table).encode())
        attach(study, SENSITIVITY_CSV, stored, filename="sensitivity.csv", mimetype="text/csv")


def as_csv(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return a stored table of sensitivities as CSV: one line a layer and part, widest bits first.

    Example:
        >>> print(as_csv({"fc": {"weights": {"8": 1e-05, "4": 0.002}, "activations": {}}}), end="")
        layer,part,8 bits (nats),4 bits (nats)
        fc,weights,1e-05,0.002
    """
    bits = {b for parts in table.values() for row in parts.values() for b in row}
    columns = sorted(bits, key=int, reverse=True)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["layer", "part", *(f"{b} bits (nats)" for b in columns)])
    for layer, parts in table.items():
        for part, row in parts.items():
            if row:
                lines.writerow([layer, part, *(row.get(b, "") for b in columns)])
    return text.getvalue()


def stored_sensitivity(study: Study) -> Sensitivity | None:
    """Return the sensitivities another worker published, or ``None``."""
    if attributes.INFO not in study.user_attrs:
        return None
    system = storage_of(study).get_study_system_attrs(id_of(study))
    table = attributes.join(attributes.SENSITIVITY, system)
    return None if table is None else Sensitivity.from_json(table)


def publish_facts(study: Study, facts: dict[str, Any]) -> None:
    """Write what was measured at the end (accuracies, seconds) into the study, by name.

    Where validation data are among it, what an earlier measurement on such data said is gone.
    Where the study can only be read, nothing is written.
    """
    stored = study.user_attrs
    if "validation_samples" in facts:
        known = (key.removeprefix(f"{attributes.REPORT}:") for key in stored)
        facts = {**dict.fromkeys(filter(is_validation_fact, known)), **facts}
    write_user_attrs(study, {f"{attributes.REPORT}:{name}": fact for name, fact in facts.items()})


def refuse_foreign_study(study: Study) -> None:
    """Refuse a study that holds trials but no search of ours."""
    multi = len(study.directions) != 1 or study.direction != optuna.study.StudyDirection.MINIMIZE
    foreign = attributes.FINGERPRINT not in study.user_attrs and len(
        study.get_trials(deepcopy=False)
    )
    if multi or foreign:
        raise ResumeError(
            f"Study {study.study_name!r} in this storage belongs to another kind of study. "
            "Give another study name (--name).",
            changed=("kind of study",),
        )


def record(
    space: SearchSpace,
    trial: Trial,
    config: BitConfig,
    found: Mapping[str, Any],
    ticket: Ticket | None,
) -> None:
    """Write what a trial shows besides its value; ``found`` are user attributes of its scoring."""
    limits = limits_of(trial.study, space)
    costs: dict[str, float] = {metric: space.costs(metric).cost(config) for metric in limits}
    known: dict[str, Any] = {} if ticket is None else facts(ticket, space, costs)
    write_facts(trial, {**known, **costs_shown(costs), **found})
    if ticket is None or ticket.kind == "free":  # others know their cost from the start
        write_constraint(trial, tuple(costs.values()), limits)


def shown(score: Score, started: float) -> dict[str, Any]:
    """Return what a trial says of its scoring, which began at ``started`` (`time.perf_counter`)."""
    said = {
        attributes.SCORE_WEIGHTS: score.weights,
        attributes.SCORE_ACTIVATIONS: score.activations,
        **by_whom(started),
    }
    if score.calibration_loss is not None:
        said[attributes.CALIBRATION_LOSS] = score.calibration_loss
    if score.rises:
        said[attributes.RISES] = list(score.rises)
    return said


def by_whom(started: float) -> dict[str, Any]:
    """Return what a trial says of the work on it."""
    return {
        attributes.SECONDS: round(time.perf_counter() - started, 6),
        attributes.WORKER: worker_identity.my_short_name(),
    }


def limits_of(study: Study, space: SearchSpace) -> dict[Metric, float]:
    """Return what a study's budget counts and how much it allows, infinity where there is none.

    A study that was loaded without its sampler and pruner says it itself.
    """
    if (budget := budget_of(study)) is not None:
        return {bound.metric: bound.limit for bound in budget.bounds(space)}
    data = study.user_attrs.get(attributes.INFO)
    if data is None or data["budget"] == "none":
        return {"bops": math.inf}
    info = attributes.StudyInfo.from_json(data)
    return {info.metric: info.limit, **{each.metric: each.limit for each in info.beside}}


def budget_of(study: Study) -> Budget | None:
    """Return the budget of a study: its sampler's, or its pruner's."""
    if isinstance(study.sampler, ProgressiveBitSampler) and study.sampler.budget is not None:
        return study.sampler.budget
    return study.pruner.budget if isinstance(study.pruner, CostBudgetPruner) else None
