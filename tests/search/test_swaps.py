"""Swaps bring the answer near the exact optimum, within the limit, by what the record holds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hq_optuna.search import Allocation, Incumbent, Past, ProgressiveSearch, Result
from hq_optuna.search.swaps import expected_rise, learn_rises, propose_swaps
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import CostModel
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace


def make(n: int, seed: int, bits: Sequence[int] = range(2, 9)) -> tuple[SearchSpace, Any]:
    """Return a space of ``n`` layers and an additive score whose error goes with 4⁻ᵇ."""
    rng = np.random.default_rng(seed)
    layers = [
        LayerSpec(f"l{i}", "Linear", (int(w), 1), 0, int(w), 1, 1)
        for i, w in enumerate(rng.integers(10, 4000, n))
    ]
    space = SearchSpace.build(layers, bits=bits, activation_bits=None, pin_first_last=None)
    scale = rng.lognormal(0, 2, n)
    rises = [
        {b: float(s * 4.0**-b) for b in v.bits} for s, v in zip(scale, space.variables, strict=True)
    ]
    return space, rises


def total(rises: Any, state: Sequence[int]) -> float:
    return sum(row[b] for row, b in zip(rises, state, strict=True))


def search_of(space: SearchSpace, share: float, **settings: Any) -> ProgressiveSearch:
    model = CostModel(space.layers, "size_bytes")
    return ProgressiveSearch(space, model.cost, share * model.int8, refine=True, **settings)


def run(space: SearchSpace, rises: Any, search: ProgressiveSearch) -> list[Incumbent]:
    def score(config: BitConfig) -> float:
        return total(rises, [config[v.layers[0]].weight_bits for v in space.variables])

    return search.run(score)


def test_refinement_closes_the_gap_to_the_exact_optimum() -> None:
    before, after = [], []
    for seed in range(20):
        space, rises = make(12, seed)
        search = search_of(space, 0.4, seed=seed)
        weights = {layer.name: layer.n_weights for layer in space.layers}
        best = Allocation(space, rises, lambda n, b, w=weights: w[n] * b.weight_bits / 8).best(
            search.limit
        )
        assert best is not None
        path = run(space, rises, search)
        first = next(i for i in path if search.met(i))
        before.append(first.score / total(rises, best))
        after.append(path[-1].score / total(rises, best))
    assert min(after) >= 1 - 1e-9  # never below the optimum
    assert all(b <= a for a, b in zip(before, after, strict=True))
    # Median over 20 tables; without swaps it is above 1.01.
    assert statistics.median(after) <= 1.002 < statistics.median(before)


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_swaps_stay_within_the_limit_and_never_raise_the_score(seed: int) -> None:
    space, rises = make(6, seed)
    search = search_of(space, 0.45, seed=seed, n_candidates=2)
    path = run(space, rises, search)
    refining = [i for i in path if search.met(i)]
    assert all(i.cost <= search.limit for i in refining)
    scores = [i.score for i in refining]
    assert scores == sorted(scores, reverse=True)


def test_no_swap_of_up_to_three_notches_is_left_that_would_help() -> None:
    space, rises = make(5, 3, bits=(8, 6, 4, 3, 2))
    # Exhaustive steps see every notch, so what is promised is what comes.
    search = search_of(space, 0.45, n_candidates=5)
    last = run(space, rises, search)[-1]
    notches = [(v, step) for v in range(5) for step in (-1, 1)]
    for size in (1, 2, 3):
        for group in itertools.combinations(notches, size):
            state = list(last.state)
            raised = sum(step == -1 for _, step in group)
            if len({v for v, _ in group}) < size or not 1 <= raised <= 2:
                continue
            for v, step in group:
                bits = space.variables[v].bits
                place = bits.index(state[v]) + step
                if not 0 <= place < len(bits):
                    break
                state[v] = bits[place]
            else:
                if search.cost_of(state) <= search.limit:
                    assert total(rises, state) >= last.score * (1 - 1e-8)


def test_rises_are_learnt_from_candidates_of_one_notch_and_from_swaps() -> None:
    space, rises = make(3, 0, bits=(8, 4, 2))

    def seen(before: tuple[int, ...], after: tuple[int, ...]) -> Any:
        return before, total(rises, before), after, total(rises, after)

    scored = [seen((8, 8, 8), (4, 8, 8)), seen((4, 8, 8), (8, 4, 8)), seen((8, 8, 8), (8, 8, 2))]
    learnt = learn_rises(space, scored)
    assert learnt[0, 4] == pytest.approx(rises[0][4] - rises[0][8])
    assert learnt[1, 4] == pytest.approx(rises[1][4] - rises[1][8])  # the swap's unknown half
    assert (2, 4) not in learnt and (2, 2) not in learnt  # two unknowns in one


def test_nothing_is_learnt_of_a_search_without_candidates() -> None:
    assert learn_rises(make(3, 0)[0], []) == {}


def test_an_untried_notch_is_judged_by_the_nearest_of_its_variable() -> None:
    space, rises = make(2, 0)
    known = {(0, 5): rises[0][5] - rises[0][6]}
    # The table's error goes with 4⁻ᵇ exactly, so the scaled rise is the true one.
    assert expected_rise(space, known, (0, 3)) == pytest.approx(rises[0][3] - rises[0][4])
    assert expected_rise(space, known, (1, 3)) == 0.0


def test_proposals_come_by_promise_and_none_is_over_the_limit() -> None:
    space, rises = make(6, 1)
    state = (4, 4, 4, 4, 4, 4)
    notches = {(v, low): rises[v][low] - rises[v][low + 1] for v in range(6) for low in range(2, 8)}
    model = CostModel(space.layers, "size_bytes")

    def cost(s: Sequence[int]) -> float:
        return model.cost(space.config(s))

    def costs(s: Sequence[int]) -> tuple[float, ...]:
        return (cost(s),)

    found = propose_swaps(
        *(space, state, notches),
        **{"costs": costs, "limits": costs(state), "score": total(rises, state), "n": 10},
    )
    assert 0 < len(found) <= 10
    scores = [total(rises, s) for s in found]
    assert scores == sorted(scores)
    assert scores[-1] < total(rises, state)
    assert all(cost(s) <= cost(state) for s in found)
    assert (
        propose_swaps(
            *(space, space.top, notches),
            **{"costs": costs, "limits": costs(space.top), "score": 1.0, "n": 4},
        )
        == ()
    )  # everything is at its widest


@pytest.mark.parametrize("activation_bits", [None, range(2, 9)])
@pytest.mark.parametrize("metric", ["bops", "size_bytes"])
def test_proposals_are_the_same_where_sums_are_known_to_be_exact(metric, activation_bits) -> None:
    """With bits of weights and inputs apart two changes may meet in a layer, and do not add up."""
    layers = make(6, 2)[0].layers
    space = SearchSpace.build(
        layers, bits=range(2, 9), activation_bits=activation_bits, pin_first_last=None
    )
    model, rng = CostModel(layers, metric), np.random.default_rng(0)

    def costs(s: Sequence[int]) -> tuple[float, ...]:
        return (model.cost(space.config(s)),)

    for _ in range(10):
        state = tuple(int(b) for b in rng.integers(3, 8, len(space.variables)))
        rises = {(v, b): rng.lognormal(-b, 1) for v in range(len(state)) for b in range(2, 8)}

        limits = (1.01 * costs(state)[0],)
        given = {"costs": costs, "limits": limits, "score": 1.0, "n": 50}
        known = propose_swaps(space, state, rises, **given, additive=[True])
        assert known == propose_swaps(space, state, rises, **given)
        assert known


@pytest.mark.parametrize("seed", range(5))
def test_proposals_are_the_first_of_all_swaps_that_fit(seed: int) -> None:
    """Held against every state a swap leads to, looked at one by one."""
    space, _ = make(5, seed)
    model, rng = CostModel(space.layers, "size_bytes"), np.random.default_rng(seed)
    state = tuple(int(b) for b in rng.integers(2, 9, len(space.variables)))
    rises = {(v, b): rng.lognormal(-b, 1) for v in range(len(state)) for b in range(2, 8)}

    def costs(s: Sequence[int]) -> tuple[float, ...]:
        return (model.cost(space.config(s)),)

    limit = costs(state)[0]
    expected = []
    for moves in itertools.product((-1, 0, 1), repeat=len(state)):
        ups, downs = moves.count(1), moves.count(-1)
        after = tuple(b + move for b, move in zip(state, moves, strict=True))
        known = (ups, downs) in {(1, 0), (1, 1), (1, 2), (2, 1)}
        if known and all(2 <= b <= 8 for b in after) and costs(after)[0] <= limit:
            rise = math.fsum(
                -rises[v, b] if move > 0 else rises[v, b - 1]
                for v, (b, move) in enumerate(zip(state, moves, strict=True))
                if move
            )
            expected += [(rise, after)] if rise < -1e-9 else []
    given = {"costs": costs, "limits": (limit,), "score": 1.0, "n": 8}
    found = propose_swaps(space, state, rises, **given, additive=[True])
    assert list(found) == [after for _, after in sorted(expected)[:8]]


def test_a_step_of_swaps_that_brings_nothing_ends_the_search() -> None:
    space, _ = make(2, 0)
    search = search_of(space, 0.9)
    state = (7, 7)
    incumbent = Incumbent(5, state, 1.0, search.cost_of(state), (4, 0))
    worse = Result((8, 6), 1.5, search.cost_of((8, 6)))
    closed = search.close(incumbent, [worse])
    assert (closed.step, closed.state, closed.origin) == (6, state, (4, 0))
    assert search.finished(closed, Past([incumbent, closed]))
    better = search.close(incumbent, [worse, Result((6, 8), 0.5, worse.cost)])
    assert (better.state, better.origin) == ((6, 8), (6, 1))


def test_without_refinement_the_search_ends_at_the_budget() -> None:
    space, rises = make(6, 0)
    model = CostModel(space.layers, "size_bytes")
    search = ProgressiveSearch(space, model.cost, 0.5 * model.int8)
    path = run(space, rises, search)
    assert [search.met(i) for i in path] == [False] * (len(path) - 1) + [True]
