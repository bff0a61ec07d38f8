"""Commands of ``hq-optuna``, beside those of `solving`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from hq_optuna._version import __version__
from hq_optuna.cli import dashboard, resolve, status, tables
from hq_optuna.cli.common import Folder, Json, Name, Storage, Study, StudyOrNone, errors, reading
from hq_optuna.cli.options import RETRY_FOR, ArtifactsAt, Device, Given, RetryFor, Threads, searches

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find how many bits each layer of a trained network needs, under a compute-cost budget.",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _command() -> str:
    return shlex.join(["hq-optuna", *sys.argv[1:]])


_OPEN: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For commands that take the options of the study file beside their own."""


@app.command(context_settings=_OPEN)
@searches
def run(
    context: typer.Context,
    study: Study,
    given: Given,
    storage: Storage = None,
    name: Name = None,
    folder: Folder = None,
    artifacts: ArtifactsAt = None,
    threads: Threads = None,
    device: Device = None,
    retry_for: RetryFor = RETRY_FOR,
    as_json: Json = False,
) -> None:
    """Search, or go on with a search that was interrupted.

    Options of the study file itself stand beside these: hq-optuna run cifar10_resnet20 --data DIR.
    """
    from hq_optuna.cli import run
    from hq_optuna.cli.session import Request

    with errors(as_json):
        data = run.run(
            Request(
                *(study, context.args, storage, name, folder, artifacts, given, threads, retry_for),
                command=_command(),
                device=device,
            ),
            command=_command(),
            console=Console(stderr=as_json),
        )
        if as_json:
            typer.echo(json.dumps(data))


@app.command(context_settings=_OPEN)
@searches
def worker(
    context: typer.Context,
    study: Study,
    given: Given,
    storage: Storage = None,
    name: Name = None,
    folder: Folder = None,
    artifacts: ArtifactsAt = None,
    threads: Threads = None,
    device: Device = None,
    retry_for: RetryFor = RETRY_FOR,
    create: Annotated[
        bool, typer.Option("--create", help="Start the study if it does not exist yet.")
    ] = False,
    wait_for: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a study that does not exist yet.")
    ] = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON objects, one a line, as things happen.")
    ] = False,
) -> None:
    """Join a search from any host that has the study file and reaches the storage.

    What the search was started with comes from the study and need not be repeated.
    """
    from hq_optuna.cli import worker
    from hq_optuna.cli.session import Request

    if create and wait_for:
        raise typer.BadParameter("--create starts the study and does not wait for it (--wait-for).")
    with errors(as_json):
        worker.work(
            Request(
                *(study, context.args, storage, name, folder, artifacts, given, threads, retry_for),
                command=_command(),
                device=device,
            ),
            create=create,
            wait_for_s=wait_for,
            as_json=as_json,
            console=Console(stderr=as_json, quiet=as_json),
        )


@app.command(context_settings=_OPEN)
@searches
def launch(
    context: typer.Context,
    study: Study,
    given: Given,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many. \\[default: one for each GPU (--device cuda), or else for each core]",
            show_default=False,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Address of a Dask scheduler, 'tcp://host:8786', to work on its cluster.",
            show_default=False,
        ),
    ] = None,
    storage: Storage = None,
    name: Name = None,
    folder: Folder = None,
    artifacts: ArtifactsAt = None,
    threads: Threads = None,
    device: Device = None,
    retry_for: RetryFor = RETRY_FOR,
    as_json: Json = False,
) -> None:
    """Search with several workers, on this host or on a Dask cluster.

    Workers that die are started again; Ctrl-C ends them all, and everything recorded stays.
    """
    from hq_optuna.cli import launch
    from hq_optuna.cli.session import Request

    with errors(as_json):
        data = launch.launch(
            Request(
                *(study, context.args, storage, name, folder, artifacts, given, threads, retry_for),
                command=_command(),
                device=device,
            ),
            n_workers=workers,
            scheduler=scheduler,
            command=_command(),
            console=Console(stderr=as_json),
        )
        if as_json:
            typer.echo(json.dumps(data))


@app.command()
def report(
    study: StudyOrNone = None,
    storage: Storage = None,
    name: Name = None,
    folder: Folder = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write. \\[default: report.html, or the terminal]")
    ] = None,
    format_: Annotated[
        Literal["html", "json", "markdown"], typer.Option("--format", help="What to write.")
    ] = "html",
) -> None:
    """Write the report of a search, finished or not."""
    from hq_optuna.report.report import render_markdown, report_data, write_report

    with errors(as_json=False), reading(study, storage, name, folder) as loaded:
        if format_ == "html":
            path = Path("report.html") if out is None else out
            write_report(loaded, path)
            console = Console()
            console.print(f"Report: {tables.plain(str(path))}", soft_wrap=True, highlight=False)
            return
        data = report_data(loaded)
        text = json.dumps(data, indent=1) if format_ == "json" else render_markdown(data)
        if out is None:
            typer.echo(text)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text + "\n", encoding="utf-8")


app.command()(status.status)
app.command()(dashboard.dashboard)
app.command()(resolve.resolve)
app.command()(resolve.pareto)
