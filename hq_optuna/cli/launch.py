"""``hq-optuna launch``: starts workers, here or on a Dask cluster, and shows them as one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Annotated

import optuna
import typer
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from hq_optuna.cli import tables
from hq_optuna.cli.options import Given, Json, Study, errors, say, takes
from hq_optuna.cli.progress import SearchProgress
from hq_optuna.cli.run import search_and_finish
from hq_optuna.cli.session import Session, begin, n_cores
from hq_optuna.dashboard import PageWriter
from hq_optuna.errors import StudyFileError
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.settings import RunSettings
from hq_optuna.space.budget import Budget
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.storages import explain_storage_errors, redact_url
from hq_optuna.workers.coordinator import Coordinator
from hq_optuna.workers.process import WorkerCommand, devices, thread_share
from hq_optuna.workers.supervisor import Member, Supervisor, WorkerHandle

LOOK_EVERY_S = 0.2
READ_EVERY_S = 1.0
"""How often the table shows what is new."""


@takes(search=True)
def launch(
    context: typer.Context,
    study: Study,
    run: RunSettings,
    given: Given,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many. \\[default: one for each GPU (--device cuda), or else for each core]",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Address of a Dask scheduler, 'tcp://host:8786', to work on its cluster."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Search with several workers, on this host or on a Dask cluster.

    Workers that die are started again; Ctrl-C ends them all, and everything recorded stays.
    """
    with errors(as_json):
        console = Console(stderr=as_json)
        if run.device is not None and run.device.startswith("cuda:"):
            raise StudyFileError(
                f"Each worker sees one GPU, its own; got --device {run.device}. Give --device "
                "cuda, and CUDA_VISIBLE_DEVICES=1,3 for the GPUs to use."
            )
        session = begin(study, context.args, run, given, console)
        search = session.search
        told = {"by_table": search.objective.verifies}
        progress = LaunchProgress(console, search.space, search.budget, **told)

        def work(found: optuna.Study) -> None:
            progress.search(session.log(found))
            if not progress.was_finished:
                _search(session, found, workers, scheduler, progress)

        search_and_finish(session, console, progress, work, as_json, prepares=False)


def _search(
    session: Session,
    study: optuna.Study,
    n_workers: int | None,
    scheduler: str | None,
    progress: LaunchProgress,
) -> None:
    """Start the workers, and watch or lead them until the search is over.

    Raises:
        WorkerError: The workers died, or say what is wrong.
    """
    with PageWriter(study, always=True) as pages:

        def tell(found: StepLog) -> None:
            progress.now_and_then(found)
            pages(found)

        supervisor, coordinator, close = _start_workers(
            session, study, n_workers, scheduler, progress.news, tell
        )
        progress.show_workers(supervisor.members)
        try:
            # The workers have begun with it; this process, which leads them later, helps.
            session.search.prepare(study, artifacts=session.artifacts, progress=progress.phase)
            if coordinator is None:
                _watch(supervisor, lambda: tell(session.log(study)))
            else:
                with explain_storage_errors(redact_url(session.place.storage)):
                    _lead(supervisor, coordinator)
        finally:
            if coordinator is not None:
                coordinator.give_back()
            supervisor.end()
            close()
        if coordinator is None:
            progress.search(session.log(study))


def _watch(supervisor: Supervisor, read: Callable[[], None]) -> None:
    """Let workers that claim for themselves work, and read now and then what they did."""
    was_read = time.monotonic()
    while supervisor.poll():
        if time.monotonic() - was_read >= READ_EVERY_S:
            read()
            was_read = time.monotonic()
        time.sleep(LOOK_EVERY_S)


def _lead(supervisor: Supervisor, coordinator: Coordinator) -> None:
    """Give orders to workers until all have ended."""
    looked = -math.inf
    while True:
        if coordinator.over or time.monotonic() - looked >= LOOK_EVERY_S:
            looked = time.monotonic()
            if not supervisor.poll():
                return
        if coordinator.over:
            time.sleep(LOOK_EVERY_S / 10)
        else:
            coordinator.poll(LOOK_EVERY_S)


def _start_workers(
    session: Session,
    study: optuna.Study,
    n_workers: int | None,
    scheduler: str | None,
    on_news: Callable[[str], None],
    on_progress: Callable[[StepLog], None],
) -> tuple[Supervisor, Coordinator | None, Callable[[], None]]:
    """Return the supervisor, who leads it, and what to call when it is done.

    Workers on a cluster claim for themselves, as they are on other hosts.
    """
    run, place = session.run, session.place
    options = [*session.arguments, "--retry-for", str(run.retry_for)]
    options += [] if run.artifacts is None else ["--artifacts", run.artifacts]
    options += [] if run.device is None else ["--device", run.device]
    command = WorkerCommand(
        study=str(session.file),
        name=place.name,
        folder=str(place.folder),
        storage=place.storage,
        options=tuple(options),
    )
    if scheduler is not None:
        from hq_optuna.workers.dask import Cluster

        cluster = Cluster(scheduler, command, threads=run.threads)
        n_workers = n_workers or cluster.n_workers
        return Supervisor(cluster.start, n_workers, on_news=on_news), None, cluster.close
    import torch

    on_gpu = session.search.objective.device.type == "cuda"
    gpus = devices(os.environ, torch.cuda.device_count()) if on_gpu else []
    n_workers = n_workers or len(gpus) or n_cores()
    threads = run.threads or min(thread_share(n_cores(), n_workers), session.threads)

    coordinator = Coordinator(study, on_progress=on_progress)

    def start(index: int) -> WorkerHandle:
        device = gpus[index % len(gpus)] if gpus else None
        return command.start(threads, device, coordinator.receive)

    return Supervisor(start, n_workers, on_news=on_news), coordinator, lambda: None


class LaunchProgress(SearchProgress):
    """Progress of a search with a table of its workers beside it, or plain lines."""

    def __init__(
        self, console: Console, space: SearchSpace, budget: Budget, *, by_table: bool = True
    ) -> None:
        super().__init__(console, space, budget, by_table=by_table)
        self._members: list[Member] = []
        self._since = time.monotonic()
        self._shown = -math.inf

    def show_workers(self, members: list[Member]) -> None:
        """Show these workers from here on."""
        self._members = members

    def now_and_then(self, log: StepLog) -> None:
        """Show where the search stands, unless that was done a moment ago."""
        if log.open is None or time.monotonic() - self._shown >= READ_EVERY_S:
            self._shown = time.monotonic()
            self.search(log)

    def news(self, text: str) -> None:
        """Show a sentence that stays."""
        say(self.console, f"[yellow]{escape(text)}[/]")

    def show(self) -> RenderableType:
        """Return table, bars and the incumbent's bits."""
        shown = super().show()
        table = worker_table(self._members, time.monotonic() - self._since)
        return Group(table, shown) if self._members else shown


def worker_table(members: list[Member], seconds: float) -> Table:
    """Return a table of workers: what each does, what it did, how often it was started again."""
    titles = ("worker", "process", "doing", "scored", "a minute", "restarts")
    table = tables.new_table(*titles, left=("process", "doing"))
    for member in members:
        colour = {"died": "red", "given up": "red", "done": "green"}.get(member.doing, "default")
        rate = 60 * member.scored / seconds if seconds > 0 else 0.0
        table.add_row(
            str(member.index + 1),
            escape(member.name or "-"),
            f"[{colour}]{member.doing}[/]",
            str(member.scored),
            f"{rate:.1f}",
            str(member.restarts),
        )
    return table
