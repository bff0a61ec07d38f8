"""``hq-optuna run``: from a study file to a result, a report and a recipe on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.study import Study
from rich.console import Console

from hq_optuna.artifacts.store import attach
from hq_optuna.cli import tables
from hq_optuna.cli.progress import SearchProgress
from hq_optuna.cli.session import Request, Session, begin
from hq_optuna.dashboard import PageWriter
from hq_optuna.protocol.status import read_status
from hq_optuna.storages import study_exists

if TYPE_CHECKING:
    from hq_optuna.answer.result import SearchResult


def run(request: Request, *, command: str, console: Console) -> dict[str, Any]:
    """Run a study file's search and show it; return the report as JSON data.

    Args:
        request: What the user asked for.
        command: The command, for the report.
        console: Where to show progress and result.
    """
    session = begin(request, console)
    existed = study_exists(session.place.storage, session.place.name)
    with SearchProgress(console, session.search.space, session.search.budget) as progress:
        found = session.open(progress=progress.phase)
        session.search.work(found, on_progress=progress.search)
    if existed:
        say_where_it_went_on(console, progress, found)
    return finish(
        session,
        found,
        changed=not (existed and progress.was_finished),
        command=command,
        console=console,
    )


def say_where_it_went_on(console: Console, progress: SearchProgress, study: Study) -> None:
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
    found: Study,
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
    from hq_optuna.answer.recipe import RECIPE
    from hq_optuna.answer.resolve import publish_answer
    from hq_optuna.report.report import report_data, write_report

    folder = session.place.folder
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
