"""The answer beside what else could have been had: measured on the same validation data.

Uniform bits within the budget are measured after every search with validation data: a few forward
passes, and the one comparison that says whether mixed bits are worth their trouble.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.attributes import ANSWER, EIGHT, UNIFORM, VENDOR
from hq_optuna.network.batches import Batches
from hq_optuna.network.evaluation import (
    Accuracy,
    Evaluate,
    Metric,
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
    """Measure the answer and uniform bits on validation data: the loss, and what ``evaluate`` says.

    ``answer`` is the answer's network where it was trained; nothing else here is. 8 bits everywhere
    are a row too, for reference, where they cost more than the budget, and where a search is for
    some hardware, what its vendor's tools give by default. Empty while the budget is not met.

    Returns:
        One row each: ``{"method", "bits", "cost", "score", "evaluations", "seconds",
        "measured": {"loss": …, "accuracy": …}, "pairs": {"samples", "only_this", "only_answer"}}``.
        ``pairs`` counts the samples that only one of this row and the answer gets right; it is
        there where `Accuracy` is what is measured and there is one class a sample. With a
        `hq_optuna.Metric` there are ``"metric"``, its name, unit and direction, and where it has
        records of samples ``"over_answer"``: this row − answer, ``{"value", "low", "high"}``.
    """
    record = history.incumbent
    if record is None or not history.met:
        return []
    counted = [c for c in history.candidates if c.counted]
    model = history.space.costs(history.info.metric)
    table = _Rows(objective, data, evaluate, model)
    table.add(
        *(ANSWER, record.config, answer),
        score=record.current.score,
        trained=isinstance(record.current, Reference),
        evaluations=len(counted),
        seconds=math.fsum(c.seconds for c in counted),
    )
    alone: dict[str, Any] = {"evaluations": 1, "seconds": None}
    for bits, config in uniform_within(history.space, history.fits).items():
        table.add(UNIFORM, config, bits=bits, **alone)
    eight = uniform_states(history.space).get((8, 8))
    if eight is not None and not history.fits(config := history.space.config(eight)):
        table.add(EIGHT, config, bits="8 bits", **alone)
    if (default := objective.setup.vendors_default(objective.model)) is not None:
        table.add(VENDOR, *default, **alone)
    return table.rows


class _Rows:
    """Measured rows, the answer's first."""

    def __init__(
        self, objective: HessianObjective, data: Batches, evaluate: Evaluate, model: CostModel
    ) -> None:
        self.objective, self.data, self.evaluate, self.model = objective, data, evaluate, model
        self.scorer = objective.prepare()
        self.rows: list[dict[str, Any]] = []
        self._answers: Tensor | None = None  # which samples the answer gets right
        self._records: list[Any] | None = None  # the metric's, of the answer

    def add(
        self, method: str, config: BitConfig, network: nn.Module | None = None, **more: Any
    ) -> None:
        """Measure an assignment, or its trained network."""
        found: dict[str, Any] = {"method": method, "bits": None, **more}
        network = self.objective.quantized(config) if network is None else network
        measured = mean_loss(network, self.data, self.objective.loss_fn)
        mine = None
        if isinstance(self.evaluate, Accuracy):
            mine = self.evaluate.of_samples(network, self.data)
        if isinstance(self.evaluate, Metric):
            found |= self._of_metric(self.evaluate, network, measured)
        elif mine is None:
            measured |= measured_figures(self.evaluate, network, self.data)
        else:
            measured["accuracy"] = share_correct(mine)
            answers = self._answers = mine if self._answers is None else self._answers
            found["pairs"] = {
                "samples": len(mine),
                "only_this": int((mine & ~answers).sum()),
                "only_answer": int((answers & ~mine).sum()),
            }
        found["cost"] = self.model.cost(config)
        found["score"] = more.get("score") or self.scorer.score(config).total
        self.rows.append({**found, "measured": measured})

    @torch.no_grad()
    def _of_metric(
        self, metric: Metric, network: nn.Module, measured: dict[str, float]
    ) -> dict[str, Any]:
        """Add the metric's figure to what was measured; return what else a row says of it."""
        records = metric.records(network, self.data)
        if records is None:
            measured |= metric(network, self.data)
            return {"metric": metric.said()}
        measured[metric.name] = metric.of(records)
        answers = self._records = records if self._records is None else self._records
        return {"metric": metric.said(), "over_answer": metric.difference(answers, records)}
