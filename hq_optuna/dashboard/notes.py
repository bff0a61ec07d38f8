"""What the dashboard says in words: the note of a study, and one line for a trial."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hq_optuna import attributes
from hq_optuna.artifacts.store import Reference
from hq_optuna.attributes import StudyInfo, quantizers_text
from hq_optuna.protocol.history import Candidate, History
from hq_optuna.protocol.status import SearchStatus
from hq_optuna.space.cost import format_cost
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

    Args:
        history: The search.
        current: Where it stands.
        study_id: Of the study, for links.
        files: Artifacts of the study by name.
        written: When, in words.
    """
    info, record = history.info, history.incumbent
    settings = info.settings
    n_searched = len({layer for v in history.space.variables for layer in v.layers})
    parts = [
        f"## {_plain(history.study_name)}: "
        f"{'the answer' if current.state == 'finished' and history.met else _state(current)}",
        f"**Goal.** Bits for each of {len(history.space.layers)} layers ({n_searched} searched) "
        "with the smallest predicted rise of the loss, at a cost of at most "
        f"**{format_cost(info.limit, info.metric)}**, {100 * info.limit / info.int8:.3g} % of "
        f"all-8-bit ({format_cost(info.int8, info.metric)}).",
        f"**State.** {_sentence(current)}",
    ]
    if record is None:
        parts.append("No step is closed yet.")
    else:
        parts.append(_incumbent(history, study_id))
    links = _links(files, study_id)
    if links:
        parts.append(f"**Files.** {links}")
    if "report" not in files:
        parts.append(
            "The report is attached when the search ends; `hq-optuna report` writes it any time."
        )
    parts += [f"> **Warning.** {_plain(text)}" for text in info.warnings]
    if record is not None:
        parts += ["### Latest steps", _steps(history, study_id), "### Bits", _layers(history)]
    parts.append(
        f"*Score {settings['scorer']}, rule {settings['rule']}, {settings['n_candidates']} "
        f"candidates a step, seed {settings['seed']}, weights "
        f"{_plain(quantizers_text(info.quantizers))}. Written {written} by "
        "hq_optuna. The card “Best Trial” of a plain optuna-dashboard does not look at the budget; "
        "this note does.*"
    )
    return "\n\n".join(parts)


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
    winner: Mapping[str, Any] | None = None,
) -> str:
    """Return one line that says what a trial of a search was; empty for other trials.

    Args:
        trial: Its user attributes.
        info: What the study is about.
        state: Name of its state.
        score: Its value; of a record that trained, what its training says is taken.
        winner: User attributes of the candidate that a step record took.

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
        taken = "" if winner is None else f": {change(winner)}"
        what = f"Closes step {step}; takes trial {trial.get(attributes.WINNER)}{taken}."
    else:
        return ""
    if state == "RUNNING":
        return f"{what} Being scored now."
    if state != "COMPLETE" or score is None:
        ended = "not needed any more" if state == "PRUNED" else "failed, or was given back"
        return f"{what} It was {ended}; it does not count."
    cost = float(trial.get(attributes.COST, math.nan))
    within = "within budget" if cost <= info.limit else "over budget"
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
    layer = trial.get(attributes.LAYER)
    if layer is None:
        return "the start, every layer at its widest bits"
    if trial.get(attributes.TO_BITS) is None:
        return f"a swap, `{layer}`"  # in words already
    before, after = (_bits(trial.get(key)) for key in (attributes.FROM_BITS, attributes.TO_BITS))
    return f"`{layer}` from {before} to {after} bits"


def user_attrs_of(candidate: Candidate) -> dict[str, Any]:
    """Return what a candidate's trial has among its user attributes, as far as notes say it."""
    return {
        attributes.KIND: "candidate",
        attributes.STEP: candidate.step,
        attributes.SLOT: candidate.slot,
        attributes.LAYER: candidate.variable,
        attributes.FROM_BITS: candidate.from_bits,
        attributes.TO_BITS: candidate.to_bits,
        attributes.COST: candidate.cost,
    }


def _state(current: SearchStatus) -> str:
    return {
        "preparing": "about to begin",
        "running": "running",
        "idle": "nobody works on it",
        "finished": "finished, over budget",
        "stopped": "stopped",
    }[current.state]


def _sentence(current: SearchStatus) -> str:
    text = {
        "preparing": "Sensitivities are being measured",
        "running": "Running",
        "idle": "Not finished, and nobody works on it now; the same command goes on with it",
        "finished": f"Finished: {current.reason}",
        "stopped": f"Stopped: {current.reason}",
    }[current.state]
    if current.state in ("running", "idle"):
        text += f". {100 * current.share:.0f} % of the way"
    return f"{text}; {current.steps} steps closed, {current.candidates} candidates scored."


def _incumbent(history: History, study_id: int) -> str:
    record, info, facts = history.incumbent, history.info, history.facts
    assert record is not None
    won = record.winner
    within = "within budget" if history.met else "over budget still"
    rows = [
        ("", "incumbent", "all 8 bits", "float"),
        (":---", "---:", "---:", "---:"),
        (
            "cost",
            f"**{format_cost(won.cost, info.metric)}**, {within}",
            format_cost(info.int8, info.metric),
            format_cost(info.float32, info.metric),
        ),
        ("predicted loss rise", f"**{record.current.score:.3g} nats**", "", "0"),
    ]
    for before in sorted(name for name in facts if name.endswith("_before")):
        name = before.removesuffix("_before")
        after = facts.get(f"{name}_after")
        if after is None:
            continue
        test = name.startswith("test_")
        n = facts.get("test_samples" if test else "validation_samples", "?")
        shown = f"{name.removeprefix('test_')}, {n} {'test' if test else 'validation'} samples"
        named = name.removeprefix("test_")
        rows.append((shown, f"**{_figure(named, after)}**", "", _figure(named, facts[before])))
    trial = f"[trial {record.number}](/dashboard/studies/{study_id}/trials?numbers={record.number})"
    return f"**Incumbent.** After step {record.step}: {trial}.\n\n" + _table(rows)


def _links(files: Mapping[str, Reference], study_id: int) -> str:
    return ", ".join(
        f"[{shown}](/artifacts/{study_id}/{files[name].id})"
        for name, shown in _FILES.items()
        if name in files and SERVED_ID.fullmatch(files[name].id)
    )


def _steps(history: History, study_id: int) -> str:
    trains = history.info.training is not None
    rows = [("step", "took", "trial", "score, nats", "cost", *(("trained",) if trains else ()))]
    rows.append(("---:", ":---", "---:", "---:", "---:", *((":---",) if trains else ())))
    for record in reversed(history.records[-LATEST_STEPS:]):
        won = record.winner
        link = f"[{won.number}](/dashboard/studies/{study_id}/trials?numbers={won.number})"
        cost = format_cost(won.cost, history.info.metric)
        took = change(user_attrs_of(won))
        said = trained(record.training).removeprefix(" Trained for ").rstrip(".")
        row = (str(record.step), took, link, f"{won.score:.3g}", cost)
        rows.append((*row, *((said,) if trains else ())))
    return _table(rows)


def _layers(history: History) -> str:
    record = history.incumbent
    assert record is not None
    rows = [("layer", "kind", "weights", "weight bits", "activation bits", "rise, nats")]
    rows.append((":---", ":---", "---:", "---:", "---:", "---:"))
    for layer in history.space.layers:
        bits = record.config[layer.name]
        table = history.sensitivity.get(layer.name, {})
        rise = sum(
            table.get(part, {}).get(b, math.nan)
            for part, b in (("weights", bits.weight_bits), ("activations", bits.activation_bits))
            if b != FLOAT_BITS
        )
        rows.append(
            (
                f"`{layer.name}`",
                layer.kind,
                f"{layer.n_weights:,}",
                _bits(bits.weight_bits),
                _bits(bits.activation_bits),
                f"{rise:.2g}" if math.isfinite(rise) else "–",
            )
        )
    return _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    # A "|" ends a cell even within code. The dashboard leaves no room between columns: an en space
    # does, and Markdown does not strip it.
    return "\n".join(
        "| "
        + " | ".join(
            cell if set(cell) <= set(":-") and cell else cell.replace("|", "\\|") + "\u2002"
            for cell in row
        )
        + " |"
        for row in rows
    )


def _bits(bits: Any) -> str:
    return "float" if str(bits) == str(FLOAT_BITS) else str(bits)


def _plain(text: str) -> str:
    """Return text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", " ".join(text.split()))
