"""What the finalists of a search were measured at, and what the answer beat, from storage alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hq_optuna.protocol.history import History
from hq_optuna.scoring import Scorer
from hq_optuna.search import Additive
from hq_optuna.search.finalists import UNIFORM, choose_finalist, finalists
from hq_optuna.space.assignment import BitConfig


class Measured(NamedTuple):
    """One finalist."""

    name: str
    cost: float
    predicted: float  # nats
    rises: tuple[float, ...]  # measured, nats, by blocks of samples


def best_measured(
    scorer: Scorer, places: Sequence[int], sums: Additive, limit: float, n: int
) -> tuple[BitConfig, dict[str, Any]]:
    """Measure finalists for any limit, and return the best with what `described` says of them.

    ``places`` are the set-aside batches. Raises `ScoreError` where a rise is not finite.
    """
    optimum = sums.best(limit)
    assert optimum is not None, "the limit was found reachable"
    found = finalists(sums, optimum, limit, n)
    configs = [sums.space.config(one.state) for one in found]
    rises = [scorer.measured(config, places).rises for config in configs]
    names = [one.name for one in found]
    predicted = [sums.score(config) for config in configs]
    uniform = names.index(UNIFORM) if UNIFORM in names else None
    chosen = choose_finalist(predicted, rises, uniform)
    costs = [sums.cost(config) for config in configs]
    told = [Measured(*row) for row in zip(names, costs, predicted, rises, strict=True)]
    return configs[chosen], described(told, chosen)


def measured_end(history: History) -> dict[str, Any] | None:
    """Return what a search's finalists were measured at; ``None`` where none were."""
    record = history.incumbent
    found = [c for c in history.candidates if c.counted and c.rises]
    if record is None or not found:
        return None
    chosen = [c.number == record.winner.number for c in found]
    told = [Measured(str(c.variable), c.cost, c.score, c.rises) for c in found]
    return described(told, chosen.index(True) if any(chosen) else None)


def described(finalists: Sequence[Measured], chosen: int | None) -> dict[str, Any]:
    """Return finalists as JSON data, and a sentence.

    Returns:
        ``{"rows": […], "sentence": …}``; a row has ``name``, ``cost``, ``predicted`` and
        ``measured`` rise (nats), ``of_uniform`` with its ``error`` (a standard error; ``None``
        where uniform bits were not measured), and whether it was ``chosen``.
    """
    uniform = next((one.rises for one in finalists if one.name == UNIFORM), ())
    rows = []
    for place, one in enumerate(finalists):
        ratio, error = None, None
        if len(one.rises) == len(uniform) and sum(uniform) > 0:
            ratio, error = ratio_of(one.rises, uniform)
        rows.append(
            {
                "name": one.name,
                "cost": one.cost,
                "predicted": one.predicted,
                "measured": math.fsum(one.rises) / len(one.rises),
                "of_uniform": ratio,
                "error": error,
                "chosen": place == chosen,
            }
        )
    return {"rows": rows, "sentence": _sentence(rows)}


def ratio_of(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the ratio of two means over the same blocks, and its standard error (delta method).

    Example:
        >>> ratio_of([1.0, 2.0], [2.0, 4.0])
        (0.5, 0.0)
    """
    mean = math.fsum(other) / len(other)
    ratio = math.fsum(one) / len(one) / mean
    if len(one) < 2:
        return ratio, 0.0
    left = [a - ratio * b for a, b in zip(one, other, strict=True)]
    return ratio, statistics.stdev(left) / math.sqrt(len(left)) / mean


def _sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    chosen = next((row for row in rows if row["chosen"]), None)
    if chosen is None:  # not closed yet
        return f"{len(rows)} assignments measured so far"
    n = len(rows)
    if chosen["name"] == UNIFORM:
        return (
            f"the set-aside samples do not tell the best of {n} assignments from uniform bits, so "
            "uniform bits stay"
        )
    said = f"{chosen['measured']:.3g} nats on set-aside samples, best of {n} measured"
    if chosen["of_uniform"] is None:
        return said
    return f"{said}; {chosen['of_uniform']:.2f} ± {chosen['error']:.2f} of uniform bits' rise"
