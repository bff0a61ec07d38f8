"""What a trial shows of its scoring."""

from __future__ import annotations

import time
from typing import Any

from optuna.study import Study
from optuna.trial import Trial

from hq_optuna import attributes
from hq_optuna.attributes import Ticket
from hq_optuna.optuna_internals import trial_id_of
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.claims import write_facts
from hq_optuna.protocol.tickets import excess, facts
from hq_optuna.pruners import CostBudgetPruner
from hq_optuna.samplers import ProgressiveBitSampler
from hq_optuna.scoring import Score
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from hq_optuna.space.search_space import SearchSpace


def record(
    space: SearchSpace,
    trial: Trial,
    config: BitConfig,
    score: Score,
    ticket: Ticket | None,
    started: float,
) -> float:
    """Write what a trial shows besides its value, which is returned.

    Args:
        space: The search space.
        trial: The trial.
        config: Its bits.
        score: Its score.
        ticket: Its ticket, if it has one.
        started: When it began, by `time.perf_counter`.
    """
    budget = budget_of(trial.study)
    cost = CostModel(space.layers, "bops" if budget is None else budget.metric).cost(config)
    known: dict[str, Any] = {} if ticket is None else facts(ticket, space, cost)
    write_facts(trial, known | {attributes.COST: cost} | shown(score, started))
    over = None if budget is None else excess(cost, budget.limit(space.layers))
    # A trial that was claimed was created with it.
    if budget is not None and over is not None and budget.metric not in trial.constraints:
        trial.set_constraint(budget.metric, over)
        # optuna-dashboard up to 0.21 reads only the older form.
        trial.storage.set_trial_system_attr(trial_id_of(trial), attributes.OLD_CONSTRAINTS, [over])
    return score.total


def shown(score: Score, started: float) -> dict[str, Any]:
    """Return what a trial says of its scoring."""
    return {
        attributes.SCORE_WEIGHTS: score.weights,
        attributes.SCORE_ACTIVATIONS: score.activations,
        attributes.CALIBRATION_LOSS: score.calibration_loss,
        attributes.SECONDS: round(time.perf_counter() - started, 6),
        attributes.WORKER: worker_identity.my_short_name(),
    }


def budget_of(study: Study) -> Budget | None:
    """Return the budget of a study: its sampler's, or its pruner's."""
    if isinstance(study.sampler, ProgressiveBitSampler) and study.sampler.budget is not None:
        return study.sampler.budget
    return study.pruner.budget if isinstance(study.pruner, CostBudgetPruner) else None
