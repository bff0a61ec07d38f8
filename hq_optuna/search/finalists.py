"""The measured end of a search: a few assignments within the budget, each measured once.

A table of rises, summed over layers, ranks well and is not exact. What it cannot tell lies close
together: optima of the table when it is tilted a little. These are the finalists, uniform bits
among them, so that the answer is never worse than uniform bits as far as samples can tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hq_optuna.search.additive import Additive, Table
from hq_optuna.search.uniform import uniform_states
from hq_optuna.space.layers import FLOAT_BITS

UNIFORM = "uniform bits"
"""Name of the finalist that the others have to beat."""

TILT = 1.5
"""How much more, or less, the inputs' part of the table counts in two finalists."""

Part = tuple[str, str]  # layer, "weights" or "activations"


class Finalist(NamedTuple):
    """An assignment to measure: where it comes from, in words, and the bits of each variable."""

    name: str
    state: tuple[int, ...]


def finalists(
    sums: Additive, incumbent: tuple[int, ...], limit: float, n: int
) -> tuple[Finalist, ...]:
    """Return up to ``n`` different assignments within the limit, uniform bits first.

    They are the widest uniform bits; the incumbent of the steps; the optimum of the table; and
    the optima of tables that are blended with that of a network whose layers are all alike, that
    stay within one notch of uniform bits, or in which the inputs' part counts more or less.
    """
    found: dict[tuple[int, ...], str] = {}
    for name, state in _by_priority(sums, incumbent, limit):
        if state is not None and len(found) < n:
            found.setdefault(state, name)
    return tuple(Finalist(name, state) for state, name in found.items())


def _by_priority(
    sums: Additive, incumbent: tuple[int, ...], limit: float
) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    uniform = _uniform(sums, limit)
    yield UNIFORM, uniform
    yield "the incumbent", incumbent
    yield "the optimum", _optimum(sums, sums.table, limit)
    yield "blended by a quarter", _optimum(sums, _blended(sums, 0.25), limit)
    if uniform is not None:
        yield "within a notch of uniform", _near(sums, uniform, limit)
    yield "inputs count more", _optimum(sums, _tilted(sums.table, TILT), limit)
    yield "inputs count less", _optimum(sums, _tilted(sums.table, 1 / TILT), limit)
    yield "blended by half", _optimum(sums, _blended(sums, 0.5), limit)


def choose_finalist(
    predicted: Sequence[float], measured: Sequence[Sequence[float]], uniform: int | None
) -> int:
    """Return the place of the finalist to take.

    That of least predicted times measured rise: their errors have nothing in common, so the mean of
    their logarithms is better than either. It has to be measured below uniform bits by more than
    the standard error of the difference, or uniform bits stay.

    Args:
        predicted: Sums over layers of each finalist.
        measured: Mean rises of the same blocks of samples, for each finalist.
        uniform: The place of uniform bits; ``None`` where they are not among the finalists.
    """
    means = [math.fsum(blocks) / len(blocks) for blocks in measured]
    both = [max(p, 0.0) * max(m, 0.0) for p, m in zip(predicted, means, strict=True)]
    best = min(range(len(both)), key=lambda place: (both[place], means[place], place))
    if uniform is None or best == uniform:
        return best
    gain, error = paired(measured[uniform], measured[best])
    return best if gain > error else uniform


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the mean of ``one − other`` over blocks of the same samples, and its standard error.

    With a single block nothing is known of the error, which is 0 then.

    Example:
        >>> paired([3.0, 5.0], [1.0, 1.0])
        (3.0, 1.0)
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    mean = math.fsum(differences) / len(differences)
    if len(differences) < 2:
        return mean, 0.0
    return mean, statistics.stdev(differences) / math.sqrt(len(differences))


def _uniform(sums: Additive, limit: float) -> tuple[int, ...] | None:
    """Return the uniform bits within the limit that the table finds best; equal ones come first."""
    within = []
    for (w, a), state in uniform_states(sums.space).items():
        config = sums.space.config(state)
        if sums.fits(config, limit):
            within.append((w != a, sums.score(config), state))
    return min(within)[2] if within else None


def _optimum(sums: Additive, table: Table, limit: float) -> tuple[int, ...] | None:
    return Additive(sums.space, table, sums.model, sums.beside).best(limit)


def _changed(table: Table, change: dict[Part, dict[int, float]]) -> Table:
    """Return a table whose rises are multiplied by factors, layer by layer."""
    return {
        layer: {
            part: {b: rise * change[layer, part].get(b, 1.0) for b, rise in row.items()}
            for part, row in parts.items()
        }
        for layer, parts in table.items()
    }


def _tilted(table: Table, factor: float) -> Table:
    """Return a table in which the inputs' part counts more, or less."""
    weight = {"weights": 1.0, "activations": factor}
    return _changed(table, {at: dict.fromkeys(row, weight[at[1]]) for at, row in _rows(table)})


def _blended(sums: Additive, share: float) -> Table:
    """Return the geometric mean with the table of a network whose layers are all alike.

    There a layer's rise is the same part of the whole as its cost, so uniform bits are best.
    """
    by_bits: dict[tuple[str, int], float] = {}
    for (_, part), row in _rows(sums.table):
        for bits, rise in row.items():
            by_bits[part, bits] = by_bits.get((part, bits), 0.0) + rise
    # Any bits would do: the cost of a layer is a multiple of what its bits make.
    of_layer = sums.model.layer_cost
    costs = {layer: of_layer(layer, pair) for layer, pair in sums.space.start.items()}
    whole = math.fsum(costs.values())
    factors = {
        (layer, part): {
            bits: (costs.get(layer, 0.0) / whole * by_bits[part, bits] / rise) ** share
            if rise > 0
            else 1.0
            for bits, rise in row.items()
        }
        for (layer, part), row in _rows(sums.table)
    }
    return _changed(sums.table, factors)


def _near(sums: Additive, uniform: tuple[int, ...], limit: float) -> tuple[int, ...] | None:
    """Return the optimum within one notch of uniform bits."""
    rises = []
    worst = 1e6 * math.fsum(max(rise.values()) for rise in sums.rises) + 1.0
    for variable, bits, row in zip(sums.space.variables, uniform, sums.rises, strict=True):
        place = variable.bits.index(bits)
        near = variable.bits[max(place - 1, 0) : place + 2]
        rises.append({b: rise if b in near else worst for b, rise in row.items()})
    return sums.best_for(rises, limit)


def _rows(table: Table) -> Iterator[tuple[Part, dict[int, float]]]:
    for layer, parts in table.items():
        for part, row in parts.items():
            yield (layer, part), {b: rise for b, rise in row.items() if b != FLOAT_BITS}
