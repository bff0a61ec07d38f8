"""The bits of all layers as a strip of digits: one digit a layer, in network order.

Digits stand on the colours of the pictures, whose lightness falls evenly with the bits, so that
they keep their order for any colour vision; without colours the digits say everything.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.visualization._figure import bit_colours, rgb, text_on

LABEL = 12
"""Columns in front of the digits."""

LINES = 3
"""Lines of digits a strip may have; longer ones are cut in the middle."""


def digit(bits: int) -> str:
    """Return one character for a number of bits: 10 to 16 are letters, float is a dot.

    Example:
        >>> "".join(digit(bits) for bits in (2, 8, 10, 16, 32))
        '28ag·'
    """
    return "·" if bits == FLOAT_BITS else "0123456789abcdefg"[bits]


def digit_styles(levels: Sequence[int]) -> dict[int, Style]:
    """Return the style of each number of bits."""
    return {
        bits: Style(color=text_on(colour), bgcolor="#{:02x}{:02x}{:02x}".format(*rgb(colour)))
        for bits, colour in zip(levels, bit_colours(levels), strict=True)
    }


def strips(
    bits: Sequence[tuple[int, int]], levels: Sequence[int], width: int | None = None
) -> list[Text]:
    """Return the lines that show an assignment: weights, and activations where they differ.

    Args:
        bits: ``(weight_bits, activation_bits)`` of each layer, in network order.
        levels: All bits that a layer may have, fewest first; they set the colours.
        width: Columns of the terminal; ``None``: one line each, however long.
    """
    styles = digit_styles(levels)
    weights, activations = ([pair[part] for pair in bits] for part in (0, 1))
    if weights == activations:
        return _lines("bits", weights, styles, width)
    if set(activations) == {FLOAT_BITS}:
        return _lines("weights", weights, styles, width)
    return _lines("weights", weights, styles, width) + _lines(
        "activations", activations, styles, width
    )


def _lines(
    label: str, row: Sequence[int], styles: dict[int, Style], width: int | None
) -> list[Text]:
    room = len(row) if width is None else max(width - LABEL - 1, 8)
    shown: list[int | None] = list(row)
    if len(row) > LINES * room:
        half = (LINES * room - 1) // 2
        shown = [*row[:half], None, *row[len(row) - half :]]
    lines = []
    for start in range(0, len(shown), max(room, 1)):
        line = Text(f"{label if not start else '':<{LABEL}}", no_wrap=True)
        for bits in shown[start : start + room]:
            if bits is None:
                line.append("…")
            else:
                line.append(digit(bits), styles.get(bits, Style.null()))
        lines.append(line)
    return lines
