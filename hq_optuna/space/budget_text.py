"""Budgets as people type them: ``0.25 bops``, ``25% size_bytes``, ``24 GBOPs``."""

from __future__ import annotations

import math
import re

from hq_optuna.errors import SettingError
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import METRICS

_ABSOLUTE_UNITS: dict[str, tuple[str, float]] = {
    **{"TBOPs": ("bops", 1e12), "GBOPs": ("bops", 1e9), "MBOPs": ("bops", 1e6)},
    **{"kBOPs": ("bops", 1e3), "GiB": ("size_bytes", 2.0**30), "MiB": ("size_bytes", 2.0**20)},
    **{"KiB": ("size_bytes", 2.0**10), "bytes": ("size_bytes", 1.0)},
}
_BUDGET = re.compile(
    r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(%?)\s*([a-z_]*?)\s*(\babsolute)?\s*", re.I
)


def parse_budget(text: str | float | Budget) -> Budget:
    """Read a budget as typed; a `Budget` is returned as it is.

    A number up to 1, or one with ``%``, is a fraction of the all-8-bit cost; what has a unit or the
    word ``absolute`` is absolute.

    Raises:
        SettingError: The text is no budget, or could mean either.

    Example:
        >>> parse_budget("25% size_bytes")
        Budget(metric='size_bytes', value=0.25, relative=True)
        >>> parse_budget("24 GBOPs") == parse_budget("24e9 bops absolute")
        True
    """
    if isinstance(text, Budget):
        return text
    how = (
        f"Write a fraction of the all-8-bit cost, '0.25 bops' or '25% size_bytes' (metrics: "
        f"{', '.join(METRICS)}), or an absolute cost, '24e9 bops absolute', '24 GBOPs' or "
        f"'5.8 MiB' (units: {', '.join(_ABSOLUTE_UNITS)})."
    )
    match = _BUDGET.fullmatch(str(text))
    if match is None:
        raise SettingError(f"{str(text)!r} is no budget. {how}")
    value, percent, unit = float(match[1]), bool(match[2]), match[3].lower()
    if not math.isfinite(value) or value <= 0:
        raise SettingError(f"A budget is a positive number; got {str(text)!r}. {how}")
    scales = {name.lower(): scale for name, scale in _ABSOLUTE_UNITS.items()}
    if unit in scales or match[4]:
        metric, scale = scales.get(unit, (unit or "bops", 1.0))
        if percent or metric not in METRICS:
            raise SettingError(f"{str(text)!r} is no absolute budget. {how}")
        return Budget.absolute(**{metric: value * scale})
    metric = unit or "bops"
    if metric not in METRICS:
        raise SettingError(f"{match[3]!r} in {str(text)!r} is neither metric nor unit. {how}")
    if value > 1 and not percent:
        raise SettingError(f"{str(text)!r} is more than all of the all-8-bit cost. {how}")
    return Budget.fraction(**{metric: value / 100 if percent else value})
