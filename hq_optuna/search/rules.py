"""Which candidate of a step becomes the incumbent, and whether its training is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

from hq_optuna.settings import Rule

RULES: tuple[Rule, ...] = get_args(Rule)

LEAST_GAIN = 1e-6
"""What a training must take off the score, as a share of it: more than machines differ by."""


def choose(
    rule: Rule,
    scores: Sequence[float],
    costs: Sequence[float],
    *,
    incumbent_score: float,
    incumbent_cost: float,
    limit: float,
) -> int:
    """Return the index of the winner among scores and costs ``(C,)``; ties go to the lowest index.

    Rule ``"min"`` takes the smallest score, as in the patent; ``"ratio"`` the smallest rise of the
    score per cost saved. What is saved beyond the budget ``limit`` (``-inf`` for none) is worth
    nothing, so the saving is counted only down to it; a candidate that saves nothing loses to all
    that do. Where the score falls, fall times saving counts.
    """
    if rule == "min":
        keys = list(scores)
    elif rule == "ratio":
        needed = incumbent_cost - limit
        keys = []
        for score, cost in zip(scores, costs, strict=True):
            rise, saved = score - incumbent_score, incumbent_cost - cost
            if 0 < needed < saved:
                saved = needed
            if saved <= 0:
                keys.append(math.inf)
            else:  # of two that lower the score, dividing would prefer the one that saves less
                keys.append(rise / saved if rise >= 0 else rise * saved)
    else:
        raise ValueError(f"rule is one of {', '.join(RULES)}; got {rule!r}.")
    return min(range(len(keys)), key=lambda index: (keys[index], index))


def keeps(trained: float, before: float) -> bool:
    """Return whether what training made of an incumbent is kept: where it lowered the score.

    Example:
        >>> keeps(0.02, 0.03), keeps(0.03, 0.03), keeps(float("nan"), 0.03)
        (True, False, False)
    """
    return trained < before - LEAST_GAIN * max(abs(before), 1e-12)
