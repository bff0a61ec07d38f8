"""Finalists: different assignments within the budget, and a choice that never trusts one figure."""

import math
import random

import pytest

from hq_optuna.search import Additive
from hq_optuna.search.finalists import UNIFORM, choose_finalist, finalists, paired
from hq_optuna.space.cost import CostModel
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace


def sums(seed: int = 0, n: int = 7, apart: bool = True, like: bool = False) -> Additive:
    """Return a table that falls by about four a bit; of layers all ``like`` each other, or not."""
    draw = random.Random(seed)
    layers = [
        LayerSpec(f"l{i}", "Linear", (8, 8), 0, (64 if like else draw.randint(20, 4000)), 1, 8)
        for i in range(n)
    ]
    space = SearchSpace.build(
        layers,
        bits=range(2, 9),
        activation_bits=range(2, 9) if apart else "same",
        pin_first_last=None,
    )
    table = {
        layer.name: {
            part: {b: scale * 4.0**-b for b in range(2, 9)}
            for part, scale in (
                (part, 10 ** draw.uniform(0, 2)) for part in ("weights", "activations")
            )
        }
        for layer in layers
    }
    if like:
        row = {b: 64 * 4.0**-b for b in range(2, 9)}
        table = {layer.name: {"weights": row, "activations": row} for layer in layers}
    return Additive(space, table, CostModel(layers))


def at_bits(of: Additive, bits: int) -> float:
    start = of.space.start
    return of.cost({name: type(pair)(bits, bits) for name, pair in start.items()})


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_finalists_differ_fit_and_begin_with_uniform_bits(seed, apart):
    of = sums(seed, apart=apart)
    limit = at_bits(of, 4)
    found = finalists(of, of.space.bottom, limit, 8)
    states = [one.state for one in found]
    assert len(set(states)) == len(states) >= 3
    assert all(of.cost(of.space.config(state)) <= limit for state in states)
    assert found[0].name == UNIFORM
    assert set(found[0].state) == {4}
    assert found[1] == ("the incumbent", of.space.bottom)
    assert of.best(limit) in states
    assert finalists(of, of.space.bottom, limit, 3) == found[:3]


def test_one_finalist_is_the_best_within_a_notch_of_uniform_bits():
    tried = 0
    for seed in range(4):
        of = sums(seed, n=5)
        limit = at_bits(of, 5)
        named = {f.name: f.state for f in finalists(of, of.space.bottom, limit, 9)}
        state = named.get("within a notch of uniform")
        if state is None:  # another finalist is the same
            continue
        tried += 1
        assert all(abs(bits - 5) <= 1 for bits in state)
        draw = random.Random(seed)
        for _ in range(3000):
            config = of.space.config(tuple(draw.choice((4, 5, 6)) for _ in state))
            assert of.cost(config) > limit or of.score(config) >= of.score(of.space.config(state))
    assert tried


def test_where_layers_are_all_alike_every_optimum_is_uniform():
    of = sums(n=4, apart=False, like=True)
    found = finalists(of, (4,) * 4, at_bits(of, 4), 8)
    assert [one.state for one in found] == [(4,) * 4]


def test_without_uniform_bits_within_the_budget_there_are_the_others():
    layers = [LayerSpec(n, "Linear", (8, 8), 0, macs, 1, 8) for n, macs in (("a", 64), ("b", 640))]
    space = SearchSpace.build(layers, bits=(8, 2), pin_first_last=None, pins={"a": 8})
    row = {8: 1e-4, 2: 0.1}
    table = {name: {"weights": row, "activations": row} for name in ("a", "b")}
    of = Additive(space, table, CostModel(layers))
    limit = of.cost(space.config((2,)))
    assert [one.state for one in finalists(of, (2,), limit, 8)] == [(2,)]


def test_the_least_product_of_predicted_and_measured_rise_wins():
    measured = [(4.0, 4.2), (1.0, 1.2), (0.5, 0.7)]
    assert choose_finalist([4.0, 1.0, 3.0], measured, uniform=0) == 1
    assert choose_finalist([4.0, 1.0, 1.0], measured, uniform=0) == 2


def test_uniform_bits_stay_where_samples_do_not_tell_the_best_apart():
    uniform = (1.0, 2.0, 3.0, 4.0)
    by_luck = (0.0, 2.9, 1.5, 5.3)  # 0.075 less, and the standard error is 0.6
    assert choose_finalist([1.0, 0.2], [uniform, by_luck], uniform=0) == 0
    surely = tuple(rise - 0.1 for rise in uniform)  # as little, but in every block
    assert choose_finalist([1.0, 0.2], [uniform, surely], uniform=0) == 1
    assert choose_finalist([1.0, 0.2], [uniform, by_luck], uniform=None) == 1


def test_paired_differences_have_the_standard_error_of_their_mean():
    draw = random.Random(1)
    means = []
    for _ in range(2000):
        common = [draw.gauss(0, 5) for _ in range(16)]
        one = [c + 1 + draw.gauss(0, 1) for c in common]
        other = [c + draw.gauss(0, 1) for c in common]
        means.append(paired(one, other))
    spread = math.sqrt(sum((m - 1) ** 2 for m, _ in means) / len(means))
    assert spread == pytest.approx(sum(e for _, e in means) / len(means), rel=0.05)
