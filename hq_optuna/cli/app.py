"""Commands of ``hq-optuna``: run, status, report, and those of `solving`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from hq_optuna._version import __version__
from hq_optuna.cli import show, solving
from hq_optuna.cli.common import Folder, Json, Name, Storage, Study, StudyOrNone, errors, load

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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    study: Study,
    storage: Storage = None,
    name: Name = None,
    folder: Folder = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="'0.25 bops' (of all-8-bit), '40% size_bytes', '24 GBOPs', '64 KiB'.",
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Candidates a step. [default: 8]", show_default=False)
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="ratio (score per cost) or min (the patent's). [default: ratio]",
            show_default=False,
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="gauss_newton, diagonal or trace. [default: gauss_newton, for losses it knows]",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="'2-8' or '8,4,2'. [default: 2-8]", show_default=False)
    ] = None,
    activation_bits: Annotated[
        str | None,
        typer.Option(
            help="same, float, a number, or bits searched apart ('4,8'). [default: same]",
            show_default=False,
        ),
    ] = None,
    pin_first_last: Annotated[
        str | None,
        typer.Option(
            help="Bits of first and last layer, or none. [default: 8]", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the draws. [default: 0]", show_default=False)
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="How weights are rounded: compensated (errors make up for each other) or nearest. "
            "[default: compensated]",
            show_default=False,
        ),
    ] = None,
    correction: Annotated[
        bool | None,
        typer.Option(
            help="Correct batch-norm statistics and biases for the bits. [default: correction]",
            show_default=False,
        ),
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option(
            help="Refine the answer by swaps once the budget is met. [default: refine]",
            show_default=False,
        ),
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(
            help="Folder or s3://bucket/prefix for files of the study. "
            "[default: artifacts in the run's folder]",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of PyTorch. [default: the cores]", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Search, or go on with a search that was interrupted.

    Options of the study file itself stand beside these: hq-optuna run cifar10_resnet20 --data DIR.
    """
    from hq_optuna.cli import running

    given = {
        "budget": budget,
        "n_candidates": candidates,
        "rule": rule,
        "scorer": scorer,
        "bits": bits,
        "activation_bits": activation_bits,
        "pin_first_last": pin_first_last,
        "seed": seed,
        "refine": refine,
        "rounding": rounding,
        "correction": correction,
    }
    with errors(as_json):
        data = running.run(
            study,
            list(context.args),
            storage=storage,
            name=name,
            folder=folder,
            given={key: value for key, value in given.items() if value is not None},
            artifacts=artifacts,
            threads=threads,
            command=shlex.join(["hq-optuna", *sys.argv[1:]]),
            console=Console(stderr=as_json),
        )
        if as_json:
            typer.echo(json.dumps(data))


@app.command()
def status(
    study: StudyOrNone = None,
    storage: Storage = None,
    name: Name = None,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Show where a search stands. Works while others run."""
    from hq_optuna.runner.report import report_data

    with errors(as_json):
        loaded = load(study, storage, name, folder)
        if as_json:
            typer.echo(json.dumps(report_data(loaded)))
        else:
            show.status(Console(), loaded)


@app.command()
def report(
    study: StudyOrNone = None,
    storage: Storage = None,
    name: Name = None,
    folder: Folder = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write. [default: report.html, or the terminal]")
    ] = None,
    format_: Annotated[
        Literal["html", "json", "markdown"], typer.Option("--format", help="What to write.")
    ] = "html",
) -> None:
    """Write the report of a search, finished or not."""
    from hq_optuna.runner.report import render_markdown, report_data, write_report

    with errors(as_json=False):
        loaded = load(study, storage, name, folder)
        if format_ == "html":
            path = Path("report.html") if out is None else out
            write_report(loaded, path)
            Console().print(f"Report: {path}", soft_wrap=True, highlight=False)
            return
        data = report_data(loaded)
        text = json.dumps(data, indent=1) if format_ == "json" else render_markdown(data)
        if out is None:
            typer.echo(text)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text + "\n", encoding="utf-8")


app.command()(solving.resolve)
app.command()(solving.pareto)
