"""Products of activations: both factors are rounded, searched, scored, saved and exported."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import hq_optuna as hq
from hq_optuna.errors import SpaceError
from hq_optuna.export.writing import write
from hq_optuna.network.batches import read_batches
from hq_optuna.network.introspection import introspect
from hq_optuna.network.products import with_products
from hq_optuna.objective.hessian import HessianObjective
from hq_optuna.quantization import prepare, set_bits
from hq_optuna.quantization.fitting import fit_layers
from hq_optuna.quantization.prepare import factor_quantizers, get_bits
from hq_optuna.scoring.scorer import Scorer
from hq_optuna.search.uniform import uniform_states
from hq_optuna.space.search_space import SearchSpace
from hq_optuna.training.settings import TrainingSettings
from tests.small_networks import seeded

N, T, D = 64, 6, 8
PRODUCTS = ["0.product_1", "0.product_2"]


class Attends(nn.Module):
    """Attention by one function, or by products."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.fused = nn.Linear(D, 3 * D), nn.Linear(D, D), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (2 * self.qkv(x)).chunk(3, -1)
        if self.fused:
            return x + self.out(scaled_dot_product_attention(q, k, v))
        return x + self.out((q @ k.mT).softmax(-1) @ v)


def transformer(fused: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(Attends(fused), nn.Flatten(), nn.Linear(T * D, 3)).eval()


def samples(network: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, T, D, generator=seeded(0))
    with torch.no_grad():
        return x, network(x).argmax(1)


def search_of(network: nn.Module, **settings) -> hq.BitSearch:
    given = {"products": True, "activation_bits": (2, 4, 6, 8), "pin_first_last": None}
    return hq.BitSearch(network, samples(network), **{**given, **settings})


def fitted(network: nn.Module, bits: int) -> tuple[nn.Module, Tensor, SearchSpace]:
    x, y = samples(network)
    network = with_products(network, x)
    layers = introspect(network, x).layers
    prepared = prepare(network, layers)
    needed = {a.name: (set[int](), {bits} if a.is_product else set[int]()) for a in layers}
    fit_layers(prepared, layers, read_batches((x, y)), needed, compensate=True)
    return prepared, x, SearchSpace.build(layers, pin_first_last=None)


def rounded_by_hand(x: Tensor, bits: int, quantizer) -> Tensor:
    scale, zero = quantizer.range(bits)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 2**bits - 1)


@pytest.mark.parametrize("bits", [8, 3])
def test_both_factors_are_rounded_in_ranges_of_their_own(bits: int) -> None:
    network = transformer()
    prepared, x, _ = fitted(network, bits)
    with torch.no_grad():
        assert torch.equal(prepared(x), network(x))
        set_bits(prepared, dict.fromkeys(PRODUCTS, (bits, bits)))
        attend = network[0]
        q, k, v = (2 * attend.qkv(x)).chunk(3, -1)
        factors = [factor_quantizers(prepared.get_submodule(name)) for name in PRODUCTS]
        q, k = (rounded_by_hand(a, bits, f) for a, f in zip((q, k.mT), factors[0], strict=True))
        p = rounded_by_hand((q @ k).softmax(-1), bits, factors[1][0])
        expected = x + attend.out(p @ rounded_by_hand(v, bits, factors[1][1]))
        assert torch.allclose(prepared[0](x), expected, atol=1e-5)
        assert not torch.allclose(prepared[0](x), attend(x), atol=1e-5)
    assert factors[1][0].range(bits).zero_point == 0  # probabilities have no sign


def test_a_products_factors_share_their_bits() -> None:
    prepared = fitted(transformer(), 8)[0]
    with pytest.raises(SpaceError, match="factors share their bits; got 4 and 8"):
        set_bits(prepared, {PRODUCTS[0]: (4, 8)})
    set_bits(prepared, {PRODUCTS[0]: (8, 8)})
    assert get_bits(prepared)[PRODUCTS[0]] == (8, 8)


def layers_of_transformer():
    network = transformer()
    x = samples(network)[0]
    return introspect(with_products(network, x), x).layers


def test_bits_of_products_are_chosen_as_those_of_activations_are() -> None:
    layers = layers_of_transformer()
    apart = SearchSpace.build(layers, bits=(8, 4), activation_bits=(8, 6), pin_first_last=None)
    found = {v.name: (v.part, v.bits) for v in apart.variables}
    assert found[PRODUCTS[0]] == ("factors", (8, 6))
    assert found["0.qkv:weights"] == ("weights", (8, 4))
    states = uniform_states(apart)
    assert apart.config(states[4, 8])[PRODUCTS[0]] == (8, 8)
    assert apart.config(states[4, 6])[PRODUCTS[0]] == (6, 6)
    fixed = SearchSpace.build(layers, bits=(8, 4), activation_bits=6, pin_first_last=None)
    assert fixed.start[PRODUCTS[1]] == (6, 6)
    assert not {v.name for v in fixed.variables} & set(PRODUCTS)
    same = SearchSpace.build(layers, bits=(8, 4), pin_first_last=None, pins={"*product_1": (4, 6)})
    assert same.start[PRODUCTS[0]] == (6, 6)
    assert {v.name: v.part for v in same.variables}[PRODUCTS[1]] == "both"
    cost = same.costs("bops").layer_cost(PRODUCTS[1], same.start[PRODUCTS[1]])
    assert cost == T * T * D * 64
    assert same.costs("size_bytes").layer_cost(PRODUCTS[1], same.start[PRODUCTS[1]]) == 0
    with pytest.raises(SpaceError, match="search without products"):
        SearchSpace.build(layers, activation_bits=None)


def test_hardware_that_says_nothing_of_products_is_refused() -> None:
    with pytest.raises(hq.errors.HardwareError, match="says nothing of Product layers"):
        search_of(transformer(), hardware="cmsis-nn", activation_bits="same")


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_table_tells_the_rise_that_is_measured(name: str) -> None:
    search = search_of(transformer())
    scorer = search.objective.prepare()
    table, data = scorer.sensitivity, search.objective.setup.table_data
    assert set(table.weights[name].values()) == {0.0}
    measuring = Scorer(
        *(scorer.prepared, table, data, cross_entropy),
        output_rise=search.objective.rise,
        correction=None,
    )
    for bits in (4, 6):
        in_float = dict.fromkeys(get_bits(scorer.prepared), (32, 32))
        _, measured = measuring.measure({**in_float, name: (bits, bits)})
        assert table.activations[name][bits] == pytest.approx(measured, rel=0.6)
    row = table.activations[name]
    assert row[2] > 5 * row[4] > 25 * row[8] > 0


@pytest.mark.parametrize("fused", [False, True])
def test_products_are_searched_saved_and_exported(fused: bool, tmp_path) -> None:
    network = transformer(fused)
    search = search_of(network, budget="0.4 bops")
    study = search.optimize()
    result = search.result(study)
    assert result.met
    assert search.seen.share_of_others == 0
    bits = {name: result.config[name] for name in PRODUCTS}
    assert all(w == a < 8 for w, a in bits.values())
    assert result.cost == search.space.costs("bops").cost(result.config)
    result.save(tmp_path)
    x, y = samples(network)
    loaded = hq.load(tmp_path, network)
    assert torch.equal(loaded(x), result.network(x))
    assert get_bits(loaded)[PRODUCTS[0]] == bits[PRODUCTS[0]]
    written = write(loaded, tmp_path / "net.onnx", (x, y))
    assert written.check is not None
    assert written.check.plain.equal > 0.999
    graph = onnx.load(written.path).graph
    makers = {name: node for node in graph.node for name in node.output}
    stored = {item.name for item in graph.initializer}
    rounded = {"DequantizeLinear", "Transpose", "Reshape"}
    of_activations = [
        [makers[name].op_type for name in node.input]
        for node in graph.node
        if node.op_type == "MatMul"
        and not any(makers[name].input[0] in stored for name in node.input)
    ]
    assert len(of_activations) == 2
    assert all(set(kinds) <= rounded for kinds in of_activations)


def test_products_are_refused_where_nothing_tells_their_rise() -> None:
    network = transformer()
    for scorer in ("diagonal", "fisher"):
        with pytest.raises(ValueError, match="Products of activations have no weights"):
            search_of(network, scorer=scorer)
    plan = hq.TrainingPlan(data=samples(network), every=1, settings=TrainingSettings(epochs=1))
    with pytest.raises(ValueError, match="without training"):
        search_of(network, training=plan)


def test_a_space_with_products_is_one_of_the_network_without_them_too() -> None:
    network = transformer()
    search = search_of(network)
    objective = HessianObjective(network, samples(network), search.space)
    mine, other = (o.prepare().sensitivity for o in (search.objective, objective))
    assert mine.activations[PRODUCTS[0]] == other.activations[PRODUCTS[0]]


def test_gauss_newton_and_rounded_outputs_know_products() -> None:
    network = transformer()
    search = search_of(network, scorer="gauss_newton", budget="0.5 bops")
    assert search.result(search.optimize()).met
    search = search_of(network, output_bits=8, budget="0.5 bops")
    assert search.result(search.optimize()).met


def test_a_layer_of_a_table_of_an_older_space_keeps_its_meaning() -> None:
    layer = layers_of_transformer()[1]
    again = dataclasses.replace(layer)
    assert type(again).from_json(layer.to_json()).is_product
