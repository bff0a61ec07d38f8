"""Output quantizers: where they stand, and that they round there and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import hq_optuna as hq
from hq_optuna.errors import NetworkError, SettingError
from hq_optuna.network.introspection import introspect
from hq_optuna.objective import preparation
from hq_optuna.quantization import observe_inputs, prepare, set_bits
from hq_optuna.quantization.correction import StatisticsCorrection
from hq_optuna.quantization.outputs import (
    add_output_quantizers_,
    find_places,
    output_quantizers,
    outputs_always,
)
from hq_optuna.space.layers import FLOAT_BITS
from tests.export.answers import data_of, images, randomized


class Residual(nn.Module):
    """A residual addition, a product, a concatenation, pools, and a layer that only one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.gate, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)))
        y = self.b(functional.relu(self.a(x)))
        x = functional.relu(x + y)
        x = x * torch.sigmoid(self.gate(functional.adaptive_avg_pool2d(x, 1)))
        x = self.c(torch.cat([x, functional.max_pool2d(x, 3, 1, 1)], 1))
        return self.head(functional.avg_pool2d(functional.relu(x), 8).flatten(1))


def rounded(network=None, bits=8, layer_bits=(8, 8)):
    network = randomized(Residual()) if network is None else network
    data = data_of(images())
    layers = introspect(network, data).layers
    names = [layer.name for layer in layers]
    prepared = prepare(network, layers, observe_inputs(network, names, data))
    add_output_quantizers_(prepared, names, data, bits)
    set_bits(prepared, dict.fromkeys(names, layer_bits))
    return network, prepared


def test_places_are_joins_pools_and_what_others_than_one_layer_read():
    prepared = rounded()[1]
    assert [(p.kind, p.call, p.name) for p in prepared.output_places] == [
        ("relu", 0, "stem.output_1"),  # behind the batch-norm and the ReLU; two read it
        ("layer", 0, "b.output_1"),  # what is added
        ("relu", 2, "b.output_2"),  # the sum
        ("layer", 0, "gate.output_1"),  # what the sigmoid reads
        ("sigmoid", 0, "gate.output_2"),
        ("mul", 0, "gate.output_3"),
        ("max_pool2d", 0, "gate.output_4"),
        ("relu", 3, "c.output_1"),  # what the pool reads; a layer alone reads the pool itself
        ("layer", 0, "head.output_1"),  # what the user reads
    ]  # and not the concatenation, "a", or the average pool before "gate": one layer reads each


@torch.no_grad()
def test_outputs_are_rounded_exactly_there():
    """Against the same network with its roundings written out by hand."""
    network, prepared = rounded(layer_bits=(FLOAT_BITS, 8))
    q = output_quantizers(prepared)

    def enters(name, x):
        return prepared.get_submodule(name).input_fake_quantize(x)

    def by_hand(x):
        n = network
        x = q["stem.output_1"](functional.relu(n.norm(n.stem(enters("stem", x)))))
        y = functional.relu(n.a(enters("a", x)))
        y = q["b.output_1"](n.b(enters("b", y)))
        x = q["b.output_2"](functional.relu(x + y))
        pooled = functional.adaptive_avg_pool2d(x, 1)
        gate = q["gate.output_1"](n.gate(enters("gate", pooled)))
        x = q["gate.output_3"](x * q["gate.output_2"](torch.sigmoid(gate)))
        x = torch.cat([x, q["gate.output_4"](functional.max_pool2d(x, 3, 1, 1))], 1)
        x = q["c.output_1"](functional.relu(n.c(enters("c", x))))
        x = functional.avg_pool2d(x, 8).flatten(1)
        return q["head.output_1"](n.head(enters("head", x)))

    x = images(8, seed=5)
    assert torch.equal(prepared(x), by_hand(x))
    scale, zero_point = q["head.output_1"].range(8)
    codes = prepared(x) / torch.tensor(scale)
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert 0 <= float(codes.round().min()) + zero_point <= 255


@torch.no_grad()
def test_in_float_nothing_is_rounded_and_any_layers_bits_turn_it_on():
    network, prepared = rounded()
    x = images(8)
    names = list(dict(prepared.named_modules()))
    layers = [n for n in ("stem", "a", "b", "gate", "c", "head") if n in names]
    set_bits(prepared, dict.fromkeys(layers, (FLOAT_BITS, FLOAT_BITS)))
    assert torch.equal(prepared(x), network(x))
    set_bits(prepared, {"a": (8, FLOAT_BITS)})
    assert {q.bits for q in output_quantizers(prepared).values()} == {8}
    with outputs_always(prepared, False):
        set_bits(prepared, {"a": (FLOAT_BITS, FLOAT_BITS)})
        set_bits(prepared, {"a": (8, FLOAT_BITS)})
        assert {q.bits for q in output_quantizers(prepared).values()} == {FLOAT_BITS}


@torch.no_grad()
def test_copies_round_too_and_gradients_pass_straight_through():
    _, prepared = rounded()
    x = images(8)
    assert torch.equal(copy.deepcopy(prepared)(x), prepared(x))
    with torch.enable_grad():
        x.requires_grad_()
        prepared(x).sum().backward()
        assert x.grad is not None and bool(x.grad.any())


@torch.no_grad()
def test_shifts_of_the_correction_come_before_the_rounding():
    _, prepared = rounded(layer_bits=(3, 4))
    StatisticsCorrection(prepared, data_of(images())).apply()
    assert bool(prepared.head.output_shift.any())
    scale, _ = output_quantizers(prepared)["head.output_1"].range(8)
    codes = prepared(images(8)).double() / scale
    assert torch.allclose(codes, codes.round(), atol=1e-4)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(x)
        if float(x[0, 0]) > 0:
            x = torch.relu(x)
        return self.b(x) + x


def test_a_network_that_branches_on_its_data_is_refused():
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    network = Branching()
    data = data_of(torch.cat([x, -x]), 1)
    layers = introspect(network, data_of(x)).layers
    prepared = prepare(network, layers)
    with pytest.raises(NetworkError, match="branches on decides which outputs are rounded"):
        add_output_quantizers_(prepared, ["a", "b"], data, 8)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tensor(self.a(x).tolist())


def test_refused_are_networks_with_nothing_to_round_and_functions_for_a_forward():
    x = torch.randn(8, 4)
    network = Detached()
    prepared = prepare(network, introspect(network, data_of(x)).layers)
    with pytest.raises(NetworkError, match="Search without output_bits"):
        find_places(prepared, ["a"], x)
    network = nn.Sequential(nn.Linear(4, 4))
    prepared = prepare(network, introspect(network, data_of(x)).layers)
    prepared.forward = lambda x: prepared[0](x)
    with pytest.raises(NetworkError, match="in the place of its class's forward"):
        add_output_quantizers_(prepared, ["0"], data_of(x), 8)


def search(budget="0.6 bops", **settings):
    torch.manual_seed(0)
    x, network = images(64), randomized(Residual())
    with torch.no_grad():
        labels = network(x).argmax(1)
    return network, x, hq.BitSearch(network, (x, labels), budget=budget, **settings)


@torch.no_grad()
def test_a_search_scores_saves_and_loads_them(tmp_path):
    network, x, plain = search(verify=2)
    _, _, found = search(verify=2, output_bits=3)
    result = found.result(found.optimize())
    before, after = (s.objective.prepare().sensitivity.score(result.config) for s in (plain, found))
    assert sum(after) > sum(before)  # three bits cost something, whatever the layers have
    assert after[0] == before[0]
    rises = [s.objective.prepare().rises(result.config, [0]).mean() for s in (plain, found)]
    assert rises[1] > rises[0]
    assert result.facts["output_quantizers"] == 9
    assert {q.bits for q in output_quantizers(result.network).values()} == {3}
    result.save(tmp_path / "answer")
    loaded = hq.load(tmp_path / "answer", network)
    assert torch.equal(loaded(x), result.network(x))
    assert len(torch.unique(loaded(x))) <= 8
    assert not torch.equal(plain.objective.quantized(result.config)(x), loaded(x))


@torch.no_grad()
def test_a_worker_that_joins_takes_the_ranges_from_the_store(tmp_path, monkeypatch):
    where = {"storage": f"sqlite:///{tmp_path}/study.db", "study_name": "shared"}
    searches = [search(verify=2, output_bits=4) for _ in range(2)]
    networks, x = [], images(64)
    for _, _, each in searches:
        study = each.open(**where, artifacts=tmp_path / "artifacts")
        networks.append(each.objective.quantized(each.space.config(each.space.bottom)))
        monkeypatch.setattr(preparation, "add_output_quantizers_", None)  # not found anew
    ranges = [[q.range(4) for q in output_quantizers(n).values()] for n in networks]
    assert ranges[0] == ranges[1] and len(ranges[0]) == 9
    assert torch.equal(networks[0](x), networks[1](x))
    tables = [each.objective.prepare(study).sensitivity.to_json() for _, _, each in searches]
    assert tables[0] == tables[1]


def test_searches_that_cannot_use_them_are_refused():
    with pytest.raises(SettingError, match="nothing would run in integers"):
        search("0.8 size_bytes", output_bits=8, activation_bits=None)
    plan = hq.TrainingPlan(data=(images(32), torch.zeros(32, dtype=torch.int64)), every=1)
    with pytest.raises(SettingError, match="training knows no ranges of outputs"):
        search(output_bits=8, training=plan)
