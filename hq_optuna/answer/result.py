"""`SearchResult`: the answer of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hq_optuna.answer import recipe
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import Metric, format_cost
from hq_optuna.space.search_space import SearchSpace


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        config: Bits of every layer.
        network: A copy of the network with these bits, fake-quantized, in eval mode.
        space: The search space.
        metric: What `cost` counts, one of `hq_optuna.space.METRICS`.
        cost: Cost of the assignment in that unit.
        cost_int8: Cost with 8 bits everywhere.
        cost_float32: Cost without quantization, where it is known.
        met: Whether the budget is met.
        score: Predicted loss rise, nats.
        score_weights: The weights' part, nats.
        score_activations: The activations' part, nats.
        steps: Number of closed steps.
        candidates: Number of candidates scored.
        facts: Measured, by name: ``accuracy_before``, ``accuracy_after``, …; ``measured_end``: the
            finalists (`hq_optuna.answer.measured_end.described`).
        fingerprint: What the search depends on.
    """

    config: BitConfig
    network: nn.Module
    space: SearchSpace
    metric: Metric
    cost: float
    cost_int8: float
    cost_float32: float | None
    met: bool
    score: float
    score_weights: float
    score_activations: float
    steps: int
    candidates: int
    facts: Mapping[str, Any]
    fingerprint: Mapping[str, Any]

    def __str__(self) -> str:
        share = 100 * self.cost / self.cost_int8
        text = (
            f"{len(self.config)} layers: {format_cost(self.cost, self.metric)}, "
            f"{share:.1f} % of all-8-bit; predicted loss rise {self.score:.3g} nats"
        )
        before, after = self.facts.get("accuracy_before"), self.facts.get("accuracy_after")
        if before is not None and after is not None:
            text += f"; accuracy {100 * before:.1f} % -> {100 * after:.1f} %"
        metric = self.facts.get("validation_metric")
        if metric is not None:
            name, unit = metric["name"], f" {metric['unit']}".rstrip()
            ends = (self.facts[f"{name}_{when}"] for when in ("before", "after"))
            text += f"; {name} " + " -> ".join(f"{value:.4g}{unit}" for value in ends)
        return text if self.met else f"{text} (budget not met)"

    def save(self, folder: str | Path) -> None:
        """Write ``recipe.json`` and ``weights.safetensors``; `hq_optuna.load` reads them.

        Raises `RecipeError` where the folder cannot be made or written.
        """
        recipe.save(
            Path(folder),
            self.network,
            self.space.layers,
            {
                "cost": {
                    "metric": self.metric,
                    "value": self.cost,
                    "all_8_bit": self.cost_int8,
                    "float": self.cost_float32,
                    "budget_met": self.met,
                },
                "score_nats": {
                    "total": self.score,
                    "weights": self.score_weights,
                    "activations": self.score_activations,
                },
                "measured": dict(self.facts),
                "fingerprint": dict(self.fingerprint),
            },
        )
