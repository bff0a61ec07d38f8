"""The report as one HTML file that opens offline: its parts, its figures, plotly.js inlined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.offline
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from optuna.study import Study

from hq_optuna.atomic_files import write_atomically
from hq_optuna.protocol.history import History, read_history
from hq_optuna.report.data import report_data
from hq_optuna.report.text import BITS_COLUMNS, blocks
from hq_optuna.visualization.bits import bits_figure, bits_info
from hq_optuna.visualization.candidates import candidates_figure, candidates_info
from hq_optuna.visualization.cost_share import cost_share_figure, cost_share_info
from hq_optuna.visualization.palette import bit_colours, bits_text, text_on
from hq_optuna.visualization.pareto import pareto_figure, pareto_info
from hq_optuna.visualization.prediction import prediction_figure, prediction_info
from hq_optuna.visualization.sensitivity import sensitivity_figure, sensitivity_info
from hq_optuna.visualization.steps import steps_figure, steps_info
from hq_optuna.visualization.training import training_figure, training_info
from hq_optuna.visualization.workers import workers_figure, workers_info

CAPTIONS = {
    "steps": "What the search paid in predicted loss, and what it saved.",
    "bits": "Each row is a layer, the first on top; each column a step. Fewer bits are brighter.",
    "cost-share": "Bars of one colour add up to 100 %.",
    "training": "What each training gave, on validation data that no training reads.",
    "sensitivity": "Predicted loss rise when this layer alone gets these bits; brighter hurts "
    "more.",
    "pareto": "The least predicted loss rise at each cost, and what else was tried. All are sums "
    "over layers, whatever the search ranks by.",
    "candidates": "The last step: every candidate, and the one it took.",
    "prediction": "Every candidate against what it is made from, on the calibration set, which "
    "score and measured loss both read.",
    "workers": "Who did what when; pauses are cut out.",
}
"""What stands below each figure, in the order of the page."""


def write_report(study: Study, path: str | Path, *, command: str | None = None) -> None:
    """Write the report as one HTML file that needs no network.

    The file appears whole or not at all: it is written beside its place and then renamed. Its
    folder is created. The same study gives the same bytes.

    Args:
        study: A study of a bit search, finished or not.
        path: The file, replaced if it exists.
        command: How the search was started; by default what the study says. Passwords in URLs are
            masked.

    Raises:
        ResumeError: The study is not a bit search.
        OSError: The file cannot be written; an earlier report stays as it was.
    """
    history = read_history(study)
    text = render_html(report_data(study, command=command, history=history), figures(history))
    write_atomically(Path(path), text.encode())


def figures(history: History) -> list[tuple[str, str, Any]]:
    """Return ``(id, caption, figure)`` of what there is to draw."""
    found: dict[str, Any] = {"cost-share": cost_share_figure(cost_share_info(history))}
    if history.records:
        found["steps"] = steps_figure(steps_info(history))
        found["bits"] = bits_figure(bits_info(history))
    if any(record.training is not None for record in history.records):
        found["training"] = training_figure(training_info(history))
    if history.sensitivity:
        found["sensitivity"] = sensitivity_figure(sensitivity_info(history))
    if history.additive() is not None:
        found["pareto"] = pareto_figure(pareto_info(history))
    if history.candidates:
        found["candidates"] = candidates_figure(candidates_info(history))
    predicted = prediction_info(history)
    if predicted.points:
        found["prediction"] = prediction_figure(predicted)
    if history.runs:
        found["workers"] = workers_figure(workers_info(history))
    return [(key, caption, found[key]) for key, caption in CAPTIONS.items() if key in found]


def render_html(data: Mapping[str, Any], pictures: Sequence[tuple[str, str, Any]]) -> str:
    """Return the page.

    Args:
        data: What `report_data` returns.
        pictures: ``(id, caption, plotly figure)`` in their order.
    """
    levels = data["levels"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # In a script no "<" of the data may stand, or a name could end the script.
    drawn = ",".join(
        f'"fig-{key}":' + figure.to_json().replace("<", "\\u003c") for key, _, figure in pictures
    )
    return environment.get_template("report.html.jinja").render(
        data=data,
        blocks=blocks(data),
        pictures=pictures,
        bits_columns=BITS_COLUMNS,
        tints={
            bits_text(bits): f"background:{colour};color:{text_on(colour)}"
            for bits, colour in zip(levels, bit_colours(levels), strict=True)
        },
        drawn=f"{{{drawn}}}",
        plotly_js=plotly.offline.get_plotlyjs(),
    )
