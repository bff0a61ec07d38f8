"""Before a search: ``hq-optuna init`` writes a study file, ``hq-optuna check`` looks it over."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hq_optuna.cli.options import Given, Json, Study, errors, say, takes
from hq_optuna.cli.session import begin
from hq_optuna.errors import StudyFileError
from hq_optuna.settings import RunSettings, SearchSettings, settings_of
from hq_optuna.space.cost import format_cost
from hq_optuna.study_files.study_file import StudyParts

TEMPLATE = '''"""My network on my data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

# What is searched, and how. Uncomment a line to change a default; options of the command line go
# before what stands here.
SETTINGS = {{
{settings}
}}


def network(checkpoint: Path) -> nn.Module:
    """Return the trained float network.

    The parameters become options on the command line, here --checkpoint.

    Args:
        checkpoint: State dict saved by torch.save.
    """
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))  # yours
    net.load_state_dict(torch.load(checkpoint, weights_only=True))
    return net.eval()


def calibration(data: Path, n_calibration: int = 256):
    """Return labelled samples that the score reads, no training and no test data.

    Args:
        data: Tensors (inputs, labels) saved by torch.save.
        n_calibration: How many samples are read.
    """
    inputs, labels = torch.load(data, weights_only=True)
    return inputs[:n_calibration], labels[:n_calibration]


def validation(data: Path, n_calibration: int = 256):
    """Return labelled samples on which the answer is measured. May be left out."""
    inputs, labels = torch.load(data, weights_only=True)
    return inputs[n_calibration:], labels[n_calibration:]


# The mean loss over a batch, from (outputs, labels). PyTorch's cross_entropy or mse_loss itself
# lets the search use its best scorer.
loss = nn.functional.cross_entropy

# Further functions that may be defined: test, train, augment, rise, evaluate.
'''


def template() -> str:
    """Return the text of a study file with every setting as a comment."""
    lines = []
    for one in settings_of(SearchSettings).values():
        unit = f" ({one.unit})" if one.unit else ""
        comment = f"{one.help} Default{unit}: {one.shown_default}."
        lines += textwrap.wrap(comment, 94, initial_indent="    # ", subsequent_indent="    # ")
        lines.append(f'    # "{one.name}": {one.example},')
    return TEMPLATE.format(settings="\n".join(lines))


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.", show_default=False)] = Path(
        "study.py"
    ),
) -> None:
    """Write a study file to fill in. Never writes over a file."""
    with errors(as_json=False):
        if file.suffix != ".py":
            raise StudyFileError(f"A study file is a Python file; got {file}. Write {file}.py.")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("x", encoding="utf-8") as opened:
                opened.write(template())
        except FileExistsError:
            raise StudyFileError(
                f"{file} exists, and is not written over. Name another file."
            ) from None
        name = escape(str(file))
        next_step = f"Fill in network() and calibration(), then: hq-optuna run {name}"
        say(Console(), f"Wrote {name}. {next_step}")


@takes(search=True)
def check(
    context: typer.Context,
    study: Study,
    run: RunSettings,
    given: Given,
    halves: Annotated[
        bool,
        typer.Option("--halves", help="Also prepare, and say whether calibration data are enough."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Look a study over before any search: layers, outputs, float metric, gradients, duration.

    Takes a few passes and the same options as run. Ends with "ready", or with what to change and
    exit status 1.
    """
    started = time.perf_counter()
    with errors(as_json):
        console = Console(stderr=as_json)
        parts: dict[str, Any] = {}

        def cut(of: StudyParts) -> StudyParts:
            from hq_optuna.objective.readiness import part_of  # loads torch

            parts["calibration"] = part_of(of.network, of.calibration, "calibration")
            if of.validation is not None:
                parts["validation"] = part_of(of.network, of.validation, "validation")
            return replace(of, **{name: part.data for name, part in parts.items()})

        session = begin(study, context.args, run, given, console, *(() if halves else (cut,)))
        from hq_optuna.objective.readiness import readiness

        search = session.search
        with console.status("running a few passes"):
            found = readiness(
                *(search.objective, search.settings, search.validation, search.evaluate),
                parts.get("calibration"),
                parts.get("validation"),
            )
        seconds = time.perf_counter() - started
        stable = None
        if halves:
            from hq_optuna.answer.stability import stability

            with console.status("comparing halves of the calibration data"):
                stable = stability(search.objective, search.budget)
        if as_json:
            more = None if stable is None else asdict(stable)
            typer.echo(json.dumps({**_as_json(search, found, seconds), "stability": more}))
        else:
            lines = _lines(search, found, seconds)
            if stable is not None:
                lines.insert(-1, f"data        {stable}")
            say(console, "\n".join(lines))
        if found.problems:
            raise typer.Exit(1)


def _as_json(search: Any, found: Any, seconds: float) -> dict[str, Any]:
    named = ("outputs", "rise", "unreached", "figures", "n_measured", "pass_s", "prepare_s")
    more: tuple[str, ...] = ("search_s", "n_read", "n_calibration", "n_validation")
    more += ("memory_bytes", "needed_bytes", "free_bytes", "problems")
    return {
        "ready": not found.problems,
        "layers": len(search.space.layers),
        "not_quantized": [list(each) for each in search.objective.skipped],
        "share_not_quantized": search.seen.share_of_others,
        "bops_not_quantized": search.seen.bops_of_others,
        "elements_not_quantized": dict(search.seen.elements),
        "warnings": list(search.objective.warnings),
        "seconds": seconds,
        **{name: getattr(found, name) for name in (*named, *more)},
    }


def _lines(search: Any, found: Any, seconds: float) -> list[str]:
    """Return what a check found, a line each, its verdict last."""
    objective, seen = search.objective, search.seen
    shapes = ", ".join(f"{name} {shape}".strip() for name, shape in found.outputs.items())
    lines = [
        f"layers      {len(search.space.layers)} found, {seen.macs:,} MACs a sample; "
        f"{100 * seen.share_of_others:.1f} % of all multiply-accumulates in none of them",
        *(f"            {escape(name)} ({kind}): {escape(why)}" for name, kind, why in
          objective.skipped[:8]),
        *_in_float(search),
        f"outputs     {escape(shapes)}",
        f"rise        {escape(found.rise)}; scorer {objective.settings.scorer}",
    ]  # fmt: skip
    if found.figures:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in found.figures.items())
        of = f"{found.n_measured:,} validation samples"
        if found.n_measured < found.n_validation:
            of = f"{found.n_measured:,} of {found.n_validation:,} validation samples (a run: all)"
        lines.append(f"float       {escape(figures)} on {of}")
    else:
        lines.append("float       not measured: the study has no validation()")
    reached = "reach every layer"
    if found.unreached:
        reached = (
            f"reach no weight of {len(found.unreached)} layers ({', '.join(found.unreached[:3])}); "
            "their rises are measured, a pass for each number of bits"
        )
    lines.append(f"gradients   {escape(reached)}")
    low, high = found.prepare_s
    steps = "looked up" if found.search_s is None else f"at most {_time(found.search_s)}"
    lines += [
        f"duration    a pass over the {found.n_calibration:,} calibration samples "
        f"{found.pass_s:.2g} s; preparation {_time(low)} to {_time(high)}, steps {steps}",
        f"memory      {found.memory_bytes / 2**20:,.0f} MiB in use; a search needs about "
        f"{found.needed_bytes / 2**20:,.0f} MiB more, {found.free_bytes / 2**20:,.0f} MiB are free",
    ]
    if found.n_read < found.n_calibration:
        lines.append(
            f"data        {found.n_read:,} of the calibration samples were read, as passes over "
            "all take long; a search reads all"
        )
    if found.problems:
        lines += [f"[bold red]not ready:[/] {escape(text)}." for text in found.problems]
    else:
        lines.append(f"[bold green]ready[/] (checked in {seconds:.0f} s)")
    return lines


def _in_float(search: Any) -> Iterator[str]:
    """Yield what stays in float and what that would cost, beside the budget."""
    seen, budget = search.seen, search.budget
    if seen.bops_of_others and budget.metric == "bops":
        yield (
            f"in float    products in no layer are {format_cost(seen.bops_of_others, 'bops')} at "
            f"32 bits, beside the budget of {format_cost(budget.limit(search.space), 'bops')}"
        )
    if seen.elements:
        listed = ", ".join(f"{what} {n:,}" for what, n in seen.elements)
        yield f"by element  {listed} elements a sample, in float"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{math.ceil(seconds / 60):,} min"
