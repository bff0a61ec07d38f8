"""`plot_steps`: score and cost of the incumbent, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from optuna.study import Study
from plotly.subplots import make_subplots

from hq_optuna.protocol.history import Candidate, History, Reference, StepRecord, read_history
from hq_optuna.space.cost import Metric, format_cost
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.palette import BLUE, GREEN, GREY, ORANGE, VERMILION, bits_text

TITLE = "Score and cost over the steps"

TRAINED = "trained"


Values = tuple[float | None, ...]


class StepsInfo(NamedTuple):
    """The incumbents, one entry per closed step; ``None`` where a number was not measured.

    A step whose winner was trained has a second entry, what the training left.
    """

    steps: tuple[int, ...]
    taken: tuple[str, ...]  # what a step took, in words; TRAINED and for how long in second entries
    score: Values  # predicted loss rise, nats
    score_weights: Values  # the weights' sum over layers
    score_activations: Values
    calibration_loss: Values  # measured
    cost: Values  # in the unit of the metric
    limit: float  # the budget
    int8: float  # cost with 8 bits everywhere
    metric: Metric


def describe_move(candidate: Candidate) -> str:
    """Return what a candidate changes, ``"conv1 8 → 7"``; ``"start"`` for the first of all."""
    if candidate.variable is None:
        return "start"
    if candidate.from_bits is None or candidate.to_bits is None:
        return candidate.variable  # a swap, in words already
    bits = f"{bits_text(candidate.from_bits)} → {bits_text(candidate.to_bits)}"
    return f"{candidate.variable} {bits}"


def shorten_moves(moves: Sequence[str], characters: int = 40) -> list[str]:
    """Return what `describe_move` says with `short_names`; those of a swap share the characters.

    Example:
        >>> shorten_moves(["net.one.conv 8 → 7", "net.one.conv 7 → 8, net.two.conv 4 → 3"], 20)
        ['net.one.conv 8 → 7', '…one.conv 7 → 8, …two.conv 4 → 3']
    """
    changes = [[change.rsplit(" ", 3) for change in move.split(", ")] for move in moves]
    names = list(dict.fromkeys(name for move in changes for name, *_ in move))
    short = {
        n: dict(zip(names, f.short_names(names, characters // n), strict=True))
        for n in {len(move) for move in changes}
    }
    return [
        ", ".join(" ".join((short[len(move)][name], *bits)) for name, *bits in move)
        for move in changes
    ]


def steps_info(history: History) -> StepsInfo:
    """Read the incumbent of every closed step."""
    entries: list[tuple[StepRecord, Candidate | Reference, str]] = []
    for record in history.records:
        entries.append((record, record.winner, describe_move(record.winner)))
        if record.trained is not None:
            epochs = (record.training or {}).get("epochs")
            said = TRAINED if epochs is None else f"{TRAINED}, {epochs} epochs"
            entries.append((record, record.trained, said))

    def values(name: str) -> Values:
        return tuple(f.finite(getattr(network, name)) for _, network, _ in entries)

    return StepsInfo(
        steps=tuple(record.step for record, _, _ in entries),
        taken=tuple(said for _, _, said in entries),
        score=values("score"),
        score_weights=values("score_weights"),
        score_activations=values("score_activations"),
        calibration_loss=values("calibration_loss"),
        cost=tuple(f.finite(record.winner.cost) for record, _, _ in entries),
        limit=history.info.limit,
        int8=history.info.int8,
        metric=history.info.metric,
    )


def steps_figure(info: StepsInfo) -> go.Figure:
    """Draw the score and its parts on a log axis, and the cost with the budget below."""
    if not info.steps:
        return f.empty(TITLE, "No step is closed yet.")
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.08)
    mode = "lines+markers" if len(info.steps) <= 60 else "lines"
    taken = [f.label(text) for text in info.taken]
    shown = _add_scores(figure, info, taken, mode)
    factor, unit = f.cost_unit(info.int8, info.metric)
    figure.add_scatter(
        x=list(info.steps),
        y=[None if cost is None else cost / factor for cost in info.cost],
        name="cost",
        mode=mode,
        line={"color": GREY, "width": 2.5},
        customdata=[
            [what, None if cost is None else cost / info.int8]
            for what, cost in zip(taken, info.cost, strict=True)
        ],
        hovertemplate="step %{x}: %{customdata[0]}<br>"
        f"cost %{{y:.4g}} {unit}, %{{customdata[1]:.1%}} of all-8-bit<extra></extra>",
        **{"row": 2, "col": 1},
    )
    limit = info.limit / factor
    figure.add_hline(y=limit, line={"color": VERMILION, "dash": "dash"}, row=2, col=1)
    f.style(figure, TITLE, 460)
    text = f"budget {format_cost(info.limit, info.metric)} ({info.limit / info.int8:.1%} of "
    place = {"x": 0, "xref": "x2 domain", "xanchor": "left", "y": limit, "yref": "y2"}
    f.note(figure, f"{text}all-8-bit)", yanchor="bottom", **place)
    figure.update_yaxes(title={"text": "predicted loss rise (nats)"}, **f.log_axis(shown), row=1)
    figure.update_yaxes(title={"text": f"cost ({unit})"}, rangemode="tozero", row=2)
    figure.update_xaxes(zeroline=False, **f.step_axis(info.steps))
    figure.update_xaxes(title=None, row=1)
    return figure


def _add_scores(figure: go.Figure, info: StepsInfo, taken: list[str], mode: str) -> list[float]:
    """Draw the score, its parts and the loss; return what is visible, for the range of the axis."""
    parts: tuple[tuple[str, Values, dict[str, Any]], ...] = (
        ("score", info.score, {"color": BLUE, "width": 2.5}),
        ("weights, by layers", info.score_weights, {"color": ORANGE, "dash": "dash"}),
        ("activations, by layers", info.score_activations, {"color": GREEN, "dash": "dot"}),
        ("calibration loss", info.calibration_loss, {"color": VERMILION, "dash": "dashdot"}),
    )
    shown: list[float] = []
    for name, values, line in parts:
        hidden = name == "calibration loss"
        # A log axis has no zero; a part that is zero throughout is left out.
        drawn = [value if (value or 0.0) > 0 else None for value in values]
        visible = [value for value in drawn if value is not None]
        if not visible:
            continue
        shown += [] if hidden else visible
        figure.add_scatter(
            x=list(info.steps),
            y=drawn,
            name=f"{name}<br>(click to show)" if hidden else name,
            mode=mode,
            line=line,
            visible="legendonly" if hidden else True,
            customdata=taken,
            hovertemplate=f"step %{{x}}: %{{customdata}}<br>{name} %{{y:.4g}} nats<extra></extra>",
            **{"row": 1, "col": 1},
        )
    _add_trained(figure, info, taken)
    return shown


def _add_trained(figure: go.Figure, info: StepsInfo, taken: list[str]) -> None:
    """Mark the scores that trainings left."""
    trained = [i for i, text in enumerate(info.taken) if text.startswith(TRAINED)]
    after = [i for i in trained if (info.score[i] or 0.0) > 0]
    if after:
        figure.add_scatter(
            x=[info.steps[i] for i in after],
            y=[info.score[i] for i in after],
            name="score after<br>a training",
            mode="markers",
            marker={"color": BLUE, "symbol": "diamond", "size": 10},
            customdata=[taken[i] for i in after],
            hovertemplate="step %{x}: %{customdata}<br>score %{y:.4g} nats<extra></extra>",
            **{"row": 1, "col": 1},
        )


def plot_steps(study: Study, *, dark: bool | None = None) -> go.Figure:
    """Plot the score's parts and the cost of the incumbent over the steps, with the budget.

    Where a winner was trained, its score moves at that step: the trained network is another one.

    Args:
        study: A study of a bit search, finished or not.
        dark: For a dark page or a light one; by default the figure stands on either.

    Raises:
        ResumeError: The study is not a bit search.
    """
    return f.on_page(steps_figure(steps_info(read_history(study))), dark)
