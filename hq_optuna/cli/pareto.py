"""``hq-optuna pareto``: the least predicted loss rise for each cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hq_optuna.answer.resolve import pareto as solve
from hq_optuna.cli import tables
from hq_optuna.cli.options import Json, StudyOrNone, errors, reading, say, takes
from hq_optuna.protocol.history import read_history
from hq_optuna.search import Point
from hq_optuna.settings import RunSettings
from hq_optuna.space.cost import METRICS, CostModel, Metric, format_cost
from hq_optuna.space.layers import LayerSpec
from hq_optuna.visualization.pareto import pareto_figure, pareto_info


@takes("storage", "name", "folder")
def pareto(
    run: RunSettings,
    study: StudyOrNone = None,
    metric: Annotated[
        str | None, typer.Option(help=f"{' or '.join(METRICS)}. \\[default: the budget's]")
    ] = None,
    points: Annotated[int, typer.Option(help="Budgets to solve for.", min=2)] = 33,
    out: Annotated[Path | None, typer.Option(help="HTML file for the picture.")] = None,
    as_json: Json = False,
) -> None:
    """Show the least predicted loss rise for each cost, exactly. Needs no network or data."""
    with errors(as_json), reading(study, run) as loaded:
        history = read_history(loaded)
        chosen = next((m for m in METRICS if m == (metric or history.info.metric)), None)
        if chosen is None:
            raise ValueError(f"--metric is one of {', '.join(METRICS)}; got {metric!r}.")
        found = solve(loaded, metric=chosen, n=points)
        if out is not None:
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
        console = Console()
        console.print(_table(found, history.space.layers, chosen))
        if out is not None:
            say(console, f"Picture: {escape(str(out))}")


def _table(points: Sequence[Point], layers: Sequence[LayerSpec], metric: Metric) -> Table:
    table = tables.new_table("cost", "of all-8-bit", "least sum, nats", "mean W bits")
    int8, total = CostModel(layers, metric).int8, sum(layer.n_weights for layer in layers)
    for point in points:
        bits = sum(layer.n_weights * point.config[layer.name].weight_bits for layer in layers)
        table.add_row(
            format_cost(point.cost, metric),
            f"{100 * point.cost / int8:.1f} %",
            f"{point.score:.3g}",
            f"{bits / total:.2f}",
        )
    return table
