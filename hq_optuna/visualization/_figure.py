"""What all pictures share: colours, axes of layers and costs, look."""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from hq_optuna.cost import Metric, format_cost
from hq_optuna.layers import FLOAT_BITS
from hq_optuna.space import SearchSpace

logger = logging.getLogger(__name__)

# Okabe & Ito (2008): told apart with any colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY = "#767676"
"""Text: the one grey with a contrast of 4.5 to 1 on white that also reads on a dark page."""

GRID = "rgba(128,128,128,0.25)"
FLOAT_COLOUR = "#b8b8b8"

TITLE_PX, PANEL_TITLE_PX, BOTTOM_PX = 56, 26, 56
"""Room for the title and the titles of panels above the plot area, and for the axis below."""

_UNITS = {
    **{"BOPs": 1.0, "kBOPs": 1e3, "MBOPs": 1e6, "GBOPs": 1e9, "TBOPs": 1e12},
    **{"bytes": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
}


def cost_unit(reference: float, metric: Metric) -> tuple[float, str]:
    """Return ``(factor, unit)`` in which `format_cost` writes ``reference``.

    Example:
        >>> cost_unit(24e9, "bops")
        (1000000000.0, 'GBOPs')
    """
    unit = format_cost(reference, metric).split()[1]
    return _UNITS[unit], unit


def finite(value: float) -> float | None:
    """Return the value, or ``None`` where it was not measured (NaN) or is infinite."""
    return value if math.isfinite(value) else None


def bits_text(bits: int) -> str:
    """Return the bits for people: ``"float"`` for 32."""
    return "float" if bits == FLOAT_BITS else str(bits)


def levels(space: SearchSpace) -> tuple[int, ...]:
    """Return all bits that a layer of the space may have, fewest first."""
    found = {bits for variable in space.variables for bits in variable.bits}
    found |= {bits for pair in space.start.values() for bits in pair}
    return tuple(sorted(found))


def bit_colours(bits: Sequence[int]) -> list[str]:
    """Return one colour per number of bits: fewer bits are brighter, float is grey.

    The colours are equal steps of Viridis, whose lightness falls evenly, so that they keep their
    order for colour-blind readers and in black and white.
    """
    integer = [b for b in bits if b != FLOAT_BITS]
    places = [1 - i / max(1, len(integer) - 1) for i in range(len(integer))]
    colours = iter(sample_colorscale("Viridis", [0.1 + 0.9 * place for place in places]))
    return [FLOAT_COLOUR if b == FLOAT_BITS else next(colours) for b in bits]


def layers_height(n_layers: int) -> int:
    """Return the height in pixels of a plot area with one row per layer.

    22 pixels a row, narrowing to 11 (the least a label needs), 2000 pixels in all.
    """
    return max(120, min(22 * n_layers, max(660, 11 * n_layers), 2000))


def layers_axis(names: Sequence[str], *, characters: int = 40) -> dict[str, Any]:
    """Return the settings of a y axis with a row per name, the first on top.

    Rows are addressed by `label`. Where rows are narrower than text, every second (third, …) label
    is shown; longer labels than ``characters`` are cut.
    """
    labels = [label(name) for name in names]
    row = layers_height(len(names)) / max(1, len(names))
    every = math.ceil(11 / row)
    return {
        "type": "category",  # layers of a Sequential are called "0", "1", …
        "categoryorder": "array",
        "categoryarray": labels,
        "tickmode": "array",
        "tickvals": labels[::every],
        "ticktext": [label(shorten(name, characters)) for name in names[::every]],
        "tickfont": {"size": max(9, min(12, round(row) - 2))},
        "range": [len(names) - 0.5, -0.5],
        "automargin": True,
        "showgrid": False,
    }


def label(name: str) -> str:
    """Return a name as plotly text, which knows HTML."""
    return html.escape(name, quote=False)


def shorten(name: str, characters: int = 40) -> str:
    """Return the name, its beginning cut where it is long: the end tells layers apart."""
    return name if len(name) <= characters else "…" + name[1 - characters :]


def step_axis(steps: Sequence[int]) -> dict[str, Any]:
    """Return the settings of an x axis of steps: whole numbers only."""
    return {
        "title": {"text": "step"},
        "tickformat": "d",
        **({"dtick": 1} if len(steps) <= 12 else {"nticks": 12}),
    }


def log_range(values: Iterable[float]) -> list[float] | None:
    """Return a range of a log axis that gives the positive values room, ``None`` without any."""
    positive = [value for value in values if value > 0]
    if not positive:
        return None
    low, high = math.log10(min(positive)), math.log10(max(positive))
    room = max(0.15, 0.06 * (high - low))
    return [low - room, high + room]


def style(figure: go.Figure, title: str, height: int) -> go.Figure:
    """Give the figure its title, height (of the plot area, pixels) and the look of all figures.

    Annotations that are there by now are the titles of panels.
    """
    top = TITLE_PX + (PANEL_TITLE_PX if figure.layout.annotations else 0)
    figure.update_layout(
        title={
            **{"text": title, "x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 16}},
            **{"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 20}},
        },
        height=height + top + BOTTOM_PX,
        margin={"t": top, "b": BOTTOM_PX, "l": 70, "r": 20},
        font={"color": GREY, "size": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GRID, "activecolor": GREY},
        colorway=[BLUE, ORANGE, GREEN, VERMILION],
    )
    figure.update_annotations(font={"size": 13})
    axes = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID}
    figure.update_xaxes(**axes)
    figure.update_yaxes(**axes)
    return figure


def empty(title: str, reason: str) -> go.Figure:
    """Return a figure that says why it shows nothing, and log it."""
    logger.warning("%s: %s", title, reason)
    figure = style(go.Figure(), title, 120)
    figure.add_annotation(
        text=label(reason), showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper"
    )
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)
