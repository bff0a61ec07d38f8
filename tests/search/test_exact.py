"""Exact allocation against enumeration, and against HAWQ-V3's published configurations."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from hq_optuna.search.exact import Allocation
from hq_optuna.space.assignment import LayerBits
from hq_optuna.space.cost import CostModel
from hq_optuna.space.layers import LayerSpec
from hq_optuna.space.search_space import SearchSpace
from tests.real_data import shared_data


def layer(name: str, weights: int, macs: int) -> LayerSpec:
    return LayerSpec(name, "Linear", (weights, 1), 0, macs, 1, 1)


def enumerated(space, rises, cost_of, limit):  # type: ignore[no-untyped-def]
    """Return the least score within the limit, by trying everything."""
    best = None
    for state in itertools.product(*(v.bits for v in space.variables)):
        if cost_of(state) <= limit:
            score = sum(row[b] for row, b in zip(rises, state, strict=True))
            best = score if best is None else min(best, score)
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("activation_bits", ["same", (8, 4, 2), 8])
def test_the_optimum_is_that_of_enumeration(seed: int, activation_bits: object) -> None:
    rng = np.random.default_rng(seed)
    layers = [layer(n, int(rng.integers(5, 500)), int(rng.integers(5, 500))) for n in "abc"]
    space = SearchSpace.build(
        layers,
        bits=(8, 6, 4, 2),
        activation_bits=activation_bits,  # type: ignore[arg-type]
        pin_first_last=None,
        pins={"c": (8, 8)},
    )
    rises = [{b: float(rng.exponential() * 4.0**-b) for b in v.bits} for v in space.variables]
    model = CostModel(layers)
    macs = {spec.name: spec.macs for spec in layers}

    def layer_cost(name: str, bits: LayerBits) -> float:
        return float(macs[name] * bits.weight_bits * bits.activation_bits)

    for share in (0.4, 0.6, 0.9):
        limit = share * model.int8
        state = Allocation(space, rises, layer_cost).best(limit)
        best = enumerated(space, rises, lambda s: model.cost(space.config(s)), limit)
        if state is None:
            assert best is None
            continue
        assert model.cost(space.config(state)) <= limit
        found = sum(row[b] for row, b in zip(rises, state, strict=True))
        assert found == pytest.approx(best, rel=1e-9)


def test_an_impossible_limit_gives_none() -> None:
    space = SearchSpace.build([layer("a", 10, 10)], bits=(8, 4), pin_first_last=None)
    rises = [{8: 0.0, 4: 1.0}]
    assert Allocation(space, rises, lambda _, bits: bits.weight_bits * 10.0).best(39.0) is None
    assert Allocation(space, rises, lambda _, bits: bits.weight_bits * 10.0).best(40.0) == (4,)


def test_too_many_combinations_are_refused_in_words() -> None:
    layers = [layer(f"l{i}", 1, 1) for i in range(2)]
    space = SearchSpace.build(layers, bits=range(1, 17), pin_first_last=None)
    object.__setattr__(
        space,
        "variables",
        tuple(type(v)(v.name, ("l0",), v.part, v.bits) for v in (*space.variables,) * 4),
    )
    with pytest.raises(ValueError, match="too many to enumerate"):
        Allocation(space, [{}] * 8, lambda *_: 1.0)


def hawq() -> dict[str, object]:
    """Return HAWQ-V3's inputs and answers for ResNet-18."""
    return json.loads(shared_data("hawq_v3_resnet18.json").read_text())  # type: ignore[no-any-return]


PUBLISHED = [f"{m}_{f}" for m in ("size", "bops", "latency") for f in ("0.75", "0.5", "0.25")]


@pytest.mark.parametrize("key", PUBLISHED)
def test_the_published_configurations_of_hawq_v3_come_out(key: str) -> None:
    data: dict = hawq()  # type: ignore[type-arg]
    names: list[str] = data["layers"]
    layers = [
        layer(n, w, m) for n, w, m in zip(names, data["n_weights"], data["macs"], strict=True)
    ]
    tied = [[names[i] for i in group] for group in data["tied"]]
    space = SearchSpace.build(layers, bits=(8, 4), tied=tied, pin_first_last=None)
    place = {name: i for i, name in enumerate(names)}
    error = {8: data["squared_error_8bit"], 4: data["squared_error_4bit"]}
    rises = [
        {
            b: sum(data["mean_hessian_trace"][place[n]] * error[b][place[n]] for n in v.layers)
            for b in v.bits
        }
        for v in space.variables
    ]
    metric, fraction = key.split("_")
    if metric == "latency":  # in milliseconds, measured by its authors on a T4

        def layer_cost(name: str, bits: LayerBits) -> float:
            return float(data[f"latency_int{bits.weight_bits}_ms"][place[name]])
    else:
        model = {
            spec.name: CostModel([spec], "bops" if metric == "bops" else "size_bytes")
            for spec in layers
        }

        def layer_cost(name: str, bits: LayerBits) -> float:
            return model[name].cost({name: bits})

    low = sum(layer_cost(n, LayerBits(4, 4)) for n in names)
    high = sum(layer_cost(n, LayerBits(8, 8)) for n in names)
    state = Allocation(space, rises, layer_cost).best(low + float(fraction) * (high - low))
    assert state is not None
    found = [space.config(state)[n].weight_bits for n in names]
    assert found == data["published"][key]
