"""The report of a search, from its storage alone: JSON data, Markdown, one HTML file.

It works at any time: a search that still runs, or was killed, is reported as far as it came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study

from hq_optuna import attributes
from hq_optuna._version import __version__
from hq_optuna.answer.agreement import agreement
from hq_optuna.atomic_files import write_atomically
from hq_optuna.attributes import COMPARED
from hq_optuna.protocol.history import History, Reference, read_history
from hq_optuna.protocol.start_options import StartOptions, mask
from hq_optuna.protocol.status import SearchStatus, read_status
from hq_optuna.report.compared import warnings
from hq_optuna.report.html import figures, render_html
from hq_optuna.report.measured import accuracies, beside, trainings, with_intervals
from hq_optuna.report.text import render_markdown
from hq_optuna.report.words import headline
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import CostModel
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.visualization.cost_share import shares

__all__ = ["LayerRow", "layer_table", "render_markdown", "report_data", "write_report"]

PACKAGES = ("optuna", "torch", "numpy", "scipy", "sqlalchemy", "plotly")
"""Packages whose versions the report names."""

NOT_COUNTED = (
    "Biases and normalisation parameters are in no cost: they stay in float.",
    "Operations other than those of the listed layers (activation functions, pooling, additions) "
    "are in no cost.",
)


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of the answer.

    Attributes:
        name: Name of the layer.
        kind: Class of the module.
        n_weights: Number of weights.
        macs: Multiply-accumulates for one sample.
        weight_bits: Of the incumbent (before the first step is closed: of the start); 32 is float.
        activation_bits: Likewise.
        searched: Whether the search may change it; pinned layers are not.
        share_before: Share in the all-8-bit cost, 0 to 1.
        share_after: Share in the cost with these bits.
        sensitivity: Predicted loss rise of this layer at its bits, weights and activations
            together, nats; ``None`` where the study does not hold it.
        quantizer: What rounds its weights.
    """

    name: str
    kind: str
    n_weights: int
    macs: int
    weight_bits: int
    activation_bits: int
    searched: bool
    share_before: float
    share_after: float
    sensitivity: float | None
    quantizer: str = "uniform"


def layer_table(history: History) -> list[LayerRow]:
    """Return the layers of the answer in network order."""
    space = history.space
    model = CostModel(space.layers, history.info.metric)
    config = space.start if history.incumbent is None else history.incumbent.config
    names = [layer.name for layer in space.layers]
    before = shares(model.per_layer(BitConfig.uniform(names, 8, 8)))
    after = shares(model.per_layer(config))
    searched = {name for variable in space.variables for name in variable.layers}
    return [
        LayerRow(
            name=layer.name,
            kind=layer.kind,
            n_weights=layer.n_weights,
            macs=layer.macs,
            weight_bits=config[layer.name].weight_bits,
            activation_bits=config[layer.name].activation_bits,
            searched=layer.name in searched,
            share_before=float(before[i]),
            share_after=float(after[i]),
            sensitivity=_sensitivity(history, layer.name, config),
            quantizer=history.info.quantizers.get(layer.name, "uniform"),
        )
        for i, layer in enumerate(space.layers)
    ]


def _sensitivity(history: History, name: str, config: BitConfig) -> float | None:
    """Return the predicted rise of one layer at its bits; what stays in float adds nothing."""
    total = 0.0
    for part, bits in zip(("weights", "activations"), config[name], strict=True):
        if bits != FLOAT_BITS:
            nats = history.sensitivity.get(name, {}).get(part, {}).get(bits)
            if nats is None or not math.isfinite(nats):
                return None
            total += nats
    return total if name in history.sensitivity else None


def report_data(study: Study, *, command: str | None = None) -> dict[str, Any]:
    """Return everything the report says, as JSON data (numbers, no NaN).

    Args:
        study: A study of a bit search, finished or not.
        command: How the search was started; by default what the study says. Passwords in URLs are
            masked.

    Raises:
        ResumeError: The study is not a bit search.
    """
    return _data(study, read_history(study), command)


def _data(study: Study, history: History, command: str | None) -> dict[str, Any]:
    info, incumbent = history.info, history.incumbent
    command = command or StartOptions.read(study).command or None
    current = None if incumbent is None else incumbent.current
    cost = None if incumbent is None else incumbent.winner.cost
    counted = [c for c in history.candidates if c.counted]
    facts = dict(history.facts)
    compared = facts.pop(COMPARED, [])
    said = [*info.warnings, *warnings(compared, info.metric, facts.get("validation_samples"))]
    data: dict[str, Any] = {
        "study": history.study_name,
        "state": _state(history, read_status(study)),
        "budget": {
            "text": info.budget,
            "metric": info.metric,
            "limit": info.limit,
            "of_int8": info.limit / info.int8,
        },
        "cost": {
            "answer": cost,
            "int8": info.int8,
            "float32": info.float32,
            "of_int8": None if cost is None else cost / info.int8,
            "of_float32": None if cost is None else cost / info.float32,
        },
        "score": {
            "total": None if current is None else current.score,
            "weights": None if current is None else current.score_weights,
            "activations": None if current is None else current.score_activations,
            "calibration_loss": None if current is None else current.calibration_loss,
            "untrained": None if incumbent is None else incumbent.winner.score,
            "untrained_calibration_loss": (
                None if incumbent is None else incumbent.winner.calibration_loss
            ),
        },
        "exact": _exact(history),
        "agreement": agreement(history),
        "accuracies": accuracies(facts),
        "beside": beside(history),
        "levels": history.space.levels,
        "layers": [dataclasses.asdict(row) for row in layer_table(history)],
        "facts": facts,
        "compared": with_intervals(compared),
        "trainings": trainings(history),
        "settings": dict(info.settings),
        "quantizers": dict(info.quantizers),
        "fingerprint": study.user_attrs.get(attributes.FINGERPRINT),
        "artifacts": _artifacts(study),
        "versions": _versions(),
        "trained": isinstance(current, Reference),
        "counts": {
            "candidates": len(counted),
            "duplicates": len(history.candidates) - len(counted),
            "records": len(history.records),
            "trained": sum(record.training is not None for record in history.records),
            "running": history.n_running,
            "pruned": history.n_pruned,
            "failed": history.n_failed,
            "workers": len({c.worker for c in history.candidates}),
            "seconds": math.fsum(c.seconds for c in history.candidates),
            "training_seconds": math.fsum(
                (record.training or {}).get("seconds", 0.0) for record in history.records
            ),
        },
        "not_counted": list(NOT_COUNTED),
        "skipped": [{"name": n, "kind": k, "reason": r} for n, k, r in info.skipped],
        "warnings": said,
        "command": None if command is None else mask(command),
    }
    data = _json(data)
    return {"headline": headline(data), **data}


def _exact(history: History) -> dict[str, Any] | None:
    """Return the answer beside the exact optimum of the sums over layers, in the same budget."""
    sums, incumbent = history.additive(), history.incumbent
    if sums is None or incumbent is None or not history.met:
        return None
    best = sums.exact(history.info.limit)
    if best is None:
        return None
    score = sums.score(incumbent.config)
    return {
        "answer": score,
        "optimum": best.score,
        "gap": score / best.score if best.score > 0 else None,
        "cost": best.cost,
        "assignment": best.config.to_json(),
        "of_the_score": math.isclose(score, incumbent.winner.score, rel_tol=1e-9),
    }


def _artifacts(study: Study) -> dict[str, Any]:
    """Return what the study says of its artifacts, by name; not of the report, which this is."""
    prefix = f"{attributes.ARTIFACT}:"
    system = study._storage.get_study_system_attrs(study._study_id)
    found = {k.removeprefix(prefix): v for k, v in system.items() if k.startswith(prefix)}
    return {name: found[name] for name in sorted(found) if name != "report"}


def _state(history: History, current: SearchStatus) -> dict[str, Any]:
    """Return how far the search is: its status, the last closed step, and the way to the budget."""
    incumbent, limit = history.incumbent, history.info.limit
    if incumbent is None:
        status, step, progress = "not started", None, 0.0
    else:
        step = incumbent.step
        start, now = history.records[0].winner.cost, incumbent.winner.cost
        progress = 1.0 if start <= limit else min(1.0, (start - now) / (start - limit))
        status = "met" if history.met else "unfinished"
        if not history.met and incumbent.winner.state == history.space.bottom:
            status = "exhausted"
    open_step = 0 if step is None else step + 1
    return {
        "status": status,
        "over": current.state in ("finished", "stopped"),
        "reason": current.reason,
        "step": step,
        "progress": progress,
        "scored_in_open_step": len(history.step(open_step)),
    }


def _versions() -> dict[str, str]:
    """Return the versions at hand, read from the installation: importing them takes seconds."""
    found = {"hq_optuna": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _json(value: Any) -> Any:
    """Return the value with NaN and infinities as ``None`` and tuples as lists."""
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_report(study: Study, path: str | Path, *, command: str | None = None) -> None:
    """Write the report as one HTML file that needs no network.

    The file appears whole or not at all: it is written beside its place and then renamed. Its
    folder is created. The same study gives the same bytes.

    Args:
        study: A study of a bit search, finished or not.
        path: The file, replaced if it exists.
        command: How the search was started; by default what the study says. Passwords in URLs are
            masked.

    Raises:
        ResumeError: The study is not a bit search.
        OSError: The file cannot be written; an earlier report stays as it was.
    """
    history = read_history(study)
    data = _data(study, history, command)
    text = render_html(data, figures(history))
    write_atomically(Path(path), text.encode())
