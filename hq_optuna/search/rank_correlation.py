"""How well a prediction ranks what was measured."""

from __future__ import annotations

from collections.abc import Iterable

MEASURED = "loss"
"""The scorer that ranks by measured losses: its score predicts nothing."""


def rank_correlation(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    """Return Spearman's rank correlation of the pairs ``(predicted, measured)`` without ``None``.

    It is ``None`` for fewer than three pairs, or where all values of one side are the same, and
    rounded to twelve digits: perfect agreement is 1.0 on every machine.

    Example:
        >>> rank_correlation([(1.0, 10.0), (2.0, 30.0), (3.0, 20.0), (None, 0.0)])
        0.5
    """
    whole = [(predicted, measured) for predicted, measured in pairs if predicted is not None]
    if len(whole) < 3 or any(len(set(side)) < 2 for side in zip(*whole, strict=True)):
        return None
    from scipy.stats import spearmanr  # takes longer to import than a report to write

    return round(float(spearmanr(*zip(*whole, strict=True)).statistic), 12)
