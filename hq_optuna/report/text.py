"""The words of a report: what `report_data` returns, as sentences and tables of text.

`blocks` says everything once; Markdown and HTML only dress it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hq_optuna.attributes import quantizers_text
from hq_optuna.report.compared import table as compared_table
from hq_optuna.report.words import (
    NOT_MEASURED,
    NOUN,
    before_and_after,
    counted,
    ended,
    fact,
    gap_text,
    hundredths,
    interval,
    number,
    percent,
    points,
    ranks_agree,
    seconds,
)
from hq_optuna.space.cost import format_cost
from hq_optuna.space.layers import FLOAT_BITS

BITS_COLUMNS = ("weight bits", "activation bits")
LAYER_COLUMNS = (
    *("layer", "kind", "weights", "MACs", *BITS_COLUMNS),
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


def blocks(data: Mapping[str, Any]) -> list[Block]:
    """Return the parts of the report in their order; the pictures go after ``"answer"``."""
    return [
        _beside(data),
        _layers(data),
        _answer(data),
        *_compared(data),
        *_trainings(data),
        *_record(data),
        *_limits(data),
    ]


def _beside(data: Mapping[str, Any]) -> Block:
    rows = data["beside"]
    losses = any(row["loss"] is not None for row in rows)
    accuracy = any(row["accuracy"] is not None for row in rows)
    noun = NOUN[data["budget"]["metric"]]
    header = ["", "BOPs", "size", f"{noun} of all 8 bits", f"{noun} of float"]
    if losses:
        header.append("validation loss")
    if accuracy:
        header += ["validation accuracy, %", "over the answer, points"]
    cells = []
    for row in rows:
        line = [
            row["name"],
            format_cost(row["bops"], "bops"),
            format_cost(row["size_bytes"], "size_bytes"),
            percent(row["of_int8"]),
            percent(row["of_float32"]),
        ]
        if losses:
            line.append("" if row["loss"] is None else f"{row['loss']:.4g}")
        if accuracy:
            line += [
                NOT_MEASURED if row["accuracy"] is None else interval(row["accuracy"], hundredths),
                "" if row["over_answer"] is None else interval(row["over_answer"], points),
            ]
        cells.append(tuple(line))
    lines = []
    if data["accuracies"]:
        lines.append(
            f"In brackets {100 * data['accuracies']['confidence']:.0f} % intervals; "
            f"{data['accuracies']['methods']}."
        )
    elif accuracy:
        lines.append("No intervals: how many samples were right is not in the study.")
    if any(row["name"].startswith("uniform") for row in rows) and not all(
        row["searched"] for row in data["layers"]
    ):
        lines.append("Uniform bits are the most within the budget; pinned layers keep theirs.")
    if data["trained"] and accuracy:
        lines.append("The answer was trained at its bits; 8 and uniform bits were not.")
    return Block(
        "beside", "Cost and accuracy", lines=tuple(lines), header=tuple(header), rows=tuple(cells)
    )


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
    facts, exact, ranks = data["facts"], data["exact"], data["agreement"]
    rise, loss = number(score["total"], "nats"), number(score["calibration_loss"])
    if data["trained"]:
        rise += f"; before its training {number(score['untrained'], 'nats')}"
        loss += f"; before its training {number(score['untrained_calibration_loss'])}"
    pairs = before_and_after(facts)
    untrained = "; all of the network before any training" if data["trainings"] else ""
    rows = [
        ("the search ended", ended(data)),
        ("budget", f"{amount(budget['limit'])} ({budget['text']})"),
        ("cost", answer),
        ("predicted loss rise", rise),
        ("by layers: weights", number(score["weights"], "nats")),
        ("by layers: activations", number(score["activations"], "nats")),
        *(
            ()
            if exact is None
            else (("gap to the exact optimum", gap_text(exact, amount) + untrained),)
        ),
        ("loss on the calibration set", loss),
        ("does the score rank as the measured loss?", ranks_agree(ranks)),
        *(
            (f"{what.replace('_', ' ')}, before → after", text + counted(data, what))
            for what, text in pairs.items()
        ),
    ]
    if not pairs:
        rows.append(("validation accuracy, before → after", NOT_MEASURED))
    said = {f"{what.replace(' ', '_')}{end}" for what in pairs for end in ("_before", "_after")}
    said |= {f"{what}_{end}" for what in data["accuracies"] for end in ("lost", "gained")}
    rows += [(k.replace("_", " "), fact(k, v)) for k, v in facts.items() if k not in said]
    return Block("answer", "In numbers", rows=tuple(rows), header=("", "value"), n_text_columns=2)


def _compared(data: Mapping[str, Any]) -> list[Block]:
    if not data["compared"]:
        return []
    header, rows, lines = compared_table(data["compared"], data["budget"]["metric"])
    return [Block("compared", "Compared", lines=lines, header=header, rows=rows)]


def _trainings(data: Mapping[str, Any]) -> list[Block]:
    rows = data["trainings"]
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row["before"]))
    names.sort(key=lambda name: name != "accuracy")

    def written(name: str, value: Any) -> str:
        if value is None:
            return NOT_MEASURED
        return interval(value, hundredths) if name == "accuracy" else f"{value:.4g}"

    cells = [
        (
            ("the answer" if row["kind"] == "final" else f"step {row['step']}")
            + ("" if row["kept"] else ", not kept"),
            str(row["trial"]),
            *(
                text
                for name in names
                for text in (
                    written(name, row["before"].get(name)),
                    written(name, row["after"].get(name)),
                )
            ),
            number(row["score"]),
            NOT_MEASURED if row["epochs"] is None else f"{row['epochs']:,}",
            seconds(row["seconds"]),
        )
        for row in rows
    ]
    titles = {"accuracy": "validation accuracy, %", "loss": "validation loss"}
    measured = [
        f"{titles.get(name, name)}, {when}" for name in names for when in ("before", "after")
    ]
    lines = [
        "Before: bits of the step, statistics corrected. After: what the next steps are made from."
    ]
    if not all(row["kept"] for row in rows):
        lines.append("A training that did not lower the score is not kept, and changes nothing.")
    if not names:
        lines.append("Nothing was measured: give the search validation data.")
    return [
        Block(
            "training",
            "Trained steps",
            lines=tuple(lines),
            header=("", "trial", *measured, "score after (nats)", "epochs", "seconds"),
            rows=tuple(cells),
        )
    ]


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
    lines = ("Sensitivities are those of the network before any training.",)
    return Block(
        "layers",
        "Layers",
        lines=lines if data["trainings"] else (),
        header=header,
        rows=tuple(rows),
        n_text_columns=len(words),
    )


def _record(data: Mapping[str, Any]) -> list[Block]:
    counts = data["counts"]
    settings = {
        "study": data["study"],
        **data["settings"],
        "quantizers of weights": quantizers_text(data["quantizers"]),
        "budget": data["budget"]["text"],
        "candidates scored": _extra(counts["candidates"], counts["duplicates"], "scored twice"),
        "steps closed": f"{counts['records']:,}",
        "of these trained": f"{counts['trained']:,}",
        "trials running, pruned, failed": ", ".join(
            str(counts[k]) for k in ("running", "pruned", "failed")
        ),
        "workers": str(counts["workers"]),
        "time in evaluations": seconds(counts["seconds"]),
    }
    if counts["trained"]:
        settings["time in trainings"] = seconds(counts["training_seconds"])
    fingerprint = data["fingerprint"]
    parts = fingerprint if isinstance(fingerprint, dict) else {"fingerprint": fingerprint}
    reproduce = [("seed", str(data["settings"]["seed"]))]
    reproduce += [(f"fingerprint: {k}", fact(k, v)) for k, v in parts.items() if v is not None]
    reproduce += [
        (f"artifact: {name}", f"SHA-256 {v['sha256']}, {v['bytes']:,} bytes")
        for name, v in data["artifacts"].items()
    ]
    reproduce += [(f"installed now: {k}", v) for k, v in data["versions"].items()]
    lines = () if data["command"] else ("The study does not say which command started it.",)
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
