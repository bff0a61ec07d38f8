"""`plot_candidates`: what one step tried, and what it took."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import plotly.graph_objects as go
from optuna.study import Study
from plotly.subplots import make_subplots

from hq_optuna.protocol.history import History, read_history
from hq_optuna.space.cost import Metric
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.palette import BLUE, VERMILION
from hq_optuna.visualization.steps import describe_move, shorten_moves

TITLE = "Candidates of a step"


class CandidateInfo(NamedTuple):
    """One candidate against the incumbent its step started from.

    Attributes:
        number: Trial number.
        move: What it lowers, in words.
        rise: Rise of the score, nats (in step 0 the score itself).
        saved: Cost saved, in the unit of the metric; ``None`` where unknown.
        key: What is compared: the score for ``min`` and ``swaps``; for ``ratio`` the rise per cost
            saved, the saving counted down to the budget only. The least wins; ``None`` never does.
        won: Whether its step took it.
    """

    number: int
    move: str
    rise: float
    saved: float | None
    key: float | None
    won: bool


class CandidatesInfo(NamedTuple):
    """The counted candidates of one step, the best of the rule first.

    Attributes:
        step: Number of the step, ``None`` when nothing was scored yet.
        closed: Whether the step has its winner.
        elsewhere: Number of the trial it took, if that is of an earlier step.
        rule: Name of the winner rule; ``"swaps"`` for steps that refine an answer within the
            budget, which take the smallest score whatever the rule.
        metric: What is counted.
        candidates: By ``key``.
    """

    step: int | None
    closed: bool
    elsewhere: int | None
    rule: str
    metric: Metric
    candidates: tuple[CandidateInfo, ...]


def candidates_info(history: History, step: int | None = None) -> CandidatesInfo:
    """Read the candidates of a step, by default of the last one that has any.

    Raises:
        ValueError: The study has no scored candidate of this step, but of others.
    """
    info = history.info
    steps = sorted({c.step for c in history.candidates if c.counted})
    if not steps:
        return CandidatesInfo(None, False, None, info.settings["rule"], info.metric, ())
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise ValueError(f"Step {step} has no scored candidate; there are steps 0 to {steps[-1]}.")
    parent = history.records[step - 1].winner if 0 < step <= len(history.records) else None
    rule = "swaps" if parent is not None and parent.cost <= info.limit else info.settings["rule"]
    winner = history.records[step].winner if step < len(history.records) else None
    found = []
    for c in history.step(step):
        rise, saved, key = c.score, None, c.score
        if parent is not None:
            rise, saved = c.score - parent.score, f.finite(parent.cost - c.cost)
            if rule == "ratio":
                needed = parent.cost - info.limit
                worth = saved or 0.0
                if 0 < needed < worth:
                    worth = needed
                key = rise / worth if worth > 0 else math.inf
        won = winner is not None and c.number == winner.number
        found.append(CandidateInfo(c.number, describe_move(c), rise, saved, f.finite(key), won))
    ranked = sorted(found, key=lambda c: math.inf if c.key is None else c.key)
    there = winner is None or any(c.won for c in found)
    return CandidatesInfo(
        step=step,
        closed=winner is not None,
        elsewhere=None if there or winner is None else winner.number,
        rule=rule,
        metric=info.metric,
        candidates=tuple(ranked),
    )


def candidates_figure(info: CandidatesInfo) -> go.Figure:
    """Draw rise, cost saved and the rule's quotient of every candidate, a row each."""
    if info.step is None:
        return f.empty(TITLE, "No candidate is scored yet.")
    rows = info.candidates
    panels = _panels(info)
    labels = [f"{c.move} (trial {c.number})" for c in rows]
    figure = make_subplots(cols=len(panels), shared_yaxes=True, horizontal_spacing=0.04)
    for column, (title, values, hover) in enumerate(panels, start=1):
        figure.add_scatter(
            x=values,
            y=[f.label(text) for text in labels],
            mode="markers",
            cliponaxis=False,
            marker={
                "opacity": 1,
                "line": {"width": 0},
                "size": [15 if c.won else 10 for c in rows],
                "symbol": ["star" if c.won else "circle" for c in rows],
                "color": [VERMILION if c.won else BLUE for c in rows],
            },
            hovertemplate=f"%{{y}}<br>%{{x:.4g}} {hover}<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
        known = [value for value in values if value is not None]
        axis: dict[str, Any] = {"rangemode": "tozero", "nticks": 4, "exponentformat": "power"}
        if known and min(known) > 0 and max(known) > 20 * min(known):
            axis = f.log_axis(known)
            if max(known) > 1000 * min(known):
                axis["dtick"] = 1  # whole decades only
        figure.update_xaxes(title={"text": title}, tickangle=0, **axis, row=1, col=column)
    took = "★ taken" if any(c.won for c in rows) else "still open"
    if info.elsewhere is not None:
        took = f"took trial {info.elsewhere} of an earlier step"
    title = f"Candidates of step {info.step}{' (swaps)' if info.rule == 'swaps' else ''} ({took})"
    if len(rows) > 1:
        order = "the least rise per saving" if info.rule == "ratio" else "the smallest score"
        title += f"<br><sub>against the incumbent; {order} on top</sub>"
    f.style(figure, title, f.layers_height(len(rows)))
    moves = shorten_moves([c.move for c in rows])
    shown = [f"{move} (trial {c.number})" for move, c in zip(moves, rows, strict=True)]
    figure.update_yaxes(**{**f.layers_axis(labels, shown), "showgrid": True})
    return figure


def _panels(info: CandidatesInfo) -> list[tuple[str, list[float | None], str]]:
    """Return the title, the values and the unit in hover texts of each panel."""
    rows = info.candidates
    rise = "predicted loss rise (nats)" if info.step == 0 else "rise (nats)"
    panels: list[tuple[str, list[float | None], str]] = [(rise, [c.rise for c in rows], "nats")]
    savings = [c.saved for c in rows if c.saved is not None]
    if savings:
        factor, unit = f.cost_unit(max(map(abs, savings)), info.metric)
        saved = [None if c.saved is None else c.saved / factor for c in rows]
        panels.append((f"cost saved ({unit})", saved, f"{unit} saved"))
        if info.rule == "ratio":
            keys = [None if c.key is None else c.key * factor for c in rows]
            panels.append((f"rise per saving (nats/{unit})", keys, f"nats per {unit} saved"))
    return panels


def plot_candidates(
    study: Study, *, step: int | None = None, dark: bool | None = None
) -> go.Figure:
    """Plot all candidates of one step, the best first, the one it took marked.

    Args:
        study: A study of a bit search, finished or not.
        step: Which step; by default the last one with a scored candidate.
        dark: For a dark page or a light one; by default the figure stands on either.

    Raises:
        ResumeError: The study is not a bit search.
        ValueError: There is no such step.
    """
    return f.on_page(candidates_figure(candidates_info(read_history(study), step)), dark)
