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
from hq_optuna.visualization import figure_of
from hq_optuna.visualization.palette import bit_colours, bits_text, text_on
from hq_optuna.visualization.prediction import prediction_info

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
    there = {
        "cost-share": True,
        "steps": bool(history.records),
        "bits": bool(history.records),
        "training": any(record.training is not None for record in history.records),
        "sensitivity": bool(history.sensitivity),
        "pareto": history.additive() is not None,
        "candidates": bool(history.candidates),
        "prediction": bool(prediction_info(history).points),
        "workers": bool(history.runs),
    }
    return [
        (key, caption, figure_of(key.replace("-", "_"), history))
        for key, caption in CAPTIONS.items()
        if there[key]
    ]


def render_html(data: Mapping[str, Any], pictures: Sequence[tuple[str, str, Any]]) -> str:
    """Return the page of what `report_data` returns and of ``(id, caption, plotly figure)``."""
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
