"""What all pictures share: axes of layers and costs, budget lines, notes, look."""

from __future__ import annotations

import html
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from hq_optuna.space.cost import UNITS, Metric, format_cost
from hq_optuna.visualization.palette import BLUE, GREEN, GREY, GRID, ORANGE, PAGES, VERMILION

logger = logging.getLogger(__name__)

TITLE_PX, PANEL_TITLE_PX, BOTTOM_PX = 64, 26, 56
"""Room for the title and the titles of panels above the plot area, and for the axis below."""

CLEAR = "rgba(0,0,0,0)"


def cost_unit(reference: float, metric: Metric) -> tuple[float, str]:
    """Return ``(factor, unit)`` in which `format_cost` writes ``reference``.

    Example:
        >>> cost_unit(24e9, "bops")
        (1000000000.0, 'GBOPs')
    """
    unit = format_cost(reference, metric).split()[1]
    return UNITS[metric].get(unit, 1.0), unit  # below a thousand BOPs they are written as such


def finite(value: float) -> float | None:
    """Return the value, or ``None`` where it was not measured (NaN) or is infinite."""
    return value if math.isfinite(value) else None


def layers_height(n_layers: int) -> int:
    """Return the height in pixels of a plot area with one row per layer.

    22 pixels a row, narrowing to 11 (the least a label needs), 2000 pixels in all.
    """
    return max(120, min(22 * n_layers, max(660, 11 * n_layers), 2000))


def layers_axis(names: Sequence[str], shown: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the settings of a y axis with a row per name, the first on top.

    Rows are addressed by the `label` of their name; the axis shows ``shown``, by default
    `short_names`. Where rows are narrower than text, only every second (third, …) is shown.
    """
    labels = [label(name) for name in names]
    short = [label(name) for name in (short_names(names) if shown is None else shown)]
    row = layers_height(len(names)) / max(1, len(names))
    every = math.ceil(11 / row)
    return {
        # Layers of a Sequential are called "0", "1", …
        **{"type": "category", "categoryorder": "array", "categoryarray": labels},
        **{"tickmode": "array", "tickvals": labels[::every], "ticktext": short[::every]},
        "tickfont": {"size": max(9, min(12, round(row) - 2))},
        **{"range": [len(names) - 0.5, -0.5], "automargin": True, "showgrid": False},
    }


def label(name: str) -> str:
    """Return a name as plotly text, which knows HTML."""
    return html.escape(name, quote=False)


def shorten(name: str, characters: int = 40) -> str:
    """Return the name, its middle cut where it is long: beginning and end tell layers apart."""
    if len(name) <= characters:
        return name
    head = characters // 2
    return name[:head] + "…" + name[head + 1 - characters :]


def short_names(names: Sequence[str], characters: int = 40) -> list[str]:
    """Return names of at most ``characters`` that still tell each other apart.

    Where one is too long, all lose the dotted beginning they share; what is still too long is cut
    in the middle. Those that are the same then get their places in the list.

    Example:
        >>> short_names(["net.body.block1.conv", "net.body.block2.conv"], 14)
        ['…block1.conv', '…block2.conv']
    """
    if len(names) > 1 and max(map(len, names)) > characters:
        parents = zip(*(name.split(".")[:-1] for name in names), strict=False)
        shared = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, parents))
        n = sum(len(parts[0]) + 1 for parts in shared)
        names = [("…" if n else "") + name[n:] for name in names]
    found = [shorten(name, characters) for name in names]
    times = Counter(found)
    places = [f"·{i}" for i in range(1, len(names) + 1)]
    return [
        text if times[text] == 1 or name == text else shorten(name, characters - len(place)) + place
        for name, text, place in zip(names, found, places, strict=True)
    ]


def step_axis(steps: Sequence[int]) -> dict[str, Any]:
    """Return the settings of an x axis of steps: whole numbers only."""
    ticks = {"dtick": 1} if len(steps) <= 12 else {"nticks": 12}
    return {"title": {"text": "step"}, "tickformat": "d", **ticks}


def log_range(values: Iterable[float]) -> list[float] | None:
    """Return a range of a log axis that gives the positive values room, ``None`` without any."""
    positive = [value for value in values if value > 0]
    if not positive:
        return None
    low, high = math.log10(min(positive)), math.log10(max(positive))
    room = max(0.15, 0.06 * (high - low))
    return [low - room, high + room]


def log_axis(values: Iterable[float]) -> dict[str, Any]:
    """Return the settings of a log axis: `log_range`, and ticks that stay apart in a low panel.

    Powers of ten alone where there are several; over less also their doubles and fives.
    """
    ends = log_range(values)
    decades = math.inf if ends is None else ends[1] - ends[0]
    return {
        **{"type": "log", "range": ends, "exponentformat": "power"},
        "dtick": 1 if decades > 1.6 else "D2",
    }


def colour_bar(title: str, ticks: Sequence[float], texts: Sequence[str], px: int) -> dict[str, Any]:
    """Return the settings of a colour bar that begins at the top and is ``px`` pixels long."""
    return {
        **{"title": {"text": title}, "tickvals": list(ticks), "ticktext": list(texts)},
        **{"lenmode": "pixels", "len": px, "thickness": 16, "outlinewidth": 0},
        **{"y": 1, "yanchor": "top"},
    }


def power_text(exponent: int) -> str:
    """Return a power of ten as plotly text."""
    return f"10<sup>{exponent}</sup>".replace("-", "−")


def note(figure: go.Figure, text: str, **place: Any) -> None:
    """Add a text to the figure; after `style`, which takes earlier ones for titles of panels."""
    figure.add_annotation(text=text, showarrow=False, **place)


def budget_line(
    figure: go.Figure, limit: float, metric: Metric, factor: float, **place: Any
) -> None:
    """Draw the budget across an x axis of costs, in the unit of ``factor``, with its name."""
    figure.add_vline(x=limit / factor, line={"color": VERMILION, "dash": "dash"})
    text = f"budget {format_cost(limit, metric)}"
    note(figure, text, x=limit / factor, xref="x", yref="paper", **place)


def style(figure: go.Figure, title: str, height: int) -> go.Figure:
    """Give the figure its title, height (of the plot area, pixels) and the look of all figures.

    Annotations that are there by now are the titles of panels.
    """
    top = TITLE_PX + (PANEL_TITLE_PX if figure.layout.annotations else 0)
    figure.update_layout(
        title={
            **{"text": title, "x": 0, "xref": "container", "xanchor": "left", "font": {"size": 16}},
            **{"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 30, "l": 10}},
        },
        height=height + top + BOTTOM_PX,
        margin={"t": top, "b": BOTTOM_PX, "l": 70, "r": 20},
        font={"color": GREY, "size": 12},
        **{"paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR},
        modebar={"bgcolor": CLEAR, "color": GRID, "activecolor": GREY},
        colorway=[BLUE, ORANGE, GREEN, VERMILION],
    )
    figure.update_annotations(font={"size": 13})
    axes = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID}
    figure.update_xaxes(**axes)
    figure.update_yaxes(**axes)
    return figure


def on_page(figure: go.Figure, dark: bool | None) -> go.Figure:
    """Give the figure the background and text of a light or a dark page; ``None`` suits both."""
    if dark is None:
        return figure
    page, text = PAGES[dark]
    return figure.update_layout(
        paper_bgcolor=page, plot_bgcolor=page, font_color=text, modebar_activecolor=text
    )


def empty(title: str, reason: str) -> go.Figure:
    """Return a figure that says why it shows nothing, and log it."""
    logger.warning("%s: %s", title, reason)
    figure = style(go.Figure(), title, 120)
    note(figure, label(reason), x=0.5, y=0.5, xref="paper", yref="paper")
    return figure.update_xaxes(visible=False).update_yaxes(visible=False)
