"""The table of rises by layer and bits that a study holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.study import Study

from hq_optuna import attributes
from hq_optuna.optuna_internals import place_of
from hq_optuna.search import Additive, ProgressiveSearch
from hq_optuna.space.budget import Bound
from hq_optuna.space.cost import Metric
from hq_optuna.space.search_space import SearchSpace

Rows = Mapping[str, Mapping[str, Mapping[int, float]]]
"""``{layer: {"weights": {bits: nats}, "activations": {bits: nats}}}``."""


def rows_of(system_attrs: Mapping[str, Any]) -> Rows:
    """Return the table among a study's system attributes; empty where none was stored."""
    return {
        layer: {
            part: {int(bits): float(nats) for bits, nats in row.items()}
            for part, row in parts.items()
        }
        for layer, parts in (attributes.join(attributes.SENSITIVITY, system_attrs) or {}).items()
    }


def sums_over(
    space: SearchSpace, rows: Rows, metric: Metric, beside: Sequence[Bound] = ()
) -> Additive | None:
    """Return the sums over layers of a table, ``None`` where it is not whole."""
    try:
        return Additive(space, rows, space.costs(metric), beside)
    except ValueError:
        return None


def stored_sums(study: Study, search: ProgressiveSearch) -> Callable[[], Additive | None]:
    """Return a function that reads the sums over layers of a study when they are needed first.

    It is there before any finalist is, and stays as it is.
    """
    storage, study_id = place_of(study)
    known: Additive | None = None

    def read() -> Additive | None:
        nonlocal known
        if known is None:
            rows = rows_of(storage.get_study_system_attrs(study_id))
            known = sums_over(search.space, rows, search.metric, search.beside)
        return known

    return read
