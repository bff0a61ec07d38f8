"""The report as one HTML file: the blocks of `_report_text`, the pictures, plotly.js inlined."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.offline

from hq_optuna.protocol.history import History
from hq_optuna.report.text import BITS_COLUMNS, Block, blocks
from hq_optuna.visualization._figure import bit_colours, bits_text, text_on
from hq_optuna.visualization.bits import bits_figure, bits_info
from hq_optuna.visualization.candidates import candidates_figure, candidates_info
from hq_optuna.visualization.cost_share import cost_share_figure, cost_share_info
from hq_optuna.visualization.pareto import pareto_figure, pareto_info
from hq_optuna.visualization.prediction import prediction_figure, prediction_info
from hq_optuna.visualization.sensitivity import sensitivity_figure, sensitivity_info
from hq_optuna.visualization.steps import steps_figure, steps_info
from hq_optuna.visualization.training import training_figure, training_info
from hq_optuna.visualization.workers import workers_figure, workers_info

MARKED = ("beside", "layers")
"""Tables whose last row stands out: the answer, the sum."""

_STYLE = """
:root { color-scheme: light dark; --text: #1c1f23; --quiet: #5c6370; --page: #fff;
  --line: #d9dce1; --box: #f5f6f8; --warn: #9a4b00 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --quiet: #9aa1ad; --page: #14161a;
  --line: #363b44; --box: #1d2026; --warn: #f0a35e } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 72rem; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1rem; color: var(--quiet); font-weight: 600; margin: 0 0 .5rem }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
#beside h2, #layers h2 { font-size: .95rem; color: var(--quiet); margin: 1rem 0 .3rem }
ul { margin: .4rem 0; padding-left: 1.2rem; color: var(--quiet); font-size: .9rem }
#warnings ul, #not-counted ul { color: var(--text); font-size: 1rem }
.answer { font-size: 1.35rem; line-height: 1.35; margin: 0 0 .6rem }
.scroll { overflow: auto; max-height: 36rem; border: 1px solid var(--line); border-radius: 4px }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem;
  border-top: 1px solid var(--line) }
tbody tr:first-child > * { border-top: 0 }
tbody th { font-weight: 500; min-width: 12rem; max-width: 24rem; overflow-wrap: anywhere }
thead th { position: sticky; top: 0; background: var(--box); font-size: .85rem;
  vertical-align: bottom }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
thead .number { white-space: normal }
.pairs th { width: 18rem; color: var(--quiet) }
.pairs td { overflow-wrap: anywhere }
#beside, #layers { font-size: .9rem; line-height: 1.4 }
#layers td { white-space: nowrap }
#layers th, #layers td { padding-top: .15rem; padding-bottom: .15rem }
.bits { display: inline-block; min-width: 1.7em; padding: 0 .3em; border-radius: 3px;
  text-align: center; box-sizing: border-box }
.total > * { border-top: 2px solid var(--line); font-weight: 600 }
pre { background: var(--box); padding: .7rem 1rem; overflow: auto; border-radius: 4px }
figure { margin: 1.6rem 0 0 }
figcaption { color: var(--quiet) }
.warn { color: var(--warn) }
footer { color: var(--quiet); margin-top: 2.5rem; font-size: .85rem }
@page { margin: 12mm }
@media print {
  :root { color-scheme: light; --text: #000; --quiet: #444; --page: #fff; --line: #bbb;
    --box: #fff; --warn: #7a3b00 }
  body { max-width: none; padding: 0; font-size: 10pt }
  .scroll { max-height: none; overflow: visible; border: 0 }
  thead th { position: static }
  tr, figure, pre, .answer { break-inside: avoid }
  h2 { break-after: avoid }
  pre { white-space: pre-wrap; border: 1px solid var(--line) }
  .bits { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .modebar { display: none }
}
"""

# The page can load and send nothing. Without this, plotly.js 4 offers to upload the figures.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; form-action 'none'"
)

# Figures come with a mid-grey that reads on any page; here we know the page.
_SCRIPT = """
const config = {responsive: true, displaylogo: false,
  showSendToCloud: false, plotlyServerURL: ""};
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const colour = () => getComputedStyle(document.documentElement).getPropertyValue("--text").trim();
for (const [id, figure] of Object.entries(figures)) {
  figure.layout.font = {...figure.layout.font, color: colour()};
  Plotly.newPlot(id, figure.data, figure.layout, config);
}
dark.addEventListener("change", () => {
  for (const id of Object.keys(figures)) Plotly.relayout(id, {"font.color": colour()});
});
// Paper is white, and narrower than most windows.
window.addEventListener("beforeprint", () => {
  for (const id of Object.keys(figures))
    Plotly.relayout(id, {"font.color": "#000", width: 700, autosize: false});
});
window.addEventListener("afterprint", () => {
  for (const id of Object.keys(figures))
    Plotly.relayout(id, {"font.color": colour(), width: null, autosize: true});
});
"""


def figures(history: History) -> list[tuple[str, str, Any]]:
    """Return ``(id, caption, figure)`` of what there is to draw."""
    found = []
    if history.records:
        found += [
            (
                "steps",
                "What the search paid in predicted loss, and what it saved.",
                steps_figure(steps_info(history)),
            ),
            (
                "bits",
                "Each row is a layer, the first on top; each column a step. Fewer bits are "
                "brighter.",
                bits_figure(bits_info(history)),
            ),
        ]
    found.append(
        (
            "cost-share",
            "Bars of one colour add up to 100 %.",
            cost_share_figure(cost_share_info(history)),
        )
    )
    if any(record.training is not None for record in history.records):
        found.append(
            (
                "training",
                "What each training gave, on validation data that no training reads.",
                training_figure(training_info(history)),
            )
        )
    if history.sensitivity:
        found.append(
            (
                "sensitivity",
                "Predicted loss rise when this layer alone gets these bits; brighter hurts more.",
                sensitivity_figure(sensitivity_info(history)),
            )
        )
    if history.additive() is not None:
        found.append(
            (
                "pareto",
                "The least predicted loss rise at each cost, and what else was tried. All are sums "
                "over layers, whatever the search ranks by.",
                pareto_figure(pareto_info(history)),
            )
        )
    if history.candidates:
        found.append(
            (
                "candidates",
                "The last step: every candidate, and the one it took.",
                candidates_figure(candidates_info(history)),
            )
        )
    predicted = prediction_info(history)
    if predicted.points:
        found.append(
            (
                "prediction",
                "Every candidate against what it is made from, on the calibration set, which score "
                "and measured loss both read.",
                prediction_figure(predicted),
            )
        )
    if history.runs:
        found.append(
            (
                "workers",
                "Who did what when; pauses are cut out.",
                workers_figure(workers_info(history)),
            )
        )
    return found


def render_html(data: Mapping[str, Any], pictures: Sequence[tuple[str, str, Any]]) -> str:
    """Return the page.

    Args:
        data: What `report_data` returns.
        pictures: ``(id, caption, plotly figure)`` in their order.
    """
    title = f"Bit search: {data['study']}"
    parts = [
        f"<header><h1>{_text(title)}</h1>",
        f'<p class="answer">{_text(data["headline"])}</p>',
    ]
    if data["warnings"]:
        n = len(data["warnings"])
        parts.append(
            f'<p class="warn"><a class="warn" href="#warnings">{n} '
            f"warning{'' if n == 1 else 's'}, see below</a></p>"
        )
    parts.append("</header>\n<main>")
    tints = _tints(data["levels"])
    for block in blocks(data):
        parts.append(_block(block, tints))
        if block.key == "answer":
            parts += [_figure(key, caption, figure) for key, caption, figure in pictures]
    version = _text(f"hq_optuna {data['versions']['hq_optuna']}")
    parts.append(f"</main>\n<footer>Written by {version}.</footer>")
    # In a script no "<" of the data may stand, or a name could end the script.
    drawn = ",".join(
        f'"fig-{key}":' + figure.to_json().replace("<", "\\u003c") for key, _, figure in pictures
    )
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{plotly.offline.get_plotlyjs()}</script>\n"
        f"<script>const figures = {{{drawn}}};{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return html.escape(text)


def _figure(key: str, caption: str, figure: Any) -> str:
    # The height is set before the script runs, so that the page does not jump.
    return (
        f'<figure><div id="fig-{key}" style="height:{figure.layout.height}px"></div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _tints(levels: Sequence[int]) -> dict[str, str]:
    """Return the style of a cell for each number of bits: the colours of the pictures."""
    return {
        bits_text(bits): f"background:{colour};color:{text_on(colour)}"
        for bits, colour in zip(levels, bit_colours(levels), strict=True)
    }


def _block(block: Block, tints: Mapping[str, str]) -> str:
    parts = [f'<section id="{block.key}"><h2>{_text(block.title)}</h2>']
    if block.code:
        parts.append(f"<pre><code>{_text(block.code)}</code></pre>")
    if block.header:
        parts.append(_table(block, tints))
    if block.lines:
        items = "".join(f"<li>{_text(line)}</li>" for line in block.lines)
        parts.append(f"<ul>{items}</ul>")
    parts.append("</section>")
    return "\n".join(parts)


def _table(block: Block, tints: Mapping[str, str]) -> str:
    kinds = [
        "" if i < block.n_text_columns else ' class="number"' for i in range(len(block.header))
    ]
    if len(block.header) > 2 or block.header[0]:
        cells = "".join(
            f'<th scope="col"{kind}>{_text(cell)}</th>'
            for kind, cell in zip(kinds, block.header, strict=True)
        )
        head, style = f"<thead><tr>{cells}</tr></thead>\n", ""
    else:
        head, style = "", ' class="pairs"'
    tinted = {i for i, title in enumerate(block.header) if title in BITS_COLUMNS}
    rows = []
    for row in block.rows:
        cells = "".join(
            f"<td{kinds[i]}>{_bits(cell, tints) if i in tinted else _text(cell)}</td>"
            for i, cell in enumerate(row)
            if i
        )
        marked = ' class="total"' if block.key in MARKED and row is block.rows[-1] else ""
        rows.append(f'<tr{marked}><th scope="row">{_text(row[0])}</th>{cells}</tr>')
    body = "\n".join(rows)
    return f'<div class="scroll"><table{style}>{head}<tbody>\n{body}\n</tbody></table></div>'


def _bits(cell: str, tints: Mapping[str, str]) -> str:
    style = tints.get(cell)
    return _text(cell) if style is None else f'<span class="bits" style="{style}">{cell}</span>'
