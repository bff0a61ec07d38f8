"""``hq-optuna status``: where a search stands, once or as it goes on."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from typing import Annotated

import optuna
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hq_optuna import attributes
from hq_optuna.cli import tables
from hq_optuna.cli.options import Json, StudyOrNone, errors, reading, say, takes
from hq_optuna.cli.progress import LINE_EVERY_S, format_rate, format_seconds
from hq_optuna.optuna_internals import storage_of
from hq_optuna.protocol.history import read_history
from hq_optuna.protocol.status import SearchStatus, StatusReader, WorkerStatus
from hq_optuna.report.data import report_data
from hq_optuna.settings import RunSettings
from hq_optuna.storages import RetryingStorage

LOOK_EVERY_S = 2.0


@takes("storage", "name", "folder", "retry_for")
def status(
    run: RunSettings,
    study: StudyOrNone = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on looking until the search is over.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show where a search stands: steps, workers, rate, time left. Works while others run."""
    with errors(as_json), reading(study, run) as loaded:
        kept = RetryingStorage(storage_of(loaded), retry_for_s=run.retry_for)
        loaded = optuna.load_study(study_name=loaded.study_name, storage=kept)
        if watch:
            _watch(StatusReader(loaded), as_json)
            return
        current = StatusReader(loaded).read()
        ours = attributes.FINGERPRINT in loaded.user_attrs
        if current.state == "preparing" and not ours and loaded.get_trials(deepcopy=False):
            read_history(loaded)  # says that this is another kind of study
        if as_json:
            known = {} if current.state == "preparing" else report_data(loaded)
            typer.echo(json.dumps({**known, "current": current.to_json()}))
            return
        console = Console()
        if current.state != "preparing":
            tables.status(console, loaded, current)
        console.print(Text(line(current)), soft_wrap=True)
        if current.workers:
            console.print(_workers(current.workers))


def _watch(watch: StatusReader, as_json: bool) -> None:
    console = Console(stderr=as_json)
    seen, said = None, -float("inf")
    on_screen = console.is_terminal and not as_json
    with Live(console=console, auto_refresh=False) if on_screen else nullcontext() as live:
        while True:
            current = watch.read()
            over = current.state in ("finished", "stopped")
            if live is not None:
                live.update(panel(current, console.width), refresh=True)
            elif as_json:
                if current != seen:
                    typer.echo(json.dumps(current.to_json()))
            elif over or time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                say(console, line(current))
            if over:
                return
            seen = current
            time.sleep(LOOK_EVERY_S)


def line(current: SearchStatus) -> str:
    """Return where a search stands, in one line."""
    if current.state == "preparing":
        return "  ".join([preparing(current), *_left(current), _at_work(current)])
    says = current.state + (f": {current.reason}" if current.reason else "")
    parts = [says, f"{100 * current.share:.0f} % of the way", f"{current.steps} steps"]
    if current.of:
        parts.append(f"{current.done} of {current.of} in the open one")
    parts.append(f"{current.candidates} candidates")
    if current.per_minute:
        parts.append(format_rate(current.per_minute))
    return "  ".join([*parts, *_left(current), _at_work(current)])


def preparing(current: SearchStatus) -> str:
    """Return how far the preparation of a search is, in words."""
    if not current.pieces:
        return "preparing: sensitivities are not measured yet"
    done = sum(piece.done for piece in current.pieces)
    share = f"{100 * current.share:.0f} % of the work"
    return f"preparing: {done} of {len(current.pieces)} pieces, {share}"


def _left(current: SearchStatus) -> list[str]:
    return [] if current.left_s is None else [f"{format_seconds(current.left_s)} left"]


def _at_work(current: SearchStatus) -> str:
    alive = sum(worker.alive is not False for worker in current.workers)
    dead = len(current.workers) - alive
    died = f", {dead} died at work" if dead else ""
    return f"{alive} worker{'' if alive == 1 else 's'}{died}"


def panel(current: SearchStatus, width: int) -> RenderableType:
    """Return where a search stands as a bar, its line, the incumbent's bits and a table of workers.

    All of it fits into `width` columns.
    """
    parts: list[RenderableType] = [Text(line(current))]
    if current.state != "preparing" or current.pieces:
        row = Table.grid()  # a bar by itself ends no line
        row.add_row(ProgressBar(total=1.0, completed=current.share, width=min(width, 60)))
        parts.insert(0, row)
        parts += tables.strips(current.bits, current.levels, width) if current.bits else []
    return Group(*parts, *([_workers(current.workers)] if current.workers else []))


def _workers(found: tuple[WorkerStatus, ...]) -> Table:
    table = tables.new_table("worker", "state", "at", "scored", left=("worker", "state", "at"))
    states = {True: "[green]alive[/]", False: "[red]dead[/]", None: "elsewhere"}
    for worker in found:
        row = (escape(worker.name), states[worker.alive], worker.doing, str(worker.candidates))
        table.add_row(*row)
    return table
