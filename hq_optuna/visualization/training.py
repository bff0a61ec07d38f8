"""`plot_training`: what training gave at each step that was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from optuna.study import Study
from plotly.subplots import make_subplots

from hq_optuna.protocol.history import History, read_history
from hq_optuna.visualization import _figure as f
from hq_optuna.visualization.measured import ACCURACY, error_bars, standard_error
from hq_optuna.visualization.palette import BLUE, GREY, ORANGE, VERMILION

TITLE = "Before and after each training"
PANEL_PX = 190
LOSS = "loss"
BEFORE, AFTER = "_before", "_after"

TRAINING_LOSS = "training loss"
"""What is drawn where nothing was measured on validation data: of the first and last epoch."""


_WORDS = {
    ACCURACY: (100.0, " %", "validation accuracy (%)"),
    LOSS: (1.0, " nats", "validation loss (nats)"),
    TRAINING_LOSS: (1.0, " nats", "training loss (nats)"),
}
"""Factor, unit in hover texts, and title of the axis."""


class TrainingPoint(NamedTuple):
    """A step whose winner was trained."""

    step: int
    number: int  # of the trial that recorded it
    final: bool  # whether it is the training of the answer
    epochs: int
    samples: int  # of an epoch
    seconds: float  # time of the epochs
    values: Mapping[str, tuple[float, float]]  # (before, after) by name; accuracies are shares of 1
    kept: bool = True  # whether the next steps go on from it


class TrainingInfo(NamedTuple):
    """The trainings of a search."""

    points: tuple[TrainingPoint, ...]  # by step
    names: tuple[str, ...]  # what was measured before and after, accuracy and loss first
    float_network: Mapping[str, float]  # what the float network has of it, where measured
    n_samples: int | None  # validation samples, where the study says
    planned: bool  # whether the search trains


def training_info(history: History) -> TrainingInfo:
    """Read what every trained step recorded."""
    points = tuple(
        TrainingPoint(
            step=record.step,
            number=record.number,
            final=record.training.get("kind") == "final",
            epochs=record.training.get("epochs", 0),
            samples=record.training.get("samples", 0),
            seconds=record.training.get("seconds", 0.0),
            values=_values(record.training),
            kept=record.training.get("kept", True),
        )
        for record in history.records
        if record.training is not None
    )
    known = {name for point in points for name in point.values}
    names = [name for name in (ACCURACY, LOSS) if name in known]
    names += sorted(known.difference(names, (TRAINING_LOSS,)))
    return TrainingInfo(
        points=points,
        names=tuple(names or sorted(known)),
        float_network={
            name: history.facts[f"{name}{BEFORE}"]
            for name in names
            if history.facts.get(f"{name}{BEFORE}") is not None
        },
        n_samples=history.facts.get("validation_samples"),
        planned=history.info.training is not None,
    )


def _values(said: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    found = {TRAINING_LOSS: (said.get("loss_first"), said.get("loss_last"))}
    for key, value in said.items():
        name = key.removesuffix(BEFORE)
        if name != key:
            found[name] = (value, said.get(f"{name}{AFTER}"))
    return {
        name: (float(before), float(after))
        for name, (before, after) in found.items()
        if before is not None and after is not None
    }


def training_figure(info: TrainingInfo) -> go.Figure:
    """Draw a panel per figure: what each trained step had before, and has after.

    Accuracies are in percent, with bars of one standard error; the float network is a line.
    """
    if not info.names:
        if info.planned:
            return f.empty(TITLE, "No step is trained yet.")
        return f.empty(TITLE, "This search trains nothing; hq-optuna run … --train-every 4 does.")
    figure = make_subplots(rows=len(info.names), shared_xaxes=True, vertical_spacing=0.06)
    for row, name in enumerate(info.names, start=1):
        _add_panel(figure, row, name, info)
    epochs, seconds = (sum(getattr(p, what) for p in info.points) for what in ("epochs", "seconds"))
    n = len(info.points)
    said = f"{n} training{'' if n == 1 else 's'}, {epochs} epochs, {seconds:.3g} s in all"
    if info.names == (TRAINING_LOSS,):
        said += "; nothing is measured: give the search validation data"
    f.style(figure, f"{TITLE}<br><sub>{said}</sub>", PANEL_PX * len(info.names))
    figure.update_layout(showlegend=True, legend={"traceorder": "normal"})
    steps = [p.step for p in info.points]
    margin = max(0.5, 0.03 * (steps[-1] - steps[0]))
    axis = f.step_axis(range(steps[0], steps[-1] + 1))
    figure.update_xaxes(zeroline=False, range=[steps[0] - margin, steps[-1] + margin], **axis)
    for row in range(1, len(info.names)):
        figure.update_xaxes(title=None, row=row)
    return figure


class _Row(NamedTuple):
    """A point in one panel, in the panel's unit."""

    point: TrainingPoint
    before: float
    after: float
    error: float  # standard error of what it has after; 0 where unknown


class _Kind(NamedTuple):
    """The markers of one entry of the legend."""

    name: str
    is_before: bool
    rows: Sequence[_Row]
    look: dict[str, Any]


def _add_panel(figure: go.Figure, row: int, name: str, info: TrainingInfo) -> None:
    """Draw one figure of all trained steps: lines from before to after, and the float network."""
    rows = _rows(name, info)
    times, unit, title = _WORDS.get(name, (1.0, "", f.label(name)))
    figure.add_scatter(
        x=[step for r in rows for step in (r.point.step, r.point.step, None)],
        y=[end for r in rows for end in (r.before, r.after, None)],
        mode="lines",
        line={"color": GREY, "width": 1.5},
        **{"hoverinfo": "skip", "showlegend": False, "row": row, "col": 1},
    )
    spread = " ± %{customdata[3]:.2g}" if name == ACCURACY and info.n_samples else ""
    hover = (
        f"%{{customdata[0]}}<br>{f.label(name)} %{{customdata[1]:.4g}}{unit} → "
        f"%{{customdata[2]:.4g}}{spread}{unit}<extra></extra>"
    )
    for kind in _kinds(name, rows):
        _add_markers(figure, row, kind, hover, with_errors=bool(spread))
    if name in info.float_network:
        _add_float_network(figure, row, rows[0].point.step, times * info.float_network[name])
    figure.update_yaxes(title={"text": title}, row=row)


def _add_markers(
    figure: go.Figure, row: int, kind: _Kind, hover: str, *, with_errors: bool
) -> None:
    values = [r.before if kind.is_before else r.after for r in kind.rows]
    bars = error_bars(values, [r.error for r in kind.rows])
    figure.add_scatter(
        x=[r.point.step for r in kind.rows],
        y=values,
        name=kind.name,
        mode="markers",
        marker={"line": {"width": 2 if kind.is_before else 0}, **kind.look},
        error_y=bars if with_errors and not kind.is_before else None,
        customdata=[(_said(p), *numbers) for p, *numbers in kind.rows],
        hovertemplate=hover,
        **_place(row, kind.name),
    )


def _rows(name: str, info: TrainingInfo) -> list[_Row]:
    times = _WORDS[name][0] if name in _WORDS else 1.0
    n = info.n_samples if name == ACCURACY else None
    rows = []
    for point in info.points:
        if name in point.values:
            before, after = point.values[name]
            error = standard_error(after, n) if n else 0.0
            rows.append(_Row(point, times * before, times * after, times * error))
    return rows


def _kinds(name: str, rows: Sequence[_Row]) -> list[_Kind]:
    first, last = ("first epoch", "last epoch") if name == TRAINING_LOSS else ("before", "after")
    kept = [r for r in rows if r.point.kept and not r.point.final]
    answer = [r for r in rows if r.point.final]
    lost = [r for r in rows if not r.point.kept]
    kinds = [
        _Kind(first, True, rows, {"color": ORANGE, "symbol": "circle-open"}),
        _Kind(last, False, kept, {"color": BLUE}),
        _Kind(f"{last}, not kept", False, lost, {"color": GREY, "symbol": "x"}),
        _Kind(f"{last}, answer", False, answer, {"color": VERMILION, "symbol": "star", "size": 13}),
    ]
    return [kind._replace(look={"size": 8, **kind.look}) for kind in kinds if kind.rows]


def _place(row: int, name: str) -> dict[str, Any]:
    """Return the panel of a trace, which is in the legend once for all panels."""
    return {"legendgroup": name, "showlegend": row == 1, "row": row, "col": 1}


def _add_float_network(figure: go.Figure, row: int, step: int, value: float) -> None:
    line = {"color": GREY, "dash": "dot", "width": 1.5}
    figure.add_hline(y=value, line=line, row=row, col=1)
    figure.add_scatter(  # an annotation would be taken for the title of a panel
        x=[step],
        y=[value],
        name="float network",
        mode="lines",
        line=line,
        hoverinfo="skip",
        **_place(row, "float network"),
    )


def _said(p: TrainingPoint) -> str:
    return (
        f"{'the answer, step' if p.final else 'step'} {p.step} (trial {p.number}): {p.epochs} "
        f"epochs of {p.samples:,} samples in {p.seconds:.3g} s{'' if p.kept else '; not kept'}"
    )


def plot_training(study: Study, *, dark: bool | None = None) -> go.Figure:
    """Plot accuracy and loss on the validation data before and after each training.

    Before: the step's bits with statistics corrected. After: the network that the next steps are
    made from; of the last training, the answer. Where the search has no validation data the
    training loss of the first and the last epoch stand there instead.

    Args:
        study: A study of a bit search, finished or not.
        dark: For a dark page or a light one; by default the figure stands on either.

    Raises:
        ResumeError: The study is not a bit search.
    """
    return f.on_page(training_figure(training_info(read_history(study))), dark)
