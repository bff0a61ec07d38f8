"""The report in words: numbers, sentences, tables of text, and all of it as Markdown.

`blocks` says everything once; `render_markdown` and the page only dress it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hq_optuna.answer.intervals import CONFIDENCE
from hq_optuna.attributes import EIGHT, UNIFORM, VENDOR, quantizers_text
from hq_optuna.report.block import NOT_MEASURED, Block, Column, percent
from hq_optuna.report.hardware import ON_HARDWARE, limits
from hq_optuna.settings import SearchSettings, Setting, settings_of
from hq_optuna.space.cost import METRICS, NOUNS, Metric, format_cost
from hq_optuna.space.layers import FLOAT_BITS

BITS_COLUMNS = ("weight bits", "activation bits")


def blocks(data: Mapping[str, Any]) -> list[Block]:
    """Return the parts of the report in their order; the pictures go after ``"answer"``."""
    found = [_beside(data), _layers(data), _answer(data)]
    if data["exact"] is not None and data["exact"]["prices"]:
        found.append(limits(data))
    found += [part(data[what]) for what, part in ON_HARDWARE.items() if data[what] is not None]
    if data["measured_end"] is not None:
        found.append(_finalists(data["measured_end"], data["budget"]["metric"]))
    if data["compared"]:
        found.append(compared(data["compared"], data["budget"]["metric"]))
    if data["trainings"]:
        found.append(_trainings(data["trainings"]))
    if data["deploy"]:
        found.append(_deploy(data["deploy"]))
    return [
        *(*found, _settings(data), _counts(data["study"], data["counts"])),
        *(_reproduce(data), _not_counted(data), _warnings(data)),
    ]


def _cells(rows: Sequence[Mapping[str, Any]], key: str, write: Callable[[Any], str]) -> list[str]:
    """Return a column of what the rows have under a key, empty where it is ``None``."""
    return ["" if row[key] is None else write(row[key]) for row in rows]


def _over_answer(rows: Sequence[Mapping[str, Any]]) -> Column:
    if any(row.get("metric") is not None for row in rows):
        cells = _cells(rows, "over_answer", lambda found: interval(found, "{:+.3g}".format))
        return "over the answer", cells
    cells = _cells(rows, "over_answer", lambda found: interval(found, points))
    return "over the answer, points", cells


def _beside(data: Mapping[str, Any]) -> Block:
    rows, noun = data["beside"], NOUNS[data["budget"]["metric"]]
    columns: list[Column] = [
        ("", [row["name"] for row in rows]),
        *(
            (NOUNS[m], _cells(rows, m, functools.partial(format_cost, metric=m)))
            for m in METRICS
            if m in rows[0]
        ),
        (f"{noun} of all 8 bits", [percent(row["of_int8"]) for row in rows]),
        (f"{noun} of float", [percent(row["of_float32"]) for row in rows]),
    ]
    losses = _cells(rows, "loss", "{:.4g}".format)
    if any(losses):
        columns.append(("validation loss", losses))
    accuracy = any(row["accuracy"] for row in rows)
    if accuracy:
        cells = [interval(row["accuracy"], hundredths) for row in rows]
        columns += [("validation accuracy, %", cells), _over_answer(rows)]
    metric = data["facts"].get("validation_metric")
    if metric is not None:
        title = f"validation {metric['name']}" + (f", {metric['unit']}" if metric["unit"] else "")
        columns += [(title, _cells(rows, "metric", "{:.4g}".format)), _over_answer(rows)]
    lines = _beside_lines(data, accuracy)
    name = "accuracy" if metric is None else metric["name"]
    return Block("beside", f"Cost and {name}", columns, lines, last_stands_out=True)


def _beside_lines(data: Mapping[str, Any], accuracy: bool) -> list[str]:
    lines = []
    if data["accuracies"]:
        confidence, methods = data["accuracies"]["confidence"], data["accuracies"]["methods"]
        lines.append(f"In brackets {100 * confidence:.0f} % intervals; {methods}.")
    elif any(row["over_answer"] for row in data["beside"]):
        lines.append("In brackets 95 % intervals, paired over the validation samples.")
    elif accuracy:
        lines.append("No intervals: how many samples were right is not in the study.")
    pinned = not all(row["searched"] for row in data["layers"])
    if pinned and any(row["name"].startswith("uniform") for row in data["beside"]):
        lines.append("Uniform bits are the most within the budget; pinned layers keep theirs.")
    if data["trained"] and accuracy:
        lines.append("The answer was trained at its bits; 8 and uniform bits were not.")
    return lines


def _layers(data: Mapping[str, Any]) -> Block:
    rows = data["layers"]

    def whole(name: str) -> list[str]:
        return [f"{n:,}" for n in (*(row[name] for row in rows), sum(row[name] for row in rows))]

    def bits(name: str) -> list[str]:
        return ["float" if row[name] == FLOAT_BITS else str(row[name]) for row in rows]

    kinds = [row["kind"] + ("" if row["searched"] else " (pinned)") for row in rows]
    named = any(row["quantizer"] != "uniform" for row in rows)
    quantizers = [("quantizer", [*(row["quantizer"] for row in rows), ""])] if named else []
    columns: list[Column] = [
        ("layer", [*(row["name"] for row in rows), "all"]),
        ("kind", [*kinds, ""]),
        *quantizers,
        ("weights", whole("n_weights")),
        ("MACs", whole("macs")),
        (BITS_COLUMNS[0], [*bits("weight_bits"), ""]),
        (BITS_COLUMNS[1], [*bits("activation_bits"), ""]),
        ("share of cost, all 8 bits", [*(percent(row["share_before"]) for row in rows), "100 %"]),
        ("share of cost, now", [*(percent(row["share_after"]) for row in rows), "100 %"]),
        ("sensitivity (nats)", [*(number(row["sensitivity"]) for row in rows), ""]),
    ]
    lines = ["Sensitivities are those of the network before any training."]
    lines = lines if data["trainings"] else []
    if any(row["errors"] for row in rows):
        columns += [
            (f"{title} (dB)", [*(decibels(row["errors"], key) for row in rows), ""])
            for key, title in ERROR_COLUMNS.items()
        ]
        output, n = data["output_error"]["output"], data["output_error"]["samples"]
        lines.append(
            f"dB are signal-to-noise ratios on {n:,} calibration samples, at the layer's own "
            "output and at the network's. Alone: only this layer is quantized. Without it: all "
            "others "
            + ("are." if output is None else f"are; with all layers it is {output:.1f} dB.")
        )
    return Block(
        "layers",
        "Layers",
        columns,
        lines,
        n_text_columns=3 if named else 2,
        last_stands_out=True,
    )


ERROR_COLUMNS = {
    "own_alone": "own output, alone",
    "output_alone": "network, alone",
    "own_in_answer": "own output, in the answer",
    "output_without": "network, without it",
}


def decibels(errors: Mapping[str, float | None] | None, key: str) -> str:
    """Return a measured ratio of a layer; where nothing changes it is exact.

    Example:
        >>> decibels({"own_alone": 31.25}, "own_alone"), decibels({"own_alone": None}, "own_alone")
        ('31.2', 'exact')
    """
    value = (errors or {}).get(key)
    return "exact" if value is None else f"{value:.1f}"


def _pairs(key: str, title: str, rows: Sequence[tuple[str, str]], **more: Any) -> Block:
    """Return a table of names and values."""
    columns = [("", [name for name, _ in rows]), ("value", [value for _, value in rows])]
    return Block(key, title, columns, n_text_columns=2, **more)


def _answer(data: Mapping[str, Any]) -> Block:
    cost, budget, score = data["cost"], data["budget"], data["score"]
    facts, exact = data["facts"], data["exact"]

    def amount(value: float | None) -> str:
        return NOT_MEASURED if value is None else format_cost(value, budget["metric"])

    parts = f"{percent(cost['of_int8'])} of all 8 bits, {percent(cost['of_float32'])} of float"
    rise, loss = number(score["total"], "nats"), number(score["calibration_loss"])
    if data["trained"]:
        rise += f"; before its training {number(score['untrained'], 'nats')}"
        loss += f"; before its training {number(score['untrained_calibration_loss'])}"
    rows = [
        ("the search ended", ended(data)),
        ("budget", f"{amount(budget['limit'])} ({budget['text']})"),
        ("cost", amount(cost["answer"]) + ("" if cost["answer"] is None else f" = {parts}")),
        ("predicted loss rise", rise),
        ("layers that cost most of it", most_costly(data["layers"]) or NOT_MEASURED),
        ("by layers: weights", number(score["weights"], "nats")),
        ("by layers: activations", number(score["activations"], "nats")),
    ]
    if floats := [row["name"] for row in data["layers"] if row["weight_bits"] == FLOAT_BITS]:
        rows.append(("left in float", ", ".join(floats)))
    if exact is not None:
        untrained = "; all of the network before any training" if data["trainings"] else ""
        rows.append(("gap to the exact optimum", gap_text(exact, amount) + untrained))
    if data["measured_end"] is None:  # else candidates are look-ups, and none was measured
        rows.append(("loss on the calibration set", loss))
        rows.append(("does the score rank as the measured loss?", ranks_agree(data["agreement"])))
    pairs = before_and_after(facts)
    found = (facts.get(f"{what}_metric") for what in ("test", "validation"))
    metrics = {metric["name"]: metric for metric in found if metric}
    for what, t in pairs.items():
        metric = metrics.get(what.removeprefix("test "))
        more = counted(data, what) if metric is None else of_metric(metric)
        rows.append((f"{what}, before → after", t + more))
    if not pairs:
        rows.append(("validation accuracy, before → after", NOT_MEASURED))
    said = {f"{what.replace(' ', '_')}{end}" for what in pairs for end in ("_before", "_after")}
    said |= {f"{what}_{end}" for what in data["accuracies"] for end in ("lost", "gained")}
    said |= {"validation_metric", "test_metric"}
    rows += [(k.replace("_", " "), fact(k, v)) for k, v in facts.items() if k not in said]
    return _pairs("answer", "In numbers", rows)


def _finalists(found: Mapping[str, Any], metric: Metric) -> Block:
    rows = found["rows"]
    columns: list[Column] = [
        ("", [f"{row['name']}{' (the answer)' if row['chosen'] else ''}" for row in rows]),
        (NOUNS[metric], [format_cost(row["cost"], metric) for row in rows]),
        ("predicted, nats", [f"{row['predicted']:.3g}" for row in rows]),
        ("measured, nats", [f"{row['measured']:.3g}" for row in rows]),
    ]
    if any(row["of_uniform"] is not None for row in rows):
        cells = [
            "" if row["of_uniform"] is None else f"{row['of_uniform']:.2f} ± {row['error']:.2f}"
            for row in rows
        ]
        columns.append(("of uniform bits", cells))
    sentence = found["sentence"]
    lines = [f"{sentence[0].upper()}{sentence[1:]}."]
    return Block("finalists", "Measured in the end", columns, lines)


def compared(rows: Sequence[Mapping[str, Any]], metric: Metric) -> Block:
    """Return the comparison of the answer with uniform bits, of rows as in the report's data."""
    uniform = (UNIFORM, EIGHT)
    columns: list[Column] = [
        ("", [f"uniform {r['bits']}" if r["method"] in uniform else r["method"] for r in rows]),
        ("cost", [format_cost(row["cost"], metric) for row in rows]),
        ("score (nats)", [f"{row['score']:.3g}" for row in rows]),
    ]
    for name in dict.fromkeys(name for row in rows for name in row["measured"]):
        columns.append((name, [_measured(row, name) for row in rows]))
    if any(row.get("pairs") or row.get("over_answer") for row in rows):
        columns.append(_over_answer(rows))
    columns.append(("evaluations", [f"{row['evaluations']:,}" for row in rows]))
    columns.append(("seconds", _cells(rows, "seconds", "{:.3g}".format)))
    return Block("compared", "Compared", columns, _compared_lines(rows))


def _measured(row: Mapping[str, Any], name: str) -> str:
    """Return a cell of the comparison: what was measured of one assignment."""
    if name not in row["measured"]:
        return "none"
    value = row["measured"][name]
    if value is None or name != "accuracy":  # None is NaN or infinity, in JSON
        return number(value, digits=4)
    low, high = row["accuracy"]["low"], row["accuracy"]["high"]
    text = f"{hundredths(value)} %"
    return text if low is None else f"{text} [{hundredths(low)}, {hundredths(high)}]"


def _compared_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    methods = {row["method"] for row in rows}
    lines = ["Measured on the validation data; all with the same score and statistics correction."]
    if any(row.get("trained") for row in rows):
        lines.append("The answer was trained at its bits, and has its score after that.")
    if any(row.get("pairs") or row.get("over_answer") for row in rows):
        lines.append(f"In brackets {100 * CONFIDENCE:.0f} % intervals over the validation samples.")
    if EIGHT in methods:
        lines.append("Uniform 8 bits are over the budget and stand here for reference.")
    if VENDOR in methods:
        lines.append(
            "The vendor's default is W8A8 where the hardware has it: ranges from the least to the "
            "largest input, weights to the nearest, nothing corrected. Its score is that of "
            "corrected ones."
        )
    if UNIFORM not in methods:
        lines.append("No uniform bits are within the budget.")
    return lines


def _trainings(rows: Sequence[Mapping[str, Any]]) -> Block:
    names = list(dict.fromkeys(name for row in rows for name in row["before"]))
    names.sort(key=lambda name: name != "accuracy")
    columns: list[Column] = [
        ("", [_trained_step(row) for row in rows]),
        ("trial", [str(row["trial"]) for row in rows]),
        *(_trained_column(rows, when, name) for name in names for when in ("before", "after")),
        ("score after (nats)", [number(row["score"]) for row in rows]),
        ("epochs", [fact("epochs", row["epochs"]) for row in rows]),
        ("seconds", [seconds(row["seconds"]) for row in rows]),
    ]
    lines = [
        "Before: bits of the step, statistics corrected. After: what the next steps are made from."
    ]
    if not all(row["kept"] for row in rows):
        lines.append("A training that did not lower the score is not kept, and changes nothing.")
    if not names:
        lines.append("Nothing was measured: give the search validation data.")
    return Block("training", "Trained steps", columns, lines)


def _trained_step(row: Mapping[str, Any]) -> str:
    step = "the answer" if row["kind"] == "final" else f"step {row['step']}"
    return step if row["kept"] else f"{step}, not kept"


def _trained_column(rows: Sequence[Mapping[str, Any]], when: str, name: str) -> Column:
    values = [row[when].get(name) for row in rows]
    if name == "accuracy":
        return f"validation accuracy, %, {when}", [interval(v, hundredths) for v in values]
    title = "validation loss" if name == "loss" else name
    return f"{title}, {when}", [number(value, digits=4) for value in values]


def _deploy(rows: Sequence[Mapping[str, Any]]) -> Block:
    """Return the files that were written of the answer, each with what its check found."""
    checks = [row["check"] for row in rows]

    def cells(write: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [NOT_MEASURED if check is None else write(check) for check in checks]

    def same_class(check: Mapping[str, Any]) -> str:
        agreement = check["agreement"]
        return NOT_MEASURED if agreement is None else f"{100 * agreement:.2f} %"

    columns: list[Column] = [
        ("file", [row["file"] for row in rows]),
        ("format", [row["format"] for row in rows]),
        ("bytes", [f"{row['bytes']:,}" for row in rows]),
        ("of numbers", [f"{row['stored_bytes']:,}" for row in rows]),
        ("codes equal", cells(lambda check: f"{100 * check['equal']:.4f} %")),
        ("same class, optimized", cells(same_class)),
        ("layers in integers", cells(lambda check: f"{check['integers']} of {check['layers']}")),
    ]
    lines = [f"{row['file']}: {row['check']['sentence']}" for row in rows if row["check"]]
    return Block("deploy", "Deploy", columns, lines, n_text_columns=2)


def _settings(data: Mapping[str, Any]) -> Block:
    settings = settings_of(SearchSettings)
    said = {name: _setting(one, data["settings"][name]) for name, one in settings.items()}
    said["budget"] = data["budget"]["text"]
    said["quantizers"] = quantizers_text(data["quantizers"])  # by layer, where the user gave globs
    columns = [
        ("", [name.replace("_", " ") for name in settings]),
        ("value", list(said.values())),
        ("meaning", [one.help for one in settings.values()]),
    ]
    return Block("settings", "Settings", columns, n_text_columns=3)


def _setting(one: Setting, value: Any) -> str:
    """Return the value of a setting with its unit; its default in words where it was not given."""
    if value is None:
        return one.shown_default if one.default is None else "none"
    text = fact(one.name, value)
    return f"{text} {one.unit}" if one.unit and isinstance(value, int | float) else text


def _counts(study: str, counts: Mapping[str, Any]) -> Block:
    twice = f" (and {counts['duplicates']:,} scored twice)" if counts["duplicates"] else ""
    trials = (str(counts[name]) for name in ("running", "pruned", "failed"))
    rows = [
        ("study", study),
        ("candidates scored", f"{counts['candidates']:,}{twice}"),
        ("steps closed", f"{counts['records']:,}"),
        ("of these trained", f"{counts['trained']:,}"),
        ("trials running, pruned, failed", ", ".join(trials)),
        ("workers", f"{counts['workers']:,}"),
        ("time in evaluations", seconds(counts["seconds"])),
    ]
    if counts["trained"]:
        rows.append(("time in trainings", seconds(counts["training_seconds"])))
    return _pairs("counts", "Trials and time", rows)


def _reproduce(data: Mapping[str, Any]) -> Block:
    fingerprint = data["fingerprint"]
    parts = fingerprint if isinstance(fingerprint, dict) else {"fingerprint": fingerprint}
    rows = [
        ("seed", str(data["settings"]["seed"])),
        *((f"fingerprint: {k}", fact(k, v)) for k, v in parts.items() if v is not None),
        *(
            (f"artifact: {name}", f"SHA-256 {v['sha256']}, {v['bytes']:,} bytes")
            for name, v in data["artifacts"].items()
        ),
        *((f"installed now: {k}", v) for k, v in data["versions"].items()),
    ]
    lines = () if data["command"] else ("The study does not say which command started it.",)
    return _pairs("reproduce", "Reproduce", rows, lines=lines, code=data["command"] or "")


def _not_counted(data: Mapping[str, Any]) -> Block:
    found = data["skipped"]
    more = "Modules that are not quantized and in no cost:" if found else "No module was skipped."
    columns = [
        (title, [row[key] for row in found])
        for title, key in (("module", "name"), ("kind", "kind"), ("reason", "reason"))
        if found
    ]
    lines = [*data["not_counted"], more]
    return Block("not-counted", "Not counted", columns, lines, n_text_columns=3)


def _warnings(data: Mapping[str, Any]) -> Block:
    return Block("warnings", "Warnings", lines=data["warnings"] or ["None."])


def render_markdown(data: Mapping[str, Any]) -> str:
    """Return the report as Markdown, without the pictures."""
    parts = [f"# Bit search: {_cell(data['study'])}", _cell(data["headline"])]
    for block in blocks(data):
        parts.append(f"## {block.title}")
        if block.lines:
            parts.append("\n".join(f"- {_cell(line)}" for line in block.lines))
        if block.code:
            parts.append("\n".join(f"    {line}" for line in block.code.splitlines()))
        if block.columns:
            rules = ["---" if i < block.n_text_columns else "--:" for i in range(len(block.header))]
            table = [block.header, rules, *([_cell(cell) for cell in row] for row in block.rows)]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in table))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    for character in "\\|<>*_`":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Return three significant digits, or "not measured" for ``None``."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.{digits}g} {unit}".rstrip()


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
    if value in ([], {}):
        return "none"
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
    eight = f"the all-8-bit {NOUNS[budget['metric']]}"
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
    metric = data["facts"].get("validation_metric")
    name = name if metric is None else metric["name"].replace("_", " ")
    text = (
        f"{_layers_at(data['layers'])}: {cost}, {rise}, "
        f"validation {name} {measured.get(name, NOT_MEASURED)}"
    )
    found = data["accuracies"].get("validation")
    if name == "accuracy" and found:
        value, low, high = (points(found["difference"][k]) for k in ("value", "low", "high"))
        text += f" ({value} points, 95 % interval {low} to {high})"
    if metric is not None:
        text += of_metric(metric)
    if most := most_costly(data["layers"]):
        text += f"; most of the predicted rise is in {most}"
    return f"{text}{'' if state['over'] else '; swaps still refine it'}."


def most_costly(layers: Sequence[Mapping[str, Any]], n: int = 3) -> str:
    """Return the layers that cost most at their bits, with their shares of the sum over layers.

    By the predicted loss rise; empty where the study does not hold it, or there is none.

    Example:
        >>> rows = [{"name": "a", "sensitivity": 3.0}, {"name": "b", "sensitivity": 1.0}]
        >>> most_costly(rows, n=1)
        'a (75 %)'
    """
    known = [(row["sensitivity"] or 0.0, row["name"]) for row in layers]
    total = math.fsum(rise for rise, _ in known)
    if total <= 0:
        return ""
    most = sorted(known, key=lambda pair: -pair[0])[:n]
    shares = [(name, 100 * rise / total) for rise, name in most]
    return ", ".join(f"{name} ({share:.0f} %)" for name, share in shares if share >= 0.5)


def of_metric(metric: Mapping[str, Any]) -> str:
    """Return unit and difference of a study's own metric, in words.

    Example:
        >>> d = {"value": -0.1, "low": -0.3, "high": 0.1}
        >>> of_metric({"unit": "dB", "difference": d})
        ' dB (-0.1 dB, 95 % interval -0.3 to +0.1)'
    """
    unit, d = f" {metric['unit']}".rstrip(), metric.get("difference")
    if d is None:
        return unit
    return f"{unit} ({d['value']:+.3g}{unit}, 95 % interval {d['low']:+.3g} to {d['high']:+.3g})"


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
