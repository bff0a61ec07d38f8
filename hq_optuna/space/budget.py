"""Budgets: the costs a user allows, absolute or as fractions of the all-8-bit network.

People type them as ``0.25 bops``, ``25% size_bytes``, ``24 GBOPs``, ``8 ms`` or ``128 KiB
activations``, and several of them as ``0.25 bops, 300 KiB``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

from hq_optuna.errors import BudgetError, SettingError
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.cost import METRICS, NOUNS, UNITS, CostModel, Metric, format_cost
from hq_optuna.space.search_space import SearchSpace

_MOST = 16
"""Cost of float (32 by 32 bits) over that of 8 bits, in bit operations."""

_FAR = 100
"""How far a latency may be from all that a table tells, as a factor."""

_ABSOLUTE: dict[str, tuple[Metric, float]] = {
    unit.lower(): (metric, scale)
    for metric in ("bops", "activation_bytes", "size_bytes", "latency_s")  # KiB alone is of size
    for unit, scale in UNITS[metric].items()
}
_METRICS: dict[str, Metric] = {metric: metric for metric in METRICS} | {
    "activations": "activation_bytes",
    "latency": "latency_s",
}
"""What metrics are called where a budget is typed."""
_UNITS = [unit for metric in METRICS for unit in UNITS[metric]]
_HOW = (
    f"Write a fraction of the all-8-bit cost, '0.25 bops' or '25% size_bytes' (metrics: "
    f"{', '.join(METRICS)}), or an absolute cost, '24e9 bops absolute', '24 GBOPs', '5.8 MiB', "
    f"'128 KiB activations' or '8 ms' (units: {', '.join(dict.fromkeys(_UNITS))})."
)
_BUDGET = re.compile(
    r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(%?)\s*([a-z_]*(?:\s+[a-z_]+)*)\s*", re.I
)


@dataclass(frozen=True, slots=True)
class Bound:
    """One limit of a network: what it counts, the most that may come to, and both in words."""

    model: CostModel
    limit: float
    text: str

    @property
    def metric(self) -> Metric:
        """What is counted."""
        return self.model.metric

    def cost(self, config: Mapping[str, LayerBits]) -> float:
        """Return what the assignment costs, in the metric's unit."""
        return self.model.cost(config)


@dataclass(frozen=True, slots=True, repr=False)
class Budget:
    """The most an assignment may cost: one limit, and others that hold ``beside`` it.

    Make one with `fraction` or `absolute`, and several with `together`.

    Example:
        >>> Budget.fraction(bops=0.25)
        Budget(metric='bops', value=0.25, relative=True)
        >>> Budget.absolute(size_bytes=64_000)
        Budget(metric='size_bytes', value=64000.0, relative=False)
        >>> print(Budget.together(Budget.fraction(bops=0.25), Budget.absolute(size_bytes=64_000)))
        25 % of the all-8-bit BOPs and 62.5 KiB
    """

    metric: Metric
    value: float
    relative: bool
    beside: tuple[Budget, ...] = ()

    def __repr__(self) -> str:
        more = f", beside={self.beside!r}" if self.beside else ""
        said = f"metric={self.metric!r}, value={self.value!r}, relative={self.relative!r}"
        return f"Budget({said}{more})"

    @classmethod
    def together(cls, *budgets: Budget) -> Budget:
        """Return a budget that holds all the limits given.

        Raises:
            ValueError: There are none, or two limit the same metric.
        """
        every = [each for budget in budgets for each in budget.all]
        counted = [each.metric for each in every]
        for metric in counted:
            if counted.count(metric) > 1:
                both = " and ".join(str(each) for each in every if each.metric == metric)
                raise ValueError(f"Two limits of {metric}: {both}. Keep the lower one.")
        if not every:
            raise ValueError("A budget has at least one limit, for example bops=0.25.")
        return replace(every[0], beside=tuple(every[1:]))

    @classmethod
    def fraction(cls, **limit: float) -> Budget:
        """Allow a fraction of the cost with 8 bits everywhere: ``bops=0.25``."""
        return cls._one(limit, relative=True)

    @classmethod
    def absolute(cls, **limit: float) -> Budget:
        """Allow an absolute cost: ``bops=24e9`` or ``size_bytes=64_000``."""
        return cls._one(limit, relative=False)

    @classmethod
    def _one(cls, limit: dict[str, float], *, relative: bool) -> Budget:
        if len(limit) != 1:
            raise ValueError(
                f"A budget limits one metric, for example bops=0.25; got {sorted(limit) or 'none'}."
            )
        ((name, value),) = limit.items()
        metric = next((metric for metric in METRICS if metric == name), None)
        if metric is None:
            raise ValueError(f"A budget limits one of {', '.join(METRICS)}; got {name!r}.")
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"A budget is a positive number; got {metric}={value!r}.")
        if relative and value > _MOST:
            raise ValueError(
                f"{metric}={value!r} would be {100 * value:g} % of the cost with 8 bits "
                f"everywhere, and {100 * _MOST} % is that of float. For a share write 0.25; for a "
                "number of bit operations or bytes use Budget.absolute."
            )
        return cls(metric, float(value), relative)

    @property
    def all(self) -> tuple[Budget, ...]:
        """The limits, one by one."""
        return (replace(self, beside=()), *self.beside)

    def limit(self, space: SearchSpace) -> float:
        """Return the absolute value of the first limit for this network, in its metric's unit.

        Raises:
            SpaceError: The space does not know what the metric counts.
            BudgetError: A latency that is off by so much that its unit must be wrong.
        """
        if not self.relative:
            if self.metric == "latency_s":
                self._check_unit(space)
            return self.value
        limit = self.value * space.costs(self.metric).int8
        # Costs are whole bit operations or eighths of a byte. A fraction made by dividing a cost by
        # the all-8-bit cost shall mean that cost, and not the float just below it.
        nearest = round(8 * limit) / 8
        return nearest if math.isclose(limit, nearest, rel_tol=1e-12) else limit

    def _check_unit(self, space: SearchSpace) -> None:
        """Refuse a latency far from all that the table tells, which another unit explains."""
        model = space.costs(self.metric)
        low, high = (model.cost(space.config(x)) for x in (space.bottom, space.top))
        if not low / _FAR <= self.value <= high * _FAR:
            raise BudgetError(
                f"Budget {self} is far from all that the latency table tells, "
                f"{format_cost(low, self.metric)} to {format_cost(high, self.metric)}. Is one of "
                "the units wrong by 1,000? A table says s, ms or us, and so does a budget.",
                limit=self.value,
                minimum=low,
            )

    def bounds(self, space: SearchSpace) -> tuple[Bound, ...]:
        """Return all limits for this network, in the order given."""
        return tuple(Bound(space.costs(b.metric), b.limit(space), str(b)) for b in self.all)

    @property
    def text(self) -> str:
        """The budget as it is typed: ``"0.25 bops"``, ``"64000.0 size_bytes absolute"``."""
        return ", ".join(
            f"{b.value!r} {b.metric}{'' if b.relative else ' absolute'}" for b in self.all
        )

    def __str__(self) -> str:
        return " and ".join(
            f"{100 * b.value:.6g} % of the all-8-bit {NOUNS[b.metric]}"
            if b.relative
            else format_cost(b.value, b.metric)
            + (" of activations" if b.metric == "activation_bytes" else "")
            for b in self.all
        )


def parse_budget(text: str | float | Budget | Sequence[str | float | Budget]) -> Budget:
    """Read a budget as people type it; a `Budget` is returned as it is.

    Several limits are a sequence, or stand in one text with commas between them.

    A number up to 1, or one with ``%``, is a fraction of the all-8-bit cost; what has a unit or the
    word ``absolute`` is absolute.

    Raises:
        SettingError: The text is no budget, or could mean either; two limits of one metric.

    Example:
        >>> parse_budget("25% size_bytes")
        Budget(metric='size_bytes', value=0.25, relative=True)
        >>> parse_budget("24 GBOPs") == parse_budget("24e9 bops absolute")
        True
        >>> len(parse_budget("0.25 bops, 300 KiB").all)
        2
    """
    if isinstance(text, Budget):
        return text
    several = text.split(",") if isinstance(text, str) else text
    if isinstance(several, Sequence) and len(several) != 1:
        try:
            return Budget.together(*map(parse_budget, several))
        except ValueError as error:
            raise SettingError(str(error)) from None
    return _parse(several[0] if isinstance(several, Sequence) else several)


def _parse(text: str | float | Budget) -> Budget:
    """Read a single limit."""
    if isinstance(text, Budget):
        return text
    said = repr(str(text))
    match = _BUDGET.fullmatch(str(text))
    if match is None:
        raise SettingError(f"{said} is no budget. {_HOW}")
    value, percent, words = float(match[1]), bool(match[2]), match[3].lower().split()
    if not math.isfinite(value) or value <= 0:
        raise SettingError(f"A budget is a positive number; got {said}. {_HOW}")
    absolute = words[-1:] == ["absolute"]
    words = words[:-1] if absolute else words
    metric, scale = _METRICS["bops"], 1.0
    units = [word for word in words[:1] if word in _ABSOLUTE]
    if units:
        (metric, scale), absolute = _ABSOLUTE[units[0]], True
    if named := words[len(units) :]:
        given = _METRICS.get(named[0])
        if len(named) > 1:
            raise SettingError(f"{said} is no budget. {_HOW}")
        if given is None and absolute:
            raise SettingError(f"{said} is no absolute budget. {_HOW}")
        if given is None:
            what = match[3].split()[len(units)]
            raise SettingError(f"{what!r} in {said} is neither metric nor unit. {_HOW}")
        if units and units[0] not in (unit.lower() for unit in UNITS[given]):
            raise SettingError(f"{said} mixes a unit with another metric. {_HOW}")
        metric = given
    if absolute:
        if percent:
            raise SettingError(f"{said} is no absolute budget. {_HOW}")
        return Budget.absolute(**{metric: value * scale})
    if value > 1 and not percent:
        raise SettingError(f"{said} is more than all of the all-8-bit cost. {_HOW}")
    return Budget.fraction(**{metric: value / 100 if percent else value})
