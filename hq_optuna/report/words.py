"""The words of a report: numbers, facts, and the answer in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from hq_optuna.space.layers import FLOAT_BITS

NOT_MEASURED = "not measured"

NOUN = {"bops": "BOPs", "size_bytes": "size"}


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Return three significant digits, or "not measured" for ``None``."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.{digits}g} {unit}".rstrip()


def percent(fraction: float | None) -> str:
    """Return the fraction as ``"24.8 %"``, or "not measured" for ``None``."""
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.1f} %"


def hundredths(fraction: float) -> str:
    """Return an accuracy in percent without its sign: ``"99.67"``."""
    return f"{100 * fraction:.2f}"


def points(fraction: float) -> str:
    """Return a difference of accuracies in points, with its sign.

    Example:
        >>> points(-0.0123), points(0.0)
        ('−1.2', '0.0')
    """
    text = f"{100 * fraction:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def interval(found: Mapping[str, float | None] | None, write: Callable[[float], str]) -> str:
    """Return ``"value [low, high]"``, or the value alone where there is no interval."""
    if found is None:
        return NOT_MEASURED
    value, *ends = (
        write(x) for x in (found["value"], found["low"], found["high"]) if x is not None
    )
    return f"{value} [{', '.join(ends)}]" if ends else value


def seconds(value: float | None) -> str:
    """Return a duration in whole seconds, short ones with three digits."""
    return number(value, "s") if value is None or value < 100 else f"{value:,.0f} s"


def fact(name: str, value: Any) -> str:
    """Return the value of a fact; accuracies are percentages."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return ", ".join(f"{key} {fact(str(key), item)}" for key, item in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return json.dumps(value)
    if "accuracy" in name and 0 <= value <= 1:
        return percent(value)
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}"


def before_and_after(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return ``{what: "before → after"}`` of the facts that were measured twice.

    Example:
        >>> before_and_after({"accuracy_before": 0.981, "accuracy_after": 0.975})
        {'accuracy': '98.1 % → 97.5 %'}
    """
    names = [key.removesuffix("_before") for key in facts if key.endswith("_before")]
    ends = {name: (facts[f"{name}_before"], facts.get(f"{name}_after")) for name in names}
    return {
        name.replace("_", " "): f"{fact(name, before)} → {fact(name, after)}"
        for name, (before, after) in ends.items()
        if f"{name}_after" in facts
    }


def headline(data: Mapping[str, Any]) -> str:
    """Return the answer in one sentence, or how far the search is."""
    state, budget = data["state"], data["budget"]
    eight = f"the all-8-bit {NOUN[budget['metric']]}"
    limit = f"the budget is {percent(budget['of_int8'])}"
    cost = f"{percent(data['cost']['of_int8'])} of {eight}"
    rise = f"predicted loss rise {number(data['score']['total'], 'nats')}"
    stopped = f"Stopped by a limit, {state['reason']}" if state["over"] else ""
    scored = _n(state["scored_in_open_step"], "candidate")
    if state["status"] == "not started":
        return f"{stopped or 'No step is closed yet'}: {scored} scored; {limit} of {eight}."
    if state["status"] == "unfinished":
        return (
            f"{stopped or 'Unfinished'}, {percent(state['progress'])} of the way to the budget: "
            f"after step {state['step']} it is at {cost} ({limit}), {rise}"
            + (f"; {scored} of the next step scored." if state["scored_in_open_step"] else ".")
        )
    if state["status"] == "exhausted":
        return (
            f"Every layer is at its fewest bits and the budget is not met: {cost} ({limit}), "
            f"{rise}."
        )
    measured = before_and_after(data["facts"])
    name = "accuracy" if "accuracy" in measured or not measured else next(iter(measured))
    text = (
        f"{_layers_at(data['layers'])}: {cost}, {rise}, "
        f"validation {name} {measured.get(name, NOT_MEASURED)}"
    )
    found = data["accuracies"].get("validation")
    if name == "accuracy" and found:
        value, low, high = (points(found["difference"][k]) for k in ("value", "low", "high"))
        text += f" ({value} points, 95 % interval {low} to {high})"
    return f"{text}{'' if state['over'] else '; swaps still refine it'}."


def _layers_at(layers: list[Mapping[str, Any]]) -> str:
    """Return ``"18 layers at 2 to 8 bits"``."""
    bits = {row[part] for row in layers for part in ("weight_bits", "activation_bits")}
    integer = bits - {FLOAT_BITS}
    text = _n(len(layers), "layer")
    if integer:
        low, high = min(integer), max(integer)
        text += f" at {low} to {high} bits" if low < high else f" at {_n(low, 'bit')}"
    if all(row["activation_bits"] == FLOAT_BITS for row in layers):
        text += " (activations in float)"
    return text


def _n(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def ended(data: Mapping[str, Any]) -> str:
    """Return why the search ended, in words."""
    state: Mapping[str, Any] = data["state"]
    met, reason = state["status"] == "met", str(state["reason"])
    if not state["over"]:
        return "not yet" + (": the budget is met, swaps still refine the answer" if met else "")
    if "budget" in reason:
        return reason
    return f"{reason}; the budget is {'met' if met else 'not met'}"


def counted(data: Mapping[str, Any], what: str) -> str:
    """Return the interval of an accuracy's difference and what was counted for it."""
    name = {"accuracy": "validation", "test accuracy": "test"}.get(what, "")
    found = data["accuracies"].get(name)
    if not found:
        return ""
    return (
        f", difference {interval(found['difference'], points)} points: of {found['samples']:,} "
        f"samples {found['lost']:,} lost, {found['gained']:,} gained"
    )


def ranks_agree(ranks: Mapping[str, Any] | None) -> str:
    """Return how well the score ranked what was measured beside it, and what that is worth."""
    if ranks is None:
        return NOT_MEASURED
    text = f"Spearman {ranks['spearman']:.3f} over {ranks['candidates']:,} candidates"
    if ranks["within_steps"] is not None:
        text += f", {ranks['within_steps']:.3f} within a step (median of {ranks['steps']})"
    return f"{text}; on the calibration set, which both read, not on unseen data"


def gap_text(exact: Mapping[str, Any], amount: Callable[[float | None], str]) -> str:
    """Return how far the answer is from the least sum over layers, in words."""
    gap = NOT_MEASURED if exact["gap"] is None else f"{exact['gap']:.3f}"
    text = (
        f"{gap} (sum over layers {number(exact['answer'], 'nats')}; the least within the budget "
        f"{number(exact['optimum'], 'nats')}, at {amount(exact['cost'])})"
    )
    if exact["of_the_score"]:
        return text
    return f"{text}; the search ranks by another score, which is no sum over layers"
