"""Peak activation memory against sums by hand and against rows evaluated one by one."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_optuna.errors import SpaceError
from hq_optuna.space import BitConfig, Budget, CostModel, LayerBits, LayerSpec, SearchSpace
from hq_optuna.space.budget import parse_budget
from hq_optuna.space.memory import LiveTensor, MemoryMap, layer_bytes

RESIDUAL = MemoryMap(
    ("conv1", "conv2", "fc"),
    (
        LiveTensor("input", 80, 0, 0, ("conv1",)),
        LiveTensor("conv1", 400, 0, 1, ("conv2",)),  # kept for the addition
        LiveTensor("conv2", 400, 1, 2, ("fc", "head")),
        LiveTensor("fc", 10, 2, 2),
    ),
)
CONFIG = BitConfig({"conv1": (8, 8), "conv2": (4, 4), "fc": (8, 8), "head": (2, 2)})


def test_the_peak_is_that_of_the_moment_with_the_most_bytes() -> None:
    assert RESIDUAL.profile(CONFIG).tolist() == [80 + 200, 200 + 400, 400 + 40]
    assert RESIDUAL.peak(CONFIG) == 600
    moment, held = RESIDUAL.at_peak(CONFIG)
    assert moment == "conv2"
    assert [(tensor.name, size) for tensor, size in held] == [("conv2", 400.0), ("conv1", 200.0)]


def test_a_tensor_is_as_wide_as_its_widest_reader_and_float_where_nobody_quantizes_it() -> None:
    assert RESIDUAL.tensors[2].width(CONFIG) == 8
    assert RESIDUAL.tensors[3].width(CONFIG) == 32


def test_bytes_at_the_peak_belong_to_the_layer_that_sets_the_width() -> None:
    names = list(CONFIG)
    assert layer_bytes(RESIDUAL, CONFIG, names).tolist() == [0, 200, 400, 0]


def test_a_map_comes_back_from_json() -> None:
    assert MemoryMap.from_json(json.loads(json.dumps(RESIDUAL.to_json()))) == RESIDUAL


@st.composite
def maps(draw: st.DrawFn) -> MemoryMap:
    n, names = draw(st.integers(1, 5)), ("a", "b", "c")
    found = []
    for _ in range(draw(st.integers(1, 6))):
        first = draw(st.integers(0, n - 1))
        readers = tuple(sorted(draw(st.sets(st.sampled_from(names), max_size=3))))
        last, size = draw(st.integers(first, n - 1)), draw(st.integers(1, 99))
        found.append(LiveTensor("t", size, first, last, readers))
    return MemoryMap(tuple("m" * n), tuple(found))


@given(maps(), st.lists(st.sampled_from([1, 2, 3, 4, 8, 32]), min_size=3, max_size=3))
def test_the_peak_is_the_largest_of_its_linear_rows_and_of_a_count_by_hand(
    memory: MemoryMap, bits: list[int]
) -> None:
    config = {name: LayerBits(8, b) for name, b in zip("abc", bits, strict=True)}
    by_hand = max(
        sum(
            t.n_elements * max([config[r].activation_bits for r in t.readers] or [32])
            for t in memory.tensors
            if t.first <= moment <= t.last
        )
        for moment in range(len(memory.moments))
    )
    rows = [row.fixed + sum(row.layer_cost(n, b) for n, b in config.items()) for row in memory.rows]
    assert memory.peak(config) == by_hand / 8 == max(rows)


def test_too_many_rows_are_refused() -> None:
    readers = tuple("abcd")
    crowd = MemoryMap(("m",), tuple(LiveTensor("t", 2**k, 0, 0, readers) for k in range(12)))
    with pytest.raises(ValueError, match="more than 20,000 linear rows"):
        assert crowd.rows


def test_rounded_outputs_are_as_wide_as_that_and_no_narrower() -> None:
    alone = (LiveTensor("input", 80, 0, 0, ("a",), alone=True),)
    tensors = (
        *alone,
        LiveTensor("a", 100, 0, 1, ("b",)),  # and an addition
        LiveTensor("sum", 100, 1, 1),
        LiveTensor("index", 10, 1, 1, bits=64),
    )
    memory = MemoryMap(("a", "b"), tensors).rounded(8)
    config = {"a": LayerBits(4, 4), "b": LayerBits(4, 4)}
    assert memory.profile(config).tolist() == [40 + 100, 100 + 100 + 80]
    wide = {"a": LayerBits(4, 4), "b": LayerBits(4, 16)}
    assert memory.profile(wide).tolist() == [40 + 200, 200 + 100 + 80]
    for bits in (config, wide):
        sums = [r.fixed + sum(r.layer_cost(n, b) for n, b in bits.items()) for r in memory.rows]
        assert max(sums) == memory.peak(bits)
    assert memory.rounded(None) == memory
    assert MemoryMap.from_json(json.loads(json.dumps(memory.to_json()))) == memory


def spec(name: str) -> LayerSpec:
    return LayerSpec(name, "Linear", (10, 10), 0, macs=100, n_calls=1, n_inputs=10)


def test_the_cost_model_counts_the_peak_and_says_what_is_missing() -> None:
    layers = [spec(name) for name in CONFIG]
    model = CostModel(layers, "activation_bytes", memory=RESIDUAL)
    assert model.cost(CONFIG) == 600
    assert (model.int8, model.float32) == (800, 3200)
    assert model.per_layer(CONFIG).sum() == 600
    assert (
        max(row.fixed + sum(row.layer_cost(n, b) for n, b in CONFIG.items()) for row in model.rows)
        == 600
    )
    with pytest.raises(SpaceError, match=r"memory=introspect\(network, inputs\).memory"):
        CostModel(layers, "activation_bytes")


def test_budgets_of_activations_are_read_and_met() -> None:
    space = SearchSpace.build([spec(name) for name in CONFIG], memory=RESIDUAL)
    assert SearchSpace.from_json(json.loads(json.dumps(space.to_json()))) == space
    assert parse_budget("128 KiB activations") == Budget.absolute(activation_bytes=128 * 1024)
    assert parse_budget("0.5 activations").limit(space) == 400
    assert parse_budget("50% activation_bytes").limit(space) == 400
    assert str(parse_budget("0.5 activations")) == "50 % of the all-8-bit peak activation memory"
    assert parse_budget(parse_budget("2 KiB activations").text).value == 2048


def test_all_states_of_a_space_cost_what_its_pairs_allow() -> None:
    space = SearchSpace.build([spec(name) for name in CONFIG], bits=(8, 4), memory=RESIDUAL)
    pairs = space.pairs
    states = itertools.product(*(variable.bits for variable in space.variables))
    for config in map(space.config, states):
        assert all(config[name] in pairs[name] for name in config)
    assert pairs["conv2"] == {(8, 8), (4, 4)}
    assert pairs["conv1"] == {(8, 8)}
