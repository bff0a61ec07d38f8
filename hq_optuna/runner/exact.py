"""The exact assignment for a budget, scored and measured like the answer of a search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optuna.study import Study

from hq_optuna import attrs
from hq_optuna.cost import Budget, CostModel
from hq_optuna.runner.resolving import resolve
from hq_optuna.runner.result import SearchResult

if TYPE_CHECKING:
    from hq_optuna.runner.bit_search import BitSearch


def exact_result(search: BitSearch, study: Study, budget: Budget | str) -> SearchResult:
    """Return the assignment with the least sum over layers, see `BitSearch.exact`."""
    scorer = search.objective.prepare(study)
    found = resolve(study, budget)
    network = search.objective.quantized(found.config)
    score = scorer.score(found.config)
    facts = {}
    if search.validation is not None:
        facts = search.before_and_after(network, search.validation, "validation")
    return SearchResult(
        config=found.config,
        network=network,
        space=search.space,
        metric=found.metric,
        cost=found.cost,
        cost_int8=found.int8,
        cost_float32=CostModel(search.space.layers, found.metric).float32,
        met=True,
        score=score.total,
        score_weights=score.weights,
        score_activations=score.activations,
        steps=0,
        candidates=1,
        facts=facts,
        fingerprint=study.user_attrs[attrs.FINGERPRINT],
    )
