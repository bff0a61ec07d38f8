"""Assignments: equality, names that are the same everywhere, JSON."""

import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hq_optuna.space.assignment import BitConfig, LayerBits

PAIRS = st.tuples(st.integers(1, 32), st.integers(1, 32))
CONFIGS = st.dictionaries(st.text(min_size=1), PAIRS, max_size=6)


def test_bits_read_as_people_write_them() -> None:
    assert str(LayerBits(4, 8)) == "W4A8"
    assert str(LayerBits(2, 32)) == "W2Afloat"
    assert f"{LayerBits(32, 32)}" == "WfloatAfloat"


def test_layers_keep_the_order_of_the_network() -> None:
    assert list(BitConfig({"z": (8, 8), "a": (4, 4), "m": (2, 2)})) == ["z", "a", "m"]


@given(CONFIGS, st.randoms(use_true_random=False))
def test_the_order_of_the_layers_changes_neither_equality_nor_digest(bits, random) -> None:  # type: ignore[no-untyped-def]
    names = list(bits)
    random.shuffle(names)
    one, two = BitConfig(bits), BitConfig({name: bits[name] for name in names})
    assert one == two
    assert hash(one) == hash(two)
    assert one.digest == two.digest


@given(CONFIGS, CONFIGS)
def test_digests_are_equal_exactly_when_the_bits_are(
    one: dict[str, tuple[int, int]], two: dict[str, tuple[int, int]]
) -> None:
    assert (BitConfig(one).digest == BitConfig(two).digest) == (one == two)


def test_weights_and_activations_are_told_apart_in_the_digest() -> None:
    assert BitConfig({"a": (4, 8)}).digest != BitConfig({"a": (8, 4)}).digest


def test_the_digest_is_the_sha256_of_the_sorted_bits() -> None:
    # Digests stand in databases: this text must never change.
    text = '[["conv",8,8],["fc",4,8]]'
    expected = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert BitConfig({"fc": (4, 8), "conv": (8, 8)}).digest == expected


def test_another_process_finds_the_same_digest() -> None:
    code = "from hq_optuna import BitConfig; print(BitConfig({'ü': (4, 8), 'b': (2, 2)}).digest)"
    run = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == BitConfig({"ü": (4, 8), "b": (2, 2)}).digest


@given(CONFIGS)
def test_an_assignment_survives_json(bits: dict[str, tuple[int, int]]) -> None:
    config = BitConfig(bits)
    again = BitConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert list(again) == list(config)


def test_replace_changes_one_part_of_one_layer_and_leaves_the_original() -> None:
    config = BitConfig({"conv": (8, 8), "fc": (6, 5)})
    assert config.replace("fc", weight_bits=3) == {"conv": (8, 8), "fc": (3, 5)}
    assert config.replace("fc", activation_bits=3) == {"conv": (8, 8), "fc": (6, 3)}
    assert config.replace("fc", weight_bits=2, activation_bits=4)["fc"] == (2, 4)
    assert config == {"conv": (8, 8), "fc": (6, 5)}


def test_replace_refuses_an_unknown_layer() -> None:
    with pytest.raises(KeyError, match="head"):
        BitConfig({"fc": (8, 8)}).replace("head", weight_bits=4)


def test_an_assignment_cannot_be_changed() -> None:
    config = BitConfig({"fc": (8, 8)})
    with pytest.raises(TypeError, match="item assignment"):
        config["fc"] = LayerBits(4, 4)  # type: ignore[index]
    with pytest.raises(AttributeError):
        config.note = "mine"  # type: ignore[attr-defined]


def test_an_assignment_is_a_copy_of_what_it_was_made_from() -> None:
    bits = {"fc": (8, 8)}
    config = BitConfig(bits)
    bits["fc"] = (2, 2)
    assert config["fc"] == (8, 8)


def test_uniform_gives_every_layer_the_same_bits() -> None:
    expected = {"a": (4, 8), "b": (4, 8)}
    assert BitConfig.uniform(["a", "b"], 4, 8) == expected
    assert BitConfig.uniform(iter(("a", "b")), 4, 8) == expected


@given(CONFIGS)
def test_the_printed_form_is_python_that_rebuilds_the_assignment(
    bits: dict[str, tuple[int, int]],
) -> None:
    config = BitConfig(bits)
    assert eval(repr(config), {"BitConfig": BitConfig}) == config
