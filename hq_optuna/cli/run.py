"""``hq-optuna run``: from a study file to a result, a report and a recipe on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from optuna.study import Study as OptunaStudy
from rich.console import Console

from hq_optuna.answer.recipe import RECIPE
from hq_optuna.answer.resolve import publish_answer
from hq_optuna.answer.result import SearchResult
from hq_optuna.artifacts.store import attach
from hq_optuna.cli import tables
from hq_optuna.cli.options import Given, Json, Study, command_line, errors, takes
from hq_optuna.cli.progress import SearchProgress
from hq_optuna.cli.session import Request, Session, begin
from hq_optuna.dashboard import PageWriter
from hq_optuna.protocol.status import read_status
from hq_optuna.report.data import report_data
from hq_optuna.report.page import write_report
from hq_optuna.settings import RunSettings


@takes(search=True)
def run(
    context: typer.Context,
    study: Study,
    run: RunSettings,
    given: Given,
    as_json: Json = False,
) -> None:
    """Search, or go on with a search that was interrupted.

    Options of the study file itself stand beside these: hq-optuna run cifar10_resnet20 --data DIR.
    """
    with errors(as_json):
        console, command = Console(stderr=as_json), command_line()
        session = begin(Request(study, context.args, run, given, command), console)
        existed = session.exists()
        with SearchProgress(console, session.search.space, session.search.budget) as progress:
            found = session.open(progress=progress.phase)
            session.search.work(found, on_progress=progress.search)
        if existed:
            say_where_it_went_on(console, progress, found)
        changed = not (existed and progress.was_finished)
        data = finish(session, found, changed=changed, command=command, console=console)
        if as_json:
            typer.echo(json.dumps(data))


def say_where_it_went_on(console: Console, progress: SearchProgress, study: OptunaStudy) -> None:
    """Say where a search that had begun before was taken up."""
    current = read_status(study)
    said = (
        f"Went on at step {progress.first_step}, after {progress.first_candidates} "
        "candidates of an earlier run."
    )
    if progress.was_finished and current.state == "stopped":
        said = f"This search was stopped before: {current.reason}. Raise the limit to go on."
    elif progress.was_finished:
        said = "This search was finished before; no candidate was scored anew."
    console.print(said, highlight=False, soft_wrap=True)


def _is_of(result: SearchResult, recipe: Path) -> bool:
    """Say whether a saved recipe is this result's: several studies may share a folder."""
    try:
        saved = json.loads(recipe.read_text(encoding="utf-8"))
        layers = saved["layers"].items()
        bits = {name: (entry["weight_bits"], entry["activation_bits"]) for name, entry in layers}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return saved.get("fingerprint") == dict(result.fingerprint) and bits == dict(result.config)


def finish(
    session: Session,
    found: OptunaStudy,
    *,
    changed: bool,
    command: str,
    console: Console,
) -> dict[str, Any]:
    """Measure the answer, write result and report, show them; return the report as JSON data.

    Args:
        session: What the search began with.
        found: Its study.
        changed: Whether anything was done; otherwise files that exist are left as they are.
        command: The command, for the report.
        console: Where to show the result.
    """
    folder = session.folder
    with console.status("measuring on validation and test data"):
        before = found.user_attrs
        result = session.search.result(found, test=session.parts.test)
        changed = changed or found.user_attrs != before
    report, saved = folder / "report.html", folder / "result"
    if changed or not (report.exists() and _is_of(result, saved / RECIPE)):
        result.save(saved)
        recipe = session.artifacts.put((saved / RECIPE).read_bytes())
        attach(found, "recipe", recipe, filename=RECIPE, mimetype="application/json")
        publish_answer(found, session.artifacts)
        write_report(found, report, command=command)
        page = session.artifacts.put(report.read_bytes())
        attach(found, "report", page, filename="report.html", mimetype="text/html")
    PageWriter(found, always=True).close()
    tables.result(console, found)
    console.print(
        f"Report: {tables.plain(str(report))}\n"
        f"Result: {tables.plain(str(saved))}  (hq_optuna.load)",
        highlight=False,
        soft_wrap=True,
    )
    return {**report_data(found, command=command), "report": str(report), "result": str(saved)}
