"""A target instead of a budget: the least cost at which a metric stays within so much of float's.

The optima of the table for many budgets lie in one row, from the widest bits down. They are
measured on validation samples, sample by sample beside the float network, in three walks down the
row: with long strides from the widest bits until one is not surely within the target, with shorter
ones from the last one that was, and with the shortest from there. A walk's places are settled
before any of them is looked at, so that it is wrong with the probability of a single test
(fixed-sequence testing, Maurer, Hothorn and Lehmacher, 1995), and all of them with as many times
that: each test has a third of what `CONFIDENCE` leaves, and it holds for the answer, however many
were measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hq_optuna.answer.intervals import CONFIDENCE, paired, quantile
from hq_optuna.errors import DataError, SettingError, TargetError
from hq_optuna.network.batches import Batches, forward
from hq_optuna.network.copies import copied
from hq_optuna.network.evaluation import Accuracy, Evaluate, Metric
from hq_optuna.network.losses import LossFunction
from hq_optuna.search import Additive, Point
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import format_cost

N_POINTS = 129
"""Budgets of the row: neighbours differ by 2 % where the dearest costs 16 times the cheapest."""

STRIDES = 32, 8, 2
"""Of the walks. They end within 4.4 % of the cheapest that holds, after 8 tests on average."""

TEST_CONFIDENCE = 1 - 2 * (1 - CONFIDENCE) / len(STRIDES)
"""Of the two-sided interval of one test, of which only the worse end counts."""

_NUMBER = r"\d+\.?\d*(?:e[+-]?\d+)?|\.\d+"
_TARGET = re.compile(rf"\s*([a-z_][\w/@]*)\s*([+-]?)\s*({_NUMBER})\s*", re.I)
_HOW = (
    "Write the metric and how much worse it may become, in its unit: 'accuracy -0.5' (points), "
    "'kl 0.01' (nats), or the study's own metric, 'mAP -0.4'."
)


@dataclass(frozen=True, slots=True)
class Target:
    """How much worse than the float network's a metric may be.

    ``worse`` is positive, in the metric's unit; of an accuracy a share, and of ``kl``, the mean
    Kullback-Leibler divergence from the float network's classes, nats. ``sign`` is what was typed.
    """

    metric: str
    worse: float
    sign: str
    text: str


def parse_target(text: str) -> Target:
    """Read a target as people type it.

    Raises:
        SettingError: The text is no target.

    Example:
        >>> parse_target("accuracy -0.5")
        Target(metric='accuracy', worse=0.005, sign='-', text='accuracy -0.5')
    """
    match = _TARGET.fullmatch(text)
    if match is None or float(match[3]) <= 0:
        raise SettingError(f"{text!r} is no target. {_HOW}")
    name, sign, value = match[1], match[2], float(match[3])
    if name.lower() == "accuracy":
        if sign == "+":
            raise SettingError(f"{text!r}: an accuracy gets worse downwards. {_HOW}")
        return Target("accuracy", value / 100, sign, text.strip())
    if name.lower() == "kl":
        if sign == "-":
            raise SettingError(f"{text!r}: a divergence gets worse upwards. {_HOW}")
        return Target("kl", value, sign, text.strip())
    return Target(name, value, sign, text.strip())


@dataclass(frozen=True, slots=True)
class Tested:
    """One assignment that was measured.

    Attributes:
        cost: Its cost.
        worse: How much worse than float it is, in the target's unit.
        at_most: The upper end of that, at `TEST_CONFIDENCE`.
        holds: Whether that is within the target.
        samples_needed: How many samples would tell, if more of them are like these; ``None`` where
            it holds, or where these say that it is not within the target.
    """

    cost: float
    worse: float
    at_most: float
    holds: bool
    samples_needed: int | None


@dataclass(frozen=True)
class Met:
    """The least cost that was found to be within a target.

    Attributes:
        config: Bits of every layer.
        cost: What they cost.
        score: Sum over layers of the predicted loss rise, nats.
        target: The target.
        n_samples: Validation samples.
        tested: All that was measured, in order.
    """

    config: BitConfig
    cost: float
    score: float
    target: Target
    n_samples: int
    tested: tuple[Tested, ...]

    @property
    def answer(self) -> Tested:
        """What was measured of the answer."""
        return next(one for one in reversed(self.tested) if one.cost == self.cost and one.holds)

    @property
    def next_needed(self) -> int | None:
        """Samples that would tell of the next cheaper assignment, where these do not."""
        lost = [one for one in self.tested if not one.holds]
        return max(lost, key=lambda one: one.cost).samples_needed if lost else None

    @property
    def sentence(self) -> str:
        """What was found, and what more samples would tell."""
        scale, unit = (100, " points") if self.target.metric == "accuracy" else (1, "")
        worse, most = (f"{scale * x:.3g}" for x in (self.answer.worse, self.answer.at_most))
        said = (
            f"{self.target.metric} {worse}{unit} worse than float on {self.n_samples} validation "
            f"samples, at most {most} with {CONFIDENCE:.0%} confidence; {len(self.tested)} "
            "assignments measured"
        )
        if self.next_needed is None:
            return said
        return (
            f"{said}. About {self.next_needed:,} samples would tell whether the next cheaper one "
            "is within the target too"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what a result says of its target."""
        return {
            "sentence": self.sentence,
            "text": self.target.text,
            "confidence": CONFIDENCE,
            "samples": self.n_samples,
            "worse": self.answer.worse,
            "at_most": self.answer.at_most,
            "next_needs_samples": self.next_needed,
            "tested": [asdict(one) for one in self.tested],
        }


Compare = Callable[[nn.Module], tuple[float, float, float]]
"""From a network: how much worse it is than float, that at most, and the variance of a sample's."""


def compare_with_float(
    target: Target, model: nn.Module, data: Batches, evaluate: Evaluate, loss_fn: LossFunction
) -> Compare:
    """Return what compares a network with the float network, sample by sample.

    ``evaluate`` is what the study measures; accuracy is of the classes that ``loss_fn`` compares.

    Raises:
        SettingError: The target is of a metric that the study does not measure, or in its good
            direction.
        DataError: The data do not tell the metric sample by sample.
    """
    original = copied(model)
    if target.metric == "accuracy":
        of = evaluate if isinstance(evaluate, Accuracy) else Accuracy(loss_fn)
        before = of.of_samples(original, data)
        if before is None:
            raise DataError(
                "A target of accuracy needs one class for each validation sample. Name the "
                "study's own metric."
            )
        return lambda network: _of_classes(before, of.of_samples(network, data))
    if target.metric == "kl":
        expected = [_log_shares(original, batch.inputs) for batch in data]
        return lambda network: _of_changes(_divergences(expected, network, data))
    if not isinstance(evaluate, Metric) or evaluate.name != target.metric:
        known = ["accuracy", "kl", *([evaluate.name] if isinstance(evaluate, Metric) else [])]
        raise SettingError(f"{target.text!r}: the metric is one of {', '.join(known)}. {_HOW}")
    if target.sign == ("+" if evaluate.higher_is_better else "-"):
        way = "downwards (-)" if evaluate.higher_is_better else "upwards (+)"
        raise SettingError(f"{target.text!r}: {evaluate.name} gets worse {way}. {_HOW}")
    first = evaluate.records(original, data)
    if first is None:
        raise DataError(
            f"The metric {evaluate.name!r} has no records of samples, so nothing tells how sure a "
            "difference is. Give it per_sample."
        )
    return lambda network: _of_records(evaluate, first, evaluate.records(network, data) or [])


def _of_classes(before: Tensor, after: Tensor | None) -> tuple[float, float, float]:
    assert after is not None, "the float network has classes"
    n, lost, gained = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    worse = (lost - gained) / n
    most = -paired(lost, gained, n, TEST_CONFIDENCE).low
    return worse, most, (lost + gained + 2) / (n + 2) - worse**2


def _of_changes(changes: Tensor) -> tuple[float, float, float]:
    from scipy.stats import t  # takes long to import

    n, mean = len(changes), float(changes.mean())
    if n < 2:
        return mean, math.inf, math.inf
    deviation = float(changes.std())
    half = float(t.ppf((1 + TEST_CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    return mean, mean + half, deviation**2


def _of_records(
    metric: Metric, first: Sequence[Any], second: Sequence[Any]
) -> tuple[float, float, float]:
    found = metric.difference(first, second)
    value, low, high = found["value"], found["low"], found["high"]
    worse, most = (-value, -low) if metric.higher_is_better else (value, high)
    error = (most - worse) / quantile(CONFIDENCE)  # which a metric's intervals have
    return worse, worse + error * quantile(TEST_CONFIDENCE), error**2 * len(first)


@torch.no_grad()
def _log_shares(network: nn.Module, inputs: Any) -> Tensor:
    outputs = forward(network, inputs)
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        raise DataError(
            "A target of kl needs a network that returns scores of classes, (samples, classes). "
            "Name accuracy or the study's own metric."
        )
    return outputs.double().log_softmax(1)


def _divergences(expected: Sequence[Tensor], network: nn.Module, data: Batches) -> Tensor:
    """Return Σ p·(log p − log q) of each sample, shape ``(N,)``."""
    pairs = zip(expected, data, strict=True)
    parts = [(p.exp() * (p - _log_shares(network, batch.inputs))).sum(1) for p, batch in pairs]
    return torch.cat(parts)


def least_cost(
    sums: Additive,
    target: Target,
    compare: Callable[[BitConfig], tuple[float, float, float]],
    n_samples: int,
    *,
    most: float = math.inf,
) -> Met:
    """Return the cheapest optimum of the table that is within a target with `CONFIDENCE`.

    It is the last that ``compare`` found to be within the target.

    Args:
        sums: The table, with what is to be least and the limits beside it.
        target: The target.
        compare: As `Compare`, of an assignment.
        n_samples: Validation samples.
        most: What it may cost.

    Raises:
        TargetError: Not even the widest bits, or the optimum at ``most``, are surely within it;
            says how many samples would do, or what they lose.
    """
    points = sums.frontier(n=N_POINTS, most=most)[::-1]  # the dearest first
    tested: list[Tested] = []
    z = quantile(TEST_CONFIDENCE)

    def holds(point: Point) -> bool:
        worse, at_most, variance = compare(point.config)
        allowed = target.worse
        needed = None
        if not at_most <= allowed and worse < allowed and math.isfinite(variance):
            needed = max(math.ceil(variance * (z / (allowed - worse)) ** 2), n_samples + 1)
        tested.append(Tested(point.cost, worse, at_most, at_most <= allowed, needed))
        return tested[-1].holds

    at = 0
    if not holds(points[at]):
        limit = "" if most == math.inf else f" within {format_cost(most, sums.model.metric)}"
        raise TargetError(
            _refusal(target, tested[-1], n_samples, limit), needed=tested[-1].samples_needed
        )
    end = len(points)
    for stride in STRIDES:
        while at + stride < end and holds(points[at + stride]):
            at += stride
        end = min(at + stride, end)  # which did not hold, or is past the end
    found = points[at]
    return Met(found.config, found.cost, found.score, target, n_samples, tuple(tested))


def _refusal(target: Target, first: Tested, n_samples: int, limit: str) -> str:
    """Say why nothing is within a target; ``limit`` is where the first that was tested is at."""
    bits = f"the best bits{limit}" if limit else "the widest bits"
    if first.samples_needed is None:
        more = "a larger budget" if limit else "more bits"
        return (
            f"Target {target.text!r}: already {bits} are {first.worse:.3g} worse than "
            f"float on {n_samples} validation samples. Allow {more}, or more loss."
        )
    return (
        f"Target {target.text!r}: {n_samples} validation samples are too few to tell. "
        f"{bits[0].upper()}{bits[1:]} are {first.worse:.3g} worse than float, and at most "
        f"{first.at_most:.3g} with {CONFIDENCE:.0%} confidence. About {first.samples_needed:,} "
        f"samples would do, or a target of {first.at_most:.2g}."
    )
