"""What a trial shows of its scoring."""

from __future__ import annotations

import time
from typing import Any

from optuna.trial import Trial

from hq_optuna import attrs, workers
from hq_optuna.attrs import Ticket
from hq_optuna.bit_config import BitConfig
from hq_optuna.cost import CostModel
from hq_optuna.runner import described
from hq_optuna.samplers.claims import write_facts
from hq_optuna.samplers.tickets import excess, facts
from hq_optuna.scoring import Score
from hq_optuna.space import SearchSpace


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
    budget = described.budget_of(trial.study)
    cost = CostModel(space.layers, "bops" if budget is None else budget.metric).cost(config)
    known: dict[str, Any] = {} if ticket is None else facts(ticket, space, cost)
    write_facts(trial, known | {attrs.COST: cost} | shown(score, started))
    over = None if budget is None else excess(cost, budget.limit(space.layers))
    # A trial that was claimed was created with it.
    if budget is not None and over is not None and budget.metric not in trial.constraints:
        trial.set_constraint(budget.metric, over)
        # optuna-dashboard up to 0.21 reads only the older form.
        trial.study._storage.set_trial_system_attr(trial._trial_id, attrs.OLD_CONSTRAINTS, [over])
    return score.total


def shown(score: Score, started: float) -> dict[str, Any]:
    """Return what a trial says of its scoring."""
    return {
        attrs.SCORE_WEIGHTS: score.weights,
        attrs.SCORE_ACTIVATIONS: score.activations,
        attrs.CALIBRATION_LOSS: score.calibration_loss,
        attrs.SECONDS: round(time.perf_counter() - started, 6),
        attrs.WORKER: workers.short_name(workers.worker_id()),
    }
