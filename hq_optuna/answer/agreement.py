"""Whether the score ranked as the measured loss does, on the calibration set, from storage alone.

The candidates of a search hold both: the predicted rise they were ranked by, and the loss measured
in the same forward pass. Both read the same samples, so their agreement says whether the prediction
holds there and nothing about data the search has not seen.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from hq_optuna.protocol.history import History
from hq_optuna.search import MEASURED, rank_correlation


def agreement(history: History) -> dict[str, Any] | None:
    """Return rank correlations (Spearman) of score and measured calibration loss.

    Over all candidates both rise as bits fall, so that correlation is high for almost any score;
    what decides in a search is the order within a step. Rises are those over the network that
    candidates are made from: what was trained last, or the start.

    Returns:
        ``{"candidates", "spearman", "steps", "within_steps"}``; ``within_steps`` is the median over
        the ``steps`` with at least three candidates, ``None`` without such steps. The start is
        no candidate. ``None`` where fewer candidates than that have both, where one of them is the
        same in all, or where the score is itself the measured loss.
    """
    if history.info.settings["scorer"] == MEASURED:
        return None
    steps = _rises(history)
    both = [pair for pairs in steps.values() for pair in pairs]
    overall = rank_correlation(both)
    if overall is None:
        return None
    within = [rho for pairs in steps.values() if (rho := rank_correlation(pairs)) is not None]
    return {
        "candidates": len(both),
        "spearman": overall,
        "steps": len(within),
        "within_steps": statistics.median(within) if within else None,
    }


def _rises(history: History) -> dict[int, list[tuple[float, float]]]:
    """Return the rises of score and loss of every counted candidate, by step."""
    steps: dict[int, list[tuple[float, float]]] = {}
    for c in history.candidates:
        if c.counted and c.step > 0 and math.isfinite(c.score + c.calibration_loss):
            steps.setdefault(c.step, []).append((c.score, c.calibration_loss))
    for step, pairs in steps.items():
        start = history.reference(step)
        if start is not None and math.isfinite(start.score + start.calibration_loss):
            steps[step] = [(x - start.score, y - start.calibration_loss) for x, y in pairs]
    return steps
