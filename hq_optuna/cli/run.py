"""``hq-optuna run``: from a study file to a result, a report and a recipe on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from optuna.study import Study as OptunaStudy
from rich.console import Console
from rich.markup import escape

from hq_optuna.answer.recipe import RECIPE
from hq_optuna.answer.resolve import publish_answer
from hq_optuna.answer.result import SearchResult
from hq_optuna.artifacts.store import attach
from hq_optuna.cli import tables
from hq_optuna.cli.options import Given, Json, Study, command_line, errors, say, takes
from hq_optuna.cli.progress import SearchProgress
from hq_optuna.cli.session import Session, begin
from hq_optuna.dashboard import PageWriter
from hq_optuna.errors import SettingError
from hq_optuna.protocol.history import read_history
from hq_optuna.protocol.status import read_status
from hq_optuna.report.data import report_data
from hq_optuna.report.page import write_report
from hq_optuna.settings import RunSettings, settings_of
from hq_optuna.storages import study_exists


@takes(search=True, target=True)
def run(
    context: typer.Context,
    study: Study,
    run: RunSettings,
    given: Given,
    as_json: Json = False,
) -> None:
    """Search, or go on with a search that was interrupted.

    With --target, the least cost is found at which a metric stays within it. Options of the study
    file itself stand beside these: hq-optuna run cifar10_resnet20 --data DIR.
    """
    with errors(as_json):
        console = Console(stderr=as_json)
        session = begin(study, context.args, run, given, console)
        search = session.search
        if run.target is not None:
            _check_target(session)
        told = {"by_table": search.objective.verifies}
        progress = SearchProgress(console, search.space, search.budget, **told)
        if run.target is not None:
            _meet(session, console, progress, given, as_json)
            return

        def work(found: OptunaStudy) -> None:
            session.search.work(found, on_progress=progress.search)

        search_and_finish(session, console, progress, work, as_json)


_OF_SEARCHES = ("max_trials", "max_evaluations", "max_seconds", "layer_errors")
"""Options of a run that nothing but a search follows."""


def _check_target(session: Session) -> None:
    """Refuse, before any work, a target that cannot be met, and what contradicts one."""
    search, run = session.search, session.run
    if search.training is not None:
        raise SettingError(
            "--target measures networks as they are rounded, and this run trains them. Leave out "
            "the target, or --train-every and --final-epochs."
        )
    if idle := [name for name in _OF_SEARCHES if getattr(run, name)]:
        option = settings_of(RunSettings)[idle[0]].option
        raise SettingError(
            f"--target runs no search, which is what {option} is for. Leave one of them out."
        )
    search.check_target(run.target)


def _meet(
    session: Session, console: Console, progress: SearchProgress, given: Given, as_json: bool
) -> None:
    """Meet the run's target in place of a search, and show and save what was found."""
    from hq_optuna.cli.resolve import meet, show

    with progress:
        study = session.open(progress.phase)
    budget = session.search.budget if "budget" in given else None
    saved = session.place.folder / "result"
    with console.status("measuring on validation data"):
        found, measured = meet(session, study, budget, saved)
    if as_json:
        typer.echo(json.dumps({**found.to_json(), **measured, "result": str(saved)}))
        return
    show(console, read_history(study), found, budget, measured)
    say(console, f"Result: {escape(str(saved))}  (hq_optuna.load)")


def search_and_finish(
    session: Session,
    console: Console,
    progress: SearchProgress,
    work: Callable[[OptunaStudy], None],
    as_json: bool,
    *,
    prepares: bool = True,
) -> None:
    """Open the study, let `work` finish its search, and write and show what was found.

    The study is prepared before `work` is called, or by it.
    """
    existed = study_exists(session.place.storage, session.place.name)
    with progress:
        found = session.open(progress.phase if prepares else None)
        work(found)
    if existed:
        _say_where_it_went_on(console, progress, found)
    data = _finish(session, found, console, changed=not (existed and progress.was_finished))
    if as_json:
        typer.echo(json.dumps(data))


def _say_where_it_went_on(console: Console, progress: SearchProgress, study: OptunaStudy) -> None:
    current = read_status(study)
    said = (
        f"Went on at step {progress.first_step}, after {progress.first_candidates} "
        "candidates of an earlier run."
    )
    if progress.was_finished and current.state == "stopped":
        said = f"This search was stopped before: {current.reason}. Raise the limit to go on."
    elif progress.was_finished:
        said = "This search was finished before; no candidate was scored anew."
    say(console, said)


def _is_of(result: SearchResult, recipe: Path) -> bool:
    """Say whether a saved recipe is this result's: several studies may share a folder."""
    try:
        saved = json.loads(recipe.read_text(encoding="utf-8"))
        layers = saved["layers"].items()
        bits = {name: (entry["weight_bits"], entry["activation_bits"]) for name, entry in layers}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return saved.get("fingerprint") == dict(result.fingerprint) and bits == dict(result.config)


def _finish(
    session: Session, found: OptunaStudy, console: Console, *, changed: bool
) -> dict[str, Any]:
    """Measure the answer, write result and report, show them; return the report as JSON data.

    Where nothing changed, files that exist are left as they are.
    """
    folder, command = session.place.folder, command_line()
    with console.status("measuring on validation and test data"):
        before = found.user_attrs
        result = session.search.result(found, test=session.parts.test)
        if session.run.layer_errors:
            session.search.layer_errors(found, result)
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
    say(console, f"Report: {escape(str(report))}")
    say(console, f"Result: {escape(str(saved))}  (hq_optuna.load)")
    return {**report_data(found, command=command), "report": str(report), "result": str(saved)}
