"""The progressive search on tables small enough to enumerate, and against its slow twin."""

import hashlib
import itertools
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_optuna.search import RULES, Incumbent, ProgressiveSearch, Result, propose
from hq_optuna.settings import Rule
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import CostModel
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.memory import LiveTensor, MemoryMap
from hq_optuna.space.search_space import SearchSpace
from tests.fake_search import fake_space
from tests.reference.progressive import Assignment, progressive

State = tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """A made-up network: whole-number score and cost of each layer at each of its bits."""

    notches: dict[str, list[int]]
    score: dict[str, dict[int, int]]
    cost: dict[str, dict[int, int]]
    twist: int = 0
    """0: scores add up. Else a hash of the whole assignment, below this number, comes on top."""

    def space(self) -> SearchSpace:
        layers = [
            LayerSpec(name, "Linear", (1,), 0, macs=1, n_calls=1, n_inputs=1)
            for name in self.notches
        ]
        return SearchSpace.build(layers, pin_first_last=None, allowed=self.notches)

    def score_of(self, bits: Assignment) -> int:
        total = sum(self.score[name][b] for name, b in bits.items())
        if self.twist:
            digest = hashlib.sha256(str(sorted(bits.items())).encode()).digest()
            total += int.from_bytes(digest[:4], "big") % self.twist
        return total

    def cost_of(self, bits: Assignment) -> int:
        return sum(self.cost[name][b] for name, b in bits.items())

    def search(self, **options: Any) -> ProgressiveSearch:
        return ProgressiveSearch(
            self.space(), lambda config: float(self.cost_of(weights(config))), **options
        )

    def run(self, **options: Any) -> list[Incumbent]:
        return self.search(**options).run(lambda config: float(self.score_of(weights(config))))

    def states(self) -> list[State]:
        return list(itertools.product(*self.notches.values()))

    def named(self, state: State) -> Assignment:
        return dict(zip(self.notches, state, strict=True))

    def optimum(self, limit: float) -> int:
        """Return the smallest score within the limit, by trying every assignment."""
        every = map(self.named, self.states())
        return min(self.score_of(bits) for bits in every if self.cost_of(bits) <= limit)

    @property
    def ends(self) -> tuple[int, int]:
        """Costs of the cheapest and the dearest assignment on the diagonal."""
        low = {name: min(bits) for name, bits in self.notches.items()}
        high = {name: max(bits) for name, bits in self.notches.items()}
        return self.cost_of(low), self.cost_of(high)


def weights(config: BitConfig) -> Assignment:
    return {name: bits.weight_bits for name, bits in config.items()}


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Scores and costs in any order, so costs may rise and scores fall on the way down."""
    choices = draw(
        st.lists(st.sets(st.integers(1, 16), min_size=2, max_size=4), min_size=1, max_size=5)
    )
    notches = {f"l{k}": sorted(bits, reverse=True) for k, bits in enumerate(choices)}
    number = st.integers(0, 60)
    return Table(
        notches,
        {name: {b: draw(number) for b in bits} for name, bits in notches.items()},
        {name: {b: draw(number) for b in bits} for name, bits in notches.items()},
        twist=draw(st.sampled_from([0, 25])),
    )


@st.composite
def falling_tables(draw: st.DrawFn) -> Table:
    """As in real networks: fewer bits always cost less. Scores are any."""
    table = draw(tables())
    cost = {}
    for name, bits in table.notches.items():
        levels = draw(st.sets(st.integers(1, 99), min_size=len(bits), max_size=len(bits)))
        cost[name] = dict(zip(bits, sorted(levels, reverse=True), strict=True))
    return Table(table.notches, table.score, cost, table.twist)


def convex(seed: int, n_layers: int = 5, bits: tuple[int, ...] = (8, 6, 4, 2)) -> Table:
    """Like quantization: score s·4^(8−b) (the error of one more bit is a quarter), size n·b."""
    generator = random.Random(seed)
    notches = {f"l{k}": list(bits) for k in range(n_layers)}
    score, cost = {}, {}
    for name in notches:
        s, n = generator.randint(1, 1000), generator.randint(10, 500)
        score[name] = {b: s * 4 ** (8 - b) for b in bits}
        cost[name] = {b: n * b for b in bits}
    return Table(notches, score, cost)


RULE = st.sampled_from(RULES)
COUNT = st.integers(1, 7)
SEED = st.integers(0, 1000)


@settings(deadline=None)
@given(tables(), RULE, COUNT, SEED, st.none() | st.integers(0, 300))
def test_the_whole_history_is_that_of_the_slow_twin(
    table: Table, rule: Rule, n: int, seed: int, limit: int | None
) -> None:
    history = table.run(
        n_candidates=n, rule=rule, seed=seed, limit=-math.inf if limit is None else float(limit)
    )
    twin = progressive(
        table.notches, table.score_of, table.cost_of, limit=limit, n=n, rule=rule, seed=seed
    )
    assert [(i.state, i.score, i.cost, i.origin) for i in history] == twin
    assert [i.step for i in history] == list(range(len(twin)))


@settings(deadline=None)
@given(falling_tables(), RULE, COUNT, SEED, st.floats(0, 1))
def test_every_step_lowers_one_layer_by_one_notch_until_the_budget_is_met(
    table: Table, rule: Rule, n: int, seed: int, part: float
) -> None:
    low, high = table.ends
    limit = low + part * (high - low)
    history = table.run(n_candidates=n, rule=rule, seed=seed, limit=limit)
    assert history[-1].cost <= limit
    assert all(incumbent.cost > limit for incumbent in history[:-1])
    # The last record may be an earlier candidate, so it is left out.
    for before, after in itertools.pairwise(history[:-1]):
        changed = [
            (bits.index(a), bits.index(b))
            for bits, b, a in zip(table.notches.values(), before.state, after.state, strict=True)
            if a != b
        ]
        assert [new - old for new, old in changed] == [1]


@settings(deadline=None)
@given(falling_tables(), RULE, COUNT, SEED)
def test_without_a_budget_the_search_ends_at_the_bottom(
    table: Table, rule: Rule, n: int, seed: int
) -> None:
    history = table.run(n_candidates=n, rule=rule, seed=seed)
    assert history[-1].state == table.space().bottom
    # One notch a step, and the start.
    assert len(history) == 1 + sum(len(bits) - 1 for bits in table.notches.values())


@settings(deadline=None)
@given(tables(), RULE, COUNT, SEED, st.integers(0, 300))
def test_the_same_seed_gives_the_same_history(
    table: Table, rule: Rule, n: int, seed: int, limit: int
) -> None:
    options = {"n_candidates": n, "rule": rule, "seed": seed, "limit": float(limit)}
    assert table.run(**options) == table.run(**options)


def test_another_seed_gives_another_history() -> None:
    histories = {
        tuple(i.state for i in convex(0).run(n_candidates=2, seed=seed)) for seed in range(5)
    }
    assert len(histories) == 5


@settings(deadline=None)
@given(falling_tables(), RULE, COUNT, SEED, st.floats(0, 1))
def test_the_answer_is_the_best_of_all_candidates_within_the_budget(
    table: Table, rule: Rule, n: int, seed: int, part: float
) -> None:
    low, high = table.ends
    limit = low + part * (high - low)
    history = table.run(n_candidates=n, rule=rule, seed=seed, limit=limit)
    space = table.space()
    tried = {(0, 0): space.top}
    for incumbent in history[:-1]:
        step = incumbent.step + 1
        moves = propose(space, incumbent.state, n=n, seed=seed, step=step)
        tried |= {(step, k): move.apply(incumbent.state) for k, move in enumerate(moves)}
    met = {
        place: table.score_of(table.named(state))
        for place, state in tried.items()
        if table.cost_of(table.named(state)) <= limit
    }
    best = min(met.values())
    answer = history[-1]
    assert answer.score == best
    assert answer.origin == min(place for place, score in met.items() if score == best)
    assert answer.state == tried[answer.origin]


@settings(deadline=None)
@given(falling_tables(), COUNT, SEED)
def test_min_takes_the_smallest_score_of_each_step(table: Table, n: int, seed: int) -> None:
    history = table.run(n_candidates=n, rule="min", seed=seed)
    for before, after in itertools.pairwise(history):
        moves = propose(table.space(), before.state, n=n, seed=seed, step=after.step)
        scores = [table.score_of(table.named(move.apply(before.state))) for move in moves]
        assert after.score == min(scores)
        assert after.origin == (after.step, scores.index(min(scores)))


@pytest.mark.parametrize("seed", range(8))
def test_an_exhaustive_ratio_search_is_optimal_at_each_of_its_costs(seed: int) -> None:
    # Marginal allocation on tables whose rise per saving grows on the way down never does worse
    # than the optimum at the costs it passes (Fox 1966, Management Science 13(3)). All 4⁵
    # assignments are tried; scores are whole numbers, so equality is exact.
    table = convex(seed)
    every = sorted(
        (table.cost_of(bits), table.score_of(bits)) for bits in map(table.named, table.states())
    )
    for incumbent in table.run(n_candidates=5, rule="ratio", seed=seed):
        assert incumbent.score == min(s for c, s in every if c <= incumbent.cost)


def gaps(rule: Rule, n: int, part: float) -> list[float]:
    """Score over the enumerated optimum on 24 tables, at a part of the way from low to high."""
    found = []
    for seed in range(24):
        table = convex(seed, n_layers=4, bits=(8, 5, 3, 2))
        low, high = table.ends
        limit = low + part * (high - low)
        answer = table.run(n_candidates=n, rule=rule, seed=seed, limit=limit)[-1]
        found.append(answer.score / table.optimum(limit))
    return found


@pytest.mark.parametrize("part", [0.15, 0.3, 0.5])
def test_ratio_with_all_moves_ends_near_the_enumerated_optimum(part: float) -> None:
    found = gaps("ratio", 4, part)
    assert min(found) >= 1.0
    # The project's own figure for `ratio`: 1.03 to 1.06 on ResNet-20. Here most tables are exact.
    assert statistics.median(found) <= 1.05


@pytest.mark.parametrize("part", [0.15, 0.3, 0.5])
def test_ratio_ends_nearer_to_the_optimum_than_min(part: float) -> None:
    assert statistics.mean(gaps("ratio", 4, part)) < statistics.mean(gaps("min", 4, part))


def test_the_answer_may_be_a_candidate_that_lost_its_step() -> None:
    # Step 1: lowering `b` meets the budget (cost 4) with score 9, lowering `a` wins with score 1
    # (cost 9). Step 2: `b` on top: score 10, cost 3, within the budget, but 9 was better.
    table = Table(
        {"a": [8, 4], "b": [8, 4]},
        {"a": {8: 0, 4: 1}, "b": {8: 0, 4: 9}},
        {"a": {8: 2, 4: 1}, "b": {8: 8, 4: 2}},
    )
    history = table.run(n_candidates=2, rule="min", limit=4.0)
    assert [i.state for i in history] == [(8, 8), (4, 8), (8, 4)]
    assert history[-1].score == 9.0
    assert history[-1].origin[0] == 1
    assert history[-1].step == 2


def test_a_start_within_the_budget_is_the_answer_at_once() -> None:
    table = convex(0)
    history = table.run(limit=float(table.ends[1]))
    assert [(i.step, i.state, i.origin) for i in history] == [(0, table.space().top, (0, 0))]


def test_step_0_has_one_candidate_the_start_without_a_move() -> None:
    search = convex(0).search()
    assert search.states(None) == (search.space.top,)
    assert not search.finished(None)


def test_nothing_is_remembered_between_calls() -> None:
    # A fresh object that is handed the record proposes what the running one proposed.
    table = convex(3)
    for incumbent in table.run(n_candidates=3, seed=5):
        fresh = table.search(n_candidates=3, seed=5)
        again = [fresh.states(incumbent) for _ in range(2)]
        assert again[0] == again[1]
        assert fresh.finished(incumbent) == (again[0] == ())


def test_a_finished_search_is_finished_for_both_reasons() -> None:
    search = convex(0).search(limit=50.0)
    middle = (4, 4, 4, 4, 4)
    assert search.finished(Incumbent(3, middle, 0.0, 50.0, (3, 0)))
    assert not search.finished(Incumbent(3, middle, 0.0, 50.5, (3, 0)))
    assert search.finished(Incumbent(3, search.space.bottom, 0.0, 50.5, (3, 0)))


def test_a_step_that_misses_the_budget_ignores_earlier_candidates() -> None:
    search = convex(0).search(limit=10.0, rule="min")
    earlier = {(1, 0): Result((8,) * 5, -1.0, 50.0)}
    start = Incumbent(1, (8,) * 5, 0.0, 60.0, (1, 0))
    closed = search.close(start, [Result((8, 8, 8, 8, 6), 2.0, 40.0)], earlier)
    assert (closed.step, closed.score, closed.origin) == (2, 2.0, (2, 0))


def test_equal_scores_within_the_budget_go_to_the_earliest_candidate() -> None:
    search = convex(0).search(limit=10.0, rule="min")
    start = Incumbent(4, (8,) * 5, 0.0, 60.0, (4, 0))
    low = Result((6,) * 5, 3.0, 9.0)
    closed = search.close(start, [low, low], {(3, 1): low, (2, 5): low, (1, 0): low})
    assert closed.origin == (1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_candidates": 0}, "n_candidates is at least 1; got 0"),
        ({"rule": "greedy"}, "rule is one of min, ratio; got 'greedy'"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convex(0).search(**options)


def test_the_score_is_asked_once_per_candidate() -> None:
    asked: list[str] = []

    def score(config: BitConfig) -> float:
        asked.append(config.digest)
        return float(table.score_of(weights(config)))

    table = convex(1)
    scorer: Callable[[BitConfig], float] = score
    history = table.search(n_candidates=2).run(scorer)
    # 15 steps of two candidates, but at the end only one layer can still go down.
    expected = 1 + sum(
        len(propose(table.space(), i.state, n=2, seed=0, step=i.step + 1)) for i in history
    )
    assert len(asked) == expected


def test_a_budget_of_size_is_met_by_weights_alone() -> None:
    """Activations searched apart have no size, so lowering them would only do harm."""
    space = fake_space(8, activation_bits=(8, 4, 2), pin_first_last=None)
    budget = Budget.fraction(size_bytes=0.5)
    cost = CostModel(space.layers, "size_bytes").cost
    search = ProgressiveSearch(
        space, cost=cost, limit=budget.limit(space), n_candidates=4, rule="min", seed=0
    )
    incumbent = None
    while incumbent is None or not search.met(incumbent):
        results = [
            Result(state, -float(sum(state)), search.cost_of(state))  # the fewer, the worse
            for state in search.states(incumbent)
        ]
        incumbent = search.close(incumbent, results)
    activations = [
        bits
        for variable, bits in zip(space.variables, incumbent.state, strict=True)
        if variable.part == "activations"
    ]
    assert set(activations) == {8}


def test_peaks_at_several_moments_are_lowered_one_after_the_other() -> None:
    names = ("a", "b", "c")
    layers = [LayerSpec(n, "Linear", (10, 10), 0, macs=100, n_calls=1, n_inputs=10) for n in names]
    tensors = (
        LiveTensor("input", 100, 0, 0, ("a",)),
        LiveTensor("a", 100, 1, 1, ("b",)),
        LiveTensor("b", 30, 2, 2, ("c",)),
    )
    memory = MemoryMap(names, tensors)
    space = SearchSpace.build(layers, bits=(8, 4), pin_first_last=None, memory=memory)
    model = space.costs("activation_bytes")
    search = ProgressiveSearch(space, model.cost, 60.0, 3, metric="activation_bytes")
    state = (8, 8, 8)
    assert search.cost_of((4, 8, 8)) == search.cost_of(state) == 100
    assert search.load((4, 8, 8)) < search.load(state) == search.load((8, 8, 4))
    # c is never at a peak, so no step lowers it, whatever it costs.
    last = search.run(lambda config: float(sum(8 - config[n].weight_bits for n in names)))[-1]
    assert (last.state, last.cost) == ((4, 4, 8), 50.0)
