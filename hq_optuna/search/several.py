"""Exact allocation under any limits: the least additive score within sums over layers.

Each limit is a set of rows, sums over layers that may each come to so much: one row for a cost that
adds up, one for each moment of a peak. Solved as an integer program with one binary variable for
each choice of a block of variables (HAWQ-V3, Yao et al., 2021), by HiGHS. Its tolerances are not
ours: what it returns is summed up again, and an assignment that is over a limit by rounding is cut
off before it solves anew. For a single sum `exact.Allocation` is much faster.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from hq_optuna.search.exact import Rises, blocks_of, choices_of, cost_of_block
from hq_optuna.space.cost import Row
from hq_optuna.space.search_space import SearchSpace

MOST_CUTS = 50
"""Assignments over a limit by rounding that are cut off one by one; then the limits shrink."""

Floats = NDArray[np.float64]


class Relaxed(NamedTuple):
    """The optimum when choices may be mixed, by linear programming.

    ``prices`` are what one more unit of each row's limit would take off the score, nats.
    """

    score: float
    prices: Floats  # (R,)
    reduced: Floats  # (n,) what each choice adds to the score at these prices


class SeveralLimits:
    """Exact allocation for several limits at once.

    Args:
        space: The search space.
        rises: Predicted loss rises of each variable at each of its bits, nats.
        rows: `R` sums over layers.

    Raises:
        ValueError: A block of variables has too many combinations.
    """

    def __init__(self, space: SearchSpace, rises: Rises, rows: Sequence[Row]) -> None:
        self.space = space
        self._blocks = blocks_of(space)
        touched = {n for block in self._blocks for v in block for n in space.variables[v].layers}
        untouched = [(name, bits) for name, bits in space.start.items() if name not in touched]
        self._fixed = np.array(
            [row.fixed + math.fsum(row.layer_cost(n, b) for n, b in untouched) for row in rows]
        )
        self._bits: list[tuple[int, tuple[int, ...]]] = []  # (block, its bits) of each choice
        score: list[float] = []
        costs: list[list[float]] = []
        for index, block in enumerate(self._blocks):
            for bits in choices_of(space, block):
                self._bits.append((index, bits))
                score.append(math.fsum(rises[v][b] for v, b in zip(block, bits, strict=True)))
                costs.append([cost_of_block(space, block, bits, row.layer_cost) for row in rows])
        self._rises = np.array(score)  # (n,)
        self._costs = np.array(costs).reshape(len(score), len(rows)).T  # (R, n)
        at = np.array([index for index, _ in self._bits])
        self._one = csr_array((np.ones(len(at)), (at, np.arange(len(at)))))  # a choice a block

    def best(self, limits: Sequence[float]) -> tuple[int, ...] | None:
        """Return the bits of each variable with the least total rise; ``None`` where none fits.

        ``limits`` are what each row may come to, fixed parts included.
        """
        found = self._solve(self._rises, np.asarray(limits) - self._fixed)
        return None if found is None else self._state(found)

    def least(self, rows: slice, limits: Sequence[float]) -> float | None:
        """Return the least that the largest of some rows can come to while the others' limits hold.

        ``None`` where those cannot hold.
        """
        rest = np.ones(len(self._fixed), dtype=bool)
        rest[rows] = False
        room = np.where(rest, np.asarray(limits) - self._fixed, np.inf)
        chosen = self._costs[rows]
        if len(chosen) == 1:
            found = self._solve(chosen[0], room)
            return None if found is None else self._sums(found)[rows][0]
        # The largest of several sums: one more variable that none of them exceeds.
        n, scale = len(self._rises), max(float(np.abs(chosen).max()), 1.0)
        over = np.hstack([chosen / scale, -np.ones((len(chosen), 1))])
        wide = np.hstack([self._costs / scale, np.zeros((len(self._costs), 1))])
        one = np.hstack([self._one.toarray(), np.zeros((len(self._blocks), 1))])
        made = _milp(
            np.concatenate([np.zeros(n), [1.0]]),
            integrality=np.concatenate([np.ones(n), [0.0]]),
            bounds=Bounds(
                np.concatenate([np.zeros(n), [-np.inf]]), np.concatenate([np.ones(n), [np.inf]])
            ),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint(over, -np.inf, -self._fixed[rows] / scale),
                LinearConstraint(wide, -np.inf, room / scale),
            ],
            options={"mip_rel_gap": 0.0},
        )
        return None if made.x is None else float(self._sums(made.x[:n] > 0.5)[rows].max())

    def relaxed(self, limits: Sequence[float]) -> Relaxed | None:
        """Return the optimum of linear programming with its prices; ``None`` where none fits."""
        return self._relaxed(self._rises, np.asarray(limits) - self._fixed)

    def _sums(self, chosen: NDArray[np.bool_]) -> Floats:
        """Return what each row comes to, rounded once."""
        sums = [math.fsum(row[chosen]) for row in self._costs]
        return np.asarray(sums, dtype=np.float64) + np.asarray(self._fixed, dtype=np.float64)

    def _state(self, chosen: NDArray[np.bool_]) -> tuple[int, ...]:
        state = list(self.space.top)
        for index in np.flatnonzero(chosen):
            block, bits = self._bits[index]
            for v, b in zip(self._blocks[block], bits, strict=True):
                state[v] = b
        return tuple(state)

    def _relaxed(self, score: Floats, room: Floats) -> Relaxed | None:
        held = np.isfinite(room)
        scale = np.maximum(np.abs(self._costs).max(axis=1, initial=0.0), 1e-300)
        unit = float(np.abs(score).max()) or 1.0
        made = linprog(
            score / unit,
            A_ub=(self._costs / scale[:, None])[held] if held.any() else None,
            b_ub=(room / scale)[held] if held.any() else None,
            A_eq=self._one,
            b_eq=np.ones(len(self._blocks)),
            method="highs",
        )
        if made.x is None:
            return None
        prices = np.zeros(len(room))
        if held.any():
            prices[held] = -np.asarray(made.ineqlin.marginals) * unit / scale[held]
        reduced = score + prices @ self._costs
        reduced -= self._least_of_blocks(reduced) @ self._one
        return Relaxed(float(made.fun) * unit, prices, reduced)

    def _least_of_blocks(self, values: Floats) -> Floats:
        """Return the least value among the choices of each block."""
        least = np.full(len(self._blocks), np.inf)
        np.minimum.at(least, [block for block, _ in self._bits], values)
        return least

    def _solve(self, score: Floats, room: Floats) -> NDArray[np.bool_] | None:
        """Return which choices have the least total score within the rooms."""
        free = np.zeros(len(score), dtype=bool)
        for block in range(len(self._blocks)):
            own = self._one.indices[self._one.indptr[block] : self._one.indptr[block + 1]]
            free[own[np.argmin(score[own])]] = True
        if bool((self._sums(free) - self._fixed <= room).all()):
            return free
        relaxed = self._relaxed(score, room)
        if relaxed is None:
            return None
        # The gap of HiGHS is absolute: what is solved for counts in a thousandth of the bound.
        lowest = float(self._least_of_blocks(score).sum())
        unit = max(relaxed.score - lowest, 1e-12 * float(np.abs(score).max(initial=0.0)), 1e-300)
        held = np.isfinite(room)
        scale = np.maximum(np.abs(room[held]), np.abs(self._costs[held]).max(axis=1, initial=0.0))
        scale = np.maximum(scale, 1e-300)
        rows, right = csr_array(self._costs[held] / scale[:, None]), room[held] / scale
        # A choice that adds much more than the whole bound is out, once an answer is known.
        allowed = relaxed.reduced <= 50 * unit
        for again in (True, False):
            found = self._cut_and_solve(
                1e3 * (score - self._least_of_blocks(score) @ self._one) / unit,
                allowed if again else np.ones(len(score), dtype=bool),
                rows,
                right,
                room,
            )
            if found is not None and (
                not again or float(score[found].sum()) - relaxed.score <= 50 * unit
            ):
                return found
        return None

    def _cut_and_solve(
        self,
        score: Floats,
        allowed: NDArray[np.bool_],
        rows: csr_array,
        right: Floats,
        room: Floats,
    ) -> NDArray[np.bool_] | None:
        cuts: list[Floats] = []
        while True:
            constraints = [LinearConstraint(self._one, 1, 1)]
            if rows.shape[0]:
                shrunk = right if len(cuts) <= MOST_CUTS else right - 2e-6
                constraints.append(LinearConstraint(rows, -np.inf, shrunk))
            if cuts:
                most = len(self._blocks) - 1
                constraints.append(LinearConstraint(vstack(list(map(csr_array, cuts))), 0, most))
            made = _milp(
                np.where(allowed, score, 0.0),
                integrality=np.ones(len(score)),
                bounds=Bounds(0, allowed.astype(float)),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
            if made.x is None:
                return None
            chosen: NDArray[np.bool_] = made.x > 0.5
            if bool((self._sums(chosen) - self._fixed <= room).all()):
                return chosen
            cuts.append(chosen.astype(float)[None])


_ONE_AT_A_TIME = threading.Lock()


def _milp(*given: Any, **options: Any) -> Any:
    """Return what `scipy.optimize.milp` does, without a word on standard output."""
    with _ONE_AT_A_TIME, _output_to_stderr():
        return milp(*given, **options)


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Send what C code prints to standard error: HiGHS prints lines left from its debugging.

    They would stand among the JSON that commands print. Does nothing where there is no output.
    """
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)  # what C holds back would come after
        os.dup2(kept, 1)
        os.close(kept)
