"""Budgets: what they allow, what they refuse, and that the refusal says the minimum."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hq_optuna.errors import BudgetError, HqOptunaError
from hq_optuna.space.budget import Budget, check_reachable
from hq_optuna.space.cost import CostModel
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace


def space(*n_macs: int, **options: Any) -> SearchSpace:
    layers = [
        LayerSpec(f"l{k}", "Linear", (n, 1), 0, macs=n, n_calls=1, n_inputs=1)
        for k, n in enumerate(n_macs)
    ]
    return SearchSpace.build(layers, **options)


def test_a_fraction_refers_to_all_layers_at_8_bits_pinned_ones_too() -> None:
    layers = space(100, 200, 300).layers
    assert Budget.fraction(bops=0.25).limit(layers) == 600 * 64 / 4
    assert Budget.fraction(size_bytes=0.5).limit(layers) == 300.0


def test_an_absolute_budget_is_its_own_limit() -> None:
    assert Budget.absolute(bops=24e9).limit(space(5, 5, 5).layers) == 24e9


def test_a_fraction_above_one_allows_more_than_8_bits() -> None:
    assert Budget.fraction(bops=2).limit(space(1, 1, 1).layers) == 2 * 3 * 64


def test_budgets_read_as_people_write_them() -> None:
    assert str(Budget.fraction(bops=0.25)) == "25 % of the all-8-bit BOPs"
    assert str(Budget.absolute(bops=24e9)) == "24 GBOPs"
    assert str(Budget.absolute(size_bytes=65536)) == "64 KiB"


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({}, "limits one metric, for example bops=0.25; got none"),
        ({"bops": 1, "size_bytes": 2}, r"got \['bops', 'size_bytes'\]"),
        ({"flops": 1}, "limits one of bops, size_bytes; got 'flops'"),
        ({"bops": 0}, "positive number; got bops=0"),
        ({"bops": -0.5}, "positive number; got bops=-0.5"),
        ({"bops": float("nan")}, "positive number; got bops=nan"),
        ({"size_bytes": float("inf")}, "positive number; got size_bytes=inf"),
    ],
)
@pytest.mark.parametrize("make", [Budget.fraction, Budget.absolute])
def test_a_budget_that_means_nothing_is_refused(
    make: Any, limit: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**limit)


def test_a_budget_below_the_cheapest_assignment_is_refused_with_the_minimum() -> None:
    # Pinned l0 and l2 cost 64 each, l1 at its fewest bits 2·2·1000.
    tight = space(1, 1000, 1)
    with pytest.raises(BudgetError, match=r"below the cheapest assignment, 4\.128 kBOPs") as caught:
        check_reachable(tight, Budget.absolute(bops=4000))
    assert caught.value.limit == 4000.0
    assert caught.value.minimum == 4128.0
    message = str(caught.value)
    assert "Budget 4 kBOPs (0.06238 of all-8-bit)" in message  # 4000 / (64 · 1002)
    assert "(0.06437 of all-8-bit" in message
    assert message.endswith("Raise the budget, allow fewer bits, or pin fewer layers.")
    assert isinstance(caught.value, HqOptunaError)
    assert isinstance(caught.value, ValueError)


def test_a_size_budget_is_refused_in_bytes() -> None:
    with pytest.raises(BudgetError, match=r"Budget 100 bytes .*cheapest assignment, 252 bytes"):
        check_reachable(space(1, 1000, 1), Budget.absolute(size_bytes=100))


@pytest.mark.parametrize("budget", ["0.25 bops", 0.25, None])
def test_what_is_no_budget_is_refused_in_words(budget: Any) -> None:
    with pytest.raises(TypeError, match=r"Budget\.fraction\(bops=0\.25\); got"):
        check_reachable(space(1, 1000, 1), budget)


def test_activations_left_in_float_count_with_32_bits_in_the_minimum() -> None:
    with pytest.raises(BudgetError) as caught:
        check_reachable(
            space(10, 10, pin_first_last=None, activation_bits=None), Budget.fraction(bops=0.9)
        )
    assert caught.value.minimum == 20 * 2 * 32


def test_a_budget_at_the_minimum_is_allowed() -> None:
    check_reachable(space(1, 1000, 1), Budget.absolute(bops=4128))


def test_a_budget_just_below_the_minimum_is_not() -> None:
    with pytest.raises(BudgetError):
        check_reachable(space(1, 1000, 1), Budget.absolute(bops=4127.999))


@given(st.lists(st.integers(1, 10**7), min_size=3, max_size=6))
@example([1, 19, 1])
def test_the_minimum_as_a_fraction_of_all_8_bit_is_allowed(n_macs: list[int]) -> None:
    # "Ask the cost, then scale it": the division and the product round, the budget must not care.
    tight = space(*n_macs)
    model = CostModel(tight.layers)
    minimum = model.cost(tight.config(tight.bottom))
    check_reachable(tight, Budget.fraction(bops=minimum / model.int8))


def test_percent_given_as_a_fraction_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bops=25 would be 2500 % .* write 0.25"):
        Budget.fraction(bops=25)
    assert Budget.fraction(bops=16).value == 16  # all in float
