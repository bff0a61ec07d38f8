"""What a report says of accuracies, their intervals, and of float, 8-bit and uniform networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hq_optuna.answer.intervals import CONFIDENCE, METHODS, paired, wilson
from hq_optuna.attributes import ANSWER, COMPARED, EIGHT, UNIFORM
from hq_optuna.protocol.history import History
from hq_optuna.search import uniform_within
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import METRICS, CostModel

DATA = {"validation": "", "test": "test_"}
"""Names of the data, and what their facts begin with."""


def accuracies(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return accuracies with their intervals, by the data they were measured on.

    Args:
        facts: Of the study.

    Returns:
        ``{"validation": {"samples", "before", "after", "difference", "lost", "gained"}, "test": …,
        "confidence", "methods"}``, each of the three ``{"value", "low", "high"}``. Empty where no
        classes of single samples were counted.
    """
    found: dict[str, Any] = {}
    for what, prefix in DATA.items():
        n, lost, gained = (facts.get(f"{what}_{name}") for name in ("samples", "lost", "gained"))
        before, after = (facts.get(f"{prefix}accuracy_{when}") for when in ("before", "after"))
        if not n or None in (lost, gained, before, after):
            continue
        assert lost is not None
        assert gained is not None
        found[what] = {
            "samples": n,
            "lost": lost,
            "gained": gained,
            "before": _proportion(before, n),
            "after": _proportion(after, n),
            "difference": _difference(lost, gained, n),
        }
    return found and {**found, "confidence": CONFIDENCE, "methods": METHODS}


def _proportion(value: Any, n: int) -> dict[str, float]:
    low, high = wilson(round(value * n), n)
    return {"value": value, "low": low, "high": high}


def _alone(value: float | None) -> dict[str, float | None] | None:
    """Return an accuracy without an interval; ``None`` where a search's own measure gave none."""
    if value is None or not math.isfinite(value):
        return None
    return {"value": value, "low": None, "high": None}


def _difference(lost: int, gained: int, n: int) -> dict[str, float]:
    low, high = paired(lost, gained, n)
    return {"value": (gained - lost) / n, "low": low, "high": high}


def beside(history: History) -> list[dict[str, Any]]:
    """Return float, 8 bits, uniform bits within the budget and the answer, to be compared.

    Costs need the storage alone. Accuracy and loss are there as far as they were measured.

    Returns:
        One row each: ``{"name", "bops", "size_bytes", "of_int8", "of_float32", "loss", "accuracy",
        "over_answer"}``. The last is how much more often than the answer it is right;
        ``accuracy`` and ``over_answer`` are ``{"value", "low", "high"}`` or ``None``.
    """
    models = {metric: CostModel(history.space.layers, metric) for metric in METRICS}
    facts, info = history.facts, history.info
    measured = {
        (row["method"], row["bits"]): row
        for row in facts.get(COMPARED, ())
        if row["method"] in (ANSWER, EIGHT, UNIFORM)
    }
    ours = accuracies(facts).get("validation")
    rows = []

    def add(name: str, costs: Mapping[str, float], row: Mapping[str, Any] | None) -> None:
        of = info.metric
        rows.append(
            {
                "name": name,
                **costs,
                "of_int8": costs[of] / info.int8,
                "of_float32": costs[of] / info.float32,
                **_figures(row),
            }
        )

    def costs_of(config: BitConfig) -> dict[str, float]:
        return {metric: model.cost(config) for metric, model in models.items()}

    add("float", {metric: model.float32 for metric, model in models.items()}, None)
    if ours is not None:
        d = ours["difference"]
        over = {"value": -d["value"], "low": -d["high"], "high": -d["low"]}
        rows[0] |= {"accuracy": ours["before"], "over_answer": over}
    else:
        rows[0]["accuracy"] = _alone(facts.get("accuracy_before"))
    add(
        "8 bits everywhere",
        {metric: model.int8 for metric, model in models.items()},
        _whole_eight(history, measured, models[info.metric]),
    )
    for bits, config in _uniform(history):
        add(f"uniform {bits}", costs_of(config), measured.get((UNIFORM, bits)))
    if history.incumbent is not None:
        add("this answer", costs_of(history.incumbent.config), measured.get((ANSWER, None)))
        if rows[-1]["accuracy"] is None and ours is not None:
            rows[-1]["accuracy"] = ours["after"]
        rows[-1]["over_answer"] = None
    return rows


def with_intervals(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of the comparison with ``accuracy`` and ``over_answer``, as in `beside`."""
    rows = []
    for row in compared:
        found = _figures(row)
        del found["loss"]  # is among what was measured
        if row["method"] == ANSWER:
            found["over_answer"] = None
        rows.append({**row, **found})
    return rows


def trainings(history: History) -> list[dict[str, Any]]:
    """Return what each training of a step's winner gave.

    Returns:
        One row each: ``{"step", "trial", "kind", "epochs", "samples", "seconds", "score",
        "curvature", "before", "after", "weights", "sensitivity"}``. ``before`` and ``after`` hold
        what was measured on the validation data by name, accuracies with their intervals where
        samples were counted; ``weights`` and ``sensitivity`` name artifacts.
    """
    ours = accuracies(history.facts).get("validation")

    def measured(said: Mapping[str, Any], end: str) -> dict[str, Any]:
        found = {k.removesuffix(end): v for k, v in said.items() if k.endswith(end)}
        if "accuracy" in found:
            found["accuracy"] = (
                _alone(found["accuracy"])
                if ours is None
                else _proportion(found["accuracy"], ours["samples"])
            )
        return found

    names = ("kind", "epochs", "samples", "seconds", "score", "curvature", "weights", "sensitivity")
    return [
        {
            "step": record.step,
            "trial": record.number,
            **{name: record.training.get(name) for name in names},
            "kept": record.training.get("kept", True),
            "before": measured(record.training, "_before"),
            "after": measured(record.training, "_after"),
        }
        for record in history.records
        if record.training is not None
    ]


def _whole_eight(
    history: History, measured: Mapping[Any, Mapping[str, Any]], model: CostModel
) -> Mapping[str, Any] | None:
    """Return what was measured with 8 bits, where pinned layers and activations have 8 too."""
    row = measured.get((EIGHT, "8 bits"))
    return row if row is not None and row["cost"] == model.int8 else None


def _uniform(history: History) -> Iterator[tuple[str, BitConfig]]:
    model = CostModel(history.space.layers, history.info.metric)
    yield from uniform_within(history.space, model.cost, history.info.limit).items()


def _figures(row: Mapping[str, Any] | None) -> dict[str, Any]:
    measured = {} if row is None else row["measured"]
    found: dict[str, Any] = {"loss": measured.get("loss"), "accuracy": None, "over_answer": None}
    accuracy = measured.get("accuracy")
    pairs = None if row is None else row.get("pairs")
    found["accuracy"] = _alone(accuracy)
    if accuracy is not None and pairs:
        n = pairs["samples"]
        found["accuracy"] = _proportion(accuracy, n)
        found["over_answer"] = _difference(pairs["only_answer"], pairs["only_this"], n)
    return found
