"""`plot_workers`: who did what when, and who died."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go
from optuna.study import Study
from optuna.trial import TrialState

from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.history import History, Run, read_history
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.palette import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION
from hq_optuna.visualization.steps import describe_move

TITLE = "Who did what when"
LEGEND_ROW_PX = 20
N_TICKS = 6
TICKS_S = (
    *(0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800, 604_800),
)
MOST_LABELLED = 4
"""Pauses up to which each has its length written above it; more would overlap."""

What = Literal["candidate", "surplus", "record", "training", "other", "running", "failed", "lost"]


class WorkerSpan(NamedTuple):
    """A trial on the row of its worker.

    The results of ``"candidate"`` and ``"record"``, which closes a step, count; a record that
    trains is ``"training"``. ``"surplus"`` is not needed any more, or another worker's result
    counts. ``"other"`` was enqueued by hand, or is of another loop. ``"failed"`` ended in an error,
    was given back, or was lost by a launcher's worker. ``"lost"``: its worker did nothing
    afterwards, so it died or was interrupted. ``"running"``: still runs, or its worker died unseen.
    """

    worker: int  # its row, from 0
    number: int  # of the trial
    what: What
    step: int  # -1 where it has none
    text: str  # for people
    start_s: float  # after the first start
    seconds: float  # of a lost trial until that was found out, of a running one until the last sign


class WorkersInfo(NamedTuple):
    """The work on a search."""

    workers: tuple[str, ...]  # host:pid, in the order they came
    begin: datetime  # the first start, UTC
    spans: tuple[WorkerSpan, ...]  # by trial number
    pauses: tuple[tuple[float, float], ...]  # from, to: long gaps without work, seconds after begin


def workers_info(history: History) -> WorkersInfo:
    """Read who ran which trial from when to when."""
    runs = sorted(history.runs, key=lambda run: run.number)
    if not runs:
        return WorkersInfo((), datetime.fromtimestamp(0, UTC), (), ())
    begin = min(run.started for run in runs)
    until = max(max(run.started, run.ended or run.started) for run in runs)
    last = {run.worker: run.number for run in runs}
    came = list(dict.fromkeys(run.worker for run in sorted(runs, key=lambda run: run.started)))
    moves = {c.number: describe_move(c) for c in history.candidates}
    spans = []
    for run in runs:
        what = _what(run, is_last=last[run.worker] == run.number)
        start, seconds = _time_of(run, until)
        spans.append(
            WorkerSpan(
                worker=came.index(run.worker),
                number=run.number,
                what=what,
                step=run.step,
                text=_text(run, what, moves.get(run.number)),
                start_s=(start - begin).total_seconds(),
                seconds=seconds,
            )
        )
    return WorkersInfo(_names(came), begin, tuple(spans), _pauses(spans))


def _time_of(run: Run, until: datetime) -> tuple[datetime, float]:
    """Return when the work on a trial began, and for how many seconds it went on."""
    end = run.ended or until
    start, seconds = run.started, (end - run.started).total_seconds()
    if run.handed and run.ended and run.seconds and run.seconds < seconds:
        start, seconds = run.ended - timedelta(seconds=run.seconds), run.seconds
    if run.seconds and not (run.started.microsecond or end.microsecond):
        seconds = max(seconds, run.seconds)  # of a storage that keeps whole seconds
    return start, max(seconds, 0.0)


def _what(run: Run, *, is_last: bool) -> What:
    if run.state == TrialState.RUNNING:
        return "lost" if worker_identity.is_dead(run.worker) else "running"
    if run.state == TrialState.FAIL:
        return "lost" if is_last else "failed"
    if run.kind == "free" and run.state != TrialState.PRUNED:
        return "other"
    if run.state == TrialState.PRUNED or run.kind == "surplus" or not run.counted:
        return "surplus"
    if run.kind == "incumbent":
        return "training" if run.trains else "record"
    return "candidate"


def _text(run: Run, what: What, move: str | None) -> str:
    doing = {
        "candidate": f"candidate {run.slot + 1} of step {run.step}",
        "incumbent": f"{'training and ' if run.trains else ''}record of step {run.step}",
        "surplus": "nothing to do",
        "free": "enqueued or of another loop",
    }[run.kind]
    if run.kind == "candidate" and move is not None:
        doing += f", {move}"
    ended = {
        "surplus": "; not needed",
        "failed": "; an error, given back, or its worker was lost",
        "lost": "; its worker died or was interrupted",
        "running": "; still runs, or its worker died unseen",
    }.get(what, "")
    return f"trial {run.number}: {doing}{ended}"


def _names(ids: Sequence[str]) -> tuple[str, ...]:
    """Return ``host:pid`` of each; the second process with the same gets ``(2)``."""
    names = [worker_identity.short_name(worker) or "unknown" for worker in ids]
    places = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return tuple(name if n == 1 else f"{name} ({n})" for name, n in zip(names, places, strict=True))


def _pauses(spans: Sequence[WorkerSpan]) -> tuple[tuple[float, float], ...]:
    """Return the gaps longer than a fifth of the time in which any worker worked.

    When in a lost trial its worker died is unknown; only its start counts as work.
    """
    busy: list[list[float]] = []
    for span in sorted(spans, key=lambda span: span.start_s):
        end = span.start_s + (0.0 if span.what in ("lost", "running") else span.seconds)
        if busy and span.start_s <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], end)
        else:
            busy.append([span.start_s, end])
    worked_s = sum(end - start for start, end in busy)
    gaps = itertools.pairwise(busy)
    return tuple((a[1], b[0]) for a, b in gaps if b[0] - a[1] > max(1.0, worked_s / 5))


def workers_figure(info: WorkersInfo) -> go.Figure:
    """Draw a row per worker, a bar per trial; pauses are cut out of the time axis.

    Candidates of even and of odd steps have two blues.
    """
    if not info.spans:
        return f.empty(TITLE, "Nobody has begun a trial yet.")
    figure = go.Figure()
    _add_bars(figure, info)
    _add_marks(figure, info)
    end_s = max(s.start_s + s.seconds for s in info.spans)
    margin_s = _margin(info, end_s)
    for start_s, stop_s in info.pauses:
        cut = _time(info, start_s + margin_s)
        figure.add_vline(x=cut, line={"color": GREY, "dash": "dot", "width": 1.5})
        if len(info.pauses) <= MOST_LABELLED:
            place = {"x": cut, "xref": "x", "xanchor": "center", "y": 1, "yref": "paper"}
            f.note(figure, _duration(stop_s - start_s), yanchor="bottom", **place)
    n = len(info.workers)
    title = f"{TITLE} ({n} worker{'' if n == 1 else 's'})"
    if info.pauses:
        title += "<br><sub>dotted: a pause of all, cut out</sub>"
    f.style(figure, title, max(f.layers_height(n), LEGEND_ROW_PX * (len(figure.data) + 1)))
    figure.update_layout(barmode="overlay", showlegend=True)
    inner = [(start_s + margin_s, stop_s - margin_s) for start_s, stop_s in info.pauses]
    figure.update_xaxes(
        type="date",
        title={"text": "time, UTC (by the clock of the host that wrote it)"},
        **(_ticks(info, end_s) if info.pauses else {"nticks": N_TICKS}),
        range=[_time(info, -margin_s), _time(info, end_s + margin_s)],
        rangebreaks=[{"bounds": [_time(info, a), _time(info, b)]} for a, b in inner],
        zeroline=False,
    )
    figure.update_yaxes(**f.layers_axis(info.workers))
    return figure


def _add_bars(figure: go.Figure, info: WorkersInfo) -> None:
    both = (0, 1)
    kinds: tuple[tuple[str, tuple[What, ...], tuple[int, ...], dict[str, Any], float], ...] = (
        ("even steps", ("candidate",), (0,), {"color": BLUE}, 0.7),
        ("odd steps", ("candidate",), (1,), {"color": SKY}, 0.7),
        ("not needed", ("surplus",), both, {"color": GREY}, 0.7),
        ("training", ("training",), both, {"color": ORANGE}, 0.7),
        ("other trials", ("other",), both, {"color": GREEN}, 0.7),
        ("running", ("running",), both, _hatched(BLUE), 0.4),
        ("no result", ("failed", "lost"), both, _hatched(VERMILION), 0.2),
    )
    for name, what, parities, marker, width in kinds:
        spans = [s for s in info.spans if s.what in what and s.step % 2 in parities]
        if spans:
            figure.add_bar(
                **_rows(info, spans),
                base=[_time(info, s.start_s) for s in spans],
                x=[1000 * s.seconds for s in spans],  # milliseconds, as of a date axis
                marker={"line": {"width": 0}, **marker},
                **{"name": name, "orientation": "h", "width": width},
            )


def _add_marks(figure: go.Figure, info: WorkersInfo) -> None:
    kinds: tuple[tuple[str, What, str, dict[str, Any]], ...] = (
        ("step closed", "record", ORANGE, {"symbol": "line-ns", "line_width": 1.5, "size": 9}),
        ("trial failed", "failed", VERMILION, {"symbol": "x-thin", "line_width": 2, "size": 8}),
        ("died or stopped", "lost", VERMILION, {"symbol": "x", "size": 10}),
    )
    for name, what, colour, marker in kinds:
        spans = [s for s in info.spans if s.what == what]
        if spans:
            figure.add_scatter(
                **_rows(info, spans),
                x=[_time(info, s.start_s) for s in spans],
                marker={**marker, "color": colour, "line_color": colour},
                **{"name": name, "mode": "markers"},
            )


def _hatched(colour: str) -> dict[str, Any]:
    look = {"shape": "/", "fgcolor": colour, "fgopacity": 1, "bgcolor": "rgba(0,0,0,0)", "size": 5}
    return {"color": colour, "pattern": look}


def _rows(info: WorkersInfo, spans: Sequence[WorkerSpan]) -> dict[str, Any]:
    """Return rows and hover texts."""
    return {
        "y": [f.label(info.workers[s.worker]) for s in spans],
        "customdata": [
            [f.label(s.text), _time(info, s.start_s), _duration(s.seconds)] for s in spans
        ],
        "hovertemplate": "%{y}<br>%{customdata[0]}<br>from %{customdata[1]} UTC, "
        "%{customdata[2]}<extra></extra>",
    }


def _margin(info: WorkersInfo, end_s: float) -> float:
    """Return the seconds that are shown before and after work: a hundredth of what is shown."""
    cut_s = sum(stop_s - start_s for start_s, stop_s in info.pauses)
    return max(0.001, min(0.01 * (end_s - cut_s), *(0.2 * (b - a) for a, b in info.pauses), 1e9))


def _ticks(info: WorkersInfo, end_s: float) -> dict[str, Any]:
    """Return ticks at round times, for an axis with cuts: plotly would put them on the cuts.

    A time within a pause, or too near to the tick before, gets none.
    """
    edges = [0.0, *itertools.chain(*info.pauses), end_s]
    worked = list(zip(edges[::2], edges[1::2], strict=True))
    shown_s = sum(stop - start for start, stop in worked)
    every = next((s for s in TICKS_S if s * N_TICKS >= shown_s), TICKS_S[-1])
    ticks: dict[float, str] = {}
    before_s, last_s, day = 0.0, -math.inf, ""
    for start, stop in worked:
        for time_s in [start, *_round_times(info, start, stop, every)]:
            at_s = before_s + time_s - start
            if at_s - last_s >= 0.7 * shown_s / N_TICKS:
                said = info.begin + timedelta(seconds=time_s)
                text = said.strftime("%H:%M:%S" if every < 60 or time_s == start else "%H:%M")
                date = said.strftime("%Y-%m-%d")
                ticks[time_s] = text if date == day else f"{text}<br>{date}"
                last_s, day = at_s, date
        before_s += stop - start
    return {"tickvals": [_time(info, time_s) for time_s in ticks], "ticktext": [*ticks.values()]}


def _round_times(info: WorkersInfo, start: float, stop: float, every: float) -> list[float]:
    """Return the times from start to stop at which the clock shows a multiple of ``every``."""
    first = info.begin.timestamp()
    round_s = math.ceil((first + start) / every) * every - first
    times = [round_s + i * every for i in range(int(max(0.0, stop - round_s) / every) + 1)]
    return [time_s for time_s in times if time_s <= stop]


def _time(info: WorkersInfo, seconds: float) -> str:
    time = info.begin + timedelta(seconds=seconds)
    return time.replace(tzinfo=None).isoformat(sep=" ", timespec="milliseconds")


def _duration(seconds: float) -> str:
    """Return a time for people.

    Example:
        >>> _duration(0.0173), _duration(7.25), _duration(75), _duration(5000), _duration(2e5)
        ('17.3 ms', '7.25 s', '1.2 min', '1.4 h', '2.3 days')
    """
    for unit, n in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= (1.5 if unit == "days" else 1.0) * n:
            return f"{seconds / n:.1f} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def plot_workers(study: Study, *, dark: bool | None = None) -> go.Figure:
    """Plot a time line of the workers: what each evaluated, when, and which died.

    Times are those of the trials: a start by the clock of the host that created the trial, an end
    by the clock of the host that ended it. Clocks that differ shift rows against each other. A
    worker that died between two trials leaves no trace; one that was interrupted and one that was
    killed look the same. Trials that a launcher claimed for its workers are on the row of who
    scored them, for as long as that took; those that such a worker lost are on the launcher's.

    Args:
        study: A study of a bit search, finished or not.
        dark: For a dark page or a light one; by default the figure stands on either.

    Raises:
        ResumeError: The study is not a bit search.
    """
    return f.on_page(workers_figure(workers_info(read_history(study))), dark)
