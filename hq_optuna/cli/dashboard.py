"""``hq-optuna dashboard``: optuna-dashboard on a search's storage, with its files."""

from __future__ import annotations

import ipaddress
import threading
import time
from typing import Annotated

import typer
from optuna.storages import BaseStorage
from optuna.study import Study
from rich.console import Console
from rich.markup import escape

from hq_optuna.artifacts.store import open_artifacts
from hq_optuna.cli.options import errors, place_of, say, takes
from hq_optuna.dashboard.pages import changed_pages
from hq_optuna.dashboard.server import DashboardServer
from hq_optuna.errors import StorageError
from hq_optuna.optuna_internals import id_of, storage_of
from hq_optuna.protocol.start_options import StartOptions
from hq_optuna.protocol.status import StatusReader
from hq_optuna.settings import RunSettings
from hq_optuna.storages import (
    load_study,
    open_storage,
    redact_url,
    sqlite_path,
    storage_exists,
)

LOOKS, LOOK_EVERY_S = 4, 0.5
"""How often is looked before a search counts as one that nobody works on."""


@takes("storage", "name", "folder", "artifacts")
def dashboard(
    run: RunSettings,
    study: Annotated[
        str | None, typer.Argument(help="A study as for run, or a storage URL with any studies.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8080,
) -> None:
    """Browse a search in optuna-dashboard, while it runs or later. Ctrl-C ends it."""
    with errors(as_json=False):
        opened, found, files, url = _open(study, run)
        # Opening creates nothing: a folder that is not there has no files.
        kept = None if files is None else open_artifacts(files)
        with DashboardServer(opened, kept, host=host, port=port) as server:
            page = "" if found is None else f"/dashboard/studies/{id_of(found)}"
            if found is not None:
                server.read_ahead(id_of(found))
                threading.Thread(target=_refresh, args=(found, server), daemon=True).start()
            console = Console()
            try:
                say(console, f"Dashboard: {server.url}{page}")
                kept_at = f"storage {redact_url(url)}, files {files or 'none'}"
                say(console, f"{escape(kept_at)}. Ctrl-C ends it.")
                if not _is_loopback(host):
                    say(
                        console,
                        "[yellow]Warning:[/] whoever reaches this address can change and delete "
                        "studies; the dashboard asks for no password.",
                    )
                threading.Event().wait()
            except KeyboardInterrupt:
                console.print("The dashboard is closed.")


def _open(study: str | None, run: RunSettings) -> tuple[BaseStorage, Study | None, str | None, str]:
    """Return the storage, the study if one is named, where its files are, and the storage's URL."""
    if study is not None and "://" in study:
        run, study = run.replace(storage=study), None
    if study is None and run.storage is None:
        raise typer.BadParameter("Give a study or a storage URL.")
    if study is None and run.name is None:
        url = str(run.storage)
        if not storage_exists(url):
            raise StorageError(f"There is no database at {redact_url(url)}. Was a search started?")
        return open_storage(url, reads=True), None, run.artifacts or _beside(url), url
    place = place_of(study or str(run.name), run, reads=True)
    found = load_study(place.storage, place.name)
    files = run.artifacts or StartOptions.read(found).settings.get("artifacts")
    return storage_of(found), found, str(files or f"{place.folder}/artifacts"), place.storage


def _beside(storage: str) -> str | None:
    """Return the folder of artifacts beside a SQLite file, as a run leaves it, if there is one."""
    file = sqlite_path(storage)
    path = None if file is None else file.parent / "artifacts"
    return str(path) if path is not None and path.is_dir() else None


def _refresh(study: Study, server: DashboardServer) -> None:
    """Show pages of a search that nobody writes any more, as after a killed run. Writes nothing."""
    reader = StatusReader(study)
    for _ in range(LOOKS):
        current = reader.read()
        if current.state != "idle":  # else perhaps just between two trials
            break
        time.sleep(LOOK_EVERY_S)
    if current.state != "preparing":
        server.show_pages(id_of(study), changed_pages(study, current=current))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
