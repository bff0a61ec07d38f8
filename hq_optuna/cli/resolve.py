"""Commands that solve on a stored study and score nothing: resolve, pareto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hq_optuna.cli import tables
from hq_optuna.cli.common import Folder, Json, Name, Storage, StudyOrNone, errors, reading
from hq_optuna.protocol.history import History, read_history
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import METRICS, format_cost
from hq_optuna.space.layers import FLOAT_BITS


def resolve(
    budget: Annotated[
        str, typer.Option(help="As for run: '0.2 bops', '40% size_bytes', '64 KiB'.")
    ],
    study: StudyOrNone = None,
    storage: Storage = None,
    name: Name = None,
    folder: Folder = None,
    out: Annotated[Path, typer.Option(help="File for the bits of every layer.")] = Path(
        "assignment.json"
    ),
    as_json: Json = False,
) -> None:
    """Solve for another budget, exactly, from what a search measured. Needs no network or data.

    The answer has the least sum of the layers' predicted loss rises within the budget.
    """
    from hq_optuna.answer.resolve import resolve as solve
    from hq_optuna.space.budget_text import parse_budget

    with errors(as_json), reading(study, storage, name, folder) as loaded:
        found = solve(loaded, parse_budget(budget))
        found.save(out)
        if as_json:
            typer.echo(json.dumps({**found.to_json(), "out": str(out)}))
            return
        console = Console()
        history = read_history(loaded)
        tables.print_whole(console, _layers(history, found.config))
        share = 100 * found.cost / found.int8
        answer = history.incumbent
        lines = [
            f"budget    {format_cost(found.limit, found.metric)}",
            f"cost      [bold]{format_cost(found.cost, found.metric)}[/], {share:.1f} % of "
            f"all-8-bit ({format_cost(found.int8, found.metric)})",
            f"score     {found.score:.3g} nats, the least sum over layers",
        ]
        if answer is not None:
            sums = history.additive(found.metric)
            assert sums is not None
            lines.append(
                f"          (the search's answer: {sums.score(answer.config):.3g} nats at "
                f"{format_cost(sums.cost(answer.config), found.metric)})"
            )
        lines.append(f"Assignment: {tables.plain(str(out))}  (hq_optuna.load_assignment)")
        console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _layers(history: History, config: BitConfig) -> Table:
    """Return a table of the layers with these bits, and with the answer's where it differs."""
    table = tables.table_of_layers()
    for title in ("W bits", "A bits"):
        table.add_column(title, justify="right", no_wrap=True)
    answer = None if history.incumbent is None else history.incumbent.config
    if answer is not None:
        table.add_column("answer", justify="right", no_wrap=True)
    table.add_column("rise, nats", justify="right", no_wrap=True)
    for name, bits in config.items():
        rise = sum(
            history.sensitivity[name][part][b]
            for part, b in zip(("weights", "activations"), bits, strict=True)
            if b != FLOAT_BITS
        )
        same = answer is not None and answer[name] == bits
        before = [] if answer is None else ["" if same else str(answer[name])]
        shown = [tables.bits_text(b, history.space.levels) for b in bits]
        table.add_row(tables.plain(name), *shown, *before, f"{rise:.2g}")
    return table


def pareto(
    study: StudyOrNone = None,
    storage: Storage = None,
    name: Name = None,
    folder: Folder = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help=f"{' or '.join(METRICS)}. \\[default: the budget's]",
            show_default=False,
        ),
    ] = None,
    points: Annotated[int, typer.Option(help="Budgets to solve for.", min=2)] = 33,
    out: Annotated[
        Path | None, typer.Option(help="HTML file for the picture.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the least predicted loss rise for each cost, exactly. Needs no network or data."""
    from hq_optuna.answer.resolve import pareto as solve

    with errors(as_json), reading(study, storage, name, folder) as loaded:
        history = read_history(loaded)
        chosen = next((m for m in METRICS if m == (metric or history.info.metric)), None)
        if chosen is None:
            raise ValueError(f"--metric is one of {', '.join(METRICS)}; got {metric!r}.")
        found = solve(loaded, metric=chosen, n=points)
        if out is not None:
            from hq_optuna.visualization.pareto import pareto_figure, pareto_info

            figure = pareto_figure(pareto_info(history, n=points, metric=chosen))
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.write_html(out, config={"showSendToCloud": False, "displaylogo": False})
        if as_json:
            rows = [
                {"cost": p.cost, "score_nats": p.score, "assignment": p.config.to_json()}
                for p in found
            ]
            typer.echo(json.dumps({"metric": chosen, "pareto": rows}))
            return
        sums = history.additive(chosen)
        assert sums is not None
        int8 = sums.cost(BitConfig.uniform([x.name for x in history.space.layers], 8, 8))
        table = Table(box=None, header_style="bold", pad_edge=False)
        for title in ("cost", "of all-8-bit", "least sum, nats", "mean W bits"):
            table.add_column(title, justify="right", no_wrap=True)
        total = sum(layer.n_weights for layer in history.space.layers)
        for point in found:
            bits = sum(x.n_weights * point.config[x.name].weight_bits for x in history.space.layers)
            table.add_row(
                format_cost(point.cost, chosen),
                f"{100 * point.cost / int8:.1f} %",
                f"{point.score:.3g}",
                f"{bits / total:.2f}",
            )
        console = Console()
        console.print(table)
        if out is not None:
            console.print(f"Picture: {tables.plain(str(out))}", soft_wrap=True, highlight=False)
