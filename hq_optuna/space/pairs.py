"""A search space over the pairs of weight and activation bits that hardware executes.

Each layer has a set of pairs. Where it is a product, weights and activations are two variables, or
one where the other part has no choice; where both parts always have the same bits it is one
variable of both; any other set is one variable whose notches are its pairs, from the most bit
operations down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hq_optuna.errors import SpaceError
from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import (
    SearchSpace,
    Variable,
    allowed_activations,
    by_layer,
    check_parameters,
    groups_of,
    notches,
    of_product,
    read_pin,
    same_input,
)

Pairs = tuple[LayerBits, ...]


def space_of_pairs(
    layers: Sequence[LayerSpec],
    pairs: Mapping[str, Pairs],
    where: str,
    *,
    bits: Iterable[int] | None = None,
    activation_bits: Any = "same",
    pin_first_last: int | None = 8,
    pins: Mapping[str, Any] | None = None,
    fixed: Mapping[str, LayerBits] | None = None,
    allowed: Mapping[str, Iterable[int]] | None = None,
    tied: Iterable[Sequence[str]] = (),
    tie_inputs: bool = True,
    **known: Any,
) -> SearchSpace:
    """Return the space in which each layer has some pairs of bits.

    Args:
        layers: Quantizable layers in the order the network calls them.
        pairs: Layer name to the pairs that the hardware has for it.
        where: Name of the hardware, for messages.
        bits: Weight bits to leave; ``None`` leaves all.
        activation_bits: Bits of inputs to leave, ``None`` for float; ``"same"`` leaves all.
        pin_first_last: As in `SearchSpace.build`, where the hardware pins neither.
        pins: As in `SearchSpace.build`.
        fixed: Layer name to the pair that the hardware pins it at.
        allowed: Layer name or glob to the weight bits to leave there.
        tied: Groups of layer names that share their pair.
        tie_inputs: Whether layers that read the same tensor share its bits: one variable of their
            activations where these are searched apart, else of their pairs.
        **known: What else the space is told of the network.

    Raises:
        SpaceError: A pin that the hardware does not have, a layer without a pair left, tied layers
            with different pairs, or nothing left to search.
    """
    left = _left(layers, pairs, where, bits, activation_bits, allowed)
    start = dict(fixed or {})
    pinned = by_layer(pins, layers, "pins", read_pin)
    start |= {name: said.value for name, said in pinned.items()}
    products = {layer.name for layer in layers if layer.is_product}
    if pin_first_last is not None:
        pin = read_pin(pin_first_last, "pin_first_last")
        ends = {layers[0].name: pin, layers[-1].name: pin}
        start = ends | start
    start |= {name: of_product(pair) for name, pair in start.items() if name in products}
    for name, pair in start.items():
        if pair not in pairs[name]:
            raise SpaceError(
                f"{name!r} is pinned at {pair}, which {where} does not have there: it has "
                f"{_said(pairs[name])}. Pin it at one of these, or not at all (pins, "
                "pin_first_last)."
            )
    variables: list[Variable] = []
    groups = groups_of(layers, tied, start)
    readers = same_input(layers, groups, left) if tie_inputs else {}
    for group in _joined(groups, readers, left):
        one = left[group[0]]
        for name in group:
            if set(left[name]) != set(one):
                raise SpaceError(
                    f"Tied layers must allow the same bits: {group[0]!r} has {_said(one)}, "
                    f"{name!r} has {_said(left[name])}."
                )
        found, widest = _variables(group, one, readers.get(group[0], group))
        variables += found
        start |= dict.fromkeys(group, widest)
    if not variables:
        raise SpaceError(
            f"Nothing is left to search: each of the {len(layers)} layers is pinned or has one "
            f"pair of bits on {where}. Remove a pin, or choose other hardware."
        )
    check_parameters([v.name for v in variables], [layer.name for layer in layers])
    config = BitConfig({layer.name: start[layer.name] for layer in layers})
    return SearchSpace(tuple(layers), tuple(variables), config, **known)


def _left(
    layers: Sequence[LayerSpec],
    pairs: Mapping[str, Pairs],
    where: str,
    bits: Iterable[int] | None,
    activation_bits: Any,
    allowed: Mapping[str, Iterable[int]] | None,
) -> dict[str, Pairs]:
    """Return the hardware's pairs that a user leaves of each layer."""
    weights = None if bits is None else notches(bits, "bits")
    inputs = allowed_activations(activation_bits)
    limited = by_layer(allowed, layers, "allowed", notches)
    found = {}
    for layer in layers:
        name = layer.name
        own = limited[name].value if name in limited else weights
        kept = [pair for pair in pairs[name] if own is None or pair.weight_bits in own]
        kept = [pair for pair in kept if inputs is None or pair.activation_bits in inputs]
        if layer.is_product:  # whose factors share their bits
            kept = [pair for pair in pairs[name] if pair == of_product(pair)]
            kept = [pair for pair in kept if inputs is None or pair.activation_bits in inputs]
            if name in limited or inputs is None:
                kept = [pair for pair in kept if own is None or pair.weight_bits in own]
        if not kept:
            raise SpaceError(
                f"Of what {where} has for {name!r}, {_said(pairs[name])}, the settings bits, "
                "activation_bits and allowed leave nothing. Allow one of these, or leave them out."
            )
        found[name] = tuple(kept)
    return found


def _joined(
    groups: Sequence[tuple[str, ...]],
    readers: Mapping[str, tuple[str, ...]],
    left: Mapping[str, Pairs],
) -> list[tuple[str, ...]]:
    """Return the groups, those joined that read one tensor whose bits go with their weights'."""
    return list(
        dict.fromkeys(
            group if _is_product(left[group[0]]) else readers.get(group[0], group)
            for group in groups
        )
    )


def _is_product(pairs: Pairs) -> bool:
    parts = zip(*pairs, strict=True)
    return len(pairs) == math.prod(len(set(part)) for part in parts)


def _variables(
    group: tuple[str, ...], pairs: Pairs, readers: tuple[str, ...]
) -> tuple[list[Variable], LayerBits]:
    """Return what can be searched in a group of tied layers, and its widest pair.

    ``readers`` share the bits of their input; these are searched with the first of them.
    """
    weights = sorted({pair.weight_bits for pair in pairs}, reverse=True)
    inputs = sorted({pair.activation_bits for pair in pairs}, reverse=True)
    name, widest = "=".join(group), LayerBits(weights[0], inputs[0])
    if _is_product(pairs):
        found = []
        if len(weights) > 1:
            shown = f"{name}:weights" if len(inputs) > 1 else name
            found.append(Variable(shown, group, "weights", tuple(weights)))
        if len(inputs) > 1 and readers[0] == group[0]:
            shown = f"{'='.join(readers)}:activations"
            found.append(Variable(shown, readers, "activations", tuple(inputs)))
        return found, widest
    if all(pair.weight_bits == pair.activation_bits for pair in pairs):
        return [Variable(name, group, "both", tuple(weights))], widest
    # Fewer bits in both parts always come later, so that each notch is lower than those before.
    ordered = sorted(
        pairs, key=lambda p: (p.weight_bits * p.activation_bits, sum(p), p.weight_bits)
    )
    codes = tuple(pair.code for pair in reversed(ordered))
    return [Variable(name, group, "pair", codes)], ordered[-1]


def _said(pairs: Pairs) -> str:
    return ", ".join(map(str, pairs))
