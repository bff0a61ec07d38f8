"""Progressive lowering, step by step (patent CN112183742B), as plain functions of the record.

Step 0 has one candidate, every variable at its widest bits. Each later step draws one-notch moves
from the incumbent, and its winner is the next incumbent, until the incumbent's cost is within the
limit. Nothing here remembers anything: the same record gives the same next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hq_optuna.assignment import BitConfig
from hq_optuna.search.moves import Move, lowerable, propose
from hq_optuna.search.rules import RULES, Rule, choose
from hq_optuna.space import SearchSpace


@dataclass(frozen=True, slots=True)
class Incumbent:
    """What a closed step leaves behind.

    Attributes:
        step: The step that chose it.
        state: Bits of each variable.
        score: Predicted loss rise, nats.
        cost: In the unit of the search's metric.
        origin: ``(step, slot)`` of the candidate it was.
    """

    step: int
    state: tuple[int, ...]
    score: float
    cost: float
    origin: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Result:
    """A scored candidate: its bits, score (nats) and cost."""

    state: tuple[int, ...]
    score: float
    cost: float


@dataclass(frozen=True)
class ProgressiveSearch:
    """The rules of one search.

    Args:
        space: What may be lowered.
        cost: Cost of an assignment; must be deterministic.
        limit: The budget in the same unit; ``-inf`` lowers everything to the bottom.
        n_candidates: Candidates a step, at least 1.
        rule: `choose`'s rule.
        seed: Seed of the draws.
    """

    space: SearchSpace
    cost: Callable[[BitConfig], float]
    limit: float = -math.inf
    n_candidates: int = 8
    rule: Rule = "ratio"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_candidates < 1:
            raise ValueError(f"n_candidates is at least 1; got {self.n_candidates}.")
        if self.rule not in RULES:
            raise ValueError(f"rule is one of {', '.join(RULES)}; got {self.rule!r}.")

    def cost_of(self, state: Sequence[int]) -> float:
        """Return the cost of a state of the search."""
        return self.cost(self.space.config(state))

    def moves(self, incumbent: Incumbent | None) -> tuple[Move | None, ...]:
        """Return the moves of the step after ``incumbent``, one per slot.

        Step 0 (no incumbent) has a single slot without a move: the start itself.
        """
        if incumbent is None:
            return (None,)
        return propose(
            self.space,
            incumbent.state,
            n=self.n_candidates,
            seed=self.seed,
            step=incumbent.step + 1,
        )

    def states(self, incumbent: Incumbent | None) -> tuple[tuple[int, ...], ...]:
        """Return the candidates of the step after ``incumbent`` as bits of each variable."""
        if incumbent is None:
            return (self.space.top,)
        return tuple(move.apply(incumbent.state) for move in self.moves(incumbent) if move)

    def close(
        self,
        incumbent: Incumbent | None,
        results: Sequence[Result],
        earlier: Mapping[tuple[int, int], Result] | None = None,
    ) -> Incumbent:
        """Return the incumbent that a complete step leaves.

        When the winner meets the budget the search is over, and the answer is the candidate with
        the smallest score among all that met the budget in any step: an earlier candidate that
        lost its step may have been within the budget already, and better.

        Args:
            incumbent: Where the step started (``None`` for step 0).
            results: The step's candidates, one per slot.
            earlier: Candidates of earlier steps by ``(step, slot)``.
        """
        step = 0 if incumbent is None else incumbent.step + 1
        slot = 0
        if incumbent is not None:
            slot = choose(
                self.rule,
                [result.score for result in results],
                [result.cost for result in results],
                incumbent_score=incumbent.score,
                incumbent_cost=incumbent.cost,
                limit=self.limit,
            )
        origin, winner = (step, slot), results[slot]
        if winner.cost <= self.limit:
            feasible = {
                place: result
                for place, result in {
                    **(earlier or {}),
                    **{(step, k): result for k, result in enumerate(results)},
                }.items()
                if result.cost <= self.limit
            }
            origin = min(feasible, key=lambda place: (feasible[place].score, place))
            winner = feasible[origin]
        return Incumbent(step, winner.state, winner.score, winner.cost, origin)

    def finished(self, incumbent: Incumbent | None) -> bool:
        """Return whether the search ends here: budget met, or nothing left to lower."""
        if incumbent is None:
            return False
        return incumbent.cost <= self.limit or not lowerable(self.space, incumbent.state)

    def run(self, score: Callable[[BitConfig], float]) -> list[Incumbent]:
        """Run the whole search in this process and return the incumbent of every step."""
        incumbents: list[Incumbent] = []
        earlier: dict[tuple[int, int], Result] = {}
        incumbent: Incumbent | None = None
        while not self.finished(incumbent):
            results = [
                Result(state, score(self.space.config(state)), self.cost_of(state))
                for state in self.states(incumbent)
            ]
            previous, incumbent = incumbent, self.close(incumbent, results, earlier)
            step = 0 if previous is None else previous.step + 1
            earlier |= {(step, slot): result for slot, result in enumerate(results)}
            incumbents.append(incumbent)
        return incumbents
