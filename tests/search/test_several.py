"""Exact allocation under several limits, against every assignment and SciPy's solver."""

from __future__ import annotations

import ctypes
import itertools
import math

import numpy as np
import pytest

from hq_optuna.errors import BudgetError
from hq_optuna.search import Additive, ProgressiveSearch, check_reachable
from hq_optuna.search import several as several_module
from hq_optuna.search.several import SeveralLimits
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.budget import Budget, parse_budget
from hq_optuna.space.cost import Row
from hq_optuna.space.search_space import SearchSpace
from tests.fake_search import fake_layers, fake_table

BOTH = parse_budget(["0.4 bops", "50% size_bytes"])


def problem(n: int = 5, budget: Budget = BOTH, **options: object) -> Additive:
    space = SearchSpace.build(fake_layers(n), **{"bits": (8, 5, 3, 2), **options})
    first, *beside = budget.bounds(space)
    return Additive(space, fake_table(space), first.model, beside)


def scattered_rows(space: SearchSpace, rng: np.random.Generator, n: int) -> list[Row]:
    """Return sums whose parts fall with the bits in no order, as latencies do."""
    parts = {
        (layer.name, LayerBits(w, a)): float(rng.uniform(0, 1))
        for layer in space.layers
        for w, a in itertools.product((*space.levels, 32), repeat=2)
    }
    scales = rng.uniform(0.1, 1e6, n)
    kept = [{key: part * scale for key, part in parts.items()} for scale in scales]
    shuffled = [dict(zip(one, rng.permutation(list(one.values())), strict=True)) for one in kept]
    return [Row(lambda name, bits, one=one: one[name, bits], 0.25) for one in shuffled]


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_is_that_of_trying_everything(seed: int) -> None:
    rng = np.random.default_rng(seed)
    apart = {} if seed % 2 else {"bits": (8, 4), "activation_bits": (8, 3)}
    sums = problem(4 + seed % 2, pin_first_last=None, **apart)
    space, rows = sums.space, scattered_rows(sums.space, rng, 1 + seed % 4)
    rises = [{b: float(rng.lognormal(0, 3)) for b in v.bits} for v in space.variables]
    several = SeveralLimits(space, rises, rows)
    found = {}
    for state in itertools.product(*(v.bits for v in space.variables)):
        config = space.config(state)
        costs = [
            row.fixed + math.fsum(row.layer_cost(n, b) for n, b in config.items()) for row in rows
        ]
        found[state] = costs, math.fsum(r[b] for r, b in zip(rises, state, strict=True))
    least = np.array([costs for costs, _ in found.values()])
    for share in (0.0, 0.02, 0.2, 0.5):
        limits = least.min(0) + share * (least.max(0) - least.min(0))
        fitting = [rise for costs, rise in found.values() if (np.array(costs) <= limits).all()]
        state = several.best(limits)
        if state is None:
            assert not fitting
            continue
        assert (np.array(found[state][0]) <= limits * (1 + 1e-15)).all()
        assert found[state][1] == pytest.approx(min(fitting), rel=1e-9)


def test_the_largest_of_several_sums_is_as_low_as_it_can_be() -> None:
    rng = np.random.default_rng(3)
    sums = problem(4, pin_first_last=None)
    rows = scattered_rows(sums.space, rng, 3)
    several = SeveralLimits(sums.space, sums.rises, rows)
    peaks, last = [], []
    for state in itertools.product(*(v.bits for v in sums.space.variables)):
        bits = sums.space.config(state).items()
        costs = [row.fixed + math.fsum(row.layer_cost(n, b) for n, b in bits) for row in rows]
        peaks.append(max(costs[:2]))
        last.append(costs[2])
    assert several.least(slice(0, 2), [math.inf] * 3) == pytest.approx(min(peaks))
    held = sorted(last)[5]
    within = min(peak for peak, cost in zip(peaks, last, strict=True) if cost <= held)
    assert several.least(slice(0, 2), [0.0, 0.0, held]) == pytest.approx(within)


def test_two_limits_leave_less_than_each_and_the_price_is_that_of_a_little_more() -> None:
    sums = problem(8, bits=range(2, 9))
    limit = BOTH.limit(sums.space)
    both = sums.exact(limit)
    alone = Additive(sums.space, sums.table, sums.model).exact(limit)
    assert both is not None and alone is not None
    assert both.score >= alone.score
    assert sums.fits(both.config, limit)
    prices = sums.prices(limit)
    assert [price.metric for price in prices] == ["bops", "size_bytes"]
    assert max(price.nats_per_unit for price in prices) > 0
    several = SeveralLimits(sums.space, sums.rises, sums._rows)
    limits = np.array(sums._limits(limit))
    for place, price in enumerate(prices):
        more = limits.copy()
        more[place] *= 1 + 1e-6
        gain = several.relaxed(limits).score - several.relaxed(more).score
        assert gain == pytest.approx(
            price.nats_per_unit * limits[place] * 1e-6, rel=1e-3, abs=1e-15
        )


def test_a_search_ends_within_all_limits_and_near_the_optimum() -> None:
    sums = problem(10, bits=range(2, 9), activation_bits=range(2, 9))
    limit = BOTH.limit(sums.space)
    search = ProgressiveSearch(
        *(sums.space, sums.cost, limit),
        **{"refine": True, "beside": sums.beside, "n_candidates": 20},
    )
    ends = search.run(sums.score)
    answer, optimum = sums.space.config(ends[-1].state), sums.exact(limit)
    assert sums.fits(answer, limit)
    assert search.progress(ends[-1].state) == 1.0
    assert optimum is not None
    assert optimum.score <= sums.score(answer) <= 1.2 * optimum.score
    assert ProgressiveSearch.from_json(search.to_json(), sums.space, "bops").limits == search.limits


def test_limits_that_contradict_each_other_are_refused_with_what_each_leaves() -> None:
    space = SearchSpace.build(fake_layers(4), bits=(8, 2), pin_first_last=None)
    least = space.costs("size_bytes").cost(space.config(space.bottom))
    with pytest.raises(BudgetError, match=r"below the cheapest assignment, 9.98 KiB") as caught:
        check_reachable(space, parse_budget(["0.5 bops", f"{least - 1} bytes"]))
    assert caught.value.minimum == least
    pairs = SearchSpace.build(fake_layers(4), bits=(8, 2), activation_bits=(8, 2))
    check_reachable(pairs, parse_budget(["0.9 bops", "0.9 size_bytes"]))


def test_nothing_that_the_solver_prints_comes_to_standard_output(capfd, monkeypatch) -> None:
    def talks(*given, **options):
        ctypes.CDLL(None).puts(b"a line left from debugging")
        return milp(*given, **options)

    milp = several_module.milp
    monkeypatch.setattr(several_module, "milp", talks)
    sums = problem(6, bits=range(2, 9))
    assert sums.exact(BOTH.limit(sums.space)) is not None
    ctypes.CDLL(None).fflush(None)
    out, err = capfd.readouterr()
    assert out == ""
    assert "a line left from debugging" in err
