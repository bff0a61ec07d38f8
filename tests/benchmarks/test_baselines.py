"""What the search is compared with: fair, within the budget, repeatable."""

import itertools
import math

import pytest

from benchmarks.baselines import METHODS, Problem, random_search, run_method
from hq_optuna.space.cost import CostModel
from tests.fake_search import fake_score, fake_space, fake_table


def problem(share=0.4, **choices):
    space = fake_space(5, **choices)
    model, table = CostModel(space.layers), fake_table(space)
    return Problem(
        space, model.cost, share * model.int8, lambda config: sum(fake_score(table, config))
    )


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_repeatable_counts_its_evaluations_and_keeps_the_budget(method):
    scored = []
    these = problem()
    counting = Problem(
        these.space, these.cost, these.limit, lambda c: scored.append(c) or these.score(c)
    )
    found = run_method(method, counting, 40, seed=1)
    assert found.evaluations == len(scored) == 40
    assert found.config is not None
    assert these.cost(found.config) <= these.limit
    within = [these.score(c) for c in scored if these.cost(c) <= these.limit]
    assert found.score == these.score(found.config) == min(within)
    assert run_method(method, these, 40, seed=1).config == found.config
    assert found.seconds > 0


@pytest.mark.parametrize("method", METHODS)
def test_each_method_finds_the_optimum_of_a_small_space(method):
    these = problem()
    every = itertools.product(*(v.bits for v in these.space.variables))
    configs = [c for c in map(these.space.config, every) if these.cost(c) <= these.limit]
    best = min(map(these.score, configs))
    assert run_method(method, these, 150, seed=0).score == pytest.approx(best, rel=1e-12)


def test_random_draws_are_all_within_the_limit_and_use_it():
    these = problem(bits=range(2, 9), pin_first_last=None)
    drawn = []
    random_search(
        Problem(these.space, these.cost, these.limit, lambda c: drawn.append(c) or 1.0), 50, 0
    )
    costs = [these.cost(c) for c in drawn]
    assert max(costs) <= these.limit
    assert min(costs) > 0.5 * these.limit
    assert len({c.digest for c in drawn}) > 40


def test_a_method_that_finds_nothing_says_so():
    these = problem()
    tight = these.cost(these.space.config(these.space.bottom))
    found = run_method("TPE", Problem(these.space, these.cost, tight, these.score), 3, 0)
    assert found.config is None
    assert found.score == math.inf


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method is one of random, TPE, NSGA-II; got 'grid'"):
        run_method("grid", problem(), 1, 0)
