"""`plot_candidates`: what one step tried, and what it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from optuna.study import Study
from plotly.subplots import make_subplots

from hq_optuna.protocol.history import Candidate, History, read_history
from hq_optuna.search import to_lower
from hq_optuna.space.cost import Metric
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.palette import BLUE, VERMILION
from hq_optuna.visualization.steps import describe_move, shorten_moves

TITLE = "Candidates of a step"

Values = list[float | None]


class CandidateInfo(NamedTuple):
    """One candidate against the incumbent its step started from.

    ``key`` is what the rule compares: the score for ``min`` and ``swaps``; for ``ratio`` the rise
    per cost saved, the saving counted down to the budget only. The least wins; ``None`` never does.
    """

    number: int  # of its trial
    move: str  # what it changes, in words
    rise: float  # of the score, nats; in step 0 the score itself
    saved: float | None  # in the unit of the metric; None where unknown
    key: float | None
    won: bool


class CandidatesInfo(NamedTuple):
    """The counted candidates of one step, the best of the rule first.

    Steps that refine an answer within the budget have the rule ``"swaps"``: they take the smallest
    score whatever the rule of the search.
    """

    step: int | None  # None when nothing was scored yet
    closed: bool
    elsewhere: int | None  # number of the trial it took, if that is of an earlier step
    rule: str
    metric: Metric
    candidates: tuple[CandidateInfo, ...]  # by key


def candidates_info(history: History, step: int | None = None) -> CandidatesInfo:
    """Read the candidates of a step, by default of the last one that has any.

    Raises:
        ValueError: The study has no scored candidate of this step, but of others.
    """
    info = history.info
    steps = {c.step for c in history.candidates if c.counted}
    if not steps:
        return CandidatesInfo(None, False, None, info.settings["rule"], info.metric, ())
    step = max(steps) if step is None else step
    if step not in steps:
        raise ValueError(f"Step {step} has no scored candidate; there are steps 0 to {max(steps)}.")
    parent = history.records[step - 1].winner if 0 < step <= len(history.records) else None
    met = parent is not None and history.fits(history.space.config(parent.state))
    rule = "swaps" if met else info.settings["rule"]
    taken = history.records[step].winner.number if step < len(history.records) else None
    found = [_against(c, parent, rule, history, taken) for c in history.step(step)]
    return CandidatesInfo(
        step=step,
        closed=taken is not None,
        elsewhere=None if any(c.won for c in found) else taken,
        rule=rule,
        metric=info.metric,
        candidates=tuple(sorted(found, key=lambda c: math.inf if c.key is None else c.key)),
    )


def _against(
    c: Candidate, parent: Candidate | None, rule: str, history: History, taken: int | None
) -> CandidateInfo:
    """Compare a candidate with the incumbent before its step, ``None`` in step 0."""
    rise, saved, key = c.score, None, c.score
    if parent is not None:
        rise, saved = c.score - parent.score, f.finite(parent.cost - c.cost)
        if rule == "ratio":
            # An incumbent over the budget: in steps that begin within it the rule is "swaps".
            before, after = _load(history, parent), _load(history, c)
            sums = bool(history.beside) or history.info.metric == "activation_bytes"
            limit = 0.0 if sums else history.info.limit
            worth = min(before - after, before - limit)
            key = rise / worth if worth > 0 else math.inf
    won = c.number == taken
    return CandidateInfo(c.number, describe_move(c), rise, saved, f.finite(key), won)


def _load(history: History, candidate: Candidate) -> float:
    config, bounds = history.space.config(candidate.state), history.bounds
    return to_lower(bounds, config)


def candidates_figure(info: CandidatesInfo) -> go.Figure:
    """Draw rise, cost saved and the rule's quotient of every candidate, a row each."""
    if info.step is None:
        return f.empty(TITLE, "No candidate is scored yet.")
    rows = info.candidates
    panels = _panels(info)
    labels = [f"{c.move} (trial {c.number})" for c in rows]
    figure = make_subplots(cols=len(panels), shared_yaxes=True, horizontal_spacing=0.04)
    marker = {
        **{"opacity": 1, "line": {"width": 0}, "size": [15 if c.won else 10 for c in rows]},
        "symbol": ["star" if c.won else "circle" for c in rows],
        "color": [VERMILION if c.won else BLUE for c in rows],
    }
    for column, (title, values, hover) in enumerate(panels, start=1):
        figure.add_scatter(
            x=values,
            y=[f.label(text) for text in labels],
            mode="markers",
            cliponaxis=False,
            marker=marker,
            hovertemplate=f"%{{y}}<br>%{{x:.4g}} {hover}<extra></extra>",
            showlegend=False,
            **{"row": 1, "col": column},
        )
        axis = {"title": {"text": title}, "tickangle": 0, **_axis(values)}
        figure.update_xaxes(**axis, row=1, col=column)
    f.style(figure, _title(info), f.layers_height(len(rows)))
    moves = shorten_moves([c.move for c in rows])
    shown = [f"{move} (trial {c.number})" for move, c in zip(moves, rows, strict=True)]
    figure.update_yaxes(**{**f.layers_axis(labels, shown), "showgrid": True})
    return figure


def _axis(values: Sequence[float | None]) -> dict[str, Any]:
    """Return a log axis where positive values are far apart, else one that begins at zero."""
    known = [value for value in values if value is not None]
    if not known or min(known) <= 0 or max(known) <= 20 * min(known):
        return {"rangemode": "tozero", "nticks": 4, "exponentformat": "power"}
    whole_decades = {"dtick": 1} if max(known) > 1000 * min(known) else {}
    return f.log_axis(known) | whole_decades


def _title(info: CandidatesInfo) -> str:
    took = "★ taken" if any(c.won for c in info.candidates) else "still open"
    if info.elsewhere is not None:
        took = f"took trial {info.elsewhere} of an earlier step"
    title = f"Candidates of step {info.step}{' (swaps)' if info.rule == 'swaps' else ''} ({took})"
    if len(info.candidates) <= 1:
        return title
    order = "the least rise per saving" if info.rule == "ratio" else "the smallest score"
    return f"{title}<br><sub>against the incumbent; {order} on top</sub>"


def _panels(info: CandidatesInfo) -> list[tuple[str, Values, str]]:
    """Return the title, the values and the unit in hover texts of each panel."""
    rows = info.candidates
    rise = "predicted loss rise (nats)" if info.step == 0 else "rise (nats)"
    panels: list[tuple[str, Values, str]] = [(rise, [c.rise for c in rows], "nats")]
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
