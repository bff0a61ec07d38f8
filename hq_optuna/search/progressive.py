"""Progressive lowering, step by step (patent CN112183742B), as plain functions of the record.

Step 0 has one candidate, every variable at its widest bits. Each later step draws one-notch moves
from the incumbent, and its winner is the next incumbent, until the incumbent's cost is within the
limit. Then, unless told not to, steps of swaps refine the answer within the limit, until a step
brings nothing. Nothing here remembers anything: the same record gives the same next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from hq_optuna.search.moves import lowerable, propose
from hq_optuna.search.rules import RULES, choose
from hq_optuna.search.swaps import Notch, learn_rises, propose_swaps
from hq_optuna.settings import Rule
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.budget import Bound
from hq_optuna.space.cost import Metric
from hq_optuna.space.layers import is_whole
from hq_optuna.space.search_space import SearchSpace


@dataclass(frozen=True, slots=True)
class Incumbent:
    """What a closed step leaves behind: bits of each variable, their score in nats, and their cost.

    ``origin`` is the ``(step, slot)`` of the candidate it was.
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

    ``cost`` is that of an assignment and must be deterministic; ``limit`` is the budget in the same
    unit (``-inf`` lowers everything to the bottom). A step has ``n_candidates``, drawn with
    ``seed``, and `choose`'s ``rule`` picks its winner. With ``refine`` swaps refine the answer once
    the budget is met. Winners are trained after every ``train_every`` steps (0: never), the answer
    where ``final`` is true. Up to ``verify`` finalists are measured in the end (0: none).
    ``metric`` is what the cost counts, for their costs by layer. The limits ``beside`` it hold too.
    """

    space: SearchSpace
    cost: Callable[[BitConfig], float]
    limit: float = -math.inf
    n_candidates: int = 8
    rule: Rule = "ratio"
    seed: int = 0
    refine: bool = False
    train_every: int = 0
    final: bool = False
    verify: int = 0
    metric: Metric = "bops"
    beside: tuple[Bound, ...] = ()
    _costs: dict[tuple[int, ...], tuple[float, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _loads: dict[tuple[int, ...], float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("n_candidates", "seed"):
            value = getattr(self, name)
            if not is_whole(value):
                raise ValueError(f"{name} is a whole number (int); got {value!r}.")
            object.__setattr__(self, name, int(value))  # NumPy's would be written differently
        if self.n_candidates < 1:
            raise ValueError(f"n_candidates is at least 1; got {self.n_candidates}.")
        if self.rule not in RULES:
            raise ValueError(f"rule is one of {', '.join(RULES)}; got {self.rule!r}.")
        if not is_whole(self.verify) or self.verify < 0:
            raise ValueError(f"verify is 0 (nothing is measured) or more; got {self.verify!r}.")
        if self.train_every < 0:
            raise ValueError(f"train_every is 0 (never) or more; got {self.train_every}.")

    def to_json(self) -> dict[str, Any]:
        """Return what the history depends on, as JSON data; the space by its digest."""
        return {
            "space": self.space.digest,
            "n_candidates": self.n_candidates,
            "rule": self.rule,
            "seed": self.seed,
            "refine": self.refine,
            "limit": self.limit if self.limit > -math.inf else None,  # JSON has no infinity
            "train_every": self.train_every,
            "final": self.final,
            "verify": self.verify,
            "beside": {bound.metric: bound.limit for bound in self.beside},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], space: SearchSpace, metric: Metric) -> Self:
        """Return the search that `to_json` described; ``metric`` is what its budget counts."""
        limit = -math.inf if data["limit"] is None else data["limit"]
        beside = tuple(Bound(space.costs(m), most, "") for m, most in data["beside"].items())
        read = ("space", "limit", "beside")
        told = {name: value for name, value in data.items() if name not in read}
        cost = space.costs(metric).cost
        return cls(space, cost, limit, metric=metric, beside=beside, **told)

    def trains(self, step: int) -> bool:
        """Return whether the winner of a step is trained, as far as the step's number tells."""
        return self.train_every > 0 and step > 0 and step % self.train_every == 0

    def costs_of(self, state: Sequence[int]) -> tuple[float, ...]:
        """Return what each limit counts of a state of the search, the first limit's cost first."""
        key = tuple(state)
        if key not in self._costs:
            config = self.space.config(key)
            self._costs[key] = (self.cost(config), *(b.cost(config) for b in self.beside))
        return self._costs[key]

    def cost_of(self, state: Sequence[int]) -> float:
        """Return the cost of a state of the search."""
        return self.costs_of(state)[0]

    @property
    def limits(self) -> dict[Metric, float]:
        """What each metric is limited to, in the order of `costs_of`."""
        return {self.metric: self.limit, **{bound.metric: bound.limit for bound in self.beside}}

    def fits(self, state: Sequence[int]) -> bool:
        """Return whether a state is within all limits."""
        return all(
            c <= most for c, most in zip(self.costs_of(state), self.limits.values(), strict=True)
        )

    def progress(self, state: Sequence[int]) -> float:
        """Return how far a state is from the start to the limits, 0 to 1: that of the slowest."""
        return way(self.costs_of(self.space.top), self.costs_of(state), self.limits.values())

    def load(self, state: Sequence[int]) -> float:
        """Return what is to be lowered: the cost, or by what shares limits are exceeded.

        The latter where there are several limits, or one of a peak, which several moments may have.
        """
        if not self._sums_shares:
            return self.cost_of(state)
        key = tuple(state)
        if key not in self._loads:
            first = Bound(self.space.costs(self.metric), self.limit, "")
            self._loads[key] = to_lower((first, *self.beside), self.space.config(key))
        return self._loads[key]

    @property
    def _sums_shares(self) -> bool:
        peak = self.metric == "activation_bytes" and self.limit > 0
        return bool(self.beside) or peak

    def states(
        self, incumbent: Incumbent | None, past: Past | None = None
    ) -> tuple[tuple[int, ...], ...]:
        """Return the candidates of the step after ``incumbent`` as bits of each variable.

        Step 0, where that is ``None``, has the start as its one candidate. Steps of swaps need
        ``past``.
        """
        if incumbent is None:
            return (self.space.top,)
        if self.met(incumbent):
            if not self.refine or past is None or past.settled(self):
                return ()
            return propose_swaps(
                *(self.space, incumbent.state, past.rises(self.space)),
                costs=self.costs_of,
                limits=tuple(self.limits.values()),
                score=incumbent.score,
                n=self.n_candidates,
                additive=[metric != "activation_bytes" for metric in self.limits],
            )
        start, load = incumbent.state, self.load(incumbent.state)
        moves = propose(
            self.space,
            start,
            n=self.n_candidates,
            seed=self.seed,
            step=incumbent.step + 1,
            saves=lambda move: self.load(move.apply(start)) < load,
        )
        return tuple(move.apply(start) for move in moves)

    def met(self, found: Incumbent | Result) -> bool:
        """Return whether an incumbent or a candidate is within the limits."""
        return found.cost <= self.limit and (not self.beside or self.fits(found.state))

    def close(
        self,
        incumbent: Incumbent | None,
        results: Sequence[Result],
        earlier: Mapping[tuple[int, int], Result] | None = None,
    ) -> Incumbent:
        """Return the incumbent that a complete step leaves.

        When the winner meets the budget the search is over, and the answer is the candidate with
        the smallest score among all that met the budget in any step: an earlier candidate that
        lost its step may have been within the budget already, and better. A step of swaps leaves
        its best candidate, or its incumbent where that is better.

        ``earlier`` are candidates of earlier steps by ``(step, slot)`` whose scores compare with
        the results: none from before the network was last trained. Step 0 has no incumbent.
        """
        step = 0 if incumbent is None else incumbent.step + 1
        known = {(step, slot): result for slot, result in enumerate(results)}
        if incumbent is None:
            origin = (step, 0)
        elif self.met(incumbent):
            origin = _best(known)
            if known[origin].score >= incumbent.score:
                return replace(incumbent, step=step)
            earlier = None
        else:
            slot = choose(
                self.rule,
                [result.score for result in results],
                [self.load(result.state) for result in results],
                incumbent_score=incumbent.score,
                incumbent_cost=self.load(incumbent.state),
                limit=0.0 if self._sums_shares else self.limit,
            )
            origin = (step, slot)
        known = {**(earlier or {}), **known}
        if self.met(known[origin]):
            origin = _best({at: found for at, found in known.items() if self.met(found)})
        winner = known[origin]
        return Incumbent(step, winner.state, winner.score, winner.cost, origin)

    def finished(self, incumbent: Incumbent | None, past: Past | None = None) -> bool:
        """Return whether the search ends here.

        It does when there is nothing left to lower, or when the budget is met and swaps bring
        nothing (or are turned off).
        """
        if incumbent is None:
            return False
        if self.met(incumbent):
            return not self.states(incumbent, past)
        return not lowerable(self.space, incumbent.state)

    def run(self, score: Callable[[BitConfig], float]) -> list[Incumbent]:
        """Run the whole search in this process and return the incumbent of every step."""
        past = Past()
        incumbent: Incumbent | None = None
        while not self.finished(incumbent, past):
            results = [
                Result(state, score(self.space.config(state)), self.cost_of(state))
                for state in self.states(incumbent, past)
            ]
            incumbent = self.close(incumbent, results, past.results)
            past.results |= {(incumbent.step, slot): r for slot, r in enumerate(results)}
            past.incumbents.append(incumbent)
        return past.incumbents


def to_lower(bounds: Sequence[Bound], config: BitConfig) -> float:
    """Return a single cost that adds up, or the sum of the shares by which limits are exceeded."""
    if len(bounds) == 1 and bounds[0].metric != "activation_bytes":
        return bounds[0].cost(config)
    return math.fsum(bound.model.excess(config, bound.limit) for bound in bounds)


def way(starts: Iterable[float], now: Iterable[float], limits: Iterable[float]) -> float:
    """Return the share of the way from costs at the start to their limits, of the slowest.

    Example:
        >>> way([8.0, 100.0], [6.0, 60.0], [4.0, 80.0])
        0.5
    """
    return min(
        1.0 if start <= limit else min(max((start - cost) / (start - limit), 0.0), 1.0)
        for start, cost, limit in zip(starts, now, limits, strict=True)
    )


def _best(results: Mapping[tuple[int, int], Result]) -> tuple[int, int]:
    return min(results, key=lambda place: (results[place].score, place))


@dataclass
class Past:
    """The record of a search: the incumbents of closed steps, in order, and every scored candidate.

    Candidates go by ``(step, slot)``.
    """

    incumbents: list[Incumbent] = field(default_factory=list)
    results: dict[tuple[int, int], Result] = field(default_factory=dict)

    def settled(self, search: ProgressiveSearch) -> bool:
        """Return whether the last step was one of swaps and brought nothing."""
        last = self.incumbents[-2:]
        return len(last) == 2 and search.met(last[0]) and last[0].state == last[1].state

    def rises(self, space: SearchSpace) -> dict[Notch, float]:
        """Return what each notch was seen to add to the score, from all closed steps."""
        scored = []
        for (step, _), result in sorted(self.results.items()):
            if 0 < step <= len(self.incumbents):
                before = self.incumbents[step - 1]
                scored.append((before.state, before.score, result.state, result.score))
        return learn_rises(space, scored)
