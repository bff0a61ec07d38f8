"""`plot_cost_share`: which layers the cost comes from, before and after."""

from __future__ import annotations

from typing import NamedTuple

import plotly.graph_objects as go
from optuna.study import Study

from hq_optuna.protocol.history import History, read_history
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import Metric, format_cost, shares
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.palette import BLUE, GREY

TITLE = "Share of each layer in the cost"


class CostShareInfo(NamedTuple):
    """Cost per layer, in the unit of the metric."""

    layers: tuple[str, ...]  # in network order
    int8: tuple[float, ...]  # with 8 bits everywhere
    incumbent: tuple[float, ...] | None  # None before the first step is closed
    metric: Metric


def cost_share_info(history: History) -> CostShareInfo:
    """Compute the cost of each layer at all-8-bit and for the incumbent."""
    space, metric = history.space, history.info.metric
    model = space.costs(metric)
    names = tuple(layer.name for layer in space.layers)
    incumbent = None
    if history.incumbent is not None:
        incumbent = tuple(model.per_layer(history.incumbent.config).tolist())
    int8 = tuple(model.per_layer(BitConfig.uniform(names, 8, 8)).tolist())
    return CostShareInfo(names, int8, incumbent, metric)


def cost_share_figure(info: CostShareInfo) -> go.Figure:
    """Draw two bars a layer: its share in the all-8-bit cost, and in the incumbent's."""
    figure = go.Figure()
    bars = [("all 8 bits", info.int8, GREY), ("incumbent", info.incumbent, BLUE)]
    for name, costs, colour in bars:
        if costs is None:
            continue
        total = format_cost(sum(costs), info.metric)
        figure.add_bar(
            x=shares(costs),
            y=[f.label(layer) for layer in info.layers],
            name=f"{name}<br>({total})",
            orientation="h",
            marker={"color": colour, "line": {"width": 0}},
            customdata=[format_cost(cost, info.metric) for cost in costs],
            hovertemplate=f"%{{y}}<br>{name}: %{{x:.1%}} of {total} (%{{customdata}})"
            "<extra></extra>",
        )
    f.style(figure, TITLE, f.layers_height(len(info.layers)))
    figure.update_layout(
        barmode="group", showlegend=True, bargap=0.25, legend={"traceorder": "normal"}
    )
    figure.update_xaxes(title={"text": "share of the total"}, tickformat=".2~%", rangemode="tozero")
    figure.update_yaxes(**f.layers_axis(info.layers))
    return figure


def plot_cost_share(study: Study, *, dark: bool | None = None) -> go.Figure:
    """Plot each layer's share of the cost with 8 bits everywhere and for the incumbent.

    Args:
        study: A study of a bit search, finished or not.
        dark: For a dark page or a light one; by default the figure stands on either.

    Raises:
        ResumeError: The study is not a bit search.
    """
    return f.on_page(cost_share_figure(cost_share_info(read_history(study))), dark)
