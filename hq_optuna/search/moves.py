"""Random one-notch moves: the patent's "draw a layer at random and lower its bits"."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

from hq_optuna.space.search_space import SearchSpace


class Move(NamedTuple):
    """One variable goes from one number of bits to another."""

    variable: int
    from_bits: int
    to_bits: int

    def apply(self, state: Sequence[int]) -> tuple[int, ...]:
        """Return the state after the move."""
        after = list(state)
        after[self.variable] = self.to_bits
        return tuple(after)


def changes(before: Sequence[int], after: Sequence[int]) -> tuple[Move, ...]:
    """Return what leads from one state to another, in the order of the variables."""
    pairs = enumerate(zip(before, after, strict=True))
    return tuple(Move(v, a, b) for v, (a, b) in pairs if a != b)


def lowerable(space: SearchSpace, state: Sequence[int]) -> list[Move]:
    """Return every move that lowers one variable by one notch, in the order of the variables."""
    moves: list[Move] = []
    for index, (variable, bits) in enumerate(zip(space.variables, state, strict=True)):
        moves += [Move(index, bits, lower) for lower in variable.below(bits)]
    return moves


def propose(
    space: SearchSpace,
    state: Sequence[int],
    *,
    n: int,
    seed: int,
    step: int,
    saves: Callable[[Move], bool] = lambda move: True,
) -> tuple[Move, ...]:
    """Draw up to ``n`` distinct one-notch moves from the incumbent ``state``, in the order drawn.

    Every variable gets a random key from a hash of (seed, step, name); those with the smallest keys
    are drawn, which is sampling without replacement. A hash, rather than a random generator, gives
    the same draw on every machine, with every version of NumPy, in every worker.

    ``saves`` says whether a move lowers the cost. Those that do not (activations, where the budget
    is of size) are drawn only where none does. With ``n`` at least the number of moves that save,
    the step is exhaustive.
    """

    def key(move: Move) -> bytes:
        name = space.variables[move.variable].name
        return hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()

    drawn = sorted(lowerable(space, state), key=key)
    return tuple(islice(filter(saves, drawn), n)) or tuple(drawn[:n])
