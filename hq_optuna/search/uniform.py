"""Uniform assignments: the same bits everywhere, as far as each layer allows them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.search_space import SearchSpace


def uniform_states(space: SearchSpace) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return the uniform assignments of a space by their ``(weight bits, activation bits)``.

    Every variable takes the given bits or, where it does not allow them, the widest below, else its
    fewest; pinned layers keep theirs. Where activations are not searched apart, both numbers are
    the same.
    """
    by_part: dict[bool, set[int]] = {False: set(), True: set()}  # activations alone, or not
    for v in space.variables:
        by_part[v.part == "activations"] |= set(v.bits)
    weights, activations = sorted(by_part[False]), sorted(by_part[True])
    pairs = [*itertools.product(weights, activations)] or [(b, b) for b in weights or activations]
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for w, a in pairs:
        state = tuple(_widest(v.bits, a if v.part == "activations" else w) for v in space.variables)
        if state not in found.values():
            found[w, a] = state
    return found


def _widest(bits: Sequence[int], wanted: int) -> int:
    return max((b for b in bits if b <= wanted), default=bits[-1])


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
