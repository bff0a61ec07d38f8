"""`plot_prediction`: the loss rises that were predicted, against those that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from optuna.study import Study
from plotly.subplots import make_subplots

from hq_optuna.protocol.history import Candidate, History, Reference, read_history
from hq_optuna.search import MEASURED, rank_correlation
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.palette import BLUE, GREEN, GREY, VERMILION
from hq_optuna.visualization.steps import describe_move

TITLE = "Predicted against measured loss rise"
DECADES = 3
"""Decades of the axes that are logarithmic; nearer to zero they are linear, which also shows the
rises below zero that measuring gives."""

MANY = 200
"""Points of one kind above which all are drawn smaller."""

AFTER = "candidates after<br>a training"
"""Name of those whose rises are over a trained network."""

TAKEN = "taken by a step"


class PredictionPoint(NamedTuple):
    """A candidate against what it is made from, the start or a trained network; rises in nats."""

    number: int  # of its trial
    step: int
    over: int  # the step whose training gave the network it is made from, 0 for the start
    move: str  # what it changes, in words
    by_score: float | None  # rise of the score; None where the score is itself measured
    by_layers: float | None  # rise of the sum over layers; None where it was not recorded
    measured: float  # rise of the mean loss on the calibration set
    won: bool  # whether a step took it


class PredictionInfo(NamedTuple):
    """Predicted and measured rises of all candidates that count, and how well they rank."""

    scorer: str
    points: tuple[PredictionPoint, ...]  # by trial number
    rank_by_score: float | None
    rank_by_layers: float | None  # None also where the score is the sum over layers


def prediction_info(history: History) -> PredictionInfo:
    """Read the rises of all candidates that count, each against what it is made from.

    That is the network that was trained last, as it is at its own bits. Before any training it is
    the start, step 0, which stands in for the float network: the storage does not hold its loss.
    """
    scorer = history.info.settings["scorer"]
    references = {step: history.reference(step) for step in {c.step for c in history.candidates}}
    won = {record.winner.number for record in history.records}
    points = []
    for c in history.candidates:
        start = references[c.step]
        if c.step > 0 and c.counted and start is not None:
            point = _point(c, start, scorer == MEASURED, c.number in won)
            points += [point] if math.isfinite(point.measured) else []
    if all(map(_says_the_same, points)):
        points = [p._replace(by_layers=None) for p in points]
    return PredictionInfo(
        scorer=scorer,
        points=tuple(points),
        rank_by_score=rank_correlation((p.by_score, p.measured) for p in points),
        rank_by_layers=rank_correlation((p.by_layers, p.measured) for p in points),
    )


def _point(
    c: Candidate, start: Candidate | Reference, score_is_measured: bool, won: bool
) -> PredictionPoint:
    before, after = (x.score_weights + x.score_activations for x in (start, c))
    return PredictionPoint(
        number=c.number,
        step=c.step,
        over=start.step,
        move=describe_move(c),
        by_score=None if score_is_measured else c.score - start.score,
        by_layers=f.finite(after - before),
        measured=c.calibration_loss - start.calibration_loss,
        won=won,
    )


def _says_the_same(p: PredictionPoint) -> bool:
    """Return whether the score is the sum over layers, as far as floating point tells."""
    if p.by_score is None or p.by_layers is None:
        return False
    return math.isclose(p.by_score, p.by_layers, rel_tol=1e-9, abs_tol=1e-15)


_LOOKS: dict[str, dict[str, Any]] = {
    "candidates": {"color": BLUE, "size": 6, "opacity": 0.85},
    AFTER: {"color": GREEN, "size": 6, "opacity": 0.85, "symbol": "diamond"},
    TAKEN: {"color": VERMILION, "size": 9, "symbol": "star"},
}


def _kind(point: PredictionPoint) -> str:
    return TAKEN if point.won else AFTER if point.over else "candidates"


def prediction_figure(info: PredictionInfo) -> go.Figure:
    """Draw a point per candidate, a panel per way to predict; on the line both rises are equal."""
    panels = _panels(info)
    if not panels:
        return f.empty(TITLE, "No candidate has both a predicted and a measured loss rise yet.")
    predicted = [x for pairs in panels.values() for x, _ in pairs]
    measured = [p.measured for pairs in panels.values() for _, p in pairs]
    unit = linear_unit([*predicted, *measured])
    places = [squeeze(x, unit) for x in (*predicted, *measured)]
    room = 0.05 * (max(places) - min(places)) or 0.1
    titles = list(panels)
    figure = make_subplots(
        cols=len(panels), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=titles
    )
    ends = [squeeze(min(predicted), unit) - room, squeeze(max(predicted), unit) + room]
    for column, pairs in enumerate(panels.values(), start=1):
        figure.add_scatter(
            **{"x": ends, "y": ends, "mode": "lines", "hoverinfo": "skip"},
            line={"color": GREY, "width": 1.5, "dash": "dot"},
            name="as predicted",
            showlegend=column == 1,
            **{"row": 1, "col": column},
        )
        _add_points(figure, column, pairs, unit)
    linear = f"±{f.power_text(round(math.log10(unit)))}"
    f.style(figure, f"{TITLE}<br><sub>axes are linear within {linear} nats</sub>", 420)
    figure.update_layout(legend={"traceorder": "normal", "itemsizing": "constant"})
    over = "the start" + (" or the last training" if any(p.over for p in info.points) else "")
    figure.update_xaxes(**rise_axis(predicted, unit, room))
    figure.update_xaxes(title={"text": f"predicted rise over {over} (nats)"})
    figure.update_yaxes(**rise_axis(measured, unit, room))
    figure.update_yaxes(title={"text": f"measured rise over {over} (nats)"}, col=1)
    return figure


def _panels(info: PredictionInfo) -> dict[str, list[tuple[float, PredictionPoint]]]:
    """Return ``(predicted rise, candidate)`` by the title of the panel that shows them."""
    score = [(p.by_score, p) for p in info.points if p.by_score is not None]
    layers = [(p.by_layers, p) for p in info.points if p.by_layers is not None]
    panels = {}
    for title, pairs, rank in (
        (f"score ({info.scorer})", score, info.rank_by_score),
        ("sum over layers", layers, info.rank_by_layers),
    ):
        correlation = "" if rank is None else f": rank correlation {rank:.2f}"
        if pairs:
            panels[f.label(title) + correlation] = pairs
    return panels


def _add_points(
    figure: go.Figure, column: int, pairs: list[tuple[float, PredictionPoint]], unit: float
) -> None:
    """Draw candidates in one panel, each ``(predicted, point)``, where `squeeze` puts them."""
    for name, look in _LOOKS.items():
        shown = [(x, p) for x, p in pairs if _kind(p) == name]
        if not shown and name == AFTER:
            continue
        over = {p.over: f"over the network trained at step {p.over}" for _, p in shown}
        over[0] = "over the start"
        figure.add_scatter(
            x=[squeeze(x, unit) for x, _ in shown],
            y=[squeeze(p.measured, unit) for _, p in shown],
            mode="markers",
            marker={**look, "size": 5} if len(shown) > MANY else look,
            name=name,
            legendgroup=name,
            customdata=[
                [p.step, f.label(p.move), p.number, x, p.measured, over[p.over]] for x, p in shown
            ],
            hovertemplate="step %{customdata[0]}: %{customdata[1]} (trial %{customdata[2]})"
            "<br>predicted %{customdata[3]:.4g} nats"
            "<br>measured %{customdata[4]:.4g} nats<br>%{customdata[5]}<extra></extra>",
            showlegend=column == 1,
            **{"row": 1, "col": column},
        )


def linear_unit(values: Sequence[float]) -> float:
    """Return the power of ten below which axes are linear.

    Example:
        >>> linear_unit([0.0, -0.2, 3.0])
        0.001
    """
    largest = max(map(abs, values))
    return 10.0 ** (math.floor(math.log10(largest)) - DECADES) if largest > 0 else 1.0


def squeeze(value: float, unit: float) -> float:
    """Return where a value stands on an axis: linear up to ``unit``, logarithmic beyond.

    Example:
        >>> [squeeze(x, 0.001) for x in (0.0, 0.001, 0.1, -0.1)]
        [0.0, 1.0, 3.0, -3.0]
    """
    if abs(value) <= unit:
        return value / unit
    return math.copysign(1 + math.log10(abs(value) / unit), value)


def rise_axis(values: Sequence[float], unit: float, room: float) -> dict[str, Any]:
    """Return the settings of an axis that shows values where `squeeze` puts them."""
    low, high = squeeze(min(values), unit) - room, squeeze(max(values), unit) + room
    far = range(1, DECADES + 3)
    step = 2 if high - low > 7 else 1  # both signs with all their decades
    ticks = [t for t in (*(-place for place in far), 0, *far) if low <= t <= high and t % step == 0]
    return {
        "range": [low, high],
        "tickvals": ticks,
        "ticktext": [_power_text(t, round(math.log10(unit))) for t in ticks],
        "zeroline": True,
        "zerolinewidth": 1,
    }


def _power_text(place: int, power: int) -> str:
    """Return the value at a place of `squeeze` in units of a power of ten."""
    if place == 0:
        return "0"
    exponent = power + abs(place) - 1
    text = {0: "1", 1: "10"}.get(exponent, f.power_text(exponent))
    return f"−{text}" if place < 0 else text


def plot_prediction(study: Study, *, dark: bool | None = None) -> go.Figure:
    """Plot the predicted loss rise of every candidate against the measured one.

    Predicted: the score, and where that is something else the sum over layers. Measured: the mean
    loss on the calibration set, without training the candidate. Both are rises over the start of
    the search, the widest bits, or over the network that the search trained last. Small rises drown
    in what a finite calibration set says by chance: that is what points below zero show.

    Args:
        study: A study of a bit search, finished or not.
        dark: For a dark page or a light one; by default the figure stands on either.

    Raises:
        ResumeError: The study is not a bit search.
    """
    return f.on_page(prediction_figure(prediction_info(read_history(study))), dark)
