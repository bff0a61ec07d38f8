"""What a report says, as JSON data, read from the study alone.

It works at any time: a search that still runs, or was killed, is reported as far as it came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.study import Study

from hq_optuna import attributes
from hq_optuna._version import __version__
from hq_optuna.answer.agreement import agreement
from hq_optuna.answer.intervals import CONFIDENCE, METHODS, paired, wilson
from hq_optuna.answer.measured_end import measured_end
from hq_optuna.attributes import ANSWER, COMPARED, EIGHT, LAYER_ERRORS, UNIFORM
from hq_optuna.optuna_internals import id_of, storage_of
from hq_optuna.protocol.history import History, Reference, read_history
from hq_optuna.protocol.start_options import StartOptions, mask
from hq_optuna.protocol.status import SearchStatus, read_status
from hq_optuna.report.comparison import warnings
from hq_optuna.report.hardware import latencies, memory_map
from hq_optuna.report.text import headline
from hq_optuna.search import uniform_within, way
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.cost import shares
from hq_optuna.space.layers import FLOAT_BITS

PACKAGES = ("optuna", "torch", "numpy", "scipy", "sqlalchemy", "plotly")
"""Packages whose versions the report names."""

NOT_COUNTED = (
    "Biases and normalisation parameters are in no cost: they stay in float.",
    "Operations other than those of the listed layers (activation functions, pooling, additions) "
    "are in no cost.",
)


def report_data(
    study: Study, *, command: str | None = None, history: History | None = None
) -> dict[str, Any]:
    """Return everything the report says, as JSON data (numbers, no NaN).

    Args:
        study: A study of a bit search, finished or not.
        command: How the search was started; by default what the study says. Passwords in URLs are
            masked.
        history: What `read_history` returns of the study; it is read if not given.

    Raises:
        ResumeError: The study is not a bit search.
    """
    history = read_history(study) if history is None else history
    info = history.info
    command = command or StartOptions.read(study).command or None
    facts = dict(history.facts)
    compared, errors = facts.pop(COMPARED, []), facts.pop(LAYER_ERRORS, None)
    data = _json(
        {
            "study": history.study_name,
            "state": _state(history, read_status(study)),
            **_answer(history),
            "exact": _exact(history),
            "measured_end": measured_end(history),
            "agreement": agreement(history),
            "accuracies": accuracies(facts),
            "beside": beside(history),
            **_on_hardware(history),
            "levels": history.space.levels,
            "output_error": errors and {k: errors[k] for k in ("samples", "output")},
            "layers": [dataclasses.asdict(row) for row in layer_table(history)],
            "facts": facts,
            "compared": with_intervals(compared),
            "deploy": _deploy(study, history),
            "trainings": trainings(history),
            "settings": dict(info.settings),
            "quantizers": dict(info.quantizers),
            "fingerprint": study.user_attrs.get(attributes.FINGERPRINT),
            "artifacts": _artifacts(study),
            "versions": _versions(),
            "counts": _counts(history),
            "not_counted": NOT_COUNTED,
            "skipped": [{"name": n, "kind": k, "reason": r} for n, k, r in info.skipped],
            "warnings": [
                *info.warnings,
                *warnings(compared, info.metric, facts.get("validation_samples")),
            ],
            "command": None if command is None else mask(command),
        }
    )
    return {"headline": headline(data), **data}


def _deploy(study: Study, history: History) -> list[dict[str, Any]]:
    """Return the files that were written of the answer as it is now, and what checks found."""
    if history.incumbent is None:
        return []
    digest, rows = history.incumbent.config.digest, study.user_attrs.get(attributes.EXPORTED, [])
    return [row for row in rows if row["assignment"] == digest]


def _on_hardware(history: History) -> dict[str, Any]:
    space = history.space
    config = space.start if history.incumbent is None else history.incumbent.config
    return {"memory": memory_map(space, config), "latency": latencies(space, config)}


def _share(cost: float | None, whole: float | None) -> float | None:
    return None if cost is None or whole is None else cost / whole


def _answer(history: History) -> dict[str, Any]:
    """Return the budget, and cost and score of the incumbent (``None`` before step 0 is closed)."""
    info, incumbent = history.info, history.incumbent
    winner = None if incumbent is None else incumbent.winner
    current = None if incumbent is None else incumbent.current
    cost = None if winner is None else winner.cost
    return {
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
            "of_float32": _share(cost, info.float32),
        },
        "score": {
            "total": getattr(current, "score", None),
            "weights": getattr(current, "score_weights", None),
            "activations": getattr(current, "score_activations", None),
            "calibration_loss": getattr(current, "calibration_loss", None),
            "untrained": getattr(winner, "score", None),
            "untrained_calibration_loss": getattr(winner, "calibration_loss", None),
        },
        "trained": isinstance(current, Reference),
        "limits": [
            {
                "metric": bound.metric,
                "text": bound.text,
                "limit": bound.limit,
                "answer": None if incumbent is None else bound.cost(incumbent.config),
                "int8": bound.model.int8,
            }
            for bound in history.bounds
        ],
    }


def _state(history: History, current: SearchStatus) -> dict[str, Any]:
    """Return how far the search is: its status, the last closed step, and the way to the budget."""
    incumbent, bounds = history.incumbent, history.bounds
    status, step, progress = "not started", None, 0.0
    if incumbent is not None:
        step = incumbent.step
        configs = history.records[0].config, incumbent.config
        start, now = ([b.cost(config) for b in bounds] for config in configs)
        progress = way(start, now, [b.limit for b in bounds])
        status = "met" if history.met else "unfinished"
        if not history.met and incumbent.winner.state == history.space.bottom:
            status = "exhausted"
    return {
        "status": status,
        "over": current.state in ("finished", "stopped"),
        "reason": current.reason,
        "step": step,
        "progress": progress,
        "scored_in_open_step": len(history.step(0 if step is None else step + 1)),
    }


def _exact(history: History) -> dict[str, Any] | None:
    """Return the answer beside the exact optimum of the sums over layers, in the same budget."""
    sums, incumbent = history.additive(), history.incumbent
    if sums is None or incumbent is None or not history.met:
        return None
    try:
        best, prices = sums.exact(history.info.limit), sums.prices(history.info.limit)
    except ValueError:  # too many sums, or combinations of bits, to be solved exactly
        return None
    if best is None:
        return None
    score = sums.score(incumbent.config)
    return {
        "answer": score,
        "optimum": best.score,
        "gap": score / best.score if best.score > 0 else None,
        "cost": best.cost,
        "assignment": best.config.to_json(),
        "prices": [price._asdict() for price in prices],
        "of_the_score": math.isclose(score, incumbent.winner.score, rel_tol=1e-9),
    }


def _counts(history: History) -> dict[str, Any]:
    counted = [c for c in history.candidates if c.counted]
    trainings = [record.training for record in history.records if record.training is not None]
    return {
        "candidates": len(counted),
        "duplicates": len(history.candidates) - len(counted),
        "records": len(history.records),
        "trained": len(trainings),
        "running": history.n_running,
        "pruned": history.n_pruned,
        "failed": history.n_failed,
        "workers": len({c.worker for c in history.candidates}),
        "seconds": math.fsum(c.seconds for c in history.candidates),
        "training_seconds": math.fsum(said.get("seconds", 0.0) for said in trainings),
    }


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of the answer; before the first step is closed, of the start."""

    name: str
    kind: str  # class of the module
    n_weights: int
    macs: int  # for one sample
    weight_bits: int  # 32 is float
    activation_bits: int
    searched: bool  # whether the search may change it; pinned layers are not
    share_before: float  # in the all-8-bit cost, 0 to 1
    share_after: float  # in the cost with these bits
    sensitivity: float | None  # predicted loss rise at its bits, nats; None where not in the study
    quantizer: str = "uniform"  # what rounds its weights
    errors: Mapping[str, float | None] | None = None  # dB; None where they were not measured


def layer_table(history: History) -> list[LayerRow]:
    """Return the layers of the answer in network order."""
    space = history.space
    model = space.costs(history.info.metric)
    config = space.start if history.incumbent is None else history.incumbent.config
    eight = BitConfig.uniform([layer.name for layer in space.layers], 8, 8)
    before, after = (shares(model.per_layer(bits)).tolist() for bits in (eight, config))
    searched = {name for variable in space.variables for name in variable.layers}
    measured = history.facts.get(LAYER_ERRORS)
    errors = measured["layers"] if measured and measured["of"] == config.digest else {}
    return [
        LayerRow(
            name=layer.name,
            kind=layer.kind,
            n_weights=layer.n_weights,
            macs=layer.macs,
            weight_bits=config[layer.name].weight_bits,
            activation_bits=config[layer.name].activation_bits,
            searched=layer.name in searched,
            share_before=before[i],
            share_after=after[i],
            sensitivity=_sensitivity(history, layer.name, config),
            quantizer=history.info.quantizers.get(layer.name, "uniform"),
            errors=errors.get(layer.name),
        )
        for i, layer in enumerate(space.layers)
    ]


def _sensitivity(history: History, name: str, config: BitConfig) -> float | None:
    """Return the predicted rise of one layer at its bits; what stays in float adds nothing."""
    if name not in history.sensitivity:
        return None
    total = math.fsum(
        history.sensitivity[name].get(part, {}).get(bits, math.nan)
        for part, bits in zip(("weights", "activations"), config[name], strict=True)
        if bits != FLOAT_BITS
    )
    return total if math.isfinite(total) else None


def accuracies(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return accuracies with their intervals, by the data they were measured on.

    Returns:
        ``{"validation": {"samples", "before", "after", "difference", "lost", "gained"}, "test": …,
        "confidence", "methods"}``, each of the three ``{"value", "low", "high"}``. Empty where no
        classes of single samples were counted.
    """
    found: dict[str, Any] = {}
    for what, prefix in (("validation", ""), ("test", "test_")):
        names = [f"{what}_samples", f"{what}_lost", f"{what}_gained"]
        names += (f"{prefix}accuracy_before", f"{prefix}accuracy_after")
        values: list[Any] = [facts.get(name) for name in names]
        n, lost, gained, before, after = values
        if n and None not in (lost, gained, before, after):
            found[what] = {
                **{"samples": n, "lost": lost, "gained": gained},
                **{"before": _accuracy(before, n), "after": _accuracy(after, n)},
                "difference": _difference(lost, gained, n),
            }
    return found and {**found, "confidence": CONFIDENCE, "methods": METHODS}


def _accuracy(value: float | None, n: int | None) -> dict[str, float | None] | None:
    """Return an accuracy with its interval, where its ``n`` samples were counted."""
    if value is None or not math.isfinite(value):
        return None
    low, high = (None, None) if n is None else wilson(round(value * n), n)
    return {"value": value, "low": low, "high": high}


def _difference(lost: int, gained: int, n: int) -> dict[str, float]:
    low, high = paired(lost, gained, n)
    return {"value": (gained - lost) / n, "low": low, "high": high}


def beside(history: History) -> list[dict[str, Any]]:
    """Return float, 8 bits, uniform bits within the budget and the answer, to be compared.

    Costs need the storage alone. Accuracy and loss are there as far as they were measured.

    Returns:
        One row each: ``{"name", "bops", "size_bytes", "of_int8", "of_float32", "loss", "accuracy",
        "metric", "over_answer"}``, and the other costs that are known. The last is how much more
        often than the answer it is right, or
        how far the study's own metric is over the answer's; ``accuracy`` and ``over_answer`` are
        ``{"value", "low", "high"}`` or ``None``, ``metric`` a number.
    """
    facts, info, space = history.facts, history.info, history.space
    models = {metric: space.costs(metric) for metric in space.metrics}
    model = models[info.metric]
    measured = {(row["method"], row["bits"]): row for row in facts.get(COMPARED, ())}
    ours = accuracies(facts).get("validation")

    def row(name: str, bits: Mapping[str, LayerBits], found: Any = None) -> dict[str, Any]:
        costs = {str(metric): m.known_cost(bits) for metric, m in models.items()}
        cost = costs[info.metric]
        shares = {"of_int8": _share(cost, info.int8), "of_float32": _share(cost, info.float32)}
        return {"name": name, **costs, **shares, **_measured(found or {"measured": {}})}

    def uniform(bits: int) -> BitConfig:
        return BitConfig.uniform([layer.name for layer in space.layers], bits, bits)

    rows = [row("float", uniform(FLOAT_BITS))]
    if ours is None:
        rows[0]["accuracy"] = _accuracy(facts.get("accuracy_before"), None)
    else:
        d = ours["difference"]
        rows[0]["accuracy"] = ours["before"]
        rows[0]["over_answer"] = {"value": -d["value"], "low": -d["high"], "high": -d["low"]}
    eight = measured.get((EIGHT, "8 bits"))
    if eight is not None and eight["cost"] != model.int8:  # pinned layers have other bits
        eight = None
    rows.append(row("8 bits everywhere", uniform(8), eight))
    for name, config in uniform_within(space, history.fits).items():
        rows.append(row(f"uniform {name}", config, measured.get((UNIFORM, name))))
    if history.incumbent is not None:
        answer = row("this answer", history.incumbent.config, measured.get((ANSWER, None)))
        if answer["accuracy"] is None and ours is not None:
            answer["accuracy"] = ours["after"]
        if (said := facts.get("validation_metric")) is not None:
            values = [facts.get(f"{said['name']}_{when}") for when in ("before", "after")]
            rows[0]["metric"] = values[0]
            answer["metric"] = values[1] if answer["metric"] is None else answer["metric"]
            if (d := said.get("difference")) is not None:
                rows[0]["over_answer"] = {
                    "value": -d["value"], "low": -d["high"], "high": -d["low"]
                }  # fmt: skip
        rows.append({**answer, "over_answer": None})
    return rows


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured of a compared assignment, with intervals where samples counted."""
    measured, pairs = row["measured"], row.get("pairs")
    accuracy, over = _accuracy(measured.get("accuracy"), None), None
    if accuracy and pairs:
        accuracy = _accuracy(measured["accuracy"], pairs["samples"])
        over = _difference(pairs["only_answer"], pairs["only_this"], pairs["samples"])
    found = {"loss": measured.get("loss"), "accuracy": accuracy, "over_answer": over}
    metric = row.get("metric")
    if metric is not None:
        found |= {"metric": measured.get(metric["name"]), "over_answer": row.get("over_answer")}
    return {"metric": None, **found}


def with_intervals(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of the comparison with ``accuracy`` and ``over_answer``, as in `beside`."""
    rows = []
    for row in compared:
        found = _measured(row)
        over = None if row["method"] == ANSWER else found["over_answer"]
        if row["method"] != ANSWER and row.get("over_answer") is not None:
            over = row["over_answer"]
        rows.append({**row, "accuracy": found["accuracy"], "over_answer": over})
    return rows


def trainings(history: History) -> list[dict[str, Any]]:
    """Return what each training of a step's winner gave.

    Returns:
        One row each. ``before`` and ``after`` hold what was measured on the validation data by
        name, accuracies with their intervals where samples were counted; ``weights`` and
        ``sensitivity`` name artifacts.
    """
    n = accuracies(history.facts).get("validation", {}).get("samples")
    names = ("kind", "epochs", "samples", "seconds", "score", "curvature", "weights", "sensitivity")

    def measured(said: Mapping[str, Any], end: str) -> dict[str, Any]:
        found = {k.removesuffix(end): v for k, v in said.items() if k.endswith(end)}
        if "accuracy" in found:
            found["accuracy"] = _accuracy(found["accuracy"], n)
        return found

    return [
        {
            **{"step": record.step, "trial": record.number},
            **{name: record.training.get(name) for name in names},
            "kept": record.training.get("kept", True),
            "before": measured(record.training, "_before"),
            "after": measured(record.training, "_after"),
        }
        for record in history.records
        if record.training is not None
    ]


def _artifacts(study: Study) -> dict[str, Any]:
    """Return what the study says of its artifacts, by name; not of the report, which this is."""
    prefix = f"{attributes.ARTIFACT}:"
    system = storage_of(study).get_study_system_attrs(id_of(study))
    found = {k.removeprefix(prefix): v for k, v in system.items() if k.startswith(prefix)}
    return {name: found[name] for name in sorted(found) if name != "report"}


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
