"""`plot_bits`: which layer has how many bits after which step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from optuna.study import Study
from plotly.subplots import make_subplots

from hq_optuna.protocol.history import History, read_history
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.palette import bit_colours, bits_text

TITLE = "Bits of each layer over the steps"

Rows = tuple[tuple[int, ...], ...]
"""Bits by layer and step, shape ``(L, S)``."""


class BitsInfo(NamedTuple):
    """Bits of the incumbents after each closed step, and the levels they may be at."""

    layers: tuple[str, ...]  # in network order
    steps: tuple[int, ...]
    weight_bits: Rows
    activation_bits: Rows
    levels: tuple[int, ...]  # fewest bits first


def bits_info(history: History) -> BitsInfo:
    """Read the bits of all layers after every closed step."""
    names = tuple(layer.name for layer in history.space.layers)
    configs = [record.config for record in history.records]
    return BitsInfo(
        layers=names,
        steps=tuple(record.step for record in history.records),
        weight_bits=tuple(tuple(c[name].weight_bits for c in configs) for name in names),
        activation_bits=tuple(tuple(c[name].activation_bits for c in configs) for name in names),
        levels=history.space.levels,
    )


def bits_figure(info: BitsInfo) -> go.Figure:
    """Draw a heat map, layers × steps.

    Activations get a panel of their own where they differ from the weights; when all have the same
    bits in every step, the title says it in words instead.
    """
    if not info.steps:
        return f.empty(TITLE, "No step is closed yet.")
    title, panels = _panels(info)
    figure = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=list(panels) if len(panels) > 1 else None,
    )
    place = {bits: i for i, bits in enumerate(info.levels)}
    for column, (name, rows) in enumerate(panels.items(), start=1):
        part = f" ({name})" if len(panels) > 1 else ""
        figure.add_heatmap(
            x=list(info.steps),
            y=[f.label(layer) for layer in info.layers],
            z=np.array([[place[bits] for bits in row] for row in rows], dtype=np.uint8),
            customdata=np.array(rows, dtype=np.uint8),
            hovertemplate=f"%{{y}}<br>step %{{x}}<br>%{{customdata}} bits{part}<extra></extra>",
            coloraxis="coloraxis",
            **{"row": 1, "col": column},
        )
    height = f.layers_height(len(info.layers))
    f.style(figure, title, height)
    figure.update_layout(coloraxis=_colours(info.levels, height))
    figure.update_xaxes(showgrid=False, zeroline=False, **f.step_axis(info.steps))
    figure.update_yaxes(**f.layers_axis(info.layers))
    return figure


def _panels(info: BitsInfo) -> tuple[str, dict[str, Rows]]:
    """Return the title of the figure, and the bits that each panel shows, by its name."""
    weights = {"weights": info.weight_bits}
    if info.activation_bits == info.weight_bits:
        return TITLE, weights
    found = {bits for row in info.activation_bits for bits in row}
    if len(found) > 1:
        return TITLE, {**weights, "activations": info.activation_bits}
    (bits,) = found
    kept = "in float" if bits == FLOAT_BITS else f"at {bits} bits"
    return f"{TITLE} (weights; activations stay {kept})", weights


def _colours(levels: tuple[int, ...], height: int) -> dict[str, Any]:
    n = len(levels)
    # Two stops of the same colour per level make steps of the scale.
    scale = [(edge / n, c) for i, c in enumerate(bit_colours(levels)) for edge in (i, i + 1)]
    bar = f.colour_bar("bits", range(n), list(map(bits_text, levels)), min(height, 60 + 24 * n))
    return {"colorscale": scale, "cmin": -0.5, "cmax": n - 0.5, "colorbar": bar}


def plot_bits(study: Study, *, dark: bool | None = None) -> go.Figure:
    """Plot the bits of every layer after every step as a heat map.

    Args:
        study: A study of a bit search, finished or not.
        dark: For a dark page or a light one; by default the figure stands on either.

    Raises:
        ResumeError: The study is not a bit search.
    """
    return f.on_page(bits_figure(bits_info(read_history(study))), dark)
