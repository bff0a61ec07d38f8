"""``hq-optuna run``: from a study file to a result, a report and a recipe on disk."""

from __future__ import annotations

from typing import Any

from optuna.study import Study
from rich.console import Console

from hq_optuna.artifacts import attach
from hq_optuna.cli import show
from hq_optuna.cli.progress import SearchProgress
from hq_optuna.cli.session import Request, Session, begin
from hq_optuna.dashboard import PageWriter
from hq_optuna.errors import StudyFileError
from hq_optuna.storages import study_exists


def run(request: Request, *, command: str, console: Console, baselines: int = 0) -> dict[str, Any]:
    """Run a study file's search and show it; return the report as JSON data.

    Args:
        request: What the user asked for.
        command: The command, for the report.
        console: Where to show progress and result.
        baselines: Seeds of the methods the answer is compared with.
    """
    session = begin(request, console)
    refuse_baselines(session, baselines)
    existed = study_exists(session.place.storage, session.place.name)
    with SearchProgress(console, session.search.space, session.search.budget) as progress:
        found = session.open(progress=progress.phase)
        session.search.work(found, on_progress=progress.search)
    if existed:
        say_where_it_went_on(console, progress)
    return finish(
        session,
        found,
        changed=not (existed and progress.was_finished),
        command=command,
        console=console,
        baselines=baselines,
    )


def refuse_baselines(session: Session, baselines: int) -> None:
    """Refuse a comparison with other methods where there are no data to compare on.

    Raises:
        StudyFileError: The study file has no validation data.
    """
    if baselines and session.search.validation is None:
        raise StudyFileError(
            "--baselines compares on validation data: let the study file define validation(), "
            "which returns labelled data as calibration() does, or leave the option out."
        )


def say_where_it_went_on(console: Console, progress: SearchProgress) -> None:
    """Say where a search that had begun before was taken up."""
    console.print(
        "This search was finished before; nothing was changed."
        if progress.was_finished
        else f"Went on at step {progress.first_step}, after {progress.first_candidates} "
        "candidates of an earlier run.",
        highlight=False,
        soft_wrap=True,
    )


def finish(
    session: Session,
    found: Study,
    *,
    changed: bool,
    command: str,
    console: Console,
    baselines: int = 0,
) -> dict[str, Any]:
    """Measure the answer, write result and report, show them; return the report as JSON data.

    Args:
        session: What the search began with.
        found: Its study.
        changed: Whether anything was done; otherwise files that exist are left as they are.
        command: The command, for the report.
        console: Where to show the result.
        baselines: Seeds of the methods the answer is compared with.
    """
    from hq_optuna.runner.publish import publish_answer
    from hq_optuna.runner.recipe import RECIPE
    from hq_optuna.runner.report import report_data, write_report

    folder = session.place.folder
    others = ", and other methods" if baselines else ""
    with console.status(f"measuring on validation and test data{others}"):
        before = found.user_attrs
        result = session.search.result(found, test=session.parts.test, baselines=baselines)
        changed = changed or found.user_attrs != before
    report, saved = folder / "report.html", folder / "result"
    if changed or not (report.exists() and saved.exists()):
        result.save(saved)
        recipe = session.artifacts.put((saved / RECIPE).read_bytes())
        attach(found, "recipe", recipe, filename=RECIPE, mimetype="application/json")
        publish_answer(found, session.artifacts)
        write_report(found, report, command=command)
        page = session.artifacts.put(report.read_bytes())
        attach(found, "report", page, filename="report.html", mimetype="text/html")
    PageWriter(found, always=True).close()
    show.result(console, found)
    console.print(
        f"Report: {show.plain(str(report))}\nResult: {show.plain(str(saved))}  (hq_optuna.load)",
        highlight=False,
        soft_wrap=True,
    )
    return {**report_data(found, command=command), "report": str(report), "result": str(saved)}
