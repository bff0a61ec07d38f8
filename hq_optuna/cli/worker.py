"""``hq-optuna worker``: joins a search, and tells what it does."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from hq_optuna.cli.options import Given, Study, errors, say, takes
from hq_optuna.cli.progress import SearchProgress
from hq_optuna.cli.session import begin, find, wait_for_study
from hq_optuna.optuna_internals import storage_of
from hq_optuna.protocol import worker_identity
from hq_optuna.settings import RunSettings
from hq_optuna.workers.process import ENDS_WITH_STDIN, SERVES
from hq_optuna.workers.serving import Orders, serve

GRACE_S = 20.0
"""How long a worker whose launcher is gone may take to give its candidate back."""


@takes(search=True)
def worker(
    context: typer.Context,
    study: Study,
    run: RunSettings,
    given: Given,
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
    if create and wait_for:
        raise typer.BadParameter("--create starts the study and does not wait for it (--wait-for).")
    with errors(as_json):
        console = Console(stderr=as_json, quiet=as_json)
        orders = _orders_of_a_launcher()
        tell = _Events(as_json)
        if not create:
            tell("waiting for the study")
            wait_for_study(find(study, run)[1], wait_for)
        tell("loading")
        session = begin(study, context.args, run, given, console)
        search = session.search
        told = {"by_table": search.objective.verifies}
        with SearchProgress(console, search.space, search.budget, **told) as progress:
            tell("preparing")
            found = session.open(progress=progress.phase)
            if orders is not None:
                storage_of(found).remove_session()  # the launcher has it from here on
                serve(orders, functools.partial(session.search.objective.obey, found), tell)
            else:
                session.search.work(
                    found,
                    on_progress=progress.search,
                    on_doing=tell,
                    pages=ENDS_WITH_STDIN not in os.environ,  # else its launcher writes them
                )
        tell("done")
        me = worker_identity.my_short_name()
        say(console, f"The search is over. This worker, {me}, scored {tell.n_scored} candidates.")


def _orders_of_a_launcher() -> Orders | None:
    """Return where the orders of this process's launcher arrive; ``None`` where it claims itself.

    Either way it ends with its launcher, if it has one.
    """
    if os.environ.get(SERVES):
        return Orders(sys.stdin.fileno(), _launcher_is_gone)
    if os.environ.get(ENDS_WITH_STDIN):
        threading.Thread(target=_end_with, args=(sys.stdin.fileno(),), daemon=True).start()
    return None


class _Events:
    """Tells a launcher what happens, one JSON object a line; silent without one."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.n_scored = 0
        self._last = ""

    def __call__(self, event: str, **facts: Any) -> None:
        self.n_scored += event == "scored"
        if self.as_json and (event != self._last or facts):
            self._last = event
            me = worker_identity.my_short_name()
            data = {"event": event, "worker": me, "scored": self.n_scored, **facts}
            print(json.dumps(data), flush=True)


def _end_with(descriptor: int, exit_: Callable[[int], Any] = os._exit) -> None:
    """End this process, gracefully if it can, when its launcher is gone."""
    while os.read(descriptor, 1024):
        pass
    _launcher_is_gone(exit_)


def _launcher_is_gone(exit_: Callable[[int], Any] = os._exit) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    exit_(1)
