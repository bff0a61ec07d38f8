"""Which quantizer rounds the weights of which layer: names and globs, checked against the space."""

from __future__ import annotations

from collections.abc import Mapping

from hq_optuna.errors import SpaceError
from hq_optuna.quantization.quantizers import QUANTIZERS, UNIFORM, quantizer_named
from hq_optuna.space.layers import FLOAT_BITS
from hq_optuna.space.search_space import SearchSpace, bits_needed, by_layer

SHOWN_LAYERS = 6


def choose_quantizers(globs: Mapping[str, str] | None, space: SearchSpace) -> dict[str, str]:
    """Return layer → name of its quantizer, in network order, of layers that are not uniform.

    ``globs`` maps layer names and globs to quantizers, see `by_layer`.

    Raises:
        SpaceError: An unknown quantizer, a glob without a match, or bits that a layer may have and
            its quantizer cannot do.
    """
    if globs is not None and not isinstance(globs, Mapping):
        raise SpaceError(
            "quantizers is a mapping from layer names or globs to quantizers, "
            f"{{'layer3.*': 'dorefa'}}; got {globs!r}."
        )
    said = by_layer(globs, space.layers, "quantizers", lambda name, _: quantizer_named(name))
    needed = bits_needed(space)
    for name, (can, glob, _) in said.items():
        cannot = sorted(b for b in needed[name][0] if b not in can.all_bits and b != FLOAT_BITS)
        if cannot:
            raise SpaceError(
                f"quantizers[{glob!r}]: {can.name!r} can do {can.bits_text}, but the weights of "
                f"layer {name!r} may have {', '.join(map(str, cannot))} bits. Give such layers "
                "bits that it can do (pins, allowed, pin_first_last), or another quantizer."
            )
    names = [layer.name for layer in space.layers if layer.name in said]
    return {n: said[n].value.name for n in names if said[n].value is not UNIFORM}


def describe_quantizers(chosen: Mapping[str, str]) -> str:
    """Return a choice of quantizers in words.

    Example:
        >>> describe_quantizers({"conv2": "dorefa", "conv3": "ternary", "conv4": "dorefa"})
        'dorefa for conv2, conv4; ternary for conv3'
    """
    layers: dict[str, list[str]] = {}
    for name, quantizer in chosen.items():
        layers.setdefault(quantizer, []).append(name)
    return "; ".join(f"{quantizer} for {', '.join(names)}" for quantizer, names in layers.items())


def uncompensated_warnings(chosen: Mapping[str, str]) -> list[str]:
    """Return a sentence for each quantizer whose weights are not compensated."""
    sentences = []
    for quantizer in dict.fromkeys(chosen.values()):
        if not QUANTIZERS[quantizer].compensates:
            names = [name for name, own in chosen.items() if own == quantizer]
            shown = ", ".join(names[:SHOWN_LAYERS]) + (", …" if len(names) > SHOWN_LAYERS else "")
            sentences.append(
                f"The quantizer {quantizer!r} says itself where a weight is rounded to, so the "
                f"rounding errors of its layers ({shown}) are not made up for as those of the "
                "others are."
            )
    return sentences
