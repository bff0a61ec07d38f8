"""What the search knows of a layer."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_optuna.space.layers import FLOAT_BITS, MAX_BITS, MIN_BITS, LayerSpec, SkippedModule

SIZES = st.integers(1, 64)
SPECS = st.builds(
    LayerSpec,
    name=st.text(min_size=1),
    kind=st.sampled_from(["Conv2d", "Linear", "ConvTranspose1d"]),
    weight_shape=st.lists(SIZES, min_size=1, max_size=5).map(tuple),
    channel_axis=st.sampled_from([0, 1]),
    macs=st.integers(0, 10**15),
    n_calls=SIZES,
    n_inputs=SIZES,
    aliases=st.lists(st.text(min_size=1), max_size=3).map(tuple),
)


def test_weights_are_counted_without_the_bias() -> None:
    # A 3×3 convolution from 16 to 32 channels has 3·3·16·32 = 4608 weights.
    conv = LayerSpec("c", "Conv2d", (32, 16, 3, 3), 0, macs=1, n_calls=1, n_inputs=1)
    assert conv.n_weights == 4608


@given(SPECS)
def test_a_layer_survives_json(layer: LayerSpec) -> None:
    assert LayerSpec.from_json(json.loads(json.dumps(layer.to_json()))) == layer


@given(SPECS)
def test_a_layer_back_from_json_can_be_a_key_again(layer: LayerSpec) -> None:
    # Lists in place of tuples would compare unequal and could not be hashed.
    again = LayerSpec.from_json(json.loads(json.dumps(layer.to_json())))
    assert {layer: 1}[again] == 1


def test_unknown_fields_in_json_are_refused() -> None:
    layer = LayerSpec("c", "Linear", (2, 2), 0, macs=1, n_calls=1, n_inputs=1)
    with pytest.raises(TypeError, match="flops"):
        LayerSpec.from_json({**layer.to_json(), "flops": 3})


def test_a_layer_cannot_be_changed() -> None:
    layer = LayerSpec("c", "Linear", (2, 2), 0, macs=1, n_calls=1, n_inputs=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.macs = 5  # type: ignore[misc]


def test_a_skipped_module_says_why() -> None:
    skipped = SkippedModule("emb", "Embedding", "lookup, not a product")
    assert skipped.reason == "lookup, not a product"


def test_float_stands_above_every_grid_a_user_may_ask_for() -> None:
    assert MIN_BITS == 1 < MAX_BITS < FLOAT_BITS == 32
