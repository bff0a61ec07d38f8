"""`plot_pareto`: predicted loss rise against cost, beside what is the best there could be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from optuna.study import Study

from hq_optuna.protocol.history import History, read_history
from hq_optuna.search import uniform_states
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import Metric
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.measured import measured_figure, measured_info
from hq_optuna.visualization.palette import BLUE, GREEN, ORANGE, VERMILION

TITLE = "Predicted loss rise against cost"
N_POINTS = 17
N_COMPARED = 30
"""Steps, and uniform assignments, drawn at most: the exact curve is solved at the cost of each."""


class ParetoPoint(NamedTuple):
    """An assignment: its cost in the unit of the metric, its sum over layers (nats), its name."""

    cost: float
    score: float
    name: str


class ParetoInfo(NamedTuple):
    """Assignments by cost and by the sum of their layers' sensitivities."""

    exact: tuple[ParetoPoint, ...]  # the least sum at each cost, the cheapest first
    incumbents: tuple[ParetoPoint, ...]  # of closed steps, evenly picked where there are many
    answer: ParetoPoint | None  # the last of them; None before the first step is closed
    uniform: tuple[ParetoPoint, ...]  # the same bits everywhere; pinned layers keep theirs
    limit: float | None  # the budget; None where it counts something else
    int8: float  # cost with 8 bits everywhere
    metric: Metric


def pareto_info(history: History, *, n: int = N_POINTS, metric: Metric | None = None) -> ParetoInfo:
    """Solve for the exact curve and place the search's steps beside it.

    All scores are sums over layers, whatever the search ranked by: only sums can be solved exactly.

    The curve has ``n`` points, beside those at the cost of what is compared with it. The metric is
    by default that of the budget.
    """
    space, info = history.space, history.info
    metric = info.metric if metric is None else metric
    sums = history.additive(metric)
    limit = info.limit if metric == info.metric else None
    int8 = space.costs(metric).int8
    if sums is None:
        return ParetoInfo((), (), None, (), limit, int8, metric)

    def point(config: BitConfig, name: str) -> ParetoPoint:
        return ParetoPoint(sums.cost(config), sums.score(config), name)

    # Solved at the cost of whatever is drawn, so that nothing seems to beat the curve.
    every = max(1, math.ceil(len(history.records) / N_COMPARED))
    incumbents = [point(r.config, f"step {r.step}") for r in history.records[::-every][::-1]]
    states = list(uniform_states(space).items())
    every = max(1, math.ceil(len(states) / N_COMPARED))
    uniform = [
        point(space.config(state), f"W{w}A{a}" if w != a else f"{w} bits")
        for (w, a), state in states[::every]
    ]
    compared = [p.cost for p in (*uniform, *incumbents)]
    exact = sums.frontier(compared if limit is None else [*compared, limit], n=n)
    return ParetoInfo(
        exact=tuple(ParetoPoint(p.cost, p.score, "exact optimum") for p in exact),
        incumbents=tuple(incumbents),
        answer=incumbents[-1]._replace(name="answer") if incumbents else None,
        uniform=tuple(uniform),
        limit=limit,
        int8=int8,
        metric=metric,
    )


def pareto_figure(info: ParetoInfo) -> go.Figure:
    """Draw sums on a log axis against cost, with the budget as a line."""
    if not info.exact:
        return f.empty(TITLE, "The study holds no whole table of sensitivities.")
    factor, unit = f.cost_unit(info.int8, info.metric)
    figure = go.Figure()
    shown: list[float] = []
    for name, points, look in _kinds(info):
        # A log axis has no zero, as of assignments that leave everything in float.
        positive = [p for p in points if p.score > 0]
        shown += [p.score for p in positive]
        if positive:
            figure.add_scatter(
                x=[p.cost / factor for p in positive],
                y=[p.score for p in positive],
                name=name,
                text=[f.label(p.name) for p in positive],
                customdata=[p.cost / info.int8 for p in positive],
                hovertemplate="%{text}: %{y:.4g} nats<br>"
                f"%{{x:.4g}} {unit}, %{{customdata:.1%}} of all-8-bit<extra></extra>",
                **look,
            )
    f.style(figure, TITLE, 380)
    if info.limit is not None:
        place = {"xanchor": "left", "y": 1, "yanchor": "top", "xshift": 4}
        f.budget_line(figure, info.limit, info.metric, factor, **place)
    figure.update_yaxes(title={"text": "sum over layers (nats)"}, **f.log_axis(shown))
    costs = [p.cost / factor for p in (*info.exact, *info.uniform, *info.incumbents)]
    figure.update_xaxes(title={"text": f"cost ({unit})"}, range=[0, 1.09 * max(costs)])
    return figure


def _kinds(info: ParetoInfo) -> list[tuple[str, Sequence[ParetoPoint], dict[str, Any]]]:
    """Return the name, the points and the look of everything that is drawn."""
    uniform: dict[str, Any] = {
        "mode": "markers+text" if len(info.uniform) <= 12 else "markers",
        "marker": {"color": ORANGE, "symbol": "diamond", "size": 9},
        "textposition": "top right",
    }
    line = {"color": GREEN, "width": 2.5, "shape": "hv"}
    # A line between the steps would run below the stairs.
    steps = {"mode": "markers", "marker": {"color": BLUE, "size": 7}}
    kinds: list[tuple[str, Sequence[ParetoPoint], dict[str, Any]]] = [
        ("exact optimum", info.exact, {"mode": "lines", "line": line}),
        ("steps of the search", info.incumbents, steps),
        ("uniform bits", info.uniform, uniform),
    ]
    if info.answer is not None:
        met = info.limit is None or info.answer.cost <= info.limit
        name = "answer" if met else "incumbent,<br>over the budget"
        star = {"color": VERMILION, "symbol": "star", "size": 15}
        kinds.append((name, (info.answer,), {"mode": "markers", "marker": star}))
    return kinds


def plot_pareto(
    study: Study, *, n: int = N_POINTS, measured: str | None = None, dark: bool | None = None
) -> go.Figure:
    """Plot the exact Pareto curve, the steps of the search, its answer, and uniform bits.

    Args:
        study: A study of a bit search, finished or not. Nothing is scored again.
        n: Points of the exact curve.
        measured: Instead of the predicted loss rise draw what was measured on validation data,
            ``"accuracy"``, ``"loss"`` or a name of the search's own ``evaluate``: of the answer, of
            uniform bits within the budget.
        dark: For a dark page or a light one; by default the figure stands on either.

    Raises:
        ResumeError: The study is not a bit search.
        ValueError: The study holds measured figures, but none of this name.
    """
    history = read_history(study)
    if measured is not None:
        return f.on_page(measured_figure(measured_info(history, measured)), dark)
    return f.on_page(pareto_figure(pareto_info(history, n=n)), dark)
