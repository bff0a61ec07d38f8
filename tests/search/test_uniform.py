"""Uniform bits within a limit."""

from hq_optuna.search import uniform_within
from tests.benchmarks.test_baselines import problem


def within(these):
    return uniform_within(these.space, lambda config: these.cost(config) <= these.limit)


def test_uniform_bits_are_the_widest_within_the_limit():
    these = problem(bits=range(2, 9), pin_first_last=None)
    (name,) = within(these)
    assert name == "5 bits"  # 25 / 64 of the cost; 6 bits are 36 / 64
    assert set(within(these)[name].values()) == {(5, 5)}
    assert uniform_within(these.space, lambda config: these.cost(config) <= 1.0) == {}


def test_uniform_weights_and_activations_apart_are_those_that_none_beats_in_both():
    these = problem(0.5, bits=(8, 6, 4), activation_bits=(8, 6, 4), pin_first_last=None)
    assert set(within(these)) == {"W8A4", "W4A8"}  # 32 / 64 each; W6A6 is 36 / 64
    wider = problem(0.6, bits=(8, 6, 4), activation_bits=(8, 6, 4), pin_first_last=None)
    assert set(within(wider)) == {"W8A4", "6 bits", "W4A8"}
