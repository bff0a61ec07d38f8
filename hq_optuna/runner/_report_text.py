"""The words of a report: what `report_data` returns, as sentences and tables of text.

`blocks` says everything once; Markdown and HTML only dress it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hq_optuna.cost import format_cost
from hq_optuna.layers import FLOAT_BITS
from hq_optuna.runner._report_compared import table as compared_table

NOT_MEASURED = "not measured"

_NOUN = {"bops": "BOPs", "size_bytes": "size"}

LAYER_COLUMNS = (
    *("layer", "kind", "weights", "MACs", "weight bits", "activation bits"),
    *("share of cost, all 8 bits", "share of cost, now", "sensitivity (nats)"),
)


@dataclass(frozen=True, slots=True)
class Block:
    """One titled part of the report.

    Attributes:
        key: Short name, for links.
        title: Heading.
        lines: Sentences, one item each.
        header: Column titles of a table; empty for none.
        rows: Its cells.
        n_text_columns: How many columns hold words; the others hold numbers.
        code: A command to copy.
    """

    key: str
    title: str
    lines: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    n_text_columns: int = 1
    code: str = ""


def number(value: float | None, unit: str = "") -> str:
    """Return three significant digits, or "not measured" for ``None``."""
    if value is None:
        return NOT_MEASURED
    text = f"{value:.3g}"
    return f"{text} {unit}" if unit else text


def percent(fraction: float | None) -> str:
    """Return the fraction as ``"24.8 %"``, or "not measured" for ``None``."""
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.1f} %"


def seconds(value: float | None) -> str:
    """Return a duration in whole seconds, short ones with three digits."""
    return number(value, "s") if value is None or value < 100 else f"{value:,.0f} s"


def fact(name: str, value: Any) -> str:
    """Return the value of a fact; accuracies are percentages."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        if "accuracy" in name and 0 <= value <= 1:
            return percent(value)
        return f"{value:.6g}" if isinstance(value, float) else f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {fact(str(key), item)}" for key, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def before_and_after(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return ``{what: "before → after"}`` of the facts that were measured twice.

    Example:
        >>> before_and_after({"accuracy_before": 0.981, "accuracy_after": 0.975})
        {'accuracy': '98.1 % → 97.5 %'}
    """
    pairs = {}
    for key in facts:
        name = key.removesuffix("_before")
        if name != key and f"{name}_after" in facts:
            after = fact(name, facts[f"{name}_after"])
            pairs[name.replace("_", " ")] = f"{fact(name, facts[key])} → {after}"
    return pairs


def headline(data: Mapping[str, Any]) -> str:
    """Return the answer in one sentence, or how far the search is."""
    state, budget, cost = data["state"], data["budget"], data["cost"]
    eight = f"the all-8-bit {_NOUN[budget['metric']]}"
    limit = f"the budget is {percent(budget['of_int8'])}"
    if state["status"] == "not started":
        return (
            f"No step is closed yet: {_n(state['scored_in_open_step'], 'candidate')} scored; "
            f"{limit} of {eight}."
        )
    rise = f"predicted loss rise {number(data['score']['total'], 'nats')}"
    if state["status"] == "unfinished":
        scored = state["scored_in_open_step"]
        return (
            f"Unfinished, {percent(state['progress'])} of the way to the budget: after step "
            f"{state['step']} it is at {percent(cost['of_int8'])} of {eight} ({limit}), {rise}"
            + (f"; {_n(scored, 'candidate')} of the next step scored." if scored else ".")
        )
    if state["status"] == "exhausted":
        return (
            f"Every layer is at its fewest bits and the budget is not met: "
            f"{percent(cost['of_int8'])} of {eight} ({limit}), {rise}."
        )
    measured = before_and_after(data["facts"])
    name = "accuracy" if "accuracy" in measured or not measured else next(iter(measured))
    return (
        f"{_layers_at(data['layers'])}: {percent(cost['of_int8'])} of {eight}, {rise}, "
        f"validation {name} {measured.get(name, NOT_MEASURED)}."
    )


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


def blocks(data: Mapping[str, Any]) -> list[Block]:
    """Return the parts of the report in their order; the pictures go after ``"layers"``."""
    return [_answer(data), *_compared(data), _layers(data), *_record(data), *_limits(data)]


def _answer(data: Mapping[str, Any]) -> Block:
    cost, budget, score = data["cost"], data["budget"], data["score"]
    metric = budget["metric"]

    def amount(value: float | None) -> str:
        return NOT_MEASURED if value is None else format_cost(value, metric)

    answer = amount(cost["answer"])
    if cost["answer"] is not None:
        answer += (
            f" = {percent(cost['of_int8'])} of all 8 bits, {percent(cost['of_float32'])} of float"
        )
    facts = data["facts"]
    pairs = before_and_after(facts)
    exact = data["exact"]
    rows = [
        ("budget", f"{amount(budget['limit'])} ({budget['text']})"),
        ("cost", answer),
        ("cost with 8 bits everywhere", amount(cost["int8"])),
        ("cost in float", amount(cost["float32"])),
        ("predicted loss rise", number(score["total"], "nats")),
        ("by layers: weights", number(score["weights"], "nats")),
        ("by layers: activations", number(score["activations"], "nats")),
        *(() if exact is None else (("gap to the exact optimum", _gap(exact, amount)),)),
        ("loss on the calibration set", number(score["calibration_loss"])),
        *((f"{what}, before → after", text) for what, text in pairs.items()),
    ]
    if not pairs:
        rows.append(("validation accuracy, before → after", NOT_MEASURED))
    paired = {f"{what.replace(' ', '_')}{end}" for what in pairs for end in ("_before", "_after")}
    rows += [(k.replace("_", " "), fact(k, v)) for k, v in facts.items() if k not in paired]
    return Block("answer", "In numbers", rows=tuple(rows), header=("", "value"), n_text_columns=2)


def _compared(data: Mapping[str, Any]) -> list[Block]:
    if not data["compared"]:
        return []
    header, rows, lines = compared_table(data["compared"], data["budget"]["metric"])
    return [Block("compared", "Compared", lines=lines, header=header, rows=rows)]


def _gap(exact: Mapping[str, Any], amount: Callable[[float | None], str]) -> str:
    """Return how far the answer is from the least sum over layers, in words."""
    gap = NOT_MEASURED if exact["gap"] is None else f"{exact['gap']:.3f}"
    text = (
        f"{gap} (sum over layers {number(exact['answer'], 'nats')}; the least within the budget "
        f"{number(exact['optimum'], 'nats')}, at {amount(exact['cost'])})"
    )
    if exact["of_the_score"]:
        return text
    return f"{text}; the search ranks by another score, which is no sum over layers"


def _layers(data: Mapping[str, Any]) -> Block:
    named = any(row["quantizer"] != "uniform" for row in data["layers"])
    rows: list[tuple[str, ...]] = []
    for row in data["layers"]:
        pinned = "" if row["searched"] else " (pinned)"
        rows.append(
            (
                row["name"],
                row["kind"] + pinned,
                *((row["quantizer"],) if named else ()),
                f"{row['n_weights']:,}",
                f"{row['macs']:,}",
                *(
                    "float" if row[part] == FLOAT_BITS else str(row[part])
                    for part in ("weight_bits", "activation_bits")
                ),
                percent(row["share_before"]),
                percent(row["share_after"]),
                number(row["sensitivity"]),
            )
        )
    n_weights, macs = (sum(row[k] for row in data["layers"]) for k in ("n_weights", "macs"))
    words = ("all", *("",) * (2 if named else 1))
    rows.append((*words, f"{n_weights:,}", f"{macs:,}", "", "", "100 %", "100 %", ""))
    header: tuple[str, ...] = LAYER_COLUMNS
    if named:
        header = (*header[:2], "quantizer", *header[2:])
    return Block("layers", "Layers", header=header, rows=tuple(rows), n_text_columns=len(words))


def _record(data: Mapping[str, Any]) -> list[Block]:
    counts = data["counts"]
    settings = {
        "study": data["study"],
        **data["settings"],
        "budget": data["budget"]["text"],
        "candidates scored": _extra(counts["candidates"], counts["duplicates"], "scored twice"),
        "steps closed": f"{counts['records']:,}",
        "trials running, pruned, failed": ", ".join(
            str(counts[k]) for k in ("running", "pruned", "failed")
        ),
        "workers": str(counts["workers"]),
        "time in evaluations": seconds(counts["seconds"]),
    }
    fingerprint = data["fingerprint"]
    parts = fingerprint if isinstance(fingerprint, dict) else {"fingerprint": fingerprint}
    reproduce = [(f"fingerprint: {k}", fact(k, v)) for k, v in parts.items() if v is not None]
    reproduce += [(f"installed now: {k}", v) for k, v in data["versions"].items()]
    lines = () if data["command"] else ("The command of this search is not known.",)
    return [
        Block(
            "settings",
            "Settings",
            header=("", "value"),
            rows=tuple((k.replace("_", " "), fact(k, v)) for k, v in settings.items()),
            n_text_columns=2,
        ),
        Block(
            "reproduce",
            "Reproduce",
            lines=lines,
            code=data["command"] or "",
            header=("", "value"),
            rows=tuple(reproduce),
            n_text_columns=2,
        ),
    ]


def _extra(count: int, extra: int, what: str) -> str:
    return f"{count:,} (and {extra:,} {what})" if extra else f"{count:,}"


def _limits(data: Mapping[str, Any]) -> list[Block]:
    skipped = tuple((s["name"], s["kind"], s["reason"]) for s in data["skipped"])
    return [
        Block(
            "not-counted",
            "Not counted",
            lines=(
                *data["not_counted"],
                "Modules that are not quantized and in no cost:"
                if skipped
                else "No module was skipped.",
            ),
            header=("module", "kind", "reason") if skipped else (),
            rows=skipped,
            n_text_columns=3,
        ),
        Block("warnings", "Warnings", lines=tuple(data["warnings"]) or ("None.",)),
    ]


def render_markdown(data: Mapping[str, Any]) -> str:
    """Return the report as Markdown, without the pictures."""
    parts = [f"# Bit search: {_cell(data['study'])}", _cell(data["headline"])]
    for block in blocks(data):
        parts.append(f"## {block.title}")
        if block.lines:
            parts.append("\n".join(f"- {_cell(line)}" for line in block.lines))
        if block.code:
            parts.append("\n".join(f"    {line}" for line in block.code.splitlines()))
        if block.header:
            rules = ["---" if i < block.n_text_columns else "--:" for i in range(len(block.header))]
            table = [block.header, tuple(rules), *(map(_cell, row) for row in block.rows)]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in table))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    for character in "\\|<>*_`":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())
