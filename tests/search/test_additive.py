"""Sums over layers: exact optima, the Pareto curve, uniform assignments."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy.optimize import milp

from hq_optuna.search import Additive, ProgressiveSearch, uniform_states
from hq_optuna.space.cost import CostModel
from hq_optuna.space.search_space import SearchSpace
from tests.fake_search import fake_layers, fake_score, fake_space, fake_table


def problem(n: int = 6, metric: str = "bops", **choices: object) -> Additive:
    space = fake_space(n, **choices)
    return Additive(space, fake_table(space), CostModel(space.layers, metric))


@pytest.mark.parametrize(
    "choices", [{}, {"activation_bits": (8, 4)}, {"activation_bits": None}, {"activation_bits": 8}]
)
def test_score_and_cost_are_those_of_table_and_cost_model(choices: dict[str, object]) -> None:
    sums = problem(5, **choices)
    model = CostModel(sums.space.layers)
    for state in (sums.space.top, sums.space.bottom):
        config = sums.space.config(state)
        assert sums.score(config) == pytest.approx(sum(fake_score(sums.table, config)), rel=1e-15)
        assert sums.cost(config) == model.cost(config)
        rises = math.fsum(row[b] for row, b in zip(sums.rises, state, strict=True))
        touched = {name for v in sums.space.variables for name in v.layers}
        fixed = {n: b for n, b in config.items() if n not in touched}
        left = (
            0.0
            if choices.get("activation_bits") != 8
            else sum(sums.table[n]["activations"][8] for n in touched)
        )
        assert rises + sums.score(fixed) + left == pytest.approx(sums.score(config), rel=1e-14)


def test_tied_layers_rise_together() -> None:
    layers = fake_layers(4)
    names = [layer.name for layer in layers]
    space = SearchSpace.build(layers, bits=(8, 4), tied=[names[1:3]])
    sums = Additive(space, fake_table(space), CostModel(layers))
    table = sums.table
    assert sums.rises == [
        {
            b: pytest.approx(sum(table[n][p][b] for n in names[1:3] for p in table[n]), rel=1e-15)
            for b in (8, 4)
        }
    ]


@pytest.mark.parametrize("damage", ["layer", "bits", "nan", "fixed"])
def test_a_table_with_a_hole_is_refused(damage: str) -> None:
    space = fake_space(4)
    table = fake_table(space)
    if damage == "layer":
        del table["layer3.1.conv"]
    elif damage == "bits":
        del table["layer3.1.conv"]["weights"][4]
    elif damage == "nan":
        table["layer3.1.conv"]["activations"][2] = math.nan
    else:
        del table["fc"]["weights"][8]
    with pytest.raises(ValueError, match=r"has no value for the (weights|activations) of"):
        Additive(space, table, CostModel(space.layers))


def scattered(rng: np.random.Generator, n: int, bits: object = range(2, 9)) -> Additive:
    """Return a problem whose rises span five orders of magnitude, as those of networks do."""
    space = fake_space(n, bits=bits, pin_first_last=None)
    table = {
        layer.name: {
            part: {b: float(10 ** rng.uniform(-4, 1) * 4.0**-b) for b in range(2, 9)}
            for part in ("weights", "activations")
        }
        for layer in space.layers
    }
    return Additive(space, table, CostModel(space.layers))


@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_is_that_of_the_plain_integer_program(seed: int) -> None:
    """Against SciPy's solver with nothing left out and its costs in units of its own."""
    rng = np.random.default_rng(seed)
    sums = scattered(rng, 14)
    low, high = (sums.cost(sums.space.config(s)) for s in (sums.space.bottom, sums.space.top))
    for share in (0.1, 0.35, 0.7):
        limit = low + share * (high - low)
        point = sums.exact(limit)
        assert point is not None
        assert point.cost <= limit
        unit = {layer.name: layer.macs for layer in sums.space.layers}
        choices = [(v, b) for v in sums.space.variables for b in v.bits]
        plain = milp(
            [1e6 * sums.rises[sums.space.variables.index(v)][b] for v, b in choices],
            constraints=[
                ([[float(u is v) for v, _ in choices] for u in sums.space.variables], 1, 1),
                ([[unit[v.name] * b * b / 1e6 for v, b in choices]], -np.inf, limit / 1e6),
            ],
            integrality=np.ones(len(choices), dtype=int),
            bounds=(0, 1),
        )
        assert point.score <= plain.fun / 1e6 * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_small_rises_beside_large_ones_are_not_lost_in_a_tolerance(seed: int) -> None:
    """One layer alone rises a million times as much as the optimum: HiGHS' gap is absolute."""
    rng = np.random.default_rng(seed)
    sums = scattered(rng, 6, bits=(8, 5, 3, 2))
    sums.table[sums.space.layers[2].name]["weights"][2] = 1e6
    sums = Additive(sums.space, sums.table, sums.model)
    limit = 0.3 * sums.cost(sums.space.start)
    every = itertools.product(*(v.bits for v in sums.space.variables))
    configs = (sums.space.config(state) for state in every)
    best = min(sums.score(c) for c in configs if sums.cost(c) <= limit)
    point = sums.exact(limit)
    assert point is not None
    assert point.score == pytest.approx(best, rel=1e-12)


def test_equal_totals_give_the_same_bits_whatever_the_order_of_the_table() -> None:
    space = fake_space(8, pin_first_last=None)
    table = {
        layer.name: {part: {8: 0.0, 4: 1.0, 2: 3.0} for part in ("weights", "activations")}
        for layer in space.layers
    }
    layers = [dataclasses.replace(layer, weight_shape=(8, 1)) for layer in space.layers]
    cost = CostModel(layers, "size_bytes")  # a byte a bit
    first = Additive(space, table, cost).exact(40.0)
    again = Additive(space, dict(reversed(table.items())), cost).exact(40.0)
    assert first == again
    assert first is not None
    assert first.cost <= 40.0


def test_many_blocks_of_weights_and_activations_apart_match_the_integer_program() -> None:
    sums = problem(16, bits=range(2, 9), activation_bits=range(2, 9), pin_first_last=None)
    limit = 0.2 * sums.cost(sums.space.start)
    point = sums.exact(limit)
    assert point is not None
    names = [layer.name for layer in sums.space.layers]
    choices = [(n, (w, a)) for n in names for w in range(2, 9) for a in range(2, 9)]
    unit = {layer.name: layer.macs for layer in sums.space.layers}
    rise = [sums.table[n]["weights"][w] + sums.table[n]["activations"][a] for n, (w, a) in choices]
    plain = milp(
        [1e3 * r for r in rise],
        constraints=[
            ([[float(m == n) for n, _ in choices] for m in names], 1, 1),
            ([[unit[n] * w * a / 1e8 for n, (w, a) in choices]], -np.inf, limit / 1e8),
        ],
        integrality=np.ones(len(choices), dtype=int),
        bounds=(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert point.score == pytest.approx(plain.fun / 1e3, rel=1e-6)


def test_no_search_is_better_than_the_optimum_and_a_limit_below_the_least_has_none() -> None:
    sums = problem(8, bits=range(2, 9), pin_first_last=None)
    limit = 0.25 * sums.cost(sums.space.start)
    optimum = sums.exact(limit)
    assert optimum is not None
    for seed in range(5):
        mind = ProgressiveSearch(sums.space, sums.cost, limit, 4, "ratio", seed, True)
        found = mind.run(sums.score)[-1]
        assert found.cost <= limit
        assert found.score >= optimum.score * (1 - 1e-12)
    assert sums.exact(sums.cost(sums.space.config(sums.space.bottom)) - 1) is None


def test_the_frontier_falls_and_each_point_is_the_optimum_of_its_cost() -> None:
    sums = problem(6, bits=(8, 4, 3, 2), pin_first_last=None)
    extra = 0.37 * sums.cost(sums.space.start)
    frontier = sums.frontier([extra], n=9)
    assert [p.cost for p in frontier] == sorted({p.cost for p in frontier})
    assert [p.score for p in frontier] == sorted({p.score for p in frontier}, reverse=True)
    assert frontier[0].config == sums.space.config(sums.space.bottom)
    assert frontier[-1].config == sums.space.start
    assert sums.exact(extra) in frontier
    every = [
        sums.point(sums.space.config(state))
        for state in itertools.product(*(v.bits for v in sums.space.variables))
    ]
    for point in frontier:
        assert point.score == pytest.approx(
            min(other.score for other in every if other.cost <= point.cost), rel=1e-12
        )


def test_uniform_assignments_leave_pins_and_take_what_is_allowed() -> None:
    space = fake_space(5, bits=(8, 4, 2), allowed={"layer2*": (8, 3)})
    found = uniform_states(space)
    assert [v.name for v in space.variables][1] == "layer2.1.conv"
    assert found == {(8, 8): (8, 8, 8), (4, 4): (4, 3, 4), (2, 2): (2, 3, 2)}
    assert space.config(found[4, 4])["fc"] == (8, 8)


def test_uniform_assignments_of_weights_and_activations_searched_apart() -> None:
    space = fake_space(3, bits=(8, 4), activation_bits=(8, 6), pin_first_last=None)
    found = uniform_states(space)
    assert set(found) == {(8, 8), (8, 6), (4, 8), (4, 6)}
    assert set(space.config(found[4, 6]).values()) == {(4, 6)}
    weights = fake_space(3, bits=(8, 4), activation_bits=None, pin_first_last=None)
    assert set(weights.config(uniform_states(weights)[4, 4]).values()) == {(4, 32)}


def test_trades_are_those_of_an_enumeration() -> None:
    space = fake_space(4)
    sums = Additive(space, fake_table(space), space.costs("bops"))
    other = space.costs("size_bytes")
    every = [space.config(state) for state in itertools.product(*(v.bits for v in space.variables))]
    scores = sorted(map(sums.score, every))
    for most in (scores[len(scores) // 10], scores[len(scores) // 2]):
        good = [c for c in every if sums.score(c) <= most]
        found = sums.trades(other, most, n=9)
        assert found[0].cost == pytest.approx(min(map(sums.cost, good)))
        assert found[-1].other == pytest.approx(min(map(other.cost, good)))
        for trade in found:
            assert trade.score <= most * (1 + 1e-9)
            assert (trade.cost, trade.other) == (sums.cost(trade.config), other.cost(trade.config))
            # Nothing as good is cheaper in one and no dearer in the other.
            assert not any(
                sums.cost(c) <= trade.cost and other.cost(c) < trade.other * (1 - 1e-9)
                for c in good
            )
    assert sums.trades(other, scores[0] / 2) == []
