"""The report's comparison of answer and uniform bits, and what it says in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hq_optuna.answer.intervals import CONFIDENCE, Interval, paired, wilson
from hq_optuna.attributes import ANSWER, EIGHT, UNIFORM
from hq_optuna.report.words import NOT_MEASURED, hundredths, interval, points
from hq_optuna.space.cost import Metric, format_cost


def beaten_by_uniform(compared: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of uniform bits that are measured to be better than the answer.

    By accuracy where it was measured, else by the loss; where these are equal, by the cost.
    """
    compared = list(compared)
    answers = [r for r in compared if r["method"] == ANSWER]
    if not answers:
        return []
    return [r for r in compared if r["method"] == UNIFORM and _worth(r) > _worth(answers[0])]


def _worth(row: Mapping[str, Any]) -> tuple[float, float]:
    measured = row["measured"]
    worth = float(measured["accuracy"]) if "accuracy" in measured else -float(measured["loss"])
    return worth, -row["cost"]


def warnings(
    compared: Sequence[Mapping[str, Any]], metric: Metric, n_samples: int | None
) -> list[str]:
    """Return a sentence for each uniform assignment that beats the answer within the budget."""
    answer = next((row for row in compared if row["method"] == ANSWER), None)
    sentences = []
    for row in beaten_by_uniform(compared):
        assert answer is not None
        name = "accuracy" if "accuracy" in row["measured"] else "loss"
        ours, theirs = answer["measured"][name], row["measured"][name]
        apart = _apart(row)
        if name == "accuracy":
            figures = f"{100 * theirs:.2f} % against {100 * ours:.2f} %"
            if apart is not None:
                low, high = (100 * end for end in apart)
                figures += (
                    f" ({row['pairs']['samples']:,} samples, 95 % interval of the difference "
                    f"{low:+.1f} to {high:+.1f} points)"
                )
            elif n_samples:
                error = 100 * math.sqrt(theirs * (1 - theirs) / n_samples)
                figures += f" ({n_samples:,} samples, standard error {error:.1f} points)"
        else:
            figures = f"{theirs:.4g} against {ours:.4g}"
        unclear = apart is not None and apart.low <= 0
        sentences.append(
            f"{_BETTER[unclear]}: {row['bits']} everywhere cost "
            f"{format_cost(row['cost'], metric)}, within the budget, and have validation {name} "
            f"{figures}. {_ADVICE[unclear]}"
        )
    return sentences


_BETTER = {
    False: "Mixed bits lose to uniform ones here",
    True: "Mixed bits are not shown to be better than uniform ones here",
}
_ADVICE = {
    False: "Take the uniform ones, or judge both on more data.",
    True: "These samples do not tell the two apart; judge both on more data, or take the simpler.",
}


def _apart(row: Mapping[str, Any]) -> Interval | None:
    """Return the interval of a row's accuracy minus the answer's, where samples were counted."""
    pairs = row.get("pairs")
    if not pairs:
        return None
    return paired(pairs["only_answer"], pairs["only_this"], pairs["samples"])


def table(
    compared: Sequence[Mapping[str, Any]], metric: Metric
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Return header, rows and sentences of the comparison.

    Where samples were counted, accuracies have their intervals.
    """
    names = list(dict.fromkeys(name for row in compared for name in row["measured"]))
    pairs = any(row.get("pairs") for row in compared)
    over = ("over the answer, points",) if pairs else ()
    header = ("", "cost", "score (nats)", *names, *over, "evaluations", "seconds")
    lines = ["Measured on the validation data; all with the same score and statistics correction."]
    if any(row.get("trained") for row in compared):
        lines.append("The answer was trained at its bits, and has its score after that.")
    if pairs:
        lines.append(f"In brackets {100 * CONFIDENCE:.0f} % intervals over the validation samples.")
    if any(row["method"] == EIGHT for row in compared):
        lines.append("Uniform 8 bits are over the budget and stand here for reference.")
    if not any(row["method"] == UNIFORM for row in compared):
        lines.append("No uniform bits are within the budget.")
    rows = []
    for row in compared:
        uniform = row["method"] in (UNIFORM, EIGHT)
        cells = [
            f"uniform {row['bits']}" if uniform else row["method"],
            format_cost(row["cost"], metric),
            f"{row['score']:.3g}",
            *(_cell(row, name) for name in names),
        ]
        if pairs:
            cells.append("" if row["method"] == ANSWER else _over_answer(row))
        cells.append(f"{row['evaluations']:,}")
        cells.append("" if row["seconds"] is None else f"{row['seconds']:.3g}")
        rows.append(tuple(cells))
    return header, tuple(rows), tuple(lines)


def _cell(row: Mapping[str, Any], name: str) -> str:
    """Return what was measured under a name, with its interval where samples were counted."""
    if name not in row["measured"]:
        return "none"
    value = row["measured"][name]
    if value is None:  # NaN or infinity, in JSON
        return NOT_MEASURED
    if name != "accuracy":
        return f"{value:.4g}"
    if not row.get("pairs"):
        return f"{100 * value:.2f} %"
    n = row["pairs"]["samples"]
    low, high = wilson(round(n * value), n)
    return f"{100 * value:.2f} % [{hundredths(low)}, {hundredths(high)}]"


def _over_answer(row: Mapping[str, Any]) -> str:
    """Return how much more often than the answer a row is right, in points, with its interval."""
    apart = _apart(row)
    if apart is None:
        return ""
    pairs = row["pairs"]
    difference = (pairs["only_this"] - pairs["only_answer"]) / pairs["samples"]
    return interval({"value": difference, "low": apart.low, "high": apart.high}, points)
