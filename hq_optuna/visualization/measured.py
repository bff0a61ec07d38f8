"""`plot_pareto(study, measured="accuracy")`: what was measured on validation data, against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from hq_optuna import attributes
from hq_optuna.protocol.history import History
from hq_optuna.space.cost import Metric
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.palette import GREY, ORANGE, SKY, VERMILION

ACCURACY = "accuracy"
_LOOK = {
    attributes.ANSWER: ("answer", VERMILION, "star", 15),
    attributes.UNIFORM: ("uniform bits", ORANGE, "diamond", 10),
}


class MeasuredPoint(NamedTuple):
    """An assignment that was measured."""

    method: str  # "answer", "uniform", "8 bits", …
    name: str  # for people, "3 bits"
    cost: float  # in the unit of the metric
    value: float


class MeasuredInfo(NamedTuple):
    """What was measured on validation data."""

    name: str  # "accuracy" (a share of 1), "loss", …
    points: tuple[MeasuredPoint, ...]  # the answer first
    before: float | None  # of the float network, where that was measured
    n_samples: int | None  # validation samples, where the study says
    limit: float  # the budget
    int8: float  # cost with 8 bits everywhere
    metric: Metric


def measured_info(history: History, name: str = ACCURACY) -> MeasuredInfo:
    """Read what was measured of the answer and of uniform bits.

    Raises:
        ValueError: Figures were measured, but none of this name.
    """
    rows = [row for row in history.facts.get(attributes.COMPARED, ()) if row["cost"] is not None]
    names = sorted({known for row in rows for known in row["measured"]})
    if names and name not in names:
        raise ValueError(f"Nothing called {name!r} was measured; there are {', '.join(names)}.")
    points = []
    for row in rows:
        method, said = row["method"], row["bits"]
        if name in row["measured"]:
            said = method if said is None else said
            points.append(MeasuredPoint(method, said, row["cost"], row["measured"][name]))
    info = history.info
    return MeasuredInfo(
        name=name,
        points=tuple(points),
        before=history.facts.get(f"{name}_before"),
        n_samples=history.facts.get("validation_samples"),
        limit=info.limit,
        int8=history.space.costs(info.metric).int8,
        metric=info.metric,
    )


def standard_error(share: float, n_samples: int) -> float:
    """Return the standard error of a share of independent samples.

    By Laplace's rule, one sample more of each kind: where all were right, nothing is certain yet.

    Example:
        >>> standard_error(0.5, 100), round(standard_error(1.0, 300), 4)
        (0.05, 0.0033)
    """
    share = (share * n_samples + 1) / (n_samples + 2)
    return math.sqrt(share * (1 - share) / n_samples)


def error_bars(percents: Sequence[float], errors: Sequence[float]) -> dict[str, Any]:
    """Return error bars, in points, around percentages; they end at 0 and at 100."""
    return {
        "array": [min(error, 100 - at) for at, error in zip(percents, errors, strict=True)],
        "arrayminus": [min(error, at) for at, error in zip(percents, errors, strict=True)],
        "thickness": 1,
        "width": 4,
    }


def measured_figure(info: MeasuredInfo) -> go.Figure:
    """Draw what was measured against cost, the float network and the budget as lines.

    Accuracies are in percent, with bars of one standard error.
    """
    title = f"Validation {f.label(info.name)} against cost"
    if not info.points:
        return f.empty(title, "Nothing is measured: give the search validation data.")
    factor, unit = f.cost_unit(info.int8, info.metric)
    times, suffix = (100.0, " %") if info.name == ACCURACY else (1.0, "")
    figure = go.Figure()
    for method in dict.fromkeys(p.method for p in info.points):
        _add_points(figure, info, method)
    f.style(figure, title, 320)
    figure.update_layout(showlegend=True)
    if info.before is not None:
        before = times * info.before
        figure.add_hline(y=before, line={"color": GREY, "dash": "dot", "width": 1.5})
        place = {"x": 1, "xref": "x domain", "xanchor": "right", "y": before, "yref": "y"}
        f.note(figure, f"float {before:.4g}{suffix}", yanchor="bottom", **place)
    values = [p.value for p in info.points]
    above = 2 * values[0] > min(values) + max(values)  # the budget's name stands where it is not
    place = {"y": 0, "yanchor": "bottom"} if above else {"y": 1, "yanchor": "top"}
    f.budget_line(figure, info.limit, info.metric, factor, xanchor="right", xshift=-4, **place)
    highest = max(info.limit, *(p.cost for p in info.points)) / factor
    figure.update_xaxes(title={"text": f"cost ({unit})"}, range=[0, 1.15 * highest])
    figure.update_yaxes(title={"text": f.label(info.name) + (suffix and " (%)")})
    return figure


def _add_points(figure: go.Figure, info: MeasuredInfo, method: str) -> None:
    """Draw what was measured of the assignments of one method."""
    points = [p for p in info.points if p.method == method]
    said, colour, symbol, size = _LOOK.get(method, (method, SKY, "x", 8))
    factor, unit = f.cost_unit(info.int8, info.metric)
    times, suffix = (100.0, " %") if info.name == ACCURACY else (1.0, "")
    values = [times * p.value for p in points]
    errors, spread = [0.0] * len(points), ""
    if info.name == ACCURACY and info.n_samples:
        errors = [100 * standard_error(p.value, info.n_samples) for p in points]
        spread = " ± %{customdata[1]:.1f}"
    labelled = method == attributes.UNIFORM and len(points) <= 12
    figure.add_scatter(
        x=[p.cost / factor for p in points],
        y=values,
        error_y=error_bars(values, errors) if spread else None,
        name=said,
        mode="markers+text" if labelled else "markers",
        marker={"color": colour, "symbol": symbol, "size": size},
        text=[f.label(p.name) for p in points],
        textposition="top right",
        customdata=[[p.cost / info.int8, e] for p, e in zip(points, errors, strict=True)],
        hovertemplate=f"%{{text}}: %{{y:.4g}}{spread}{suffix}<br>"
        f"%{{x:.4g}} {unit}, %{{customdata[0]:.1%}} of all-8-bit<extra></extra>",
    )
