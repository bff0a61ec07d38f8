"""`plot_pareto`: predicted loss rise against cost, beside what is the best there could be."""

from __future__ import annotations

from typing import NamedTuple

import plotly.graph_objects as go
from optuna.study import Study

from hq_optuna.bit_config import BitConfig
from hq_optuna.cost import CostModel, Metric, format_cost
from hq_optuna.history import History, read_history
from hq_optuna.search import uniform_states
from hq_optuna.visualization import _figure as f

TITLE = "Predicted loss rise against cost"
N_POINTS = 17
N_COMPARED = 30
"""So many steps, and uniform assignments, at most have the optimum of their own cost drawn."""


class ParetoPoint(NamedTuple):
    """An assignment: its cost in the unit of the metric, its sum over layers (nats), its name."""

    cost: float
    score: float
    name: str


class ParetoInfo(NamedTuple):
    """Assignments by cost and by the sum of their layers' sensitivities.

    Attributes:
        exact: The Pareto curve: the least sum at each cost, the cheapest first.
        incumbents: What each closed step left.
        answer: The last of them, ``None`` before the first step is closed.
        uniform: The same bits everywhere (pinned layers keep theirs).
        limit: The budget; ``None`` where it counts something else.
        int8: Cost with 8 bits everywhere.
        metric: What is counted.
    """

    exact: tuple[ParetoPoint, ...]
    incumbents: tuple[ParetoPoint, ...]
    answer: ParetoPoint | None
    uniform: tuple[ParetoPoint, ...]
    limit: float | None
    int8: float
    metric: Metric


def pareto_info(history: History, *, n: int = N_POINTS, metric: Metric | None = None) -> ParetoInfo:
    """Solve for the exact curve and place the search's steps beside it.

    All scores are sums over layers, whatever the search ranked by: only sums can be solved exactly.

    Args:
        history: The search.
        n: Points of the curve, beside those at the cost of what is compared with it.
        metric: What is counted; by default what the search's budget counts.
    """
    space, info = history.space, history.info
    metric = info.metric if metric is None else metric
    sums = history.additive(metric)
    limit = info.limit if metric == info.metric else None
    int8 = CostModel(space.layers, metric).int8
    if sums is None:
        return ParetoInfo((), (), None, (), limit, int8, metric)

    def point(config: BitConfig, name: str) -> ParetoPoint:
        return ParetoPoint(sums.cost(config), sums.score(config), name)

    incumbents = tuple(point(r.config, f"step {r.step}") for r in history.records)
    uniform = tuple(
        point(space.config(state), f"W{w}A{a}" if w != a else f"{w} bits")
        for (w, a), state in uniform_states(space).items()
    )
    # Solved at the cost of what is compared, so that nothing seems to beat the curve.
    every = max(1, len(incumbents) // N_COMPARED)
    compared = [p.cost for p in (*uniform[:N_COMPARED], *incumbents[::every])]
    exact = sums.frontier(compared if limit is None else [*compared, limit], n=n)
    return ParetoInfo(
        exact=tuple(ParetoPoint(p.cost, p.score, "exact") for p in exact),
        incumbents=incumbents,
        answer=incumbents[-1]._replace(name="answer") if incumbents else None,
        uniform=uniform,
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
    labelled = len(info.uniform) <= 12
    drawn = (
        (
            "exact optimum",
            info.exact,
            "lines",
            {"line": {"color": f.GREEN, "width": 2.5, "shape": "hv"}},
        ),
        (
            "steps of the search",
            info.incumbents,
            "lines+markers",
            {"line": {"color": f.BLUE, "width": 1}, "marker": {"size": 5}},
        ),
        (
            "uniform bits",
            info.uniform,
            "markers+text" if labelled else "markers",
            {
                "marker": {"color": f.ORANGE, "symbol": "diamond", "size": 9},
                "textposition": "top right",
            },
        ),
        (
            "answer",
            () if info.answer is None else (info.answer,),
            "markers",
            {"marker": {"color": f.VERMILION, "symbol": "star", "size": 15}},
        ),
    )
    shown: list[float] = []
    for name, points, mode, look in drawn:
        # A log axis has no zero, as of assignments that leave everything in float.
        positive = [p for p in points if p.score > 0]
        if not positive:
            continue
        shown += [p.score for p in positive]
        figure.add_scatter(
            x=[p.cost / factor for p in positive],
            y=[p.score for p in positive],
            name=name,
            mode=mode,
            text=[f.label(p.name) for p in positive],
            customdata=[p.cost / info.int8 for p in positive],
            hovertemplate="%{text}: %{y:.4g} nats<br>"
            f"%{{x:.4g}} {unit}, %{{customdata:.1%}} of all-8-bit",
            **look,
        )
    f.style(figure, TITLE, 380)
    if info.limit is not None:
        figure.add_vline(x=info.limit / factor, line={"color": f.VERMILION, "dash": "dash"})
        figure.add_annotation(
            text=f"budget {format_cost(info.limit, info.metric)}",
            **{"x": info.limit / factor, "xref": "x", "xanchor": "left"},
            **{"y": 1, "yref": "paper", "yanchor": "top", "showarrow": False, "xshift": 4},
        )
    figure.update_yaxes(
        type="log",
        title={"text": "sum over layers (nats)"},
        exponentformat="power",
        range=f.log_range(shown),
    )
    figure.update_xaxes(title={"text": f"cost ({unit})"}, rangemode="tozero")
    return figure


def plot_pareto(study: Study, *, n: int = N_POINTS) -> go.Figure:
    """Plot the exact Pareto curve, the steps of the search, its answer, and uniform bits.

    Args:
        study: A study of a bit search, finished or not. Nothing is scored again.
        n: Points of the exact curve.

    Raises:
        ResumeError: The study is not a bit search.
    """
    return pareto_figure(pareto_info(read_history(study), n=n))
