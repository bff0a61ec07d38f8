"""The colours of all pictures, of the report's tables and of the terminal; no plotly is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hq_optuna.space.layers import FLOAT_BITS

# Okabe & Ito (2008): told apart with any colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY = "#56B4E9"
GREY = "#767676"
"""Text: the one grey with a contrast of 4.5 to 1 on white that also reads on a dark page."""

GRID = "rgba(128,128,128,0.25)"
PAGES = {False: ("#ffffff", "#1c1f23"), True: ("#14161a", "#e4e6ea")}
"""Background and text of a figure for a light and for a dark page."""

FLOAT_COLOUR = "#b8b8b8"

VIRIDIS = (
    *("#440154", "#482878", "#3e4989", "#31688e", "#26828e"),
    *("#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"),
)
"""Ten even stops of the colour map of van der Walt & Smith (2015), as plotly has them."""


def bits_text(bits: int | str) -> str:
    """Return the bits for people: ``"float"`` for 32; a pair in words stays as it is."""
    return "float" if bits == FLOAT_BITS else str(bits)


def bit_colours(bits: Sequence[int]) -> list[str]:
    """Return one colour, ``"#rrggbb"``, per number of bits: fewer are brighter, float is grey.

    The colours are equal steps of Viridis, whose lightness falls evenly, so that they keep their
    order for colour-blind readers and in black and white.
    """
    integer = [b for b in bits if b != FLOAT_BITS]
    places = [1.0 - 0.9 * i / max(1, len(integer) - 1) for i in range(len(integer))]
    stops = np.linspace(0, 1, len(VIRIDIS))
    channels = zip(*map(_rgb, VIRIDIS), strict=True)
    parts = np.rint([np.interp(places, stops, channel) for channel in channels]).astype(int)
    colours = iter("#{:02x}{:02x}{:02x}".format(*colour) for colour in parts.T)
    return [FLOAT_COLOUR if b == FLOAT_BITS else next(colours) for b in bits]


def text_on(colour: str) -> str:
    """Return black or white, whichever is easier to read on a colour ``"#rrggbb"``."""
    # Relative luminance of sRGB as in WCAG 2, with the exponent rounded to 2.2.
    light = sum(
        weight * (part / 255) ** 2.2
        for weight, part in zip((0.2126, 0.7152, 0.0722), _rgb(colour), strict=True)
    )
    return "#000000" if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else "#ffffff"


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
