"""Budgets: what they allow, what they refuse, and that the refusal says the minimum."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hq_optuna.errors import BudgetError, HqOptunaError, SettingError
from hq_optuna.search import check_reachable
from hq_optuna.space.budget import Budget, parse_budget
from hq_optuna.space.cost import CostModel, format_cost
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace


def space(*n_macs: int, **options: Any) -> SearchSpace:
    layers = [
        LayerSpec(f"l{k}", "Linear", (n, 1), 0, macs=n, n_calls=1, n_inputs=1)
        for k, n in enumerate(n_macs)
    ]
    return SearchSpace.build(layers, **options)


def test_a_fraction_refers_to_all_layers_at_8_bits_pinned_ones_too() -> None:
    these = space(100, 200, 300)
    assert Budget.fraction(bops=0.25).limit(these) == 600 * 64 / 4
    assert Budget.fraction(size_bytes=0.5).limit(these) == 300.0


def test_an_absolute_budget_is_its_own_limit() -> None:
    assert Budget.absolute(bops=24e9).limit(space(5, 5, 5)) == 24e9


def test_a_fraction_above_one_allows_more_than_8_bits() -> None:
    assert Budget.fraction(bops=2).limit(space(1, 1, 1)) == 2 * 3 * 64


def test_budgets_read_as_people_write_them() -> None:
    assert str(Budget.fraction(bops=0.25)) == "25 % of the all-8-bit BOPs"
    assert str(Budget.absolute(bops=24e9)) == "24 GBOPs"
    assert str(Budget.absolute(size_bytes=65536)) == "64 KiB"


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({}, "limits one metric, for example bops=0.25; got none"),
        ({"bops": 1, "size_bytes": 2}, r"got \['bops', 'size_bytes'\]"),
        ({"flops": 1}, "limits one of bops, size_bytes, activation_bytes, latency_s; got 'flops'"),
        ({"bops": 0}, "positive number; got bops=0"),
        ({"bops": -0.5}, "positive number; got bops=-0.5"),
        ({"bops": float("nan")}, "positive number; got bops=nan"),
        ({"size_bytes": float("inf")}, "positive number; got size_bytes=inf"),
        ({"bops": "a lot"}, "positive number; got bops='a lot'"),
        ({"bops": True}, "positive number; got bops=True"),
    ],
)
@pytest.mark.parametrize("make", [Budget.fraction, Budget.absolute])
def test_a_budget_that_means_nothing_is_refused(
    make: Any, limit: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**limit)


@pytest.mark.parametrize("value", [np.int64(2), np.float32(2), Fraction(4, 2), 2])
@pytest.mark.parametrize("make", [Budget.fraction, Budget.absolute])
def test_a_budget_is_a_real_number_of_any_kind_and_kept_as_a_float(make: Any, value: Any) -> None:
    found = make(bops=value).value
    assert (found, type(found)) == (2.0, float)


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


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.25", Budget.fraction(bops=0.25)),
        (" .25 bops ", Budget.fraction(bops=0.25)),
        ("1", Budget.fraction(bops=1)),
        ("0.25 size_bytes", Budget.fraction(size_bytes=0.25)),
        ("25% size_bytes", Budget.fraction(size_bytes=0.25)),
        ("25 %", Budget.fraction(bops=0.25)),
        ("150% bops", Budget.fraction(bops=1.5)),
        ("24e9 bops absolute", Budget.absolute(bops=24e9)),
        ("24e9 absolute", Budget.absolute(bops=24e9)),
        ("64000 size_bytes absolute", Budget.absolute(size_bytes=64_000)),
        ("0.5 bops absolute", Budget.absolute(bops=0.5)),
        ("24 GBOPs", Budget.absolute(bops=24e9)),
        ("0.5 gbops", Budget.absolute(bops=0.5e9)),
        ("24gbops absolute", Budget.absolute(bops=24e9)),
        ("3 kBOPs", Budget.absolute(bops=3e3)),
        ("3 MBOPs", Budget.absolute(bops=3e6)),
        ("3 TBOPs", Budget.absolute(bops=3e12)),
        ("64000 bytes", Budget.absolute(size_bytes=64_000)),
        ("64 KiB", Budget.absolute(size_bytes=64 * 1024)),
        ("5.5MiB", Budget.absolute(size_bytes=5.5 * 1024**2)),
        ("1 GiB", Budget.absolute(size_bytes=1024**3)),
        (0.25, Budget.fraction(bops=0.25)),
        (Budget.absolute(bops=7), Budget.absolute(bops=7)),
    ],
)
def test_budgets_are_read_as_people_write_them(text: Any, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is no budget"),
        ("a quarter", "'a quarter' is no budget"),
        ("nan", "is no budget"),
        ("1e999", "is a positive number; got '1e999'"),
        ("0", "is a positive number; got '0'"),
        ("-0.5 bops", "is a positive number; got '-0.5 bops'"),
        ("2 bops", r"'2 bops' is more than all of the all-8-bit cost.*'24e9 bops absolute'"),
        ("24e9", "'24e9' is more than all"),
        ("5.8 MB", r"'MB' in '5\.8 MB' is neither metric nor unit.*GiB, MiB, KiB, bytes"),
        ("0.25 macs", r"'macs' in .* is neither metric nor unit.*metrics: bops, size_bytes"),
        ("25% GBOPs", "'25% GBOPs' is no absolute budget"),
        ("25% bops absolute", "is no absolute budget"),
        ("9 macs absolute", "is no absolute budget"),
        ("0.25 bops bops", "is no budget"),
        ("0.25, bops", "is no budget"),
    ],
)
def test_a_budget_that_means_nothing_or_two_things_is_refused(text: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        parse_budget(text)


@given(st.integers(1_000, 9_999), st.integers(0, 12), st.sampled_from(["bops", "size_bytes"]))
def test_a_printed_absolute_budget_can_be_typed_again(
    digits: int, exponent: int, metric: Any
) -> None:
    # Printed with four digits, so what is printed must read back to what prints the same.
    printed = format_cost(digits * 10.0**exponent, metric)
    assert format_cost(parse_budget(printed).value, metric) == printed
    assert parse_budget(printed).metric == metric
