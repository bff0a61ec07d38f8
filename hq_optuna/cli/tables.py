"""What people see in the terminal: opening lines, tables, status."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from optuna.study import Study
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text

from hq_optuna.answer.measured_end import measured_end
from hq_optuna.attributes import COMPARED, UNIFORM, quantizers_text
from hq_optuna.cli.options import Place, say
from hq_optuna.protocol.history import History, read_history
from hq_optuna.protocol.status import SearchStatus, read_status
from hq_optuna.report.comparison import warnings
from hq_optuna.report.data import accuracies, layer_table
from hq_optuna.report.text import ERROR_COLUMNS, decibels, most_costly, of_metric
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import NOUNS, format_cost, macs
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.storages import redact_url
from hq_optuna.visualization.palette import bit_colours, text_on


def opening(
    console: Console,
    space: SearchSpace,
    budget: Budget,
    skipped: Sequence[tuple[str, str, str]],
    place: Place,
) -> None:
    """Say what is searched, before the work."""
    layers = space.layers
    bounds = [(b.limit, b.model.int8, b.metric) for b in budget.bounds(space)]
    lines = [
        f"{len(layers)} layers, {macs(layers):,} MACs, "
        f"{sum(layer.n_weights for layer in layers):,} weights; {len(space.variables)} searched",
        *(
            f"budget {format_cost(limit, metric)} {f'{NOUNS[metric]} ' if bounds[1:] else ''}"
            f"({100 * limit / int8:.4g} % of all-8-bit {format_cost(int8, metric)})"
            for limit, int8, metric in bounds
        ),
        f"storage {redact_url(place.storage)}, study {place.name}",
        *(f"not quantized: {name} ({kind}): {reason}" for name, kind, reason in skipped),
    ]
    say(console, escape("\n".join(lines)))


def bits_text(bits: int, levels: Sequence[int]) -> str:
    """Return bits for a table, on the colour that they have in the pictures."""
    if bits == FLOAT_BITS:
        return "float"
    style = digit_styles(levels).get(bits)
    return str(bits) if style is None else f"[{style}]{bits}[/]"


def new_table(*titles: str, left: Collection[str] = ()) -> Table:
    """Return a table with these columns, aligned right but for those of `left` and ``layer``.

    Names of layers too long for the screen take two lines. All other columns keep their width, so
    that no figure is cut.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in titles:
        if title == "layer":
            table.add_column(title, overflow="fold")
        else:
            table.add_column(title, justify="left" if title in left else "right", no_wrap=True)
    return table


def print_whole(console: Console, table: Table) -> None:
    """Print a table as wide as the terminal; without one, a row is a line, however long."""
    width = console.width
    if not console.is_terminal:
        options = console.options.update(max_width=100_000)
        console.width = max(width, Measurement.get(console, options, table).maximum)
    console.print(table)
    console.width = width


def result(console: Console, study: Study) -> None:
    """Show the answer: a table of layers, costs, accuracies."""
    history = read_history(study)
    levels = history.space.levels
    titles = ["layer", "kind", "weights", "MACs", "W bits", "A bits", "cost", "rise, nats"]
    rows = layer_table(history)
    errors = list(ERROR_COLUMNS) if any(row.errors for row in rows) else []
    titles += ["own, dB", "net, dB", "own in all", "net without"][: len(errors)]
    titles += ["rounded"] if history.info.quantizers else []
    table = new_table(*titles, left=("kind", "rounded"))
    for row in rows:
        table.add_row(
            escape(row.name),
            row.kind,
            f"{row.n_weights:,}",
            f"{row.macs:,}",
            bits_text(row.weight_bits, levels),
            bits_text(row.activation_bits, levels),
            f"{100 * row.share_after:.1f} %",
            "-" if row.sensitivity is None else f"{row.sensitivity:.2g}",
            *(decibels(row.errors, key) for key in errors),
            *((row.quantizer,) if history.info.quantizers else ()),
        )
    print_whole(console, table)
    say(console, _summary(history, read_status(study).reason))


def _trained(history: History) -> str:
    n = sum(record.training is not None for record in history.records)
    n_kept = sum(record.trained is not None for record in history.records)
    if not n:
        return "no training"
    return f"{n} trained" + (f", {n_kept} of these kept" if n_kept < n else "")


def _summary(history: History, reason: str = "") -> str:
    record, info = history.incumbent, history.info
    quantizers = f"weights   {escape(quantizers_text(info.quantizers))}" if info.quantizers else ""
    if record is None:
        return "\n".join(filter(None, (quantizers, "No step is closed yet.")))
    cost = record.winner.cost
    lines = [
        f"cost      [bold]{format_cost(cost, info.metric)}[/], "
        f"{100 * cost / info.int8:.1f} % of all-8-bit ({format_cost(info.int8, info.metric)})"
        + (
            ""
            if info.float32 is None
            else f", {100 * cost / info.float32:.2f} % of float "
            f"({format_cost(info.float32, info.metric)})"
        ),
        *(
            f"          [bold]{format_cost(bound.cost(record.config), bound.metric)}[/] of "
            f"{format_cost(bound.limit, bound.metric)} allowed, {NOUNS[bound.metric]}"
            for bound in history.beside
        ),
        f"score     {record.current.score:.3g} nats predicted loss rise "
        f"(by layers: weights {record.current.score_weights:.3g}, "
        f"activations {record.current.score_activations:.3g})",
        *_measured_end(history),
        f"search    {len(history.records)} steps, "
        f"{sum(c.counted for c in history.candidates)} candidates, "
        + _trained(history)
        + (f"; ended: {reason}" if reason else ""),
    ]
    if quantizers:
        lines.append(quantizers)
    if most := most_costly([asdict(row) for row in layer_table(history)]):
        lines.append(f"layers    most of the predicted rise is in {escape(most)}")
    lines += [*_measured(history.facts), *_uniform(history)]
    counted = history.facts.get("validation_samples")
    compared = warnings(history.facts.get(COMPARED, ()), info.metric, counted)
    lines += [f"[yellow]Warning:[/] {escape(text)}" for text in compared]
    if not history.met:
        lines.append("[bold red]The budget is not met.[/]")
    return "\n".join(lines)


def _measured_end(history: History) -> Iterator[str]:
    if (found := measured_end(history)) is not None:
        yield f"measured  {found['sentence']}"


def _measured(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each figure that was measured before and after."""
    intervals = accuracies(facts)
    metrics = {f["name"]: f for w in ("validation", "test") if (f := facts.get(f"{w}_metric"))}
    for name in sorted(n.removesuffix("_before") for n in facts if n.endswith("_before")):
        before, after = facts[f"{name}_before"], facts.get(f"{name}_after", float("nan"))
        what = "test" if name.startswith("test_") else "validation"
        named, unit, points = name.removeprefix("test_"), "", ""
        if named == "accuracy":
            before, after, unit = 100 * before, 100 * after, " %"
            if what in intervals:
                ends = intervals[what]["difference"]
                value, low, high = (100 * ends[end] for end in ("value", "low", "high"))
                points = f", {value:+.2f} points, 95 % interval {low:+.1f} to {high:+.1f}"
        if named in metrics:
            unit = f" {metrics[named]['unit']}".rstrip()
            points = of_metric(facts.get(f"{what}_metric", {"unit": ""})).removeprefix(unit)
        yield (
            f"{escape(named):<9} {before:.2f}{unit} float -> [bold]{after:.2f}{unit}[/] quantized"
            f"{points} ({facts.get(f'{what}_samples', '?')} {what} samples)"
        )


def _uniform(history: History) -> Iterator[str]:
    """Yield a line for each uniform assignment that was measured."""
    n = history.facts.get("validation_samples", "?")
    for row in history.facts.get(COMPARED, ()):
        if row["method"] == UNIFORM:
            values = row["measured"]
            shown = {escape(name): f"{value:.4g}" for name, value in values.items()}
            if "accuracy" in values:
                shown = {"accuracy": f"{100 * values['accuracy']:.2f} %"}
            if (metric := row.get("metric")) is not None:
                over = {**metric, "difference": row.get("over_answer")}
                text = f"{values[metric['name']]:.4g}{of_metric(over)}"
                shown = {escape(metric["name"]): text.replace(" (", ", over the answer (", 1)}
            figures = ", ".join(f"{name} {value}" for name, value in shown.items())
            cost = format_cost(row["cost"], history.info.metric)
            yield f"uniform   {row['bits']} cost {cost}: {figures} ({n} validation samples)"


def status(console: Console, study: Study, current: SearchStatus) -> None:
    """Show where a search stands."""
    history = read_history(study)
    record = history.incumbent
    state = current.state + (f": {current.reason}" if current.reason else "")
    say(console, f"[bold]{escape(study.study_name)}[/]  {state}")
    if record is not None:
        first = history.records[0].config
        limits = " and ".join(
            f"{format_cost(b.cost(first), b.metric)} to {format_cost(b.limit, b.metric)}"
            for b in history.bounds
        )
        say(console, f"{100 * current.share:.0f} % of the way from {limits}")
        # Whole where there is no terminal.
        width = console.width if console.is_terminal else None
        for strip in strips(list(record.config.values()), history.space.levels, width):
            console.print(strip, soft_wrap=True)
    say(console, _summary(history))
    say(
        console,
        f"{history.n_running} running, {history.n_pruned} not needed, {history.n_failed} failed "
        "or given back",
    )


# The bits of all layers as a strip of digits, one digit a layer, in network order. Digits stand on
# the colours of the pictures; without colours the digits say everything.

LABEL = 12
"""Columns in front of the digits."""

LINES = 3
"""Lines of digits a strip may have; longer ones are cut in the middle."""


def digit(bits: int) -> str:
    """Return one character for a number of bits: 10 to 16 are letters, float is a dot.

    Example:
        >>> "".join(digit(bits) for bits in (2, 8, 10, 16, 32))
        '28ag·'
    """
    return "·" if bits == FLOAT_BITS else "0123456789abcdefg"[bits]


def digit_styles(levels: Sequence[int]) -> dict[int, Style]:
    """Return the style of each number of bits."""
    return {
        bits: Style(color=text_on(colour), bgcolor=colour)
        for bits, colour in zip(levels, bit_colours(levels), strict=True)
    }


def strips(
    bits: Sequence[tuple[int, int]], levels: Sequence[int], width: int | None = None
) -> list[Text]:
    """Return the lines that show an assignment: weights, and activations where they differ.

    Bits are ``(weight_bits, activation_bits)`` of each layer, in network order; `levels`, all bits
    that a layer may have, fewest first, set the colours. Without a width each line is whole.
    """
    styles = digit_styles(levels)
    weights, activations = ([pair[part] for pair in bits] for part in (0, 1))
    rows = {"weights": weights, "activations": activations}
    if weights == activations:
        rows = {"bits": weights}
    elif set(activations) == {FLOAT_BITS}:
        rows = {"weights": weights}
    return [line for label, row in rows.items() for line in _lines(label, row, styles, width)]


def _lines(
    label: str, row: Sequence[int], styles: dict[int, Style], width: int | None
) -> list[Text]:
    room = len(row) if width is None else max(width - LABEL - 1, 8)
    shown: list[int | None] = list(row)
    if len(row) > LINES * room:
        half = (LINES * room - 1) // 2
        shown = [*row[:half], None, *row[len(row) - half :]]
    lines = []
    for start in range(0, len(shown), max(room, 1)):
        digits = [
            "…" if bits is None else (digit(bits), styles.get(bits, Style.null()))
            for bits in shown[start : start + room]
        ]
        label_there = f"{'' if start else label:<{LABEL}}"
        lines.append(Text.assemble(label_there, *digits, no_wrap=True))
    return lines
