"""``hq-optuna status``: where a search stands, once or as it goes on."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import optuna
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hq_optuna import attrs
from hq_optuna.cli import show
from hq_optuna.cli.common import Folder, Json, Name, Storage, StudyOrNone, errors, reading
from hq_optuna.cli.options import RETRY_FOR, RetryFor
from hq_optuna.cli.progress import LINE_EVERY_S, format_rate, format_seconds
from hq_optuna.cli.strip import strips
from hq_optuna.standing import Standing, Watch, WorkerStanding

LOOK_EVERY_S = 2.0


def status(
    study: StudyOrNone = None,
    storage: Storage = None,
    name: Name = None,
    folder: Folder = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on looking until the search is over.")
    ] = False,
    retry_for: RetryFor = RETRY_FOR,
    as_json: Json = False,
) -> None:
    """Show where a search stands: steps, workers, rate, time left. Works while others run."""
    from hq_optuna.history import read_history
    from hq_optuna.runner.report import report_data
    from hq_optuna.storages import RetryingStorage

    with errors(as_json), reading(study, storage, name, folder) as loaded:
        kept = RetryingStorage(loaded._storage, retry_for_s=retry_for)
        loaded = optuna.load_study(study_name=loaded.study_name, storage=kept)
        if watch:
            _watch(Watch(loaded), as_json)
            return
        standing = Watch(loaded).look()
        ours = attrs.FINGERPRINT in loaded.user_attrs
        if standing.state == "preparing" and not ours and loaded.get_trials(deepcopy=False):
            read_history(loaded)  # says that this is another kind of study
        if as_json:
            known: dict[str, Any] = {}
            if standing.state != "preparing":
                known = report_data(loaded)
            typer.echo(json.dumps({**known, "standing": standing.to_json()}))
            return
        console = Console()
        if standing.state != "preparing":
            show.status(console, loaded, standing)
        console.print(Text(line(standing)), soft_wrap=True)
        if standing.workers:
            console.print(_workers(standing.workers))


def _watch(watch: Watch, as_json: bool) -> None:
    console = Console(stderr=as_json)
    seen, said = None, -float("inf")
    live = (
        Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    )
    if live is not None:
        live.start()
    try:
        while True:
            standing = watch.look()
            over = standing.state in ("finished", "stopped")
            if live is not None:
                live.update(panel(standing, console.width), refresh=True)
            elif as_json:
                if standing != seen:
                    typer.echo(json.dumps(standing.to_json()))
            elif over or time.monotonic() - said >= LINE_EVERY_S:
                said = time.monotonic()
                console.print(line(standing), highlight=False, soft_wrap=True)
            if over:
                return
            seen = standing
            time.sleep(LOOK_EVERY_S)
    finally:
        if live is not None:
            live.stop()


def line(standing: Standing) -> str:
    """Return a standing in one line."""
    if standing.state == "preparing":
        return "preparing: sensitivities are not measured yet"
    says = standing.state + (f": {standing.reason}" if standing.reason else "")
    parts = [says, f"{100 * standing.share:.0f} % of the way", f"{standing.steps} steps"]
    if standing.of:
        parts.append(f"{standing.done} of {standing.of} in the open one")
    parts.append(f"{standing.candidates} candidates")
    if standing.per_minute:
        parts.append(format_rate(standing.per_minute))
    if standing.left_s is not None:
        parts.append(f"{format_seconds(standing.left_s)} left")
    alive = sum(worker.alive is not False for worker in standing.workers)
    dead = len(standing.workers) - alive
    parts.append(
        f"{alive} worker{'' if alive == 1 else 's'}" + (f", {dead} died at work" if dead else "")
    )
    return "  ".join(parts)


def panel(standing: Standing, width: int) -> RenderableType:
    """Return a standing as a bar, its line, the incumbent's bits and a table of workers.

    Args:
        standing: What to show.
        width: Columns of the terminal.
    """
    parts: list[RenderableType] = [Text(line(standing))]
    if standing.state != "preparing":
        bar = ProgressBar(total=1.0, completed=standing.share, width=min(width, 60))
        row = Table.grid()  # a bar by itself ends no line
        row.add_row(bar)
        parts.insert(0, row)
        parts += strips(standing.bits, standing.levels, width) if standing.bits else []
    return Group(*parts, *([_workers(standing.workers)] if standing.workers else []))


def _workers(found: tuple[WorkerStanding, ...]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title, side in (("worker", "left"), ("state", "left"), ("at", "left"), ("scored", "right")):
        table.add_column(title, justify="right" if side == "right" else "left", no_wrap=True)
    states = {True: "[green]alive[/]", False: "[red]dead[/]", None: "elsewhere"}
    for worker in found:
        table.add_row(
            show.plain(worker.name), states[worker.alive], worker.doing, str(worker.candidates)
        )
    return table
