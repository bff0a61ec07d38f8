"""``hq-optuna export`` and ``profile``: files for another runtime, and how long it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hq_optuna import attributes
from hq_optuna.cli import tables
from hq_optuna.cli.options import Json, Study, errors, say, takes
from hq_optuna.cli.session import begin, wait_for_study
from hq_optuna.protocol.study_view import write_user_attrs
from hq_optuna.settings import RunSettings
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.latency import write_latency

if TYPE_CHECKING:  # these load torch
    from hq_optuna.export.check import Check
    from hq_optuna.export.profiling import Profile
    from hq_optuna.export.writing import Written


@takes()
def export(
    context: typer.Context,
    study: Study,
    run: RunSettings,
    out: Annotated[Path, typer.Option(help="File to write.")],
    format_: Annotated[
        Literal["onnx", "encodings", "qonnx", "pt2"],
        typer.Option("--format", help="What to write."),
    ] = "onnx",
    weights: Annotated[
        Literal["int2", "int4", "int8"],
        typer.Option(help="Smallest type of weights in ONNX; int2 needs opset 25."),
    ] = "int4",
    bias: Annotated[
        Literal["float", "int32"], typer.Option(help="Type of biases in ONNX.")
    ] = "float",
    check: Annotated[
        int, typer.Option(help="Calibration samples to run beside the network; 0 for none.", min=0)
    ] = 512,
    as_json: Json = False,
) -> None:
    """Write the answer as a file that another runtime reads, and check it number by number.

    Takes the options of the study file too. A file that computes other numbers is not written.
    """
    with errors(as_json):
        console = Console(stderr=as_json)
        session = begin(study, context.args, run, {}, console)
        wait_for_study(session.place, 0)
        from hq_optuna.export import write

        with console.status("reading the answer"):
            found = session.open(progress=lambda what, done, of: None)
            result = session.search.result(found)
        with console.status(f"writing and checking {out.name}"):
            written = write(
                result,
                out,
                session.search.objective.data,
                format=format_,
                weights=weights,
                bias=bias,
                check=check,
                evaluate=session.search.evaluate,
            )
        rows = found.user_attrs.get(attributes.EXPORTED, [])
        row = _row(written, result.config.digest)
        kept = [old for old in rows if old["file"] != row["file"]][-(MOST_ROWS - 1) :]
        write_user_attrs(found, {attributes.EXPORTED: [*kept, row]})
        if as_json:
            typer.echo(json.dumps(to_json(written)))
            return
        if written.check is not None:
            console.print(_table(written.check))
        for line in _lines(written):
            say(console, line)


@takes()
def profile(
    context: typer.Context,
    study: Study,
    run: RunSettings,
    out: Annotated[Path, typer.Option(help="CSV or JSON file to write.")] = Path("latency.csv"),
    runtime: Annotated[
        Literal["onnxruntime"], typer.Option(help="What runs the layers, on one thread.")
    ] = "onnxruntime",
    weights: Annotated[
        Literal["int2", "int4", "int8"], typer.Option(help="As for export.")
    ] = "int4",
    turns: Annotated[int, typer.Option(help="Times that each file is timed.", min=4)] = 300,
    fit: Annotated[
        int,
        typer.Option(
            help="Drawn mixed assignments, timed as a whole, that the table is fitted to.", min=0
        ),
    ] = 16,
    check: Annotated[
        int, typer.Option(help="Others that it is compared with; 0 for none.", min=0)
    ] = 4,
    as_json: Json = False,
) -> None:
    """Measure how long each layer takes at each of its bits, for budgets such as '8 ms'.

    Each layer is exported with each pair of bits that it may have, and all files are timed in
    turns. The table is for run --latency. Takes the options of the study file too, and needs no
    search.
    """
    with errors(as_json):
        console = Console(stderr=as_json)
        if out.suffix.lower() not in (".csv", ".json"):
            raise ValueError(f"--out is a .csv or .json file; got {out}.")
        out.parent.mkdir(parents=True, exist_ok=True)
        session = begin(study, context.args, run, {}, console)
        from hq_optuna.export.profiling import drawn
        from hq_optuna.export.profiling import profile as measure

        search = session.search
        with console.status("preparing") as status:
            found = measure(
                search.space,
                search.quantized,
                search.objective.data,
                weights=weights,
                turns=turns,
                fit=drawn(search.space, check + fit)[check:],
                check=drawn(search.space, check),
                tell=status.update,
            )
        write_latency(found.table, out)
        if as_json:
            typer.echo(json.dumps({"runtime": runtime, "out": str(out), **found.to_json()}))
            return
        tables.print_whole(console, _latencies(found))
        for line in found.sentences:
            say(console, line)
        say(console, f"Table: {escape(str(out))}  (hq-optuna run … --latency {escape(str(out))})")


def _latencies(found: Profile) -> Table:
    """Return the microseconds of each layer by pair, and the widest spread of each layer."""
    known = found.table
    pairs = [LayerBits(*p) for p in dict.fromkeys((r[1], r[2]) for r in known.rows)]
    table = tables.new_table("layer, us", *map(str, pairs), "spread")
    for name in dict.fromkeys(row.layer for row in known.rows):
        shown = {bits: known.knows(name, bits) for bits in pairs}
        cells = [f"{1e6 * known.seconds(name, b):.4g}" if has else "" for b, has in shown.items()]
        spread = max(found.spreads[name, b] for b, has in shown.items() if has)
        table.add_row(escape(name), *cells, f"{spread:.0%}")
    return table


MOST_ROWS = 8
"""Files that a study remembers: those written last."""


def _row(written: Written, assignment: str) -> dict[str, Any]:
    """Return what the study's report says of a file."""
    check = written.check
    seen = None
    if check is not None:
        seen = {
            "equal": check.plain.equal,
            "agreement": check.optimized.agreement,
            "integers": len(check.integer_layers),
            "layers": len(check.layers),
            "sentence": check.sentence,
        }
    return {
        **{"file": written.path.name, "format": written.format, "assignment": assignment},
        **{"bytes": written.bytes, "stored_bytes": written.stored_bytes, "check": seen},
    }


def to_json(written: Written) -> dict[str, Any]:
    """Return what was written as JSON data."""
    return {
        "path": str(written.path),
        "format": written.format,
        "bytes": written.bytes,
        "stored_bytes": written.stored_bytes,
        "check": None if written.check is None else written.check.to_json(),
        "notes": list(written.notes),
    }


def _table(check: Check) -> Table:
    """Return what the check found, without and with optimizations."""
    table = tables.new_table("check", "as written", "optimized")
    runs = (check.plain, check.optimized)

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values)

    row("codes equal, given equal codes before", *(f"{100 * r.equal:.4f} %" for r in runs))
    row("largest difference of codes", *(f"{r.furthest}" for r in runs))
    row("largest difference of outputs, given equal codes", *(f"{r.given_error:.2g}" for r in runs))
    row("the same from the inputs on", *(f"{r.free_error:.2g}" for r in runs))
    if all(r.agreement is not None for r in runs):
        row("samples with the same class", *(f"{100 * (r.agreement or 0):.2f} %" for r in runs))
    return table


def _lines(written: Written) -> list[str]:
    """Return what there is to say of a file beside the table."""
    rest = written.bytes - written.stored_bytes
    lines = [
        f"{written.bytes:,} bytes: {written.stored_bytes:,} of numbers, {rest:,} of graph and text",
    ]
    check = written.check
    if check is not None:
        n, of = len(check.integer_layers), len(check.layers)
        lines.append(f"{n} of {of} layers run in integers when onnxruntime optimizes the file")
        for name, (file, network) in check.figures.items():
            lines.append(f"{name}: {file:.4g} in the file, {network:.4g} in PyTorch")
        lines.append(check.sentence)
    lines += [escape(note) for note in written.notes]
    return [*lines, f"Written: {escape(str(written.path))}"]
