"""Options of commands, made from `hq_optuna.settings`, and errors in one sentence."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from hq_optuna.errors import HqOptunaError, StudyFileError, note_caller
from hq_optuna.settings import NUMBER, SWITCH, WHOLE, RunSettings, SearchSettings, Setting
from hq_optuna.settings import settings_of as fields_of

Study = Annotated[str, typer.Argument(help="A study file, or NAME for studies/NAME.py.")]
StudyOrNone = Annotated[str | None, typer.Argument(help="As for run.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
Given = Mapping[str, Any]
"""Settings of a search that were given on the command line, by name."""

OPEN: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context of commands that take the options of the study file beside their own."""

ENVIRONMENT = {"storage": "HQ_OPTUNA_STORAGE"}
"""Options that an environment variable may give."""

TRACEBACK = "HQ_OPTUNA_TRACEBACK"
"""Environment variable that keeps errors from being cut to a sentence."""

RUNS = Path("hq-optuna-runs")


def takes(
    *of_run: str, search: bool = False, target: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Give a command options made from settings.

    It receives those of a run, all or the ones named here, as `RunSettings` in the argument
    ``run``, and with `search` those of a search that were given in the argument ``given``. Only
    with ``target`` it can meet one in place of a search.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        known = {n: s for n, s in fields_of(RunSettings).items() if not of_run or n in of_run}
        if not target:
            known.pop("target", None)
        search_options = fields_of(SearchSettings) if search else {}
        own = inspect.signature(command, eval_str=True).parameters
        shown = [p for name, p in own.items() if name not in ("run", "given")]
        shown.sort(key=lambda p: p.default is not p.empty)  # arguments first
        made = [_parameter(s) for s in (*search_options.values(), *known.values()) if s.option]

        @functools.wraps(command)
        def called(*arguments: Any, **values: Any) -> Any:
            taken = {p.name: values.pop(p.name) for p in made}
            set_ = {name: value for name, value in taken.items() if value not in (None, [])}
            values["run"] = RunSettings(**{n: v for n, v in set_.items() if n in known})
            if search:
                values["given"] = {n: v for n, v in set_.items() if n in search_options}
            return command(*arguments, **values)

        signature = [*shown, *made]
        called.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in signature}
        return called

    return decorate


def _parameter(one: Setting) -> inspect.Parameter:
    """Return the option of a setting; ``None`` where it is not given."""
    kinds = {WHOLE: int, NUMBER: float, SWITCH: bool}
    kind: Any = list[str] if one.repeats else kinds.get(one.kind, str)
    option = typer.Option(
        f"{one.option}/--no-{one.option[2:]}" if one.kind == SWITCH else one.option,
        help=escape(f"{one.help} [default: {one.shown_default}]"),
        metavar=one.metavar or None,
        envvar=ENVIRONMENT.get(one.name),
    )
    annotation = Annotated[kind | None, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(one.name, keyword, default=None, annotation=annotation)


def own_options() -> list[str]:
    """Return the options of ``run``, ``worker`` and ``launch``, which study files cannot have."""
    known = (*fields_of(SearchSettings).values(), *fields_of(RunSettings).values())
    named = [one.option for one in known if one.option]
    switches = [f"--no-{one.option[2:]}" for one in known if one.kind == SWITCH]
    return [*named, *switches, "--create", "--wait-for", "--workers", "--scheduler", "--json",
            "--help"]  # fmt: skip


def say(console: Console, text: str) -> None:
    """Print text with its markup, neither wrapped nor with highlighted numbers."""
    console.print(text, highlight=False, soft_wrap=True)


def command_line() -> str:
    """Return the whole command as it was typed."""
    return shlex.join(["hq-optuna", *sys.argv[1:]])


@dataclass(frozen=True)
class Place:
    """Where a run keeps what it makes: the study's name, the run's folder, the storage's URL."""

    name: str
    folder: Path
    storage: str


def place_of(study: str, run: RunSettings, *, reads: bool = False) -> Place:
    """Return where a run keeps what it makes; what is not given follows from the study's name.

    A command that only reads takes any name in a storage that is given, such as that of a study
    started from Python.

    Raises:
        StudyFileError: A run's folder cannot have the study's name.
    """
    from hq_optuna.storages import sqlite_url

    name = Path(study).stem if run.name is None else run.name
    named_after = run.folder is None and not (reads and run.storage is not None)
    if not name or (named_after and name != Path(name).name):
        raise StudyFileError(
            f"{name!r} is no name for a study: it names a folder of its own. "
            "Give the run another folder (--folder)."
        )
    folder = RUNS / name if run.folder is None else run.folder
    storage = sqlite_url(folder / "study.db") if run.storage is None else run.storage
    return Place(name, folder, storage)


@contextmanager
def reading(study: str | None, run: RunSettings) -> Iterator[Any]:
    """Open the study that a command names, and say in words if its storage cannot be read."""
    from hq_optuna.storages import explain_storage_errors, load_study, redact_url

    if study is None and (run.storage is None or run.name is None):
        raise typer.BadParameter("Give a study, or both --storage and --name.")
    place = place_of(study or str(run.name), run, reads=True)
    with explain_storage_errors(redact_url(place.storage)):
        yield load_study(place.storage, place.name)


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turn errors into one sentence and an exit status: 1 for errors, 130 for Ctrl-C.

    Errors that code of the user raises keep their traceback, and so do those that are bugs. With
    `TRACEBACK` in the environment all errors do.
    """

    def interrupt(_signal: int, _frame: object) -> NoReturn:
        # Optuna gives a trial back on KeyboardInterrupt, and on nothing else.
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except HqOptunaError as error:
        _fail(error, as_json)
    except (ValueError, OSError) as error:
        theirs = note_caller(error)
        if not theirs and (isinstance(error, OSError) or type(error) is ValueError):
            _fail(error, as_json)
        if theirs and as_json:
            _print_json(error)
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


def _fail(error: Exception, as_json: bool) -> NoReturn:
    if os.environ.get(TRACEBACK):
        raise error
    if as_json:
        _print_json(error)
    else:
        say(Console(stderr=True), f"[bold red]Error:[/] {escape(str(error))}")
    raise typer.Exit(1) from None


def _print_json(error: Exception) -> None:
    typer.echo(json.dumps({"error": type(error).__name__, "message": str(error)}))
