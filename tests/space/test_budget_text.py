"""Budgets as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_optuna.errors import StudyFileError
from hq_optuna.space.budget import Budget
from hq_optuna.space.cost import format_cost
from hq_optuna.study_files.study_file import parse_budget


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
def test_budgets_are_read_as_people_write_them(text, budget):
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
def test_a_budget_that_means_nothing_or_two_things_is_refused(text, words):
    with pytest.raises(StudyFileError, match=words):
        parse_budget(text)


@given(st.integers(1_000, 9_999), st.integers(0, 12), st.sampled_from(["bops", "size_bytes"]))
def test_a_printed_absolute_budget_can_be_typed_again(digits, exponent, metric):
    # Printed with four digits, so what is printed must read back to what prints the same.
    printed = format_cost(digits * 10.0**exponent, metric)
    assert format_cost(parse_budget(printed).value, metric) == printed
    assert parse_budget(printed).metric == metric
