"""``hq-optuna launch``: starts workers, here or on a Dask cluster, and shows them as one."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

import optuna
from rich.console import Console, Group, RenderableType
from rich.table import Table

from hq_optuna.cli import tables
from hq_optuna.cli.progress import SearchProgress
from hq_optuna.cli.run import finish, say_where_it_went_on
from hq_optuna.cli.session import Request, Session, begin
from hq_optuna.cli.settings import n_cores
from hq_optuna.dashboard import PageWriter
from hq_optuna.errors import StudyFileError
from hq_optuna.protocol.step_log import StepLog
from hq_optuna.storages import explain_storage_errors, redact_url, study_exists
from hq_optuna.workers.foreman import Foreman
from hq_optuna.workers.process import WorkerCommand, devices, thread_share
from hq_optuna.workers.supervisor import Member, Supervisor, WorkerHandle

LOOK_EVERY_S = 0.2
READ_EVERY_S = 1.0
"""How often the table shows what is new."""


def launch(
    request: Request,
    *,
    n_workers: int | None,
    scheduler: str | None,
    command: str,
    console: Console,
) -> dict[str, Any]:
    """Run a search with several workers; return the report as JSON data.

    Network, data and settings are checked, tables and study are made and sensitivities are measured
    once, here, before any worker starts.

    Args:
        request: What the user asked for.
        n_workers: How many; ``None``: one for each GPU where the network is on one, or else for
            each core, or for each worker of the cluster.
        scheduler: Address of a Dask scheduler; ``None``: processes of this host.
        command: The command, for the report.
        console: Where to show progress and result.

    Raises:
        WorkerError: The workers died, or say what is wrong.
        HqOptunaError: Whatever is wrong before any worker starts.
    """
    if request.device is not None and request.device.startswith("cuda:"):
        raise StudyFileError(
            f"Each worker sees one GPU, its own; got --device {request.device}. Give --device "
            "cuda, and CUDA_VISIBLE_DEVICES=1,3 for the GPUs to use."
        )
    session = begin(request, console)
    existed = study_exists(session.place.storage, session.place.name)
    with LaunchProgress(console, session) as progress:
        study = session.open(progress=progress.phase)
        log = functools.partial(session.log, study)
        progress.search(log())
        if not progress.was_finished:
            with PageWriter(study, always=True) as pages:

                def tell(found: StepLog) -> None:
                    progress.now_and_then(found)
                    pages(found)

                crew, foreman, close = _crew(
                    request, session, study, n_workers, scheduler, progress.news, tell
                )
                progress.members = crew.members
                try:
                    if foreman is None:
                        _watch(crew, lambda: tell(log()))
                    else:
                        with explain_storage_errors(redact_url(session.place.storage)):
                            _lead(crew, foreman)
                finally:
                    if foreman is not None:
                        foreman.give_back()
                    crew.end()
                    close()
                if foreman is None:
                    progress.search(log())
    if existed:
        say_where_it_went_on(console, progress, study)
    return finish(
        session,
        study,
        changed=not (existed and progress.was_finished),
        command=command,
        console=console,
    )


def _watch(crew: Supervisor, read: Callable[[], None]) -> None:
    was_read = time.monotonic()
    while crew.look():
        if time.monotonic() - was_read >= READ_EVERY_S:
            read()
            was_read = time.monotonic()
        time.sleep(LOOK_EVERY_S)


def _lead(crew: Supervisor, foreman: Foreman) -> None:
    looked = -math.inf
    while True:
        if foreman.over or time.monotonic() - looked >= LOOK_EVERY_S:
            looked = time.monotonic()
            if not crew.look():
                return
        if foreman.over:
            time.sleep(LOOK_EVERY_S / 10)
        else:
            foreman.look(LOOK_EVERY_S)


def _crew(
    request: Request,
    session: Session,
    study: optuna.Study,
    n_workers: int | None,
    scheduler: str | None,
    on_news: Callable[[str], None],
    on_progress: Callable[[StepLog], None],
) -> tuple[Supervisor, Foreman | None, Callable[[], None]]:
    """Return the crew, who leads it, and what to call when it is done.

    Workers on a cluster claim for themselves, as they are on other hosts.
    """
    options = [*request.arguments, "--retry-for", str(request.retry_for_s)]
    if request.artifacts is not None:
        options += ["--artifacts", request.artifacts]
    if request.device is not None:
        options += ["--device", request.device]
    command = WorkerCommand(
        study=str(session.file),
        name=session.place.name,
        folder=str(session.place.folder),
        storage=session.place.storage,
        options=tuple(options),
    )
    if scheduler is not None:
        from hq_optuna.workers.dask import Cluster

        cluster = Cluster(scheduler, command, threads=request.threads)
        n_workers = n_workers or cluster.n_workers
        return Supervisor(cluster.start, n_workers, on_news=on_news), None, cluster.close
    import torch

    on_gpu = session.search.objective.device.type == "cuda"
    gpus = devices(os.environ, torch.cuda.device_count()) if on_gpu else []
    n_workers = n_workers or len(gpus) or n_cores()
    threads = request.threads or min(thread_share(n_cores(), n_workers), session.threads)

    foreman = Foreman(study, on_progress=on_progress)

    def start(index: int) -> WorkerHandle:
        device = gpus[index % len(gpus)] if gpus else None
        return command.start(threads, device, foreman.hear)

    return Supervisor(start, n_workers, on_news=on_news), foreman, lambda: None


class LaunchProgress(SearchProgress):
    """Progress of a search with a table of its workers beside it, or plain lines."""

    def __init__(self, console: Console, session: Session) -> None:
        super().__init__(console, session.search.space, session.search.budget)
        self.members: list[Member] = []
        self._since = time.monotonic()
        self._shown = -math.inf

    def now_and_then(self, log: StepLog) -> None:
        """Show where the search stands, unless that was done a moment ago."""
        if log.open is None or time.monotonic() - self._shown >= READ_EVERY_S:
            self._shown = time.monotonic()
            self.search(log)

    def news(self, text: str) -> None:
        """Show a sentence that stays."""
        self.console.print(f"[yellow]{tables.plain(text)}[/]", highlight=False, soft_wrap=True)

    def show(self) -> RenderableType:
        """Return table, bars and the incumbent's bits."""
        shown = super().show()
        table = worker_table(self.members, time.monotonic() - self._since)
        return Group(table, shown) if self.members else shown


def worker_table(members: list[Member], seconds: float) -> Table:
    """Return a table of workers: what each does, what it did, how often it was started again."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("worker", "process", "doing", "scored", "a minute", "restarts"):
        right = title in ("worker", "scored", "a minute", "restarts")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for member in members:
        colour = {"died": "red", "given up": "red", "done": "green"}.get(member.doing, "default")
        rate = 60 * member.scored / seconds if seconds > 0 else 0.0
        table.add_row(
            str(member.index + 1),
            tables.plain(member.name or "-"),
            f"[{colour}]{member.doing}[/]",
            str(member.scored),
            f"{rate:.1f}",
            str(member.restarts),
        )
    return table
