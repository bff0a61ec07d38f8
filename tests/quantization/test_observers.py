"""Observers: the histogram of what enters each layer, and the ranges found from it."""

import numpy as np
import pytest
import torch
from torch import nn

from hq_optuna.errors import DataError
from hq_optuna.network.batches import read_batches
from hq_optuna.quantization import observers
from hq_optuna.quantization.functional import quantize_activation
from hq_optuna.quantization.observers import (
    N_BINS,
    TINY_RANGE,
    InputHistogram,
    observe_inputs,
    watch_inputs,
)
from tests.small_networks import ConvNet, Twice, assert_unchanged, make, seeded, snapshot

X = torch.randn(20, 3, generator=seeded(0), dtype=torch.float64)
Y = torch.zeros(20, dtype=torch.int64)


def data(x=X, batch_size=8):
    return read_batches((x, Y[: len(x)]), batch_size=batch_size)


def test_the_histogram_of_the_networks_input_is_that_of_the_data():
    found = observe_inputs(nn.Linear(3, 2).double(), [""], data())[""]
    expected, edges = np.histogram(X.numpy(), N_BINS)
    assert found.counts.sum() == X.numel()
    assert (found.edges[0], found.edges[-1]) == (float(X.min()), float(X.max()))
    np.testing.assert_allclose(found.edges, edges)
    # Single precision may put a value that lies on an edge into the next bin.
    assert np.abs(np.cumsum(found.counts) - np.cumsum(expected)).max() <= 1


def test_all_calls_of_a_layer_go_into_one_histogram():
    found = observe_inputs(make(Twice), ["shared", "leave"], data())
    assert found["shared"].counts.sum() == 2 * 20 * 4
    assert found["leave"].counts.sum() == 20 * 4


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("growing", [False, True])
def test_batches_hardly_change_the_histogram_and_what_its_ranges_cost(rectified, growing):
    """A histogram that is widened spreads what was counted, by less than a bin."""
    x = torch.randn(960, 40, generator=seeded(1))
    if growing:  # every batch is wider than all before it
        x *= torch.linspace(0.5, 1.5, 960)[:, None]
    x = x.relu() if rectified else x
    layer = nn.Linear(40, 1)
    labels = torch.zeros(960, dtype=torch.int64)
    whole, parts = (
        observe_inputs(layer, [""], read_batches((x, labels), batch_size=n))[""] for n in (960, 32)
    )
    assert np.array_equal(whole.edges, parts.edges)
    assert parts.counts.sum() == pytest.approx(x.numel())
    below = np.abs(np.cumsum(whole.counts) - np.cumsum(parts.counts))
    assert below.max() <= 2 * np.sort(whole.counts)[-2]  # the largest one holds the zeros
    for bits in (2, 4, 8):
        errors = [
            (quantize_activation(x, *h.range(bits), bits) - x).double().square().sum()
            for h in (parts, whole)
        ]
        assert errors[0] <= 1.01 * errors[1]


def test_the_histogram_starts_at_zero_where_nothing_is_negative():
    found = observe_inputs(nn.Linear(3, 2).double(), [""], data(X.abs() + 1))[""]
    assert found.edges[0] == 0.0
    for observer in ("squared_error", "min_max", "percentile"):
        assert found.range(4, observer).zero_point == 0


def test_a_layer_that_sees_only_zeros_or_is_never_called_gets_a_range():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x * 0)

    found = observe_inputs(Unused().double(), ["used", "unused"], data())
    for histogram in found.values():
        assert histogram.edges[-1] == TINY_RANGE
        for observer in ("squared_error", "min_max", "percentile"):
            scale, zero_point = histogram.range(8, observer)
            assert 0 < scale <= TINY_RANGE
            assert zero_point == 0


def test_more_values_than_single_precision_can_count_are_all_counted(monkeypatch):
    # torch.histc adds ones in float32 and stops at 2²⁴; a smaller limit here, the same loop.
    assert observers.MOST_COUNTED <= 2**24
    monkeypatch.setattr(observers, "MOST_COUNTED", 7)
    found = observe_inputs(nn.Linear(3, 2).double(), [""], data())[""]
    assert found.counts.sum() == X.numel()


def test_min_max_covers_all_values_and_percentile_all_but_the_rarest():
    values = np.linspace(-1.0, 2.0, 100_000)
    values[[0, -1]] = -50.0, 100.0
    counts, edges = np.histogram(values, 30_000)
    found = InputHistogram(counts.astype(float), edges)
    low_high = [(-zp * s, (255 - zp) * s) for s, zp in (found.range(8, o) for o in OBSERVERS)]
    assert low_high[0] == pytest.approx((-50, 100), abs=0.6)
    # 0.01 % of 100,000 values are ten on either side; bins are 0.005 wide, half a step is 0.006.
    assert low_high[1] == pytest.approx((-1, 2), abs=0.012)


OBSERVERS = ("min_max", "percentile")


def test_percentile_takes_the_quantiles_of_the_values():
    values = np.random.default_rng(0).exponential(size=50_000)
    counts, edges = np.histogram(values, N_BINS, (0, values.max()))
    scale, zero_point = InputHistogram(counts.astype(float), edges).range(8, "percentile")
    assert zero_point == 0
    # To the width of a bin.
    assert scale * 255 == pytest.approx(np.quantile(values, 0.9999), abs=edges[1] - edges[0])


def test_the_squared_error_range_is_found_from_the_histogram():
    values = np.append(np.tile([0.0, 1.0, 2.0, 3.0], 5000), 3.4)
    counts, edges = np.histogram(values, N_BINS)
    found = InputHistogram(counts.astype(float), edges)
    # Four values, four codes; one value in 20,000 between them is not worth a wider range.
    assert found.range(2) == (pytest.approx(1.0, abs=edges[1]), 0)
    assert found.range(2, "min_max") == (pytest.approx(3.4 / 3), 0)


def test_an_unknown_observer_is_refused_by_name():
    found = InputHistogram(np.ones(4), np.linspace(0, 1, 5))
    with pytest.raises(ValueError, match="squared_error, min_max, percentile; got 'entropy'"):
        found.range(4, "entropy")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_layer_that_receives_nan_or_infinity_is_named(bad):
    class Explodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            return self.inner(x * bad)

    with pytest.raises(DataError, match="'inner' receives NaN or infinity"):
        observe_inputs(Explodes().double(), ["inner"], data())


def test_observing_leaves_the_network_as_it_was_also_when_it_fails():
    network = make(ConvNet).train()
    before = snapshot(network)
    network.eval()
    names = ["stem", "depthwise", "up", "head"]
    x = torch.randn(4, 2, 6, 6, generator=seeded(1), dtype=torch.float64)
    observe_inputs(network, names, data(x))
    with pytest.raises(RuntimeError):
        observe_inputs(network, names, data(x[:, :1]))
    network.train()
    assert_unchanged(network, before)


def test_inputs_given_by_keyword_are_seen():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            return self.inner(input=x)

    seen = []
    network = Keyword().double()
    with watch_inputs(network, ["inner"], lambda name, x: seen.append((name, x))):
        network(X)
    network(X)
    assert [name for name, _ in seen] == ["inner"]
    assert torch.equal(seen[0][1], X)


def test_the_histogram_is_the_same_with_deterministic_algorithms():
    network, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(40, 3)
    data = read_batches((x, torch.zeros(40)))
    found = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            found.append(observe_inputs(network, ["0"], data)["0"])
        finally:
            torch.use_deterministic_algorithms(False)
    assert found[0].counts.sum() == 120
    assert (found[0].counts == found[1].counts).all()
