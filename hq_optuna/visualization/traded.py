"""The picture of ``hq-optuna pareto`` for two costs, or for a cost and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from hq_optuna.space.cost import NOUNS, Metric
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.palette import BLUE, GREEN, GREY


class TradedInfo(NamedTuple):
    """A curve of two figures, the cheapest first."""

    costs: Sequence[float]
    others: Sequence[float]
    metric: Metric
    other: str  # one of the metrics, or the name of what was measured
    int8: float  # cost with 8 bits everywhere
    int8_other: float | None = None  # the other cost with 8 bits everywhere
    before: float | None = None  # what was measured of the float network


def traded_figure(info: TradedInfo) -> go.Figure:
    """Draw a cost against another, or what was measured against a cost."""
    factor, unit = f.cost_unit(info.int8, info.metric)
    noun = next((NOUNS[m] for m in NOUNS if m == info.other), info.other)
    title = f"{noun[0].upper()}{noun[1:]} against {NOUNS[info.metric]}"
    other_factor, other_unit = 1.0, ""
    if info.int8_other is not None:
        metric = next(m for m in NOUNS if m == info.other)
        other_factor, other_unit = f.cost_unit(info.int8_other, metric)
    figure = go.Figure()
    is_cost = info.int8_other is not None
    figure.add_scatter(
        x=[cost / factor for cost in info.costs],
        y=[value / other_factor for value in info.others],
        name="exact" if is_cost else "measured",
        mode="lines+markers" if is_cost else "markers",
        line={"color": GREEN, "width": 2.5, "shape": "hv"} if is_cost else None,
        marker={"color": GREEN if is_cost else BLUE, "size": 7},
        customdata=[cost / info.int8 for cost in info.costs],
        hovertemplate=f"%{{y:.4g}} {other_unit}<br>%{{x:.4g}} {unit}, "
        "%{customdata:.1%} of all-8-bit<extra></extra>",
    )
    f.style(figure, title, 380)
    if info.before is not None:
        figure.add_hline(y=info.before, line={"color": GREY, "dash": "dot", "width": 1.5})
    figure.update_xaxes(title={"text": f"{NOUNS[info.metric]} ({unit})"})
    figure.update_yaxes(title={"text": f"{noun} ({other_unit})" if other_unit else f.label(noun)})
    return figure
