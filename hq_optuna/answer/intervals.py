"""Intervals of accuracies: of one network, and of the difference of two on the same samples.

Two networks that were measured on the same samples are compared sample by sample: what both get
right, or both wrong, says nothing about which is better. The interval of the difference is
therefore far narrower than those of the two accuracies would suggest.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95

METHODS = "accuracies: Wilson; differences: paired, Bonett and Price (2012), over the same samples"
"""How the intervals of a report are made, in words."""


class Interval(NamedTuple):
    """Lower and upper end, as fractions."""

    low: float
    high: float


def wilson(right: int, n: int) -> Interval:
    """Return Wilson's interval of a proportion: ``right`` samples of ``n``, at least 1.

    It keeps its coverage near 0 and 1 and for few samples, where ± one standard error does not.

    Example:
        >>> low, high = wilson(81, 263)
        >>> f"{low:.4f} {high:.4f}"
        '0.2553 0.3662'
    """
    from scipy.stats import binomtest  # takes longer to import than a report to write

    found = binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high))


def paired(lost: float, gained: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the interval of the difference (second − first) of two accuracies on ``n`` samples.

    Only the first gets ``lost`` samples right, only the second ``gained``; means where there are
    several seeds. Bonett & Price (2012), "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data", J. Educ. Behav. Stat. 37: the plain interval with
    one sample more of each kind.

    Example:
        >>> low, high = paired(lost=4, gained=1, n=300)
        >>> f"{low:.4f} {high:.4f}"
        '-0.0271 0.0072'
    """
    only_first, only_second = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    difference = only_second - only_first
    error = quantile(confidence) * math.sqrt((only_first + only_second - difference**2) / (n + 2))
    return Interval(max(difference - error, -1.0), min(difference + error, 1.0))


def quantile(confidence: float) -> float:
    """Return the normal quantile of a two-sided confidence.

    Example:
        >>> round(quantile(0.95), 4)
        1.96
    """
    return NormalDist().inv_cdf((1 + confidence) / 2)
