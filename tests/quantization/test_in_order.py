"""Rounding in the order of running, against closed forms, slower twins and the float network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hq_optuna as hq
from hq_optuna.export.deployed import deployed
from hq_optuna.network.batches import Batches, forward, read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.compensation import compensate_weights
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.functional import quantize_activation
from hq_optuna.quantization.in_order import InOrder, output_range, places_in_memory
from hq_optuna.quantization.moments import LayerPlaces
from hq_optuna.quantization.prepare import (
    float_weight,
    input_quantizer,
    prepared_layers,
    weight_quantizer,
)
from hq_optuna.quantization.ranges import AffineRange, affine_range
from hq_optuna.space.layers import FLOAT_BITS
from tests.quantization.test_compensation import MODULES
from tests.small_networks import ConvNet, Twice


class Deep(nn.Module):
    """Convolutions with batch-norm, one of them depthwise, a shortcut and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 12, 1), (12, 12, 12), (12, 12, 1), (12, 12, 1))
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, groups=g, bias=False) for i, o, g in widths
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in widths)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = torch.relu(norm(conv(x)))
            x = x + y if place == 2 else y
        return self.head(x.mean((2, 3)))


def smooth_images(n: int, seed: int, size: int = 8) -> Tensor:
    """Return images whose neighbouring pixels are alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, size // 2, size // 2, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=2.0, mode="bilinear")


def batches(x: Tensor, size: int = 16) -> Batches:
    return read_batches((x, torch.zeros(len(x), dtype=torch.long)), batch_size=size)


def made(network: nn.Module, x: Tensor, bits: tuple[int, int]) -> tuple[nn.Module, Batches]:
    """Return a prepared network with compensated weights and these bits, and its data."""
    data = batches(x)
    layers = introspect(network, data[0].inputs).layers
    names = [layer.name for layer in layers]
    prepared = prepare(network, layers, observe_inputs(network, names, data))
    compensate_weights(prepared, layers, data, {name: {bits[0]} for name in names})
    set_bits(prepared, dict.fromkeys(names, bits))
    return prepared, data


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Deep()
        network.train()(smooth_images(128, 9))
    return network.eval()


@torch.no_grad()
def error(network: nn.Module, other: nn.Module, x: Tensor) -> float:
    return float((network(x) - other(x)).square().mean())


@torch.no_grad()
def test_unseen_outputs_come_nearer_to_those_of_float():
    """Inputs are alike, so that a layer can tell what the ones before it lost."""
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        network = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(24, 24), nn.ReLU())))
        mix = torch.randn(5, 24)
        x = torch.randn(1024, 5) @ mix + 0.05 * torch.randn(1024, 24)
        prepared, data = made(network.eval(), x[:256], (3, 3))
        correction = StatisticsCorrection(prepared, data)
        correction.apply()
        corrected = copy.deepcopy(prepared)
        correction.reset()
        fitted = copy.deepcopy(prepared)
        InOrder(prepared, data, range(len(data))).fit_(fitted)
        ratios.append(error(fitted, network, x[256:]) / error(corrected, network, x[256:]))
    assert np.exp(np.mean(np.log(ratios))) < 0.8, ratios


def test_the_same_numbers_come_out_twice_and_the_prepared_network_stays(deep):
    prepared, data = made(deep, smooth_images(64, 0), (3, 4))
    x = smooth_images(8, 1)
    with torch.no_grad():
        before = prepared(x)
    in_order = InOrder(prepared, data, range(len(data)))
    first, second = copy.deepcopy(prepared), copy.deepcopy(prepared)
    in_order.fit_(first)
    in_order.fit_(second)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))
        assert not torch.equal(first(x), before)
        assert torch.equal(prepared(x), before)


@pytest.mark.parametrize("network", [Deep, ConvNet], ids=lambda n: n.__name__)
def test_a_network_in_float_stays_as_it_is(network):
    torch.manual_seed(0)
    network = network().eval()
    x = torch.randn(32, 2 if isinstance(network, ConvNet) else 3, 8, 8)
    prepared, data = made(network, x, (FLOAT_BITS, FLOAT_BITS))
    fitted = copy.deepcopy(prepared)
    InOrder(prepared, data, range(len(data))).fit_(fitted)
    with torch.no_grad():
        torch.testing.assert_close(fitted(x), network(x), rtol=1e-5, atol=1e-6)


def test_layers_that_cannot_be_fitted_stay_as_they_were():
    torch.manual_seed(0)
    twice = Twice().eval()
    prepared, data = made(twice, torch.randn(48, 3), (3, 3))
    fitted = copy.deepcopy(prepared)
    InOrder(prepared, data, range(len(data))).fit_(fitted)
    ours, theirs = (n.get_submodule("shared") for n in (fitted, prepared))
    assert torch.equal(ours.weight, theirs.weight)
    assert input_quantizer(ours).range(3) == input_quantizer(theirs).range(3)
    moved = [n for n in ("enter", "leave") if (
        not torch.equal(fitted.get_submodule(n).weight, prepared.get_submodule(n).weight)
    )]  # fmt: skip
    assert moved


def test_rounded_weights_lie_on_the_grid_of_their_scales(deep):
    prepared, data = made(deep, smooth_images(64, 0), (3, 4))
    InOrder(prepared, data, range(len(data))).fit_(prepared)
    for module in prepared_layers(prepared).values():
        holder = weight_quantizer(module)
        weight = float_weight(module).detach()
        scale = holder.scale(weight, 3)
        codes = holder.quantized(weight, 3).flatten(1) / scale[:, None]
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
        assert float(codes.abs().max()) < 3.5


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_ranges_are_about_as_good_as_the_best_of_thousands(signed, normed):
    torch.manual_seed(0)
    rows = torch.randn(1, 4000, 12) ** 3
    rows = rows if signed else rows.relu()
    weight = torch.randn(1, 5, 12) * torch.tensor([1.0, 0.1, 3.0, 1.0, 1.0])[:, None]
    top = float(rows.max())
    before = affine_range(float(rows.min()), top, 3)

    def lost(found: AffineRange) -> float:
        change = (quantize_activation(rows, *found, 3) - rows) @ weight.mT
        unit = (rows @ weight.mT).var(1) if normed else 1.0
        return float((change.var(1) / unit).sum())

    lows = np.linspace(float(rows.min()), 0, 40) if signed else [0.0]
    tried = [affine_range(low, high, 3) for low in lows for high in np.linspace(0, top, 41)[1:]]
    found = output_range(weight, rows, 3, before, normed=normed)
    assert lost(found) < 1.1 * min(map(lost, tried))
    assert lost(found) < 0.7 * lost(before)


def test_a_range_that_is_better_on_neither_half_stays():
    torch.manual_seed(0)
    rows = torch.rand(1, 256, 3).mul(15).round()  # of the grid of 4 bits: no error at all
    before = AffineRange(1.0, 0)
    assert output_range(torch.ones(1, 1, 3), rows, 4, before, normed=False) == before


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda v: str(v)[:40])
@torch.no_grad()
def test_rows_times_weights_are_the_layers_outputs(module, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    places = LayerPlaces(module, x)
    rows = places.rows(torch.arange(places.n))
    found = rows @ module.weight.reshape(len(rows), -1, rows.shape[2]).mT
    expected = module(x) - (0 if module.bias is None else torch.zeros(()))
    channels = -1 if isinstance(module, nn.Linear) else 1
    expected = expected.movedim(channels, -1).flatten(0, -2) - module.bias
    torch.testing.assert_close(found.movedim(0, 1).flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_as_many_batches_are_read_as_memory_holds(monkeypatch):
    data = batches(torch.randn(64, 3, 4, 4), size=8)
    assert places_in_memory(data, range(1, 8), 48) == tuple(range(1, 8))
    monkeypatch.setattr("hq_optuna.quantization.in_order.MOST_IN_MEMORY", 3 * 8 * 48)
    some = places_in_memory(data, range(1, 8), 48)
    assert len(some) == 3 and set(some) <= set(range(1, 8))


def test_samples_that_take_another_branch_do_no_harm():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rare, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            chosen = x[:, 0] > 0.3
            y = x.clone()
            y[chosen] = self.rare(x[chosen])
            return self.last(y)

    torch.manual_seed(0)
    network = Routed().eval()
    prepared, data = made(network, torch.randn(64, 4), (2, 2))
    fitted = copy.deepcopy(prepared)
    InOrder(prepared, data, range(len(data))).fit_(fitted)
    with torch.no_grad():
        assert all(bool(forward(fitted, batch.inputs).isfinite().all()) for batch in data)


def test_a_search_returns_the_fitted_network_and_measures_its_finalists_so(deep):
    images = smooth_images(96, 0)
    with torch.no_grad():
        given = images, deep(images).argmax(1)
    options = {"bits": (8, 4, 3), "budget": "0.3 bops", "verify": 3}
    search = hq.BitSearch(deep, given, nn.CrossEntropyLoss(), rounding="in_order", **options)
    study = search.optimize()
    result = search.result(study)
    x = smooth_images(16, 1)
    objective = search.objective
    scorer = objective.prepare(study)
    with torch.no_grad():
        assert torch.equal(objective.quantized(result.config)(x), result.network(x))
        plain = scorer.network(result.config, in_order=False)
        assert not torch.equal(plain(x), result.network(x))
        # What a finalist was measured at is the rise of the network that is handed over.
        places = objective.setup.set_aside_places
        found = scorer.rises(result.config, places)
        inputs = torch.cat([objective.data[place].inputs for place in places])
        before, moved = deep(inputs), result.network(inputs)
    whole = batches(inputs, len(inputs))
    told = objective.rise.fitted([before], whole).averaged()
    expected = told.of_samples(before, moved, whole[0])
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-9)


def test_what_is_exported_computes_the_same(deep):
    prepared, data = made(deep, smooth_images(64, 0), (3, 4))
    InOrder(prepared, data, range(len(data))).fit_(prepared)
    x = smooth_images(16, 1)
    with torch.no_grad():
        torch.testing.assert_close(deployed(prepared)(x), prepared(x), rtol=1e-4, atol=1e-5)
