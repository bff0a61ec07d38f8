"""``hq-optuna`` itself: its commands, each a file of its own that is read when it is used."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hq_optuna._version import __version__
from hq_optuna.cli.options import OPEN

COMMANDS = {
    "run": "Search, or go on with a search that was interrupted.",
    "launch": "Search with several workers, on this host or on a Dask cluster.",
    "worker": "Join a search from any host that has the study file and reaches the storage.",
    "status": "Show where a search stands: steps, workers, rate, time left.",
    "report": "Write the report of a search, finished or not.",
    "dashboard": "Browse a search in optuna-dashboard, while it runs or later.",
    "resolve": "Solve for another budget, exactly, from what a search measured.",
    "pareto": "Show the least predicted loss rise for each cost, exactly.",
    "export": "Write the answer as a file that another runtime reads, checked number by number.",
    "profile": "Measure how long each layer takes at each of its bits, for budgets such as '8 ms'.",
    "init": "Write a study file to fill in.",
    "check": "Look a study over before any search, in a few passes: ready, or what to change.",
}
"""Commands by name, each with the beginning of its help."""


def load(name: str) -> Any:
    """Return a command, from ``hq_optuna.cli.NAME`` or the file that it shares with another."""
    file = {"pareto": "resolve", "init": "check", "profile": "export"}.get(name, name)
    function = getattr(importlib.import_module(f"hq_optuna.cli.{file}"), name)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    opens = name in ("run", "launch", "worker", "export", "profile", "check")
    alone.command(name, context_settings=OPEN if opens else None)(function)
    return typer.main.get_command(alone)


class LazyGroup(TyperGroup):
    """Commands whose files are read when they are called, so that ``--help`` is quick."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command's name and help without reading its file."""
        if cmd_name not in COMMANDS:
            return None
        stub = typer.Typer(add_completion=False)
        stub.command(cmd_name, help=COMMANDS[cmd_name])(lambda: None)
        return typer.main.get_command(stub)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is called, and its arguments."""
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None
        return name, load(name), rest


app = typer.Typer(
    cls=LazyGroup,
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
