"""The answer beside what else could have been had: measured on the same validation data.

Uniform bits within the budget are measured after every search with validation data: a few forward
passes, and the one comparison that says whether mixed bits are worth their trouble.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from hq_optuna.attributes import ANSWER, EIGHT, UNIFORM
from hq_optuna.network.batches import Batches
from hq_optuna.network.evaluation import (
    Evaluate,
    accuracy,
    correct_predictions,
    mean_loss,
    measured_figures,
    share_correct,
)
from hq_optuna.objective.hessian import HessianObjective
from hq_optuna.protocol.history import History, Reference
from hq_optuna.search import uniform_states, uniform_within
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import CostModel


def rows(
    objective: HessianObjective,
    history: History,
    data: Batches,
    evaluate: Evaluate,
    *,
    answer: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Measure the answer and uniform bits.

    Args:
        objective: Prepared for this search.
        history: The search.
        data: Validation data.
        evaluate: What is measured there, beside the mean loss.
        answer: The answer's network, where it was trained; nothing else here is.

    Returns:
        One row each: ``{"method", "bits", "cost", "score", "evaluations", "seconds",
        "measured": {"loss": …, "accuracy": …}, "pairs": {"samples", "only_this", "only_answer"}}``.
        ``pairs`` counts the samples that only one of this row and the answer gets right; it is
        there where `accuracy` is what is measured and there is one class a sample. 8 bits
        everywhere are a row too, for reference, where they cost more than the budget. Empty while
        the budget is not met.
    """
    record = history.incumbent
    if record is None or not history.met:
        return []
    counted = [c for c in history.candidates if c.counted]
    scorer = objective.prepare()
    model = CostModel(history.space.layers, history.info.metric)
    of_answer: Tensor | None = None

    def row(method: str, config: BitConfig, **more: Any) -> dict[str, Any]:
        nonlocal of_answer
        found: dict[str, Any] = {"method": method, "bits": None, **more}
        network = objective.quantized(config)
        if method == ANSWER and answer is not None:
            network = answer
        measured = mean_loss(network, data, objective.loss_fn)
        mine = correct_predictions(network, data) if evaluate is accuracy else None
        if mine is None:
            measured |= measured_figures(evaluate, network, data)
        else:
            measured["accuracy"] = share_correct(mine)
            of_answer = mine if method == ANSWER else of_answer
            assert of_answer is not None
            found["pairs"] = {
                "samples": len(mine),
                "only_this": int((mine & ~of_answer).sum()),
                "only_answer": int((of_answer & ~mine).sum()),
            }
        return {
            **found,
            "cost": model.cost(config),
            "score": more.get("score") or scorer.score(config).total,
            "measured": measured,
        }

    found = [
        row(
            ANSWER,
            record.config,
            score=record.current.score,
            trained=isinstance(record.current, Reference),
            evaluations=len(counted),
            seconds=math.fsum(c.seconds for c in counted),
        )
    ]
    for bits, config in uniform_within(history.space, model.cost, history.info.limit).items():
        found.append(row(UNIFORM, config, bits=bits, evaluations=1, seconds=None))
    eight = uniform_states(history.space).get((8, 8))
    if eight is not None and model.cost(config := history.space.config(eight)) > history.info.limit:
        found.append(row(EIGHT, config, bits="8 bits", evaluations=1, seconds=None))
    return found
