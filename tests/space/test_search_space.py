"""The search space: what may be lowered, what is fixed, and what is refused."""

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_optuna.errors import SpaceError
from hq_optuna.search.additive import Additive
from hq_optuna.space.assignment import BitConfig
from hq_optuna.space.cost import CostModel
from hq_optuna.space.layers import FLOAT_BITS, LayerSpec
from hq_optuna.space.search_space import SearchSpace


def specs(*names: str) -> list[LayerSpec]:
    return [LayerSpec(name, "Linear", (3, 5), 0, macs=15, n_calls=1, n_inputs=5) for name in names]


PARTS = ("weights", "activations")
FOUR = specs("stem", "block.1", "block.2", "head")
CHOICES = st.sets(st.integers(1, 16), min_size=2, max_size=5)
ACTIVATIONS: st.SearchStrategy[Any] = st.sampled_from(["same", None, 8, 32]) | CHOICES.map(tuple)


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Any mixture of pins, globs, ties and ways to treat activations, over two to six layers."""
    names = [f"l{index}" for index in range(draw(st.integers(2, 6)))]
    return SearchSpace.build(
        specs(*names),
        bits=draw(CHOICES),
        activation_bits=draw(ACTIVATIONS),
        pin_first_last=None,
        pins={names[0]: draw(st.integers(1, 16))} if draw(st.booleans()) else None,
        allowed={"l1": draw(CHOICES)} if draw(st.booleans()) else None,
        tied=[(names[-1], names[-2])] if len(names) > 3 and draw(st.booleans()) else (),
    )


@st.composite
def spaces_with_states(draw: st.DrawFn) -> tuple[SearchSpace, tuple[int, ...]]:
    space = draw(spaces())
    return space, tuple(draw(st.sampled_from(variable.bits)) for variable in space.variables)


def test_the_first_and_last_layer_are_pinned_to_8_bits_unless_told_otherwise() -> None:
    space = SearchSpace.build(FOUR)
    assert [variable.name for variable in space.variables] == ["block.1", "block.2"]
    low = space.config(space.bottom)
    assert low == {"stem": (8, 8), "block.1": (2, 2), "block.2": (2, 2), "head": (8, 8)}


def test_without_pins_every_layer_is_searched() -> None:
    space = SearchSpace.build(FOUR, pin_first_last=None)
    assert [variable.name for variable in space.variables] == ["stem", "block.1", "block.2", "head"]
    assert space.top == (8, 8, 8, 8)
    assert space.bottom == (2, 2, 2, 2)


def test_notches_go_from_wide_to_narrow_without_repeats() -> None:
    space = SearchSpace.build(FOUR, bits=[4, 2, 8, 4])
    assert space.variables[0].bits == (8, 4, 2)


def test_a_network_of_one_layer_is_pinned_once_and_leaves_nothing_to_search() -> None:
    with pytest.raises(SpaceError, match=r"Nothing is left to search.*pin_first_last=None"):
        SearchSpace.build(specs("only"))


@pytest.mark.parametrize(
    ("activation_bits", "start", "bottom"),
    [
        ("same", (8, 8), (2, 2)),
        (8, (8, 8), (2, 8)),
        (FLOAT_BITS, (8, 32), (2, 32)),
        (None, (8, 32), (2, 32)),
        ([8, 6], (8, 8), (2, 6)),
    ],
)
def test_activations_follow_stay_or_are_searched_apart(
    activation_bits: Any, start: tuple[int, int], bottom: tuple[int, int]
) -> None:
    space = SearchSpace.build(specs("a", "b"), activation_bits=activation_bits, pin_first_last=None)
    assert space.start == {"a": start, "b": start}
    assert space.config(space.bottom) == {"a": bottom, "b": bottom}


def test_activations_searched_apart_have_variables_of_their_own() -> None:
    space = SearchSpace.build(specs("a"), activation_bits=(8, 4), pin_first_last=None)
    assert [(v.name, v.part, v.bits[-1]) for v in space.variables] == [
        ("a:weights", "weights", 2),
        ("a:activations", "activations", 4),
    ]
    assert space.config((5, 4)) == {"a": (5, 4)}


def test_a_pin_overrules_the_pin_of_first_and_last_and_what_is_allowed() -> None:
    space = SearchSpace.build(
        FOUR, pins={"head": (6, 8), "block.1": 4}, allowed={"block.*": (8, 7, 3)}
    )
    assert space.start["head"] == (6, 8)
    assert space.start["block.1"] == (4, 4)
    assert [(v.name, v.bits) for v in space.variables] == [("block.2", (8, 7, 3))]


def test_the_last_matching_glob_counts() -> None:
    space = SearchSpace.build(FOUR, allowed={"block.*": (8, 4), "*.2": (6, 3)})
    assert [v.bits for v in space.variables] == [(8, 4), (6, 3)]


def test_one_number_pins_the_weights_alone_where_activations_stay_in_float() -> None:
    space = SearchSpace.build(FOUR, activation_bits=None, pins={"block.1": 4})
    assert space.start["stem"] == (8, FLOAT_BITS)
    assert space.start["block.1"] == (4, FLOAT_BITS)


def test_a_layer_may_be_pinned_to_float() -> None:
    assert SearchSpace.build(FOUR, pins={"block.1": 32}).start["block.1"] == (32, 32)


def test_a_layer_with_one_allowed_number_of_bits_is_fixed() -> None:
    space = SearchSpace.build(FOUR, allowed={"block.1": [5]})
    assert [v.name for v in space.variables] == ["block.2"]
    assert space.start["block.1"] == (5, 5)


def test_tied_layers_move_together_in_network_order() -> None:
    space = SearchSpace.build(FOUR, pin_first_last=None, tied=[("head", "stem")])
    assert [v.name for v in space.variables] == ["stem=head", "block.1", "block.2"]
    assert space.config((3, 8, 8)) == {
        "stem": (3, 3),
        "block.1": (8, 8),
        "block.2": (8, 8),
        "head": (3, 3),
    }


@given(spaces_with_states())
def test_every_variable_sets_its_part_of_its_layers_and_nothing_else(
    pair: tuple[SearchSpace, tuple[int, ...]],
) -> None:
    space, state = pair
    config = space.config(state)
    assert list(config) == [layer.name for layer in space.layers]
    untouched = {(name, part) for name in config for part in (0, 1)}
    for variable, bits in zip(space.variables, state, strict=True):
        for name in variable.layers:
            for part in {"both": (0, 1), "weights": (0,), "activations": (1,)}[variable.part]:
                assert config[name][part] == bits
                untouched.discard((name, part))
    assert all(config[name][part] == space.start[name][part] for name, part in untouched)


@given(spaces())
def test_the_top_state_is_the_start(space: SearchSpace) -> None:
    assert space.config(space.top) == space.start


@given(spaces())
def test_different_states_are_different_assignments(space: SearchSpace) -> None:
    lowered = [
        space.top[:k] + (variable.bits[1],) + space.top[k + 1 :]
        for k, variable in enumerate(space.variables)
    ]
    configs = {space.config(state) for state in [space.top, *lowered]}
    assert len(configs) == 1 + len(space.variables)


@given(spaces_with_states())
def test_the_parameters_of_a_trial_tell_the_whole_assignment(
    pair: tuple[SearchSpace, tuple[int, ...]],
) -> None:
    space, state = pair
    rebuilt = {layer.name: [FLOAT_BITS, FLOAT_BITS] for layer in space.layers}
    alone = {v.name: v.part for v in space.variables}
    for name, (bits, choices) in space.parameters(state).items():
        assert bits in choices
        layers, _, part = name.partition(":")
        part = part or alone.get(name, "both")
        for layer in layers.split("="):
            if part != "activations":
                rebuilt[layer][0] = bits
            if part != "weights":
                rebuilt[layer][1] = bits
    assert BitConfig({name: (w, a) for name, (w, a) in rebuilt.items()}) == space.config(state)


def test_parameters_show_fixed_parts_once_and_leave_out_float_activations() -> None:
    weights = SearchSpace.build(FOUR, activation_bits=None, pins={"head": (8, 6)})
    assert weights.parameters((4, 2)) == {
        "block.1": (4, (8, 7, 6, 5, 4, 3, 2)),
        "block.2": (2, (8, 7, 6, 5, 4, 3, 2)),
        "stem:weights": (8, (8,)),
        "stem:activations": (32, (32,)),
        "head:weights": (8, (8,)),
        "head:activations": (6, (6,)),
    }
    fixed = SearchSpace.build(FOUR[:3], activation_bits=6, bits=(8, 4))
    assert fixed.parameters((4,)) == {
        "block.1": (4, (8, 4)),
        "block.1:activations": (6, (6,)),
        "stem": (8, (8,)),
        "block.2": (8, (8,)),
    }


@given(spaces())
def test_a_space_survives_json_and_keeps_its_digest(space: SearchSpace) -> None:
    again = SearchSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    assert again.digest == space.digest
    assert again.config(again.bottom) == space.config(space.bottom)


def test_the_digest_tells_spaces_apart() -> None:
    digests = {
        SearchSpace.build(FOUR).digest,
        SearchSpace.build(FOUR, bits=range(3, 9)).digest,
        SearchSpace.build(FOUR, pins={"stem": 7}).digest,
        SearchSpace.build(FOUR, pin_first_last=None).digest,
        SearchSpace.build(FOUR, activation_bits=8).digest,
        SearchSpace.build(FOUR, tied=[("block.1", "block.2")]).digest,
        SearchSpace.build([*FOUR[:3], *specs("tail")]).digest,
    }
    assert len(digests) == 7


def test_a_state_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="bits of 2 variables"):
        SearchSpace.build(FOUR).config((8,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": []}, "bits is empty.*at least one"),
        ({"bits": [0, 4]}, "bits holds 0; bits are whole numbers from 1 to 16"),
        ({"bits": [4, 17]}, "bits holds 17; bits are whole numbers from 1 to 16"),
        ({"bits": [2.5, 4]}, "holds 2.5"),
        ({"bits": [True, 4]}, "holds True"),
        ({"bits": ["8", 4]}, "holds '8'"),
        ({"activation_bits": "float"}, "'same', a number, a sequence or None; got 'float'"),
        ({"activation_bits": 0}, "activation_bits holds 0"),
        ({"activation_bits": [8, 99]}, "activation_bits holds 99"),
        ({"pin_first_last": 20}, "pin_first_last holds 20"),
        ({"pins": {"block.1": (4, 0)}}, r"pins\['block.1'\] holds 0"),
        ({"pins": {"block.1": (4, 4, 4)}}, "one number or .weight bits, activation bits."),
        ({"pins": {"blck.*": 4}}, r"pins: 'blck\.\*' matches no layer.*stem, block\.1, block\.2"),
        ({"allowed": {"conv*": (4,)}}, r"allowed: 'conv\*' matches no layer"),
        ({"allowed": {"head": ()}}, r"allowed\['head'\] is empty"),
        ({"tied": [("nope", "block.1")]}, "tied: 'nope' is no layer.*stem, block.1"),
        ({"tied": [("stem", "block.1")]}, "'stem' is pinned to W8A8; untie or unpin"),
        ({"tied": [("block.1", "block.2"), ("block.2",)]}, "'block.2' stands in two groups"),
        (
            {"tied": [("block.1", "block.2")], "allowed": {"block.2": (8, 4)}},
            "Tied layers must allow the same bits: 'block.1'.*'block.2' allows",
        ),
        ({"bits": [8]}, "Nothing is left to search: each of the 4 layers"),
        (
            {"pins": ["0"]},
            r"pins is a mapping from layer names .*; got \['0'\]\. Write for example",
        ),
        ({"allowed": "8"}, r"allowed is a mapping from layer names .*; got '8'"),
        ({"pins": {"*": 4}}, "Nothing is left to search"),
    ],
)
def test_an_impossible_space_is_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace.build(FOUR, **arguments)


@pytest.mark.parametrize("name", ["nope", "block.*"])
def test_an_unknown_name_later_in_a_tied_group_is_refused_in_words(name: str) -> None:
    with pytest.raises(SpaceError, match="tied"):
        SearchSpace.build(FOUR, tied=[("block.1", name)])


@pytest.mark.parametrize("value", [None, "four", float("nan"), float("inf")])
def test_bits_that_are_no_number_are_refused_in_words(value: Any) -> None:
    with pytest.raises(SpaceError, match=r"bits holds .*whole numbers"):
        SearchSpace.build(FOUR, bits=[value])


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(SpaceError, match="no layers to search"):
        SearchSpace.build([])


def test_a_long_list_of_layers_is_cut_short_in_the_message() -> None:
    with pytest.raises(SpaceError, match=r"l7, …\.$"):
        SearchSpace.build(specs(*[f"l{k}" for k in range(20)]), pins={"x": 4})


INT = np.int64


@pytest.mark.parametrize(
    ("numpy", "plain"),
    [
        ({"bits": np.arange(2, 9)}, {"bits": range(2, 9)}),
        ({"activation_bits": INT(8)}, {"activation_bits": 8}),
        ({"activation_bits": INT(32)}, {"activation_bits": 32}),
        ({"activation_bits": np.array([8, 4])}, {"activation_bits": (8, 4)}),
        ({"pin_first_last": INT(8)}, {"pin_first_last": 8}),
        (
            {"pin_first_last": INT(6), "activation_bits": None},
            {"pin_first_last": 6, "activation_bits": None},
        ),
        ({"pins": {"head": INT(4)}}, {"pins": {"head": 4}}),
        ({"pins": {"head": (INT(4), INT(32))}}, {"pins": {"head": (4, 32)}}),
        ({"allowed": {"block.*": np.array([8, 4])}}, {"allowed": {"block.*": (8, 4)}}),
    ],
)
def test_numpys_integers_are_bits_too_and_kept_as_plain_ones(
    numpy: dict[str, Any], plain: dict[str, Any]
) -> None:
    space = SearchSpace.build(FOUR, **numpy)
    expected = SearchSpace.build(FOUR, **plain)
    assert space == expected
    assert json.dumps(space.to_json()) == json.dumps(expected.to_json())
    assert space.digest == expected.digest


@pytest.mark.parametrize("name", ["bits", "activation_bits", "pin_first_last"])
@pytest.mark.parametrize("value", [True, np.bool_(True), 4.0, np.float64(4)])
def test_what_is_no_integer_is_no_number_of_bits(name: str, value: Any) -> None:
    with pytest.raises(SpaceError, match=name):
        SearchSpace.build(FOUR, **{name: (value,) if name == "bits" else value})


def test_an_assignment_of_numpys_integers_is_that_of_plain_ones() -> None:
    config = BitConfig({"a": (INT(4), INT(8))}).replace("a", activation_bits=np.uint8(6))
    assert json.dumps(config.to_json()) == '{"a": [4, 6]}'
    assert config.digest == BitConfig({"a": (4, 6)}).digest
    with pytest.raises(TypeError, match="float"):
        BitConfig({"a": (4.0, 8)})  # type: ignore[dict-item]


def readers(*names: str) -> list[LayerSpec]:
    """Return layers of which the second to the fourth read one tensor."""
    made = specs(*names)
    return [replace(x, input_of=names[1] if x.name in names[2:4] else "") for x in made]


QKV = readers("stem", "q", "k", "v", "out", "head")


def names(**more: Any) -> list[str]:
    return [variable.name for variable in SearchSpace.build(QKV, bits=(8, 4), **more).variables]


def test_layers_that_read_the_same_tensor_share_the_bits_of_their_input() -> None:
    assert names() == ["q=k=v", "out"]
    assert names(activation_bits=8) == ["q", "k", "v", "out"]
    assert names(activation_bits=(8, 6)) == [
        *("q:weights", "q=k=v:activations", "k:weights", "v:weights"),
        *("out:weights", "out:activations"),
    ]
    space = SearchSpace.build(QKV, bits=(8, 4), activation_bits=(8, 6))
    config = space.config([8, 6, 4, 8, 8, 8])
    assert [config[name] for name in ("q", "k", "v")] == [(8, 6), (4, 6), (8, 6)]
    assert SearchSpace.from_json(space.to_json()) == space


def test_layers_that_are_pinned_tied_or_allowed_other_bits_keep_an_input_of_their_own() -> None:
    assert names(tie_inputs=False) == ["q", "k", "v", "out"]
    assert names(pins={"q": 8}) == ["k=v", "out"]
    assert names(allowed={"k": (8, 4, 2)}) == ["q=v", "k", "out"]
    assert names(tied=[("k", "out")]) == ["q=v", "k=out"]


def test_the_exact_optimum_keeps_shared_inputs_together() -> None:
    space = SearchSpace.build(QKV, bits=(8, 4), activation_bits=(8, 4), pin_first_last=8)
    rng = np.random.default_rng(0)
    table = {
        layer.name: {part: dict(zip((8, 4), sorted(rng.random(2)), strict=True)) for part in PARTS}
        for layer in QKV
    }
    sums = Additive(space, table, CostModel(QKV))
    states = [*itertools.product(*(v.bits for v in space.variables))]
    for limit in sorted({sums.cost(space.config(state)) for state in states}):
        fitting = [c for s in states if sums.cost(c := space.config(s)) <= limit]
        found = sums.exact(limit)
        assert found is not None
        assert found.score == pytest.approx(min(map(sums.score, fitting)))
        assert len({found.config[name].activation_bits for name in ("q", "k", "v")}) == 1
