"""``hq-optuna report``: the report of a search as a page, as text or as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from hq_optuna.cli.options import StudyOrNone, errors, reading, say, takes
from hq_optuna.report.data import report_data
from hq_optuna.report.page import write_report
from hq_optuna.report.text import render_markdown
from hq_optuna.settings import RunSettings


@takes("storage", "name", "folder")
def report(
    run: RunSettings,
    study: StudyOrNone = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. \\[default: report.html, or the terminal]"),
    ] = None,
    format_: Annotated[
        Literal["html", "json", "markdown"], typer.Option("--format", help="What to write.")
    ] = "html",
) -> None:
    """Write the report of a search, finished or not."""
    with errors(as_json=False), reading(study, run) as loaded:
        if format_ == "html":
            path = Path("report.html") if out is None else out
            write_report(loaded, path)
            say(Console(), f"Report: {escape(str(path))}")
            return
        data = report_data(loaded)
        text = json.dumps(data, indent=1) if format_ == "json" else render_markdown(data)
        if out is None:
            typer.echo(text)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text + "\n", encoding="utf-8")
