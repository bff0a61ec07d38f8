"""``hq-optuna resolve`` and ``pareto``: other budgets, from what a search measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from optuna.study import Study
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hq_optuna.answer.resolve import Resolved
from hq_optuna.answer.resolve import pareto as solve_pareto
from hq_optuna.answer.resolve import resolve as solve
from hq_optuna.answer.resolve import trades as solve_trades
from hq_optuna.cli import tables
from hq_optuna.cli.options import Json, StudyOrNone, errors, reading, say, takes
from hq_optuna.errors import SettingError, StudyFileError
from hq_optuna.protocol.history import History, read_history
from hq_optuna.search import Point, Trade
from hq_optuna.settings import RunSettings
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.budget import Budget, parse_budget
from hq_optuna.space.cost import METRICS, NOUNS, Metric, format_cost
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.visualization.pareto import pareto_figure, pareto_info
from hq_optuna.visualization.traded import TradedInfo, traded_figure

if TYPE_CHECKING:
    from hq_optuna.cli.session import Session


@takes("storage", "name", "folder", "target", target=True)
def resolve(
    run: RunSettings,
    study: StudyOrNone = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="As for run: '0.2 bops', '40% size_bytes', '64 KiB'; several hold at once."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="File for the bits of every layer.")] = Path(
        "assignment.json"
    ),
    measure: Annotated[
        int,
        typer.Option(
            min=0,
            help="Measure so many assignments for this budget, as in the end of a search, and save "
            "the best one's network. STUDY is the study file then.",
        ),
    ] = 0,
    result: Annotated[Path, typer.Option(help="Folder for the network that is measured.")] = Path(
        "result"
    ),
    as_json: Json = False,
) -> None:
    """Solve for another budget, exactly, from what a search measured. Needs no network or data.

    The answer has the least sum of the layers' predicted loss rises within the budget; with
    --measure, it is the best of some such that are measured on set-aside samples. With --target, it
    costs the least of those that surely are within the target; that runs the network. A --budget
    beside it holds too.
    """
    with errors(as_json), reading(study, run) as loaded:
        if not (budget or run.target) or (run.target and measure):
            raise SettingError("Give --budget, or --target without --measure, or both of these.")
        wanted = parse_budget(budget) if budget else None
        measured: dict[str, Any] = {}
        if run.target:
            found, measured = _meeting(study, run, loaded, wanted, result, as_json)
        else:
            assert wanted is not None
            found = solve(loaded, wanted)
            if measure:
                given = study, run, loaded, found, wanted, measure, result, as_json
                found, measured = _measured(*given)
        found.save(out)
        if as_json:
            told = {"measured_end": None, **measured}
            typer.echo(json.dumps({**found.to_json(), "out": str(out), **told}))
            return
        console = Console()
        show(console, read_history(loaded), found, wanted, measured)
        say(console, f"Assignment: {escape(str(out))}  (hq_optuna.load_assignment)")
        if measured:
            say(console, f"Result: {escape(str(result))}  (hq_optuna.load)")


def show(
    console: Console,
    history: History,
    found: Resolved,
    budget: Budget | None,
    measured: Mapping[str, Any],
) -> None:
    """Print the bits of every layer, what they cost, and what was measured of them."""
    tables.print_whole(console, _layers(history, found.config))
    share = 100 * found.cost / found.int8
    beside = budget.bounds(history.space)[1:] if budget else history.beside
    lines = [
        f"budget    {found.budget}"
        if measured.get("target")
        else f"budget    {format_cost(found.limit, found.metric)}",
        f"cost      [bold]{format_cost(found.cost, found.metric)}[/], {share:.1f} % of "
        f"all-8-bit ({format_cost(found.int8, found.metric)})",
        *(
            f"          [bold]{format_cost(bound.cost(found.config), bound.metric)}[/] of "
            f"{format_cost(bound.limit, bound.metric)} allowed, {NOUNS[bound.metric]}"
            for bound in beside
        ),
        f"score     {found.score:.3g} nats, "
        + ("the sum over layers" if measured.get("measured_end") else "the least sum over layers"),
    ]
    lines += [f"measured  {one['sentence']}" for one in measured.values()]
    sums = history.additive(found.metric)
    if history.incumbent is not None and sums is not None:
        answer = history.incumbent.config
        lines.append(
            f"          (the search's answer: {sums.score(answer):.3g} nats at "
            f"{format_cost(sums.cost(answer), found.metric)})"
        )
    say(console, "\n".join(lines))


def _measured(
    study: str | None,
    run: RunSettings,
    loaded: Study,
    found: Resolved,
    budget: Budget,
    n: int,
    folder: Path,
    quiet: bool,
) -> tuple[Resolved, dict[str, Any]]:
    """Measure assignments for the budget, save the network of the best, and return its bits."""
    from hq_optuna.cli.session import begin

    if study is None:
        raise StudyFileError("--measure runs the network: give the study file too.")
    session = begin(study, (), run, {}, Console(stderr=True, quiet=quiet))
    answer = session.search.exact(loaded, budget, verify=n, artifacts=session.artifacts)
    answer.save(folder)
    better = replace(
        found,
        config=answer.config,
        cost=answer.cost,
        score=answer.score_weights + answer.score_activations,
    )
    return better, {"measured_end": answer.facts["measured_end"]}


def _meeting(
    study: str | None,
    run: RunSettings,
    loaded: Study,
    budget: Budget | None,
    folder: Path,
    quiet: bool,
) -> tuple[Resolved, dict[str, Any]]:
    """Find the least cost within a target, save the network, and return its bits."""
    from hq_optuna.cli.session import begin

    if study is None:
        raise StudyFileError("--target runs the network: give the study file too.")
    session = begin(study, (), run, {}, Console(stderr=True, quiet=quiet))
    return meet(session, loaded, budget, folder)


def meet(
    session: Session, study: Study, budget: Budget | None, folder: Path
) -> tuple[Resolved, dict[str, Any]]:
    """Find the least cost within the run's target, save the network, and return its bits.

    The second of what is returned are facts by name, with a sentence each.
    """
    target = str(session.run.target)
    answer = session.search.meet(study, target, budget=budget, artifacts=session.artifacts)
    answer.save(folder)
    found = Resolved(
        study_name=study.study_name,
        config=answer.config,
        budget=f"target {target}" + (f" within {budget}" if budget else ""),
        metric=answer.metric,
        limit=answer.cost,
        cost=answer.cost,
        int8=answer.cost_int8,
        score=answer.score_weights + answer.score_activations,
        fingerprint=dict(answer.fingerprint),
    )
    return found, {"target": answer.facts["target"]}


def _layers(history: History, config: BitConfig) -> Table:
    """Return a table of the layers with these bits, and with the answer's where it differs."""
    answer = None if history.incumbent is None else history.incumbent.config
    compared = [] if answer is None else ["answer"]
    table = tables.new_table("layer", "W bits", "A bits", *compared, "rise, nats")
    for name, bits in config.items():
        pairs = zip(("weights", "activations"), bits, strict=True)
        rise = sum(history.sensitivity[name][part][b] for part, b in pairs if b != FLOAT_BITS)
        before = [] if answer is None else ["" if answer[name] == bits else str(answer[name])]
        shown = [tables.bits_text(b, history.space.levels) for b in bits]
        table.add_row(escape(name), *shown, *before, f"{rise:.2g}")
    return table


@takes("storage", "name", "folder")
def pareto(
    run: RunSettings,
    study: StudyOrNone = None,
    metric: Annotated[
        str | None, typer.Option(help=f"{' or '.join(METRICS)}. \\[default: the budget's]")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Another of these, least at each cost among assignments that are as good as the "
            "answer; or the study's measured figure, accuracy. "
            "\\[default: the predicted loss rise]"
        ),
    ] = None,
    within: Annotated[
        float | None,
        typer.Option(help="Sum over layers, nats, that is as good, in place of the answer's."),
    ] = None,
    measure: Annotated[
        int,
        typer.Option(
            min=0, help="Points to measure on validation data. STUDY is the study file then."
        ),
    ] = 0,
    points: Annotated[int, typer.Option(help="Budgets to solve for.", min=2)] = 33,
    out: Annotated[Path | None, typer.Option(help="HTML file for the picture.")] = None,
    as_json: Json = False,
) -> None:
    """Show what each cost buys at best, exactly: the predicted loss rise, or another cost.

    Needs no network or data, unless points are measured.
    """
    with errors(as_json), reading(study, run) as loaded:
        history = read_history(loaded)
        chosen = _metric(metric or history.info.metric)
        if chosen is None:
            raise ValueError(f"--metric is one of {', '.join(METRICS)}; got {metric!r}.")
        other = _metric(against)
        if within is not None and other is None:
            raise ValueError("--within says what is as good where --against is another cost.")
        found: Sequence[Point | Trade]
        if other is None:
            found = solve_pareto(loaded, metric=chosen, n=points)
        else:
            found = solve_trades(loaded, metric=chosen, against=other, within=within, n=points)
        figure_of = against if other is None else None
        if figure_of is not None:
            measure = measure or N_MEASURED
        measured, before = _measured_points(study, run, loaded, found, measure, as_json)
        if figure_of is not None and figure_of not in before:
            raise ValueError(
                f"--against is one of {', '.join((*METRICS, *before))}; got {against!r}."
            )
        if out is not None:
            if other is None and figure_of is None:
                figure = pareto_figure(pareto_info(history, n=points, metric=chosen))
            else:
                figure = traded_figure(_traded(history, chosen, against, found, measured, before))
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.write_html(out, config={"showSendToCloud": False, "displaylogo": False})
        if as_json:
            rows = [_row(found[i], measured.get(i)) for i in range(len(found))]
            said = {"metric": chosen, "against": against, "float": before, "pareto": rows}
            typer.echo(json.dumps(said))
            return
        console = Console()
        console.print(_points(found, history.space, chosen, other, measured))
        if before:
            float_ = ", ".join(f"{name} {value:.4g}" for name, value in before.items())
            say(console, f"float: {float_}")
        if out is not None:
            say(console, f"Picture: {escape(str(out))}")


def _row(point: Point | Trade, measured: Mapping[str, float] | None) -> dict[str, Any]:
    row = {
        "cost": point.cost,
        "score_nats": point.score,
        "assignment": point.config.to_json(),
    }
    if isinstance(point, Trade):
        row["other"] = point.other
    return row if measured is None else {**row, "measured": measured}


def _traded(
    history: History,
    metric: Metric,
    against: str | None,
    found: Sequence[Point | Trade],
    measured: Mapping[int, Mapping[str, float]],
    before: Mapping[str, float],
) -> TradedInfo:
    """Return what is drawn: a second cost, or what was measured."""
    int8, other = history.space.costs(metric).int8, _metric(against)
    if other is not None:
        pairs = [(p.cost, p.other) for p in found if isinstance(p, Trade)]
        int8_other = history.space.costs(other).int8
        return TradedInfo(*_columns(pairs), metric, other, int8, int8_other)
    name = str(against)
    pairs = [(found[i].cost, values[name]) for i, values in measured.items()]
    return TradedInfo(*_columns(pairs), metric, name, int8, before=before[name])


N_MEASURED = 5
"""Points that are measured where the figure is asked for, and no number of them."""


def _metric(name: str | None) -> Metric | None:
    return next((m for m in METRICS if m == name), None)


def _columns(rows: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in rows], [y for _, y in rows]


def _measured_points(
    study: str | None,
    run: RunSettings,
    loaded: Study,
    found: Sequence[Point | Trade],
    n: int,
    quiet: bool,
) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
    """Measure so many of the points, evenly along the curve; by place, and the float network's."""
    if not n:
        return {}, {}
    from hq_optuna.cli.session import begin

    if study is None:
        raise StudyFileError("--measure runs the network: give the study file too.")
    session = begin(study, (), run, {}, Console(stderr=True, quiet=quiet))
    last = len(found) - 1
    places = sorted({round(i * last / max(n - 1, 1)) for i in range(n)})
    configs = [found[i].config for i in places]
    before, *after = session.search.measure(loaded, configs, artifacts=session.artifacts)
    return dict(zip(places, after, strict=True)), before


def _points(
    points: Sequence[Point | Trade],
    space: SearchSpace,
    metric: Metric,
    other: Metric | None,
    measured: Mapping[int, Mapping[str, float]],
) -> Table:
    names = list(next(iter(measured.values()), ()))
    beside = [] if other is None else [NOUNS[other]]
    head = "least sum, nats" if other is None else "sum, nats"
    table = tables.new_table("cost", "of all-8-bit", *beside, head, "mean W bits", *names)
    layers, int8 = space.layers, space.costs(metric).int8
    total = sum(layer.n_weights for layer in layers)
    for i, point in enumerate(points):
        bits = sum(layer.n_weights * point.config[layer.name].weight_bits for layer in layers)
        traded = []
        if other is not None and isinstance(point, Trade):
            traded = [format_cost(point.other, other)]
        table.add_row(
            format_cost(point.cost, metric),
            f"{100 * point.cost / int8:.1f} %",
            *traded,
            f"{point.score:.3g}",
            f"{bits / total:.2f}",
            *(f"{measured[i][name]:.4g}" if i in measured else "" for name in names),
        )
    return table
