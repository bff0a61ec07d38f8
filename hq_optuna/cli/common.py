"""What all commands share: their options, opening a study, errors in one sentence."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from hq_optuna.cli import tables
from hq_optuna.errors import HqOptunaError

Study = Annotated[
    str, typer.Argument(help="A study file, or NAME for studies/NAME.py.", show_default=False)
]
StudyOrNone = Annotated[str | None, typer.Argument(help="As for run.", show_default=False)]
Storage = Annotated[
    str | None,
    typer.Option(
        help="Storage URL. \\[default: SQLite in the run's folder]",
        envvar="HQ_OPTUNA_STORAGE",
        show_default=False,
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="Name of the study. \\[default: the file's name]", show_default=False),
]
Folder = Annotated[
    Path | None,
    typer.Option(help="The run's folder. \\[default: hq-optuna-runs/NAME]", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]

TRACEBACK = "HQ_OPTUNA_TRACEBACK"
"""Environment variable that keeps errors from being cut to a sentence."""


@contextmanager
def reading(
    study: str | None, storage: str | None, name: str | None, folder: Path | None
) -> Iterator[Any]:
    """Open the study that a command names, and say in words if its storage cannot be read."""
    from hq_optuna.cli.place import Place
    from hq_optuna.storages import explain_storage_errors, load_study, redact_url

    if study is None and (storage is None or name is None):
        raise typer.BadParameter("Give a study, or both --storage and --name.")
    place = Place.of(study or str(name), storage, name, folder, reads=True)
    with explain_storage_errors(redact_url(place.storage)):
        yield load_study(place.storage, place.name)


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turn errors into one sentence and an exit status: 1 for errors, 130 for Ctrl-C.

    With `TRACEBACK` in the environment errors are left as they are, traceback and all.
    """

    def interrupt(_signal: int, _frame: object) -> NoReturn:
        # Optuna gives a trial back on KeyboardInterrupt, and on nothing else.
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except HqOptunaError as error:
        if os.environ.get(TRACEBACK):
            raise
        _fail(str(error), type(error).__name__, as_json)
    except (ValueError, OSError) as error:
        # Optuna's and the file system's own words; a bug of ours shows its traceback instead.
        if isinstance(error, OSError) or type(error) is ValueError:
            if os.environ.get(TRACEBACK):
                raise
            _fail(str(error), type(error).__name__, as_json)
        raise
    except KeyboardInterrupt:
        message = "Interrupted. Everything recorded stays; start the same command again to go on."
        if as_json:
            typer.echo(json.dumps({"error": "Interrupted", "message": message}))
        else:
            Console(stderr=True).print(message)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, kind: str, as_json: bool) -> NoReturn:
    if as_json:
        typer.echo(json.dumps({"error": kind, "message": message}))
    else:
        Console(stderr=True).print(
            f"[bold red]Error:[/] {tables.plain(message)}", soft_wrap=True, highlight=False
        )
    raise typer.Exit(1) from None
