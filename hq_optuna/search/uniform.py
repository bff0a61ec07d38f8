"""Uniform assignments: the same bits everywhere, as far as each layer allows them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from hq_optuna.space.assignment import BitConfig, LayerBits
from hq_optuna.space.search_space import SearchSpace, Variable

_OF_ACTIVATIONS = ("activations", "factors")


def uniform_states(space: SearchSpace) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return the uniform assignments of a space by their ``(weight bits, activation bits)``.

    Every variable takes the given bits or, where it does not allow them, the widest below, else its
    fewest; pinned layers keep theirs. Where activations are not searched apart, both numbers are
    the same.
    """
    by_part: dict[bool, set[int]] = {False: set(), True: set()}  # activations alone, or not
    for v in space.variables:
        if v.part == "pair":
            for pair in map(LayerBits.of_code, v.bits):
                by_part[False].add(pair.weight_bits)
                by_part[True].add(pair.activation_bits)
        else:
            by_part[v.part in _OF_ACTIVATIONS] |= set(v.bits)
    weights, activations = sorted(by_part[False]), sorted(by_part[True])
    pairs = [*itertools.product(weights, activations)] or [(b, b) for b in weights or activations]
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for w, a in pairs:
        state = tuple(_widest(v, w, a) for v in space.variables)
        if state not in found.values():
            found[w, a] = state
    return found


def _widest(variable: Variable, weights: int, activations: int) -> int:
    """Return the widest notch that has no more than the bits wanted, else the lowest."""
    if variable.part == "pair":
        pairs = zip(variable.bits, map(LayerBits.of_code, variable.bits), strict=True)
        fitting = (b for b, (w, a) in pairs if w <= weights and a <= activations)
        return next(fitting, variable.bits[-1])
    wanted = activations if variable.part in _OF_ACTIVATIONS else weights
    return max((b for b in variable.bits if b <= wanted), default=variable.bits[-1])


def uniform_within(space: SearchSpace, fits: Callable[[BitConfig], bool]) -> dict[str, BitConfig]:
    """Return the widest uniform assignments that fit, by name (``"4 bits"``, ``"W4A8"``).

    Where weights and activations are searched apart there may be several, none of which is wider in
    both than another. Empty where even the fewest bits cost more.
    """
    fitting = {
        pair: config
        for pair, state in uniform_states(space).items()
        if fits(config := space.config(state))
    }
    widest = {
        pair: config
        for pair, config in fitting.items()
        if not any(
            other != pair and min(o - p for o, p in zip(other, pair, strict=True)) >= 0
            for other in fitting
        )
    }
    return {f"W{w}A{a}" if w != a else f"{w} bits": config for (w, a), config in widest.items()}
