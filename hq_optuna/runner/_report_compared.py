"""The report's comparison: answer, uniform bits, other methods; and what it says in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hq_optuna import attrs
from hq_optuna.cost import Metric, format_cost
from hq_optuna.runner._report_words import NOT_MEASURED, hundredths, interval, points
from hq_optuna.runner.baselines import METHODS, NSGA2, RANDOM, TPE
from hq_optuna.runner.intervals import CONFIDENCE, Interval, paired, wilson

COMPARED, ANSWER, UNIFORM, EIGHT = attrs.COMPARED, attrs.ANSWER, attrs.UNIFORM, "8 bits"
"""The fact that holds the rows, and their methods beside those of `hq_optuna.runner.baselines`."""

_WORDS = {
    RANDOM: "random within the budget",
    TPE: "TPE (Optuna)",
    NSGA2: "NSGA-II (Optuna)",
}
NOT_RUN = (
    "Random draws, TPE and NSGA-II were not run; hq-optuna run … --baselines 3 compares with them."
)


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

    Methods with several seeds are one row, mean ± standard deviation. Where samples were counted,
    accuracies have their intervals; those of a mean are no narrower, as all seeds read the same
    samples.
    """
    names = list(dict.fromkeys(name for row in compared for name in row["measured"]))
    pairs = any(row.get("pairs") for row in compared)
    over = ("over the answer, points",) if pairs else ()
    header = ("", "cost", "score (nats)", *names, *over, "evaluations", "seconds")
    lines = ["Measured on the validation data; all with the same score and statistics correction."]
    if any(row.get("trained") for row in compared):
        lines.append("The answer was trained at its bits, and has its score after that.")
    if pairs:
        lines.append(
            f"In brackets {100 * CONFIDENCE:.0f} % intervals over the validation samples; ± is "
            "over seeds."
        )
    if any(row["method"] == EIGHT for row in compared):
        lines.append("Uniform 8 bits are over the budget and stand here for reference.")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in compared:
        key = f"uniform {row['bits']}" if row["method"] in (UNIFORM, EIGHT) else row["method"]
        groups.setdefault(key, []).append(row)
    if not any(row["method"] == UNIFORM for row in compared):
        lines.append("No uniform bits are within the budget.")
    if not set(METHODS) & set(groups):
        lines.append(NOT_RUN)
    rows = []
    for key, group in groups.items():
        within = [row for row in group if row["cost"] is not None]
        title = _WORDS.get(key, key)
        if len(group) > 1:
            title += f", {len(group)} seeds"
        if len(within) < len(group):
            lines.append(
                f"{title}: {len(group) - len(within)} of {len(group)} found nothing within the "
                "budget."
            )
        cells = [
            format_cost(statistics.mean(row["cost"] for row in within), metric)
            if within
            else "none",
            _spread([row["score"] for row in within], "{:.3g}".format),
        ]
        for name in names:
            values = [row["measured"][name] for row in within if name in row["measured"]]
            if None in values:  # NaN or infinity, in JSON
                cells.append(NOT_MEASURED)
            elif name == "accuracy":
                cells.append(_spread([100 * v for v in values], "{:.2f} %".format))
                cells[-1] += _interval(within)
            else:
                cells.append(_spread(values, "{:.4g}".format))
        if pairs:
            cells.append("" if key == ANSWER else _over_answer(within))
        cells.append(f"{round(statistics.mean(row['evaluations'] for row in group)):,}")
        seconds = [row["seconds"] for row in group if row["seconds"] is not None]
        cells.append(f"{statistics.mean(seconds):.3g}" if seconds else "")
        rows.append((title, *cells))
    return header, tuple(rows), tuple(lines)


def _mean_pairs(group: Sequence[Mapping[str, Any]]) -> tuple[float, float, int] | None:
    """Return samples that only the answer gets right, that only this does, and all of them."""
    counted = [row["pairs"] for row in group if row.get("pairs")]
    if not counted or len(counted) < len(group):
        return None
    lost, gained = (
        statistics.mean(pairs[name] for pairs in counted) for name in ("only_answer", "only_this")
    )
    return lost, gained, counted[0]["samples"]


def _interval(group: Sequence[Mapping[str, Any]]) -> str:
    """Return the interval of a row's accuracy, `` [low, high]`` in percent, where there is one."""
    pairs = _mean_pairs(group)
    if pairs is None:
        return ""
    n = pairs[2]
    low, high = wilson(round(n * statistics.mean(row["measured"]["accuracy"] for row in group)), n)
    return f" [{hundredths(low)}, {hundredths(high)}]"


def _over_answer(group: Sequence[Mapping[str, Any]]) -> str:
    """Return how much more often than the answer a row is right, in points, with its interval."""
    pairs = _mean_pairs(group)
    if pairs is None:
        return ""
    lost, gained, n = pairs
    low, high = paired(lost, gained, n)
    return interval({"value": (gained - lost) / n, "low": low, "high": high}, points)


def _spread(values: Sequence[float], write: Callable[[float], str]) -> str:
    if not values:
        return "none"
    text = write(statistics.mean(values))
    if len(values) == 1:
        return text
    return f"{text} ± {statistics.stdev(values):.2g}"
