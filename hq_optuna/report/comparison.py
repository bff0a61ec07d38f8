"""Warnings where uniform bits are measured to be better than the answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hq_optuna.answer.intervals import paired
from hq_optuna.attributes import ANSWER, UNIFORM
from hq_optuna.space.cost import Metric, format_cost

_LOST = (
    "Mixed bits lose to uniform ones here",
    "Take the uniform ones, or judge both on more data.",
)
_UNCLEAR = (
    "Mixed bits are not shown to be better than uniform ones here",
    "These samples do not tell the two apart; judge both on more data, or take the simpler.",
)


def beaten_by_uniform(compared: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of uniform bits that are measured to be better than the answer.

    By the metric or the accuracy where they were measured, else by the loss; where these are equal,
    by the cost.
    """
    compared = list(compared)
    answer = next((row for row in compared if row["method"] == ANSWER), None)
    if answer is None:
        return []
    return [r for r in compared if r["method"] == UNIFORM and _worth(r) > _worth(answer)]


def _worth(row: Mapping[str, Any]) -> tuple[float, float]:
    measured, metric = row["measured"], row.get("metric")
    if metric is not None:
        value = float(measured[metric["name"]])
        return (value if metric["higher_is_better"] else -value), -row["cost"]
    worth = float(measured["accuracy"]) if "accuracy" in measured else -measured.get("loss", 0.0)
    return worth, -row["cost"]


def warnings(
    compared: Sequence[Mapping[str, Any]], metric: Metric, n_samples: int | None
) -> list[str]:
    """Return a sentence for each uniform assignment that beats the answer within the budget."""
    measured = {row["method"]: row["measured"] for row in compared}
    sentences = []
    for row in beaten_by_uniform(compared):
        if row.get("metric") is not None:
            sentences.append(_by_metric(row, measured[ANSWER], metric, n_samples))
            continue
        name = "accuracy" if "accuracy" in row["measured"] else "loss"
        if name not in row["measured"]:
            continue
        ours, theirs, pairs = measured[ANSWER][name], row["measured"][name], row.get("pairs")
        said, advice = _LOST
        if name == "loss":
            figures = f"{theirs:.4g} against {ours:.4g}"
        else:
            figures = f"{100 * theirs:.2f} % against {100 * ours:.2f} %"
        if pairs:
            low, high = paired(pairs["only_answer"], pairs["only_this"], pairs["samples"])
            if low <= 0:
                said, advice = _UNCLEAR
            if name == "accuracy":
                figures += (
                    f" ({pairs['samples']:,} samples, 95 % interval of the difference "
                    f"{100 * low:+.1f} to {100 * high:+.1f} points)"
                )
        elif n_samples and name == "accuracy":
            error = 100 * math.sqrt(theirs * (1 - theirs) / n_samples)
            figures += f" ({n_samples:,} samples, standard error {error:.1f} points)"
        sentences.append(
            f"{said}: {row['bits']} everywhere cost {format_cost(row['cost'], metric)}, within "
            f"the budget, and have validation {name} {figures}. {advice}"
        )
    return sentences


def _by_metric(
    row: Mapping[str, Any], answer: Mapping[str, Any], metric: Metric, n_samples: int | None
) -> str:
    """Return the sentence of a uniform assignment that is better by the study's own metric."""
    said, unit = row["metric"], f" {row['metric']['unit']}".rstrip()
    name, over = said["name"], row.get("over_answer")
    verdict, advice = _LOST
    figures = f"{row['measured'][name]:.4g}{unit} against {answer[name]:.4g}{unit}"
    if over is not None:
        low, high = over["low"], over["high"]
        better = low > 0 if said["higher_is_better"] else high < 0
        verdict, advice = (verdict, advice) if better else _UNCLEAR
        figures += (
            f" ({n_samples or '?'} samples, 95 % interval of the difference {low:+.3g} to "
            f"{high:+.3g}{unit})"
        )
    return (
        f"{verdict}: {row['bits']} everywhere cost {format_cost(row['cost'], metric)}, within the "
        f"budget, and have validation {name} {figures}. {advice}"
    )
