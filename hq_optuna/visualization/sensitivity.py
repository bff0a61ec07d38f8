"""`plot_sensitivity`: what each number of bits would cost each layer in loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from optuna.study import Study
from plotly.subplots import make_subplots

from hq_optuna.protocol.history import History, read_history
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.visualization import _figure as f

TITLE = "Sensitivity of each layer"

Rows = tuple[tuple[float | None, ...], ...]


class SensitivityInfo(NamedTuple):
    """Predicted loss rise, nats, per layer and bits; ``None`` where it was not computed."""

    layers: tuple[str, ...]  # in network order (L)
    bits: tuple[int, ...]  # widest first (B)
    weights: Rows  # (L, B)
    activations: Rows  # (L, B)
    weight_bits: tuple[int, ...] | None  # the incumbent's; None before the first step is closed
    activation_bits: tuple[int, ...] | None


def sensitivity_info(history: History) -> SensitivityInfo:
    """Read the stored sensitivity table, and where the incumbent stands in it."""
    names = tuple(layer.name for layer in history.space.layers)
    table = history.sensitivity
    found = {bits for parts in table.values() for row in parts.values() for bits in row}
    bits = tuple(sorted(found - {FLOAT_BITS}, reverse=True))

    def rows(part: str) -> Rows:
        return tuple(
            tuple(f.finite(table.get(name, {}).get(part, {}).get(b, math.nan)) for b in bits)
            for name in names
        )

    config = None if history.incumbent is None else history.incumbent.config
    return SensitivityInfo(
        layers=names,
        bits=bits,
        weights=rows("weights"),
        activations=rows("activations"),
        weight_bits=None if config is None else tuple(config[n].weight_bits for n in names),
        activation_bits=None if config is None else tuple(config[n].activation_bits for n in names),
    )


def sensitivity_figure(info: SensitivityInfo) -> go.Figure:
    """Draw a heat map, layers × bits, with a log colour; circles show the incumbent's bits.

    A cell that was not computed, or whose rise is zero, stays empty.
    """
    parts = (
        ("weights", info.weights, info.weight_bits),
        ("activations", info.activations, info.activation_bits),
    )
    panels = [part for part in parts if _numbers(part[1])]
    if not panels:
        return f.empty(TITLE, "The study holds no sensitivities.")
    names = [name for name, _, _ in panels]
    figure = make_subplots(
        cols=len(panels), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=names
    )
    for column, (name, rows, chosen) in enumerate(panels, start=1):
        _add_panel(figure, column, name, rows, info)
        _add_circles(figure, column, chosen or (), info)
    height = f.layers_height(len(info.layers))
    circles = "" if info.weight_bits is None else " (○ bits of the incumbent)"
    f.style(figure, TITLE + circles, height)
    rises = [rise for _, rows, _ in panels for rise in _numbers(rows)]
    figure.update_layout(coloraxis=_colours(rises, min(height, 320)))
    bits = [str(bits) for bits in info.bits]
    axis = {"type": "category", "categoryorder": "array", "categoryarray": bits}
    figure.update_xaxes(**axis, title={"text": "bits"}, showgrid=False)
    figure.update_yaxes(**f.layers_axis(info.layers))
    return figure


def _numbers(rows: Rows) -> list[float]:
    return [rise for row in rows for rise in row if rise is not None]


def _add_panel(
    figure: go.Figure, column: int, name: str, rows: Rows, info: SensitivityInfo
) -> None:
    figure.add_heatmap(
        x=[str(bits) for bits in info.bits],
        y=[f.label(layer) for layer in info.layers],
        z=[[math.log10(v) if v is not None and v > 0 else None for v in row] for row in rows],
        customdata=[list(row) for row in rows],
        hovertemplate=f"%{{y}}<br>{name} at %{{x}} bits<br>"
        "predicted loss rise %{customdata:.3g} nats<extra></extra>",
        coloraxis="coloraxis",
        **{"row": 1, "col": column},
    )


def _add_circles(
    figure: go.Figure, column: int, chosen: Sequence[int], info: SensitivityInfo
) -> None:
    """Mark the bits that layers have, where the table holds them."""
    pairs = zip(chosen, info.layers, strict=False)
    marked = [(bits, layer) for bits, layer in pairs if bits in info.bits]
    if marked:
        line = {"color": "black", "width": 1}
        figure.add_scatter(
            x=[str(bits) for bits, _ in marked],
            y=[f.label(layer) for _, layer in marked],
            mode="markers",
            marker={"symbol": "circle", "size": 7, "color": "white", "line": line},
            **{"hoverinfo": "skip", "showlegend": False, "row": 1, "col": column},
        )


def _colours(rises: Sequence[float], px: int) -> dict[str, Any]:
    """Return a log colour axis of the rises above zero; its bar has whole decades if several."""
    positive = [rise for rise in rises if rise > 0]
    low, high = (math.log10(min(positive)), math.log10(max(positive))) if positive else (0.0, 0.0)
    decades = range(math.ceil(low), math.floor(high) + 1)
    ticks: Sequence[float] = [low, high]
    texts = [f"{10**tick:.2g}" for tick in ticks]
    if len(decades) > 1:
        ticks, texts = decades, [f.power_text(tick) for tick in decades]
    return {
        "colorscale": "Viridis",
        "cmin": low,
        "cmax": high if high > low else low + 1,
        "colorbar": f.colour_bar("nats", ticks, texts, px),
    }


def plot_sensitivity(study: Study, *, dark: bool | None = None) -> go.Figure:
    """Plot the predicted loss rise of every layer at every number of bits.

    Args:
        study: A study of a bit search, finished or not.
        dark: For a dark page or a light one; by default the figure stands on either.

    Raises:
        ResumeError: The study is not a bit search.
    """
    return f.on_page(sensitivity_figure(sensitivity_info(read_history(study))), dark)
