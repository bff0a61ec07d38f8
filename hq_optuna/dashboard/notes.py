"""What the dashboard says in words: the note of a study, and one line for a trial."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hq_optuna import attributes
from hq_optuna.artifacts.store import Reference
from hq_optuna.attributes import StudyInfo, quantizers_text
from hq_optuna.protocol import worker_identity
from hq_optuna.protocol.history import Candidate, History
from hq_optuna.protocol.status import SearchStatus
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.cost import Metric, format_cost
from hq_optuna.space.layers import FLOAT_BITS

YOURS = "*What you write below this line is kept.*"
"""Ends what is written by us; the rest of a note is its reader's."""

LATEST_STEPS = 12

SERVED_ID = re.compile("[0-9a-fA-F-]+")
"""Ids of artifacts that optuna-dashboard answers; those in a prefix of a bucket it does not."""

_FILES = {
    "report": "report",
    "assignment": "assignment (JSON)",
    "sensitivity_csv": "sensitivities (CSV)",
    "sensitivity": "sensitivities (JSON)",
}


def study_note(
    history: History,
    current: SearchStatus,
    study_id: int,
    files: Mapping[str, Reference],
    written: str,
) -> str:
    """Return the note of a study in Markdown: goal, state, incumbent, files, layers, last steps.

    Links need the study's id and its artifacts by name; ``written`` says when, in words.
    """
    over = current.state == "finished" and history.met
    links = [
        f"[{shown}](/artifacts/{study_id}/{files[name].id})"
        for name, shown in _FILES.items()
        if name in files and SERVED_ID.fullmatch(files[name].id)
    ]
    text: str = _template(history.info.metric).render(
        history=history,
        info=history.info,
        record=history.incumbent,
        study_id=study_id,
        written=written,
        state="the answer" if over else _STATES[current.state][0],
        sentence=_sentence(current),
        n_searched=len({layer for v in history.space.variables for layer in v.layers}),
        measured=_measured(history.facts),
        links=", ".join(links),
        has_report="report" in files,
        latest=history.records[: -LATEST_STEPS - 1 : -1],
        rise=functools.partial(_rise, history),
    )
    return text


def preparation_note(name: str, current: SearchStatus) -> str:
    """Return the note of a study whose pieces are being prepared, in Markdown."""
    done = sum(piece.done for piece in current.pieces)
    rows = [
        f"| {piece.name} | {'done' if piece.done else 'at work' if piece.worker else 'open'} "
        f"| {worker_identity.short_name(piece.worker) or '–'} "
        f"| {f'{piece.seconds:.1f}' if piece.done else '–'} |"
        for piece in current.pieces
    ]
    lines = [
        f"## {_plain(name)}: being prepared",
        f"**State.** {done} of {len(current.pieces)} pieces are done, "
        f"{100 * current.share:.0f} % of the work.",
        "\n".join(["| piece | state | worker | seconds |", "| :--- | :--- | :--- | ---: |", *rows]),
    ]
    return "\n\n".join(lines)


def _template(metric: Metric) -> Any:
    # Imported here: a worker that does not write must not pay for it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "plain": _plain,
        "bits": _bits,
        "change": change_of,
        "cost": functools.partial(format_cost, metric=metric),
        "quantizers": quantizers_text,
        "trained": lambda said: trained(said).removeprefix(" Trained for ").rstrip("."),
    }
    return environment.get_template("note.md.jinja")


def with_readers_part(ours: str, stored: str) -> str:
    """Return our part of a note, followed by what readers wrote in the stored one."""
    _, mark, theirs = stored.partition(YOURS)
    if not mark:
        theirs = stored
    theirs = theirs.strip("\n")
    return f"{ours}\n\n---\n{YOURS}\n" + (f"\n{theirs}\n" if theirs else "")


def trial_note(
    trial: Mapping[str, Any],
    info: StudyInfo,
    *,
    state: str = "COMPLETE",
    score: float | None = None,
    took: str = "",
) -> str:
    """Return one line that says what a trial of a search was; empty for other trials.

    The trial is given by its user attributes, the name of its state and its value, which gives way
    to what the training of a record says; a record also by what the candidate it ``took`` changes.

    Example:
        >>> info = StudyInfo("bops", 24e9, "", 96e9, 1e12, "trace", "ratio", 8, 0)
        >>> what = {"kind": "candidate", "step": 3, "slot": 4, "layer": "conv1", "cost": 2.4e10}
        >>> trial_note({**what, "from_bits": 6, "to_bits": 5}, info, score=0.0012)
        'Step 3, candidate 5: `conv1` from 6 to 5 bits. Score 0.0012 nats, 24 GBOPs, within budget.'
    """
    kind, step = trial.get(attributes.KIND), trial.get(attributes.STEP)
    if kind == "candidate":
        what = f"Step {step}, candidate {int(trial.get(attributes.SLOT, 0)) + 1}: {change(trial)}."
    elif kind == "incumbent":
        taken = f"{trial.get(attributes.WINNER)}{': ' if took else ''}{took}"
        what = f"Closes step {step}; takes trial {taken}."
    else:
        return ""
    if state == "RUNNING":
        return f"{what} Being scored now."
    if state != "COMPLETE" or score is None:
        ended = "not needed any more" if state == "PRUNED" else "failed, or was given back"
        return f"{what} It was {ended}; it does not count."
    cost = float(trial.get(attributes.COST, math.nan))
    further = ((trial.get(f"{attributes.COST}:{b.metric}", 0.0), b.limit) for b in info.beside)
    fits = all(spent <= limit for spent, limit in ((cost, info.limit), *further))
    within = "within budget" if fits else "over budget"
    said = trial.get(attributes.TRAINING) or {}
    if said.get("kept", True):
        score = float(said.get("score", score))  # the value of the answer is made the best
    return (
        f"{what} Score {score:.3g} nats, {format_cost(cost, info.metric)}, {within}.{trained(said)}"
    )


def trained(said: Mapping[str, Any] | None) -> str:
    """Return a sentence of what a record says of its training; empty where there was none.

    Example:
        >>> trained({"epochs": 2, "seconds": 3.21, "accuracy_before": 0.9, "accuracy_after": 0.95})
        ' Trained for 2 epochs in 3.21 s: accuracy 90.00% → 95.00%.'
        >>> trained({"epochs": 2, "seconds": 3.21, "kept": False, "score": 0.0123})
        ' Trained for 2 epochs in 3.21 s; not kept, as its score was 0.0123 nats.'
    """
    if not said:
        return ""
    text = f" Trained for {said.get('epochs', '?')} epochs in {said.get('seconds', math.nan):.3g} s"
    pairs = [
        f"{name} {_figure(name, said[f'{name}_before'])} → {_figure(name, said[f'{name}_after'])}"
        for name in sorted(key.removesuffix("_before") for key in said if key.endswith("_before"))
        if f"{name}_after" in said
    ]
    text += f": {', '.join(pairs)}" if pairs else ""
    if "failed" in said:
        text += "; not kept, as it failed"
    elif not said.get("kept", True):
        text += f"; not kept, as its score was {said.get('score', math.nan):.3g} nats"
    return f"{text}."


def _figure(name: str, value: float) -> str:
    return f"{value:.2%}" if name == "accuracy" else f"{value:.4g}"


def change(trial: Mapping[str, Any]) -> str:
    """Return what a candidate changes, in words, from its user attributes."""
    return _changed(*map(trial.get, (attributes.LAYER, attributes.FROM_BITS, attributes.TO_BITS)))


def change_of(candidate: Candidate) -> str:
    """Return the same of a candidate of the history."""
    return _changed(candidate.variable, candidate.from_bits, candidate.to_bits)


def _changed(layer: str | None, before: Any, after: Any) -> str:
    if layer is None:
        return "the start, every layer at its widest bits"
    if after is None:
        return f"a swap, `{layer}`"  # in words already
    unit = "" if str(after).startswith("W") else " bits"  # a pair in words
    return f"`{layer}` from {_bits(before)} to {_bits(after)}{unit}"


_STATES = {
    "preparing": ("about to begin", "Sensitivities are being measured"),
    "running": ("running", "Running"),
    "idle": (
        "nobody works on it",
        "Not finished, and nobody works on it now; the same command goes on with it",
    ),
    "finished": ("finished, over budget", "Finished: {reason}"),
    "stopped": ("stopped", "Stopped: {reason}"),
}
"""States of a search, for a heading and for a sentence."""


def _sentence(current: SearchStatus) -> str:
    text = _STATES[current.state][1].format(reason=current.reason)
    if current.state in ("running", "idle"):
        text += f". {100 * current.share:.0f} % of the way"
    return f"{text}; {current.steps} steps closed, {current.candidates} candidates scored."


def _measured(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return ``(name and samples, before, after)`` of what was measured twice, in words."""
    found = []
    for key in sorted(name for name in facts if name.endswith("_before")):
        data = "test" if key.startswith("test_") else "validation"
        after = facts.get(f"{key.removesuffix('_before')}_after")
        name = key.removesuffix("_before").removeprefix("test_")
        if after is not None:
            named = f"{name}, {facts.get(f'{data}_samples', '?')} {data} samples"
            metric = facts.get(f"{data}_metric") or {"name": None}
            unit = f" {metric['unit']}".rstrip() if metric["name"] == name else ""
            before = f"{_figure(name, facts[key])}{unit}"
            found.append((named, before, f"{_figure(name, after)}{unit}"))
    return found


def _rise(history: History, layer: str, bits: LayerBits) -> str:
    """Return the predicted rise of one layer, nats; a dash where the study does not hold it."""
    table = history.sensitivity.get(layer, {})
    parts = zip(("weights", "activations"), bits, strict=True)
    rise = sum(table.get(part, {}).get(b, math.nan) for part, b in parts if b != FLOAT_BITS)
    return f"{rise:.2g}" if math.isfinite(rise) else "–"


def _bits(bits: Any) -> str:
    return "float" if str(bits) == str(FLOAT_BITS) else str(bits)


def _plain(text: str) -> str:
    """Return text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", " ".join(text.split()))
